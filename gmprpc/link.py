"""One hub's connection of a client: made when it is needed, made again when it is lost, and the calls that wait for it.

It knows neither where the server is nor how to connect: it is given somebody who can.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import gevent
from gevent import Greenlet, GreenletExit
from gevent.event import Event

from .backoff import Backoff
from .calls import IN_HUB, TakeBack
from .connection import Connection
from .exceptions import CallTimeout, ConnectFailed, ConnectionClosed, ProtocolError, RemoteError, text_of
from .heartbeat import Heartbeat
from .methods import HEALTH, MethodTable
from .metrics import Counters
from .options import CONNECT_TIMEOUT, LinkOptions, check_timeout
from .reply import PendingCall, failure_of
from .requests import encoder_of
from .streams import Stream
from .transport import format_address

# What fails at once, as a unix socket that isn't there does, would otherwise keep the loop for ever where
# retry_interval is 0. Picked arbitrarily.
_SHORTEST_PAUSE = 0.001
# How often a call that is idempotent, and has no time-out to end it, is sent at most. Picked arbitrarily.
_MOST_ATTEMPTS = 3


class Owner(Protocol):
    """What a link needs of the client that it belongs to."""

    @property
    def peer(self) -> Any:
        """Where the server is, for logs and for :attr:`gmprpc.Connection.peer`."""

    @property
    def is_closed(self) -> bool:
        """True while nothing is to be connected or sent."""

    def open_stream(self, opened: Callable[[Callable[[], Any]], Any]) -> Stream:
        """A stream to the server; blocks the greenlet. Killed, it leaves nothing open.

        Whatever is open by then ``opened`` is told how to let go of, in a process that is forked off meanwhile.
        """

    def greet(self, connection: Connection) -> None:
        """Say on a new ``connection`` what has to be said before any call; where `is_greeted` says that there is."""

    def is_worth_another_try(self, failure: BaseException) -> bool:
        """Whether what `open_stream`, or `greet`, has raised may be otherwise next time."""

    def let_go(self) -> None:
        """A connection is over and its stream is closed; may block the greenlet."""

    def report(self, exc: Exception) -> None:
        """Tell whoever wants to know that there is no connection any more, or yet; may block the greenlet."""


class Link:
    """A connection to the server of ``owner``, for the greenlets of one thread."""

    def __init__(self, owner: Owner, methods: MethodTable, options: LinkOptions, counters: Counters) -> None:
        self._owner = owner
        self._methods = methods
        self._options = options
        self._counters = counters
        self._hub = gevent.get_hub()
        self._max_pending = sys.maxsize if options.max_pending is None else options.max_pending
        self._encoder = encoder_of(options.connection)
        #: The connection on which calls are sent; it may have ended by now. None before the first.
        self.connection: Connection | None = None
        # Takes a call back from it.
        self._take_back_unsent: TakeBack | None = None
        # The greenlets of this connection, of those before on which something is still to be answered, and of one that
        # is made.
        self._lives: dict[Greenlet[..., None], Connection] = {}
        # Those of them on which something is still to be said or answered before any call is sent.
        self._on_probation: set[Connection] = set()
        # What waits for a connection, or for room on it, in the order in which it is to be sent; and before all that
        # what was sent on a connection that has ended, and had not left.
        self._queue: OrderedDict[PendingCall, _Waiting] = OrderedDict()  # A dict's first item is ever harder to find.
        self._returned: OrderedDict[PendingCall, _Waiting] = OrderedDict()
        # The greenlet that makes a connection, while there is one to be made, and why it couldn't last time.
        self._connecting: Greenlet[..., None] | None = None
        self._failure: Exception | None = None
        self._opened: list[Callable[[], Any]] = []  # How to let go of what it has opened.
        interval = options.retry_interval
        self._backoff = None if interval is None else Backoff(interval, options.max_retry_interval)
        self._not_before = 0.0  # When the next attempt may be made.
        self._wanted_until = 0.0  # Till then there shall be a connection even if nobody waits for it.
        self._begun_at = 0.0  # When the last connection was made.
        self._is_unproven = False  # What the connection was good for hasn't been looked at yet.
        self._is_given_up = Event()  # Nobody waits for it any more.
        self._is_abandoned = False

    # Calling.

    def call(self, method: str, params: tuple[Any, ...], timeout: float | None, is_idempotent: bool, tell: bool) -> Any:
        """The result of a call, once it is there; see :meth:`gmprpc.Client.call`."""
        begun = perf_counter()
        has_returned, times_sent = False, 0
        connection = self.connection
        if connection is not None and not self._queue and connection.has_room(self._max_pending):
            try:
                return connection.calls.call(method, params, timeout, tell)
            except ConnectionClosed as exc:
                exc._body = None
                if not self._may_go_again(connection, exc, is_idempotent):
                    raise
                has_returned, times_sent = True, int(exc.sent)
        if gevent.getcurrent() is self._hub:
            raise RuntimeError(IN_HUB)
        check_timeout("timeout", timeout)
        call = PendingCall(method)
        waiting = _Waiting(call, self._encoder.body(method, params), is_idempotent=is_idempotent)
        waiting.has_returned, waiting.times_sent = has_returned, times_sent
        self._enqueue(waiting, timeout, tell, begun)
        return self._result_of(call, tell)

    def call_async(
        self, method: str, params: tuple[Any, ...], timeout: float | None, is_idempotent: bool, tell: bool, which: str
    ) -> PendingCall:
        """A call that goes on its way; see :meth:`gmprpc.Client.call_async`. ``which`` time-out it is."""
        call = PendingCall(method)
        connection = self.connection
        if connection is not None and not self._queue and connection.has_room(self._max_pending) and not is_idempotent:
            try:
                connection.calls.send(call, params, timeout, tell, self._take_back_unsent)
                return call
            except ConnectionClosed as exc:  # A hook of the packer has waited.
                if not self._may_go_again(connection, exc, is_idempotent):
                    raise
        check_timeout("timeout", timeout)
        call.which = which  # Now, since the time may be up before it is returned.
        waiting = _Waiting(call, self._encoder.body(method, params), is_idempotent=is_idempotent)
        self._enqueue(waiting, timeout, tell)
        if len(self._queue) > self._max_pending and call in self._queue and gevent.getcurrent() is not self._hub:
            waiting.gone = Event()
            try:
                waiting.gone.wait()
            except BaseException:
                call.cancel(tell)
                raise
        return call

    def notify(self, method: str, params: Sequence[Any], timeout: float | None) -> None:
        """Send a notification; see :meth:`gmprpc.Client.notify`."""
        connection = self.connection
        if connection is not None and not self._queue and connection.has_room(self._max_pending):
            with suppress(ConnectionClosed):
                connection.notify(method, *params)
                return
        self._wait_in_queue(method, self._encoder.notification(method, params), timeout)

    def connect(self) -> None:
        """Wait until there is a connection, as long as making one may take; raises ConnectFailed."""
        if not self.is_connected:
            self._wait_in_queue("connect", None, None)

    def _wait_in_queue(self, method: str, notification: bytes | None, timeout: float | None) -> None:
        check_timeout("timeout", timeout)
        call = PendingCall(method)
        self._enqueue(_Waiting(call, notification, is_notification=True), timeout, False)
        if gevent.getcurrent() is not self._hub:  # Where nobody may wait; it leaves all the same.
            self._result_of(call, False)

    def _result_of(self, call: PendingCall, tell: bool) -> Any:
        try:
            return call.get()
        except BaseException:
            call.cancel(tell)  # Unless it is over, and that was its end.
            raise

    # Waiting to be sent.

    def _enqueue(self, waiting: _Waiting, timeout: float | None, tell: bool, begun: float | None = None) -> None:
        if self._owner.is_closed or self._is_abandoned:
            raise ConnectionClosed("the client is closed")
        if gevent.getcurrent() is self._connecting:
            raise RuntimeError("a hook can't call: there is no connection yet")
        if timeout is not None:
            left = timeout if begun is None else max(0.0, timeout - (perf_counter() - begun))
            waiting.call.limit(self._hub.loop, timeout, tell, left)
        self._queue[waiting.call] = waiting
        self._await(waiting)

    def _await(self, waiting: _Waiting) -> None:
        """See to it that ``waiting``, which stands in one of the queues, gets its turn."""
        waiting.call._forget = partial(self._forget, waiting.call)
        connection = self.connection
        if connection is not None and connection.is_lasting:
            connection.calls.on_room = self._pump
            connection.settle_soon()
        else:
            self._limit_wait(waiting)
            self._want_connection()

    def _forget(self, call: PendingCall, _tell: bool) -> bool:
        """A call is given up that has not been sent."""
        waiting = self._take_out(call)
        call._obstacle = self._failure
        if not self._queue and not self._returned:
            self._is_given_up.set()
        return waiting is not None and waiting.was_sent

    def _take_out(self, call: PendingCall) -> _Waiting | None:
        waiting = self._returned.pop(call, None) or self._queue.pop(call, None)
        if waiting is not None:
            waiting.leave()
        return waiting

    def _pump(self) -> None:
        """Send what waits, as far as there is room; in the hub, or in the greenlet that has made the connection."""
        connection = self.connection
        assert connection is not None
        while (queue := self._returned or self._queue) and connection.has_room(self._max_pending):
            waiting = queue[next(iter(queue))]
            self._take_out(waiting.call)
            self._send(connection, waiting)
        if not queue:
            connection.calls.on_room = None
        elif not connection.is_lasting:
            self._wait_for_another(connection)

    def _wait_for_another(self, connection: Connection) -> None:
        """Let all that waits, for room on ``connection`` perhaps, wait for another one."""
        connection.calls.on_room = None
        for waiting in [*self._returned.values(), *self._queue.values()]:
            self._limit_wait(waiting)
        self._want_connection()

    def _send(self, connection: Connection, waiting: _Waiting) -> None:
        call, body = waiting.call, waiting.body
        if not waiting.is_notification:
            assert body is not None
            take_back = self._take_back_unsent
            if waiting.is_idempotent or waiting.has_returned:
                take_back = partial(self._take_back, connection, waiting)
            connection.calls.send_packed(call, body, take_back)
        else:
            if body is not None:
                connection.post(body)
            call._forget = None
            call.set(None)

    def _may_go_again(self, connection: Connection, closed: ConnectionClosed, is_idempotent: bool) -> bool:
        """Whether a call that ended with ``closed`` on ``connection`` may go another way."""
        # An open connection has nothing to do with it: that is what somebody's gevent.Timeout has raised.
        if connection.is_open or connection.is_given_up or self._owner.is_closed or self._is_abandoned:
            return False
        if closed.sent and is_idempotent:
            self._counters.resent_requests += 1
        return is_idempotent or not closed.sent

    def _take_back(
        self, connection: Connection, waiting: _Waiting | None, call: PendingCall, closed: ConnectionClosed
    ) -> bool:
        """Queue a call again whose connection has ended; False if that can't be; in the hub."""
        body, closed._body = closed._body, None  # It may be large, and errors are kept and sent around.
        if waiting is None:
            waiting = _Waiting(call, body)
        # Without pauses a server that accepts and hangs up would be tried without an end; and so would one that dies of
        # this very call, if the call has all the time in the world.
        times_sent = waiting.times_sent + closed.sent
        is_last = (waiting.has_returned and self._backoff is None) or (
            times_sent >= _MOST_ATTEMPTS and not call.is_limited
        )
        if is_last or not self._may_go_again(connection, closed, waiting.is_idempotent):
            closed.sent |= waiting.was_sent
            return False
        waiting.has_returned, waiting.times_sent = True, times_sent
        self._returned[call] = waiting
        self._await(waiting)
        return True

    # Connecting.

    def _want_connection(self) -> None:
        if self._connecting is None and not self._is_abandoned:
            if self._is_unproven:
                self._judge()
            self._is_given_up.clear()
            # In a greenlet of its own: the caller who came first may lose patience, the others still wait.
            connecting = self._connecting = gevent.spawn(self._connect)
            connecting.rawlink(self._clear_up_after)

    def _judge(self) -> None:
        """Learn from how the last connection went."""
        last = self.connection
        assert last is not None
        self._is_unproven = False
        if self._backoff is None or self._options.retry_interval is None:  # There is either both or neither.
            return
        lifetime = perf_counter() - self._begun_at
        is_peer = last.has_heard and not isinstance(last.error, ProtocolError)
        if last.is_given_up or (is_peer and lifetime >= self._options.retry_interval):
            self._backoff.reset()
        else:  # A server that accepts and hangs up is as good as none, also if it says something before.
            self._pause(self._backoff)

    def _pause(self, backoff: Backoff) -> None:
        """Another attempt has failed."""
        self._not_before = perf_counter() + max(_SHORTEST_PAUSE, backoff.next())

    def _connect(self) -> None:
        me = self._connecting
        while self._is_wanted():
            if (delay := self._not_before - perf_counter()) > 0:
                self._is_given_up.wait(delay)
                self._is_given_up.clear()
                continue
            begun = perf_counter()
            try:
                self._opened.clear()
                stream = self._owner.open_stream(self._opened.append)
                if self._connecting is not me:
                    stream.close()
                    return
                connection = self._come_alive(stream)
                if self._options.draining:
                    self._announce(connection, begun)
                if self._options.is_greeted:
                    self._greet(connection, begun)
            except BaseException as exc:
                if self._connecting is not me:
                    return  # Closed meanwhile: nobody waits any more.
                if not self._fail(exc):
                    break
            else:
                self._begin(connection)
                return
        self._connecting = None

    def _come_alive(self, stream: Stream) -> Connection:
        """The connection on ``stream``; no call goes there yet."""
        connection = Connection(
            stream, self._methods, self._options.connection, counters=self._counters, peer=self._owner.peer
        )
        if self._options.draining or self._options.is_greeted:
            self._on_probation.add(connection)
        self._opened.clear()
        life = gevent.spawn(self._live, connection)
        self._lives[life] = connection
        life.rawlink(self._lives.pop)
        return connection

    def _announce(self, connection: Connection, begun: float) -> None:
        """Have the server know, by asking for its health, that this client wants to be told before it is let go.

        A server that is about to do so tells it before it answers. So what comes after the answer, whatever that is, is
        not lost. The attempt to connect was ``begun`` then.

        Raises:
            ConnectFailed: there was no answer, or the server has told it.
        """
        where = format_address(self._owner.peer)
        limit = self._options.connect_timeout
        try:
            connection.call(HEALTH, timeout=None if limit is None else max(0.0, begun + limit - perf_counter()))
        except (RemoteError, ProtocolError):
            pass  # Any answer will do.
        except CallTimeout:
            connection.abort()
            raise ConnectFailed(f"can't connect to {where}: no answer to {HEALTH} within {limit:g} s") from None
        except ConnectionClosed as exc:
            reason = connection.error or exc
            raise ConnectFailed(f"can't connect to {where}: {reason}") from (reason.__cause__ or reason)
        except BaseException:  # This greenlet is killed.
            connection.abort()
            raise
        if not connection.is_lasting:
            raise ConnectFailed(f"can't connect to {where}: the server is about to stop")

    def _greet(self, connection: Connection, begun: float) -> None:
        """Have the owner say what it has to, in the time that is left of the attempt to connect that was ``begun``.

        Raises:
            ConnectFailed: there was no time left, or the connection was lost.
            BaseException: what the owner's hook has raised.
        """
        where = format_address(self._owner.peer)
        limit = self._options.connect_timeout
        late = ConnectFailed(f"can't connect to {where}: on_connect didn't come to its end within {limit} s")
        try:
            with gevent.Timeout(None if limit is None else max(0.0, begun + limit - perf_counter()), late):
                self._owner.greet(connection)
            if not connection.is_lasting:
                raise ConnectionClosed("the server has let go of it")
        except BaseException as exc:
            reason = connection.error or exc
            connection.abort()
            if isinstance(exc, ConnectionClosed) and not isinstance(exc, ConnectFailed):
                raise ConnectFailed(f"can't connect to {where}: {reason}") from (reason.__cause__ or reason)
            raise

    def _clear_up_after(self, connecting: Greenlet[..., None]) -> None:
        """Fail those who wait for a greenlet that won't make a connection any more: somebody has killed it."""
        if self._connecting is connecting:
            self._connecting = None
            self._failure = ConnectFailed(f"can't connect: {text_of(failure_of(connecting) or GreenletExit())}")
            self._fail_queue(self._failure)

    def _is_wanted(self) -> bool:
        """Whether there shall be a connection."""
        if self._queue or self._returned:
            return True
        is_wanted = self._options.keep_connected or perf_counter() < self._wanted_until
        return is_wanted and not self._owner.is_closed

    def _fail(self, exc: BaseException) -> bool:
        """There is no connection, because of ``exc``; says whether to try again."""
        backoff = self._backoff if self._owner.is_worth_another_try(exc) else None
        if not isinstance(exc, Exception):  # A hook's, or the greenlet was killed.
            exc = ConnectFailed(f"can't connect: {text_of(exc)}")
        self._failure = exc
        if backoff is not None:
            self._pause(backoff)
        else:
            self._fail_queue(exc)
        gevent.spawn(self._owner.report, exc)  # It may block, or call.
        return backoff is not None

    def _begin(self, connection: Connection) -> None:
        """Use the connection that has been made."""
        self._on_probation.discard(connection)
        self.connection = connection
        self._take_back_unsent = partial(self._take_back, connection, None)
        self._is_unproven, self._begun_at = True, perf_counter()
        self._connecting = self._failure = None
        self._wanted_until = 0.0
        connection.calls.on_room = self._pump
        # What this connection gives back goes before what it hasn't had room for; and nobody who calls while it has may
        # go before either.
        for call in reversed(self._returned):
            self._queue[call] = self._returned[call]
            self._queue.move_to_end(call, last=False)
        self._returned.clear()
        for waiting in [*self._queue.values()]:
            waiting.lift()
            if waiting.body is None:  # It waits for nothing else.
                self._take_out(waiting.call)
                self._send(connection, waiting)
        self._pump()

    def _live(self, connection: Connection) -> None:
        heartbeat = None
        if self._options.ping_interval is not None:
            heartbeat = Heartbeat(connection, self._options.ping_interval)
        try:
            error = connection.run()
        finally:
            if heartbeat is not None:
                heartbeat.stop()
            is_new = connection in self._on_probation
            self._on_probation.discard(connection)
            self._owner.let_go()
        if connection is self.connection and self._is_wanted():
            self._want_connection()
        if error is not None and not is_new:  # Or else that is why the attempt to connect has failed.
            gevent.spawn(self._owner.report, error)  # It may block, and `close` waits for this greenlet.

    def move_from(self, connection: Connection) -> None:
        """The server will let go of ``connection``: send nothing more there, and make another one for what comes.

        It is closed when it has all its answers.
        """
        if not connection.is_lasting:
            return
        connection.finish()
        if connection is self.connection:
            if self._backoff is not None:  # Or else who lets go of whoever comes would be tried without a pause.
                limit = self._options.connect_timeout
                self._wanted_until = perf_counter() + (CONNECT_TIMEOUT if limit is None else limit)
            self._wait_for_another(connection)

    def _limit_wait(self, waiting: _Waiting) -> None:
        """Let what has no time-out of its own wait for a connection only as long as making one may take."""
        limit = self._options.connect_timeout
        if not waiting.call.is_limited and limit is not None and waiting.timer is None:
            waiting.timer = self._hub.loop.timer(limit)
            waiting.timer.start(self._expire, waiting.call, limit, update=True)

    def _expire(self, call: PendingCall, limit: float) -> None:
        was_sent = call.forget(False)
        reason = self._failure or f"can't connect to {format_address(self._owner.peer)}"
        failed = ConnectFailed(f"{reason}; no connection within {limit:g} s (connect_timeout)", sent=was_sent)
        failed.__cause__ = self._failure
        call.set_exception(failed)

    # The end.

    def close(self) -> None:
        """Close: what waits ends with ConnectionClosed. Waits for the farewell of the connections, but in the hub."""
        closed = ConnectionClosed("the client was closed")
        self._stop_connecting()
        self._fail_queue(closed)
        for connection in self._lives.values():
            connection.close()
        current: Any = gevent.getcurrent()
        if current is not self._hub:  # Where nobody may wait.
            gevent.joinall([life for life in self._lives if life is not current])

    def close_from_elsewhere(self) -> None:
        """The same, called in another thread; doesn't wait."""
        if (loop := self._hub.loop) is not None:  # It goes when its thread ends.
            loop.run_callback_threadsafe(gevent.spawn, self.close)

    def leave(self) -> None:
        """The thread ends, and with it the connection."""
        self._is_abandoned = True
        for connection in self._lives.values():
            connection.leave()
        if self._hub.loop is not None:
            connecting = self._stop_connecting()
            gevent.joinall([*self._lives, *connecting])
        for let_go in self._opened:  # Where there was no loop any more.
            let_go()
        Connection.forget_hub(self._hub)

    def abandon(self) -> None:
        """Leave everything to the process that this one was just forked off from."""
        self._is_abandoned = True
        self._stop_connecting()
        for let_go in self._opened:
            let_go()
        self._fail_queue(ConnectionClosed("this call is that of the process which this one was forked off from"))

    def _stop_connecting(self) -> list[Greenlet[..., None]]:
        """Kill the greenlet that connects; returns it, if there was one."""
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            return []
        connecting.kill(block=False)
        return [connecting]

    def _fail_queue(self, exc: Exception) -> None:
        for waiting in [*self._returned.values(), *self._queue.values()]:
            self._take_out(waiting.call)
            waiting.call._forget = None
            waiting.call.set_exception(_own(exc, waiting.was_sent))

    # What there is.

    @property
    def is_connected(self) -> bool:
        """True while there is a connection on which calls can be sent."""
        return self.connection is not None and self.connection.is_lasting

    @property
    def connections(self) -> list[Connection]:
        """Those on which something may be under way; may be asked in any thread."""
        return list(self._lives.values())

    @property
    def pending(self) -> int:
        """How many calls wait for their answers, or to be sent; may be asked in any thread."""
        waiting = len(self._queue) + len(self._returned)
        return waiting + sum(connection.pending for connection in self.connections)


def _own(exc: Exception, was_sent: bool) -> Exception:
    """``exc`` for one of several who get it, of whom each has frames and a request of its own."""
    if not isinstance(exc, ConnectionClosed):  # A hook's, and perhaps nothing that can be copied.
        return exc
    own = copy(exc)
    own.sent, own.__cause__ = was_sent, exc.__cause__
    return own


class _Waiting:
    """Something that waits to be sent: a request, a notification, or nothing but that there is a connection."""

    __slots__ = ("body", "call", "gone", "has_returned", "is_idempotent", "is_notification", "timer", "times_sent")

    def __init__(
        self, call: PendingCall, body: bytes | None, *, is_idempotent: bool = False, is_notification: bool = False
    ) -> None:
        #: Who waits for it, in one way or another.
        self.call = call
        #: Of a request, what follows the msgid; of a notification, all of it.
        self.body = body
        self.is_idempotent = is_idempotent
        self.is_notification = is_notification
        #: True once it was taken back from a connection that has ended; and from how many it may have left.
        self.has_returned = False
        self.times_sent = 0
        #: Limits its time while there is no connection, where nothing else does.
        self.timer: Any = None
        #: Set when it is no longer in a queue, where somebody waits for that.
        self.gone: Event | None = None

    @property
    def was_sent(self) -> bool:
        """Whether it may have left on a connection that has ended."""
        return self.times_sent > 0

    def lift(self) -> None:
        """There is a connection: its time isn't limited any more."""
        if self.timer is not None:
            self.timer.close()
            self.timer = None

    def leave(self) -> None:
        """It is no longer in a queue."""
        self.lift()
        if self.gone is not None:
            self.gone.set()
