"""Ends what a server has begun, so that nothing which was received is lost.

It accepts nothing and knows no listener: it is told how to close it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from random import uniform
from time import perf_counter
from typing import TYPE_CHECKING, Any

import gevent
from gevent import Greenlet
from gevent.event import Event

from .acceptor import ConnectionGreenlets
from .connection import Connection, current_call
from .exceptions import ConnectionClosed
from .log import log
from .methods import DRAINING

if TYPE_CHECKING:
    _Greenlet = Greenlet[..., None]
else:
    _Greenlet = Greenlet  # It is generic in its stubs only.

# The logger of the server: where its end is looked after is nothing that a reader of logs should have to know.
logger = logging.getLogger("gmprpc.server")

# How long a stop waits for connections that it has cut: their greenlets only have to notice.
_ABORT_TIMEOUT = 1.0

# How long a stop gives TLS handshakes that are under way: some round trips. Picked arbitrarily.
_HANDSHAKE_GRACE = 0.5

# Before a stop cuts what is left it lets those go who talk on and on, whatever they are told, so that they are answered
# what they have said: so many seconds, or this part of all. Picked arbitrarily.
_LAST_MOMENT, _LAST_PART = 1.0, 0.2

# How often it is seen to those who have been told to go, and how long one of them may be quiet before it is taken for
# one that hasn't understood. A process that is held up for so long by a handler that computes loses the call that it
# makes then: nginx, too, lingers for 5 s.
_LOOK_INTERVAL = 1.0
_QUIET_TIME = 5.0

# So many are told to go before others get their turn: to tell 10,000 takes 200 ms. Picked arbitrarily.
_AT_ONCE = 100

# By how much, at most, the age at which a connection is to end differs from what was said, so that those which were
# made together don't end together.
_JITTER = 0.1


class Farewells:
    """Parts with connections whose peers would go on using them.

    A peer that has announced itself, by calling ``$/health`` on a connection, is told to go, by the notification
    ``$/draining``: it sends nothing more there and closes when it has all its answers. Until then it is read and
    answered, so that what was on its way isn't lost. From any other nothing more is read but what has arrived.
    """

    def __init__(self, max_age: float | None, patience: float | None) -> None:
        """Connections end at ``max_age`` seconds; one that is busy then has ``patience`` seconds more."""
        self._max_age = max_age
        self._patience = patience
        self._announced: set[Connection] = set()
        self._ages: dict[Connection, Any] = {}  # The timers.
        self._leavers: dict[Connection, _Leaver] = {}
        self._watch: _Greenlet | None = None  # The greenlet that looks after those.

    def limit_age(self, connection: Connection) -> None:
        """Part with ``connection`` at its age, if there is a limit to that."""
        if self._max_age is not None:
            timer = self._ages[connection] = gevent.get_hub().loop.timer(
                self._max_age * uniform(1 - _JITTER, 1 + _JITTER)
            )
            timer.start(self._retire, connection, update=True)

    def hear(self, connection: Connection) -> None:
        """The peer announces itself: it is waiting for the answer to ``$/health``.

        It is told at once, before that answer, if this connection is about to end: so who waits for the answer before
        he sends a call never sends one that isn't read.
        """
        if connection.is_closed:  # A hook has kept the question waiting for so long. What is noted now nobody forgets.
            return
        self._announced.add(connection)
        leaver = self._leavers.get(connection)
        if leaver is not None:
            leaver.tell()
        elif not connection.is_lasting:
            _tell(connection)

    def part_with(self, connection: Connection) -> None:
        """Let ``connection`` end soon."""
        if connection not in self._announced:
            self._finish(connection)
        elif (leaver := self._leavers.get(connection)) is not None and leaver.told_at is not None:
            leaver.until = None
        elif connection.is_lasting:
            self._look_after(_Leaver(connection, None))

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        self._announced.discard(connection)
        self._leavers.pop(connection, None)
        if (timer := self._ages.pop(connection, None)) is not None:
            timer.close()

    def _retire(self, connection: Connection) -> None:
        """Its time is over; in the hub."""
        if connection.is_lasting and connection not in self._leavers:
            until = None if self._patience is None else perf_counter() + self._patience
            self._look_after(_Leaver(connection, until))

    def _look_after(self, leaver: _Leaver) -> None:
        self._leavers[leaver.connection] = leaver
        self._look(leaver)
        if self._leavers and self._watch is None:
            self._watch = gevent.spawn(self._look_again_and_again)

    def _look_again_and_again(self) -> None:
        try:
            while self._leavers:
                gevent.sleep(_LOOK_INTERVAL)
                for leaver in list(self._leavers.values()):
                    self._look(leaver)
        finally:
            self._watch = None

    def _look(self, leaver: _Leaver) -> None:
        connection, now = leaver.connection, perf_counter()
        if not connection.is_lasting or (leaver.until is not None and now >= leaver.until):
            self._finish(connection)
        elif connection not in self._announced:
            if not connection.in_flight:
                self._finish(connection)
        elif leaver.told_at is None or connection.used_at > leaver.told_at:
            # Also who has said something after he was told: he may have had no place for it, see `max_concurrency`.
            leaver.tell()
        elif connection.in_flight or connection.pending or connection.unsent_size:
            leaver.quiet_since = now
        elif now - leaver.quiet_since >= _QUIET_TIME:
            self._finish(connection)

    def _finish(self, connection: Connection) -> None:
        self._leavers.pop(connection, None)
        connection.finish()


class _Leaver:
    """A connection that is to end when its peer has understood or, if he knows no better, when it is quiet."""

    __slots__ = ("connection", "quiet_since", "told_at", "until")

    def __init__(self, connection: Connection, until: float | None) -> None:
        self.connection = connection
        #: When it ends in any case.
        self.until = until
        #: When the peer was told last.
        self.told_at: float | None = None
        #: Since when nothing has been under way, as far as is known.
        self.quiet_since = 0.0

    def tell(self) -> None:
        _tell(self.connection)
        self.told_at = self.quiet_since = perf_counter()  # After what has just been sent.


def _tell(connection: Connection) -> None:
    with suppress(ConnectionClosed):
        connection.notify(DRAINING)


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
        handshakes: set[Any],
        farewells: Farewells,
        catch_up: Callable[[float], None],
    ) -> None:
        #: True from the first stop on, so that others may know before connections end.
        self.is_begun = False
        #: True once the delay is over and accepting has ended: who comes now is only answered what he has said.
        self.is_parting = False
        #: Set when it is over.
        self.over = Event()
        self._close = close
        self._greenlets = greenlets
        self._connections = connections
        self._handshakes = handshakes
        self._catch_up = catch_up
        self._farewells = farewells
        self._delay_over = Event()
        #: True if all goes on instead.
        self.is_revoked = False

    def stop(self, hub: Any, timeout: float | None, delay: float) -> int:
        """Stop, and wait for it, where that can be; ``hub`` is the server's. See :meth:`gmprpc.Server.stop`."""
        if hub is not None and gevent.get_hub() is not hub:
            if (loop := hub.loop) is not None:  # It goes when its thread ends.
                loop.run_callback_threadsafe(gevent.spawn, self._stop, timeout, delay)
            return 0
        # In a greenlet of its own: whoever waits for it may lose patience.
        stopping = gevent.spawn(self._stop, timeout, delay)
        current: Any = gevent.getcurrent()
        if _is_in_handler() or current in self._greenlets or current is hub:
            return 0
        cut: int = stopping.get()
        return cut

    def revoke(self) -> None:
        """The server is started again, in the delay: all goes on."""
        self.is_revoked = True
        self._delay_over.set()
        self.over.set()

    def _stop(self, timeout: float | None, delay: float) -> int:
        self.is_begun = True
        if delay and not self.is_parting:
            self._delay_over.wait(delay)
        if self.is_revoked:
            return 0
        self._delay_over.set()  # For those who wanted to wait longer.
        self.is_parting = True
        self._close()
        greenlets = list(self._greenlets)  # Not those that come after another start.
        # A request may have come right behind the handshake; but most who are still at it have nothing to say.
        handshakes = gevent.spawn_later(_HANDSHAKE_GRACE, self._end_handshakes, greenlets)
        if timeout != 0:  # Or else nobody has the time to understand.
            self._part_with_all(greenlets)
        last_moment = min(_LAST_MOMENT, _LAST_PART * timeout) if timeout else 0.0
        gevent.joinall(greenlets, None if timeout is None else timeout - last_moment)
        for greenlet in greenlets:
            if (connection := self._connections.get(greenlet)) is not None:
                connection.finish()
        gevent.joinall(greenlets, last_moment)
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

    def _part_with_all(self, greenlets: list[Any]) -> None:
        for number, greenlet in enumerate(greenlets, 1):
            if (connection := self._connections.get(greenlet)) is not None:
                self._farewells.part_with(connection)
            if number % _AT_ONCE == 0:
                gevent.sleep(0.001)  # Not 0, which lets neither timers nor other sockets in.

    def _end_handshakes(self, greenlets: Iterable[Any]) -> None:
        gevent.killall(self._handshakes.intersection(greenlets), block=False)

    def _has_live_connection(self, greenlet: Any) -> bool:
        connection = self._connections.get(greenlet)
        return connection is not None and not connection.is_closed


def _is_in_handler() -> bool:
    try:
        current_call()
    except LookupError:
        return False
    return True
