"""Makes what has gone quiet give back the memory that it only holds to be quicker next time.

It knows nothing of connections: anything that can be asked to rest can be watched.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, ClassVar, Protocol


class Restable(Protocol):
    """What a sweeper looks after."""

    def rest(self) -> bool:
        """Give back what can be done without, if there was nothing to do since the last call; says whether so."""


class Sweeper:
    """Looks after what runs under one hub."""

    # Seconds; picked arbitrarily. What has gone quiet gives back after one to two of these.
    _INTERVAL = 1.0

    _of_hub: ClassVar[weakref.WeakKeyDictionary[Any, Sweeper]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: Any) -> None:
        # Without a reference: waiting for the next sweep keeps no program alive.
        self._loop = loop
        self._timer = loop.timer(self._INTERVAL, self._INTERVAL, ref=False)
        self._awake: dict[Restable, None] = {}

    @classmethod
    def of(cls, hub: Any) -> Sweeper:
        """The sweeper of ``hub``."""
        if (sweeper := cls._of_hub.get(hub)) is None:
            sweeper = cls._of_hub[hub] = cls(hub.loop)
        return sweeper

    def watch(self, busy: Restable) -> None:
        """Ask ``busy`` to rest, every now and then, until it does."""
        if not self._awake:
            self._timer.start(self._sweep)
        self._awake[busy] = None

    def _sweep(self) -> None:
        for busy in list(self._awake):
            if self._rests(busy):
                del self._awake[busy]
        if not self._awake:
            self._timer.stop()

    def _rests(self, busy: Restable) -> bool:
        try:
            return busy.rest()
        except Exception:  # The timer of a callback that raises is stopped; the others want to be asked again.
            self._loop.handle_error(busy, *sys.exc_info())
            return True
