"""Ends what a server has begun, so that nothing which was received is lost.

It accepts nothing and knows no listener: it is told how to close it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from typing import Any

import gevent
from gevent.event import Event

from .acceptor import ConnectionGreenlets
from .connection import Connection, current_call
from .log import log

# The logger of the server: where its end is looked after is nothing that a reader of logs should have to know.
logger = logging.getLogger("gmprpc.server")

# How long a stop waits for connections that it has cut: their greenlets only have to notice.
_ABORT_TIMEOUT = 1.0

# How long a stop gives TLS handshakes that are under way: some round trips. Picked arbitrarily.
_HANDSHAKE_GRACE = 0.5


class Stopping:
    """How a server that has been started comes to its end; a later start has another.

    ``close()`` ends accepting; ``greenlets`` are the lives of its connections, ``connections`` has those that got so
    far, and ``handshakes`` the greenlets that are amid a handshake; ``catch_up(timeout)`` waits for whoever is told.
    """

    def __init__(
        self,
        close: Callable[[], None],
        greenlets: ConnectionGreenlets,
        connections: Mapping[Any, Connection],
        handshakes: Set[Any],
        catch_up: Callable[[float], None],
    ) -> None:
        #: True from the first stop on.
        self.is_begun = False
        #: Set when it is over.
        self.over = Event()
        self._close = close
        self._greenlets = greenlets
        self._connections = connections
        self._handshakes = handshakes
        self._catch_up = catch_up

    def stop(self, hub: Any, timeout: float | None) -> int:
        """Stop, and wait for it, where that can be; ``hub`` is the server's. See :meth:`gmprpc.Server.stop`."""
        if hub is not None and gevent.get_hub() is not hub:
            if (loop := hub.loop) is not None:  # It goes when its thread ends.
                loop.run_callback_threadsafe(gevent.spawn, self._stop, timeout)
            return 0
        # In a greenlet of its own: whoever waits for it may lose patience.
        stopping = gevent.spawn(self._stop, timeout)
        current: Any = gevent.getcurrent()
        if _is_in_handler() or current in self._greenlets or current is hub:
            return 0
        cut: int = stopping.get()
        return cut

    def _stop(self, timeout: float | None) -> int:
        self.is_begun = True
        self._close()
        # A request may have come right behind the handshake; but most who are still at it have nothing to say.
        handshakes = gevent.spawn_later(_HANDSHAKE_GRACE, self._end_handshakes)
        for connection in self._connections.values():
            connection.finish()
        greenlets = list(self._greenlets)  # Not those that come after another start.
        gevent.joinall(greenlets, timeout)
        handshakes.kill(block=False)
        late = [greenlet for greenlet in greenlets if not greenlet.ready()]
        connections = [self._connections[greenlet] for greenlet in late if greenlet in self._connections]
        if cut := sum(connection.in_flight for connection in connections):
            # Here, where it is known: if this call cuts short one that waits, that one comes to the end first.
            log(logger, logging.WARNING, "%d requests were cut after %g s", cut, timeout)
        # Who has its answers, and doesn't hang up, isn't waited for any longer either.
        gevent.killall([greenlet for greenlet in late if not self._has_live_connection(greenlet)], block=False)
        for connection in connections:
            connection.abort()
        gevent.joinall(late, _ABORT_TIMEOUT)
        gevent.killall(late, block=False)
        self._catch_up(_ABORT_TIMEOUT)
        self.over.set()
        return cut

    def _end_handshakes(self) -> None:
        gevent.killall(self._handshakes, block=False)

    def _has_live_connection(self, greenlet: Any) -> bool:
        connection = self._connections.get(greenlet)
        return connection is not None and not connection.is_closed


def _is_in_handler() -> bool:
    try:
        current_call()
    except LookupError:
        return False
    return True
