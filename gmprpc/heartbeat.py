"""Asks a connection on which nothing happens whether its peer is still there.

It knows nothing of why somebody wants to know. A peer that is busy is never asked: only where nothing is under way.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import gevent

from .exceptions import CallTimeout, RPCError
from .methods import HEALTH
from .reply import PendingCall


class Pingable(Protocol):
    """What a heartbeat needs of a connection."""

    used_at: float
    #: How many bytes wait to be sent.
    unsent_size: int

    @property
    def pending(self) -> int:
        """How many calls wait for the peer's answers."""

    @property
    def in_flight(self) -> int:
        """How many of the peer's requests are at work."""

    def call_async(self, method: str, /, *, timeout: float) -> PendingCall:
        """Call ``method`` of the peer; raises ConnectionClosed if that has gone."""

    def lose(self, reason: Exception) -> None:
        """End, because of ``reason``."""


class Heartbeat:
    """Pings ``connection`` when it was quiet for ``interval`` seconds, and ends it when for as long no answer comes."""

    def __init__(self, connection: Pingable, interval: float) -> None:
        self._connection = connection
        self._interval = interval
        self._loop = gevent.get_hub().loop
        self._timer: Any = None
        self._wait(interval)

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _wait(self, seconds: float) -> None:
        self.stop()
        self._timer = self._loop.timer(seconds)
        self._timer.start(self._look, update=True)

    def _look(self) -> None:
        connection = self._connection
        left = connection.used_at + self._interval - perf_counter()
        # Where much is still to be sent a ping would come last, and the answer too late.
        if connection.pending or connection.in_flight or connection.unsent_size or left > 0:
            self._wait(max(left, self._interval / 2))
            return
        try:
            # Any answer will do, also that there is no such method.
            ping = connection.call_async(HEALTH, timeout=self._interval)
        except RPCError:  # It has just ended.
            self.stop()
            return
        self._wait(2 * self._interval)  # Unless there is an answer before.
        asked_at = connection.used_at
        ping.rawlink(lambda ping: self._hear(ping, asked_at))

    def _hear(self, ping: PendingCall, asked_at: float) -> None:
        if isinstance(ping.exception, CallTimeout) and self._connection.used_at == asked_at:
            self._connection.lose(TimeoutError(f"no answer to a ping within {self._interval:g} s"))
        elif self._timer is not None:
            self._wait(self._interval)
