"""What load there shall be, and each process's part of it; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gmprpc.streams import Stream


@dataclass(frozen=True)
class Plan:
    """The load that one or several processes make. Times are seconds."""

    #: A new connection to the server; blocks the greenlet.
    open_stream: Callable[[], Stream]
    method: str
    #: A request, from behind its msgid on.
    body: bytes
    connections: int = 1
    #: How many calls are in flight on each connection; with a rate, at most.
    depth: int = 1
    #: Calls a second, whether the server keeps up or not; None for the next call when one is answered.
    rate: float | None = None
    #: How long calls come before they count.
    warm_up: float = 0.0
    #: Until when: so many calls, or so long. One of the two is None.
    calls: int | None = None
    duration: float | None = None
    #: How long to wait at the end for answers.
    timeout: float = 10.0
    #: The place of this process among those that share the rate, and how many they are.
    place: int = 0
    processes: int = 1

    def parts(self, processes: int) -> Iterator[Plan]:
        """The parts of so many processes, no more than there are connections and calls."""
        for place in range(processes):
            yield replace(
                self,
                connections=_share(self.connections, place, processes),
                calls=None if self.calls is None else _share(self.calls, place, processes),
                place=place,
                processes=processes,
            )


def _share(whole: int, place: int, processes: int) -> int:
    return whole // processes + (place < whole % processes)
