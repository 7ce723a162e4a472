"""Makes what has gone quiet give back the memory that it only holds to be quicker next time.

It knows nothing of connections: anything that can be asked to rest can be watched.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from typing import Any, ClassVar, Protocol


class Restable(Protocol):
    """What a sweeper looks after."""

    def rest(self) -> bool:
        """Give back what can be done without, if there was nothing to do since the last call; says whether so."""


class Sweeper:
    """Looks after what runs under one hub."""

    # Seconds; picked arbitrarily. What has gone quiet gives back after one to two of these.
    _INTERVAL = 1.0
    # So many are asked before others get their turn: to let 8,000 connections rest takes 90 ms. Picked arbitrarily.
    _AT_ONCE = 50

    _of_hub: ClassVar[weakref.WeakKeyDictionary[Any, Sweeper]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: Any) -> None:
        # Without a reference: waiting for the next sweep keeps no program alive.
        self._loop = loop
        self._timer = loop.timer(self._INTERVAL, self._INTERVAL, ref=False)
        self._turn: Any = None  # The timer that ends a pause made for others.
        self._awake: dict[Restable, None] = {}
        self._to_ask: list[Restable] = []  # In this sweep.

    @classmethod
    def of(cls, hub: Any) -> Sweeper:
        """The sweeper of ``hub``."""
        if (sweeper := cls._of_hub.get(hub)) is None:
            sweeper = cls._of_hub[hub] = cls(hub.loop)
        return sweeper

    @classmethod
    def forget_hub(cls, hub: Any) -> None:
        """The thread of ``hub`` ends."""
        if (sweeper := cls._of_hub.pop(hub, None)) is not None:
            sweeper._awake.clear()
            with suppress(ValueError):  # The loop may be gone already.
                sweeper._timer.close()

    def watch(self, busy: Restable) -> None:
        """Ask ``busy`` to rest, every now and then, until it does."""
        if not self._awake:
            self._timer.start(self._sweep)
        self._awake[busy] = None

    def forget(self, busy: Restable) -> None:
        """Ask ``busy`` no more."""
        self._awake.pop(busy, None)

    def _sweep(self) -> None:
        if not self._to_ask:
            self._to_ask = list(self._awake)
            self._ask_some()

    def _ask_some(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None
        some = self._to_ask[-self._AT_ONCE :]
        del self._to_ask[-self._AT_ONCE :]
        for busy in some:
            if busy in self._awake and self._rests(busy):
                self.forget(busy)
        if self._to_ask:
            # A zero timer, since callbacks of the loop don't let timers and other sockets in.
            self._turn = self._loop.timer(0, ref=False)
            self._turn.start(self._ask_some)
        elif not self._awake:
            self._timer.stop()

    def _rests(self, busy: Restable) -> bool:
        try:
            return busy.rest()
        except Exception:  # The timer of a callback that raises is stopped; the others want to be asked again.
            self._loop.handle_error(busy, *sys.exc_info())
            return True
