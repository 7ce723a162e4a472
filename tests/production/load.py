"""So many calls a second, each with a number of its own, by clients that never retry: what became of each of them?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import gevent

import gmprpc
from tests.counting import Ledger

#: Where the service is that the calls are for: ``counted:service``, with the file of the ledger as LEDGER.
PROGRAMS = Path(__file__).parent / "programs"

#: How many greenlets call: each waits for its answer before it calls again.
_CALLERS = 20

_METHODS = ("do", "pause", "later")


@dataclass(frozen=True)
class Made:
    """A call that has ended."""

    number: int
    client: gmprpc.Client
    began_at: float
    ended_at: float
    #: What it has failed with.
    error: Exception | None


class Load:
    """Calls ``rate`` times a second, and remembers how each has ended."""

    def __init__(self, directory: Path, rate: float = 200.0, size: int = 100_000) -> None:
        #: How often each call has been carried out.
        self.ledger = Ledger(directory / "ledger", size)
        #: What the servers need in their environment.
        self.env = {"LEDGER": str(self.ledger.path)}
        #: The calls that have ended.
        self.made: list[Made] = []
        self._rate = rate
        self._numbers = count()
        self._began_at = 0.0
        self._is_over = False

    @contextmanager
    def by(self, clients: Sequence[Any]) -> Iterator[None]:
        """Call through ``clients`` until the end of the ``with``."""
        self._began_at, self._is_over = perf_counter(), False
        callers = [
            gevent.spawn(self._call_on_and_on, place, clients[place % len(clients)]) for place in range(_CALLERS)
        ]
        try:
            yield
            self._is_over = True
            gevent.joinall(callers, raise_error=True)
        finally:
            gevent.killall(callers)

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def number(self) -> int:
        """A number for a call of the test's own."""
        return next(self._numbers)

    def wait(self, seconds: float) -> None:
        """Wait until it has lasted so long."""
        gevent.sleep(max(0.0, self._began_at + seconds - perf_counter()))

    @property
    def failed(self) -> list[Made]:
        """The calls that have failed."""
        return [call for call in self.made if call.error is not None]

    @property
    def succeeded(self) -> list[Made]:
        """The calls that were answered."""
        return [call for call in self.made if call.error is None]

    def executions(self, calls: Iterable[Made]) -> set[int]:
        """How often ``calls`` have been carried out: {1} if each was, once."""
        executions = self.ledger.snapshot()
        return {executions[call.number] for call in calls}

    def _call_on_and_on(self, place: int, client: gmprpc.Client) -> None:
        due = self._began_at + place / self._rate
        methods = cycle(_METHODS)
        while not self._is_over:
            # Who has had to wait makes up for it.
            gevent.sleep(max(0.0, due - perf_counter()))
            due += _CALLERS / self._rate
            self._call(client, next(methods), next(self._numbers))

    def _call(self, client: gmprpc.Client, method: str, number: int) -> None:
        began_at = perf_counter()
        error: Exception | None = None
        try:
            assert client.call(method, number) == number
        except gmprpc.RPCError as exc:
            error = exc
        self.made.append(Made(number, client, began_at, perf_counter(), error))
