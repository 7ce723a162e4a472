"""One stream with MessagePack-RPC on it, at either end: it answers requests and holds calls until they are answered.

Who does what, and in which greenlet:

* The stream is read in the hub, as a watcher's callback. Nothing there may block, and nothing may escape.
* Each request and notification runs in a greenlet of its own, which the hub switches into, as gevent starts its own
  greenlets. Whether the handler ends or blocks, control is back in the hub. A greenlet that has finished is kept for
  the next request of the same connection: a fresh one costs ten times as much as the switches.
* Only the hub switches into request greenlets and into callers that wait for an answer. What anybody else sets off
  reaches them through a callback of the loop.
* Answers gather in a list and are written together. There is one writer; nobody waits to write.

The connection is handed a mapping of methods and knows no service, no listener and no way to connect.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Final

import gevent
from gevent import GreenletExit
from gevent.event import Event
from greenlet import getcurrent

from .calls import Calls, switch
from .deadline import Deadline
from .exceptions import ConnectionClosed, ProtocolError
from .log import log, log_soon, shown
from .metrics import Counters
from .options import ConnectionOptions
from .protocol import (
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Decoder,
    Message,
    Run,
    parted,
)
from .reply import PendingCall, Reply, get_thread_ident
from .requests import RequestGreenlet, Requests, call_in_thread
from .streams import Stream, forget_buffer_of
from .sweeper import Sweeper
from .transport import format_address

logger = logging.getLogger("gmprpc.connection")

TOO_MANY_REQUESTS: Final = "too many requests in flight"

# For how long, and for how many messages, a connection may keep the hub before others get their turn.
_BATCH_TIME = 0.004
_BATCH_MESSAGES = 100
# For how long a connection may go on reading when no other has anything to say, for how long it may wait for more
# meanwhile, and how many attempts at that are skipped: at most, after one that was in vain; and after others have had
# their turn, since they would wait for this one. Picked arbitrarily.
_STREAK_TIME = 0.0005
_SPIN_TIME = 0.00003
_SKIPPED_LOOKS = 1000
_LOOKS_AFTER_OTHERS = 20
# So much of what waits to be written, and the rest of its last piece, is joined for one attempt. Picked arbitrarily.
_JOINED_SIZE = 256 * 1024
# So much of what this side says on its own account doesn't wait for more to be sent with it. Picked arbitrarily.
_GATHERED_SIZE = 64 * 1024

_READ, _WRITE = 1, 2

# The phases of a connection, in their order; each may be skipped.
_OPEN = 0
_FINISHING = 1  # Reads what the peer has sent by now, answers it.
_DRAINED = 2  # Has read that; reads on only for the answers to its own calls.
_DEAF = 3  # The peer won't say more, or nothing that makes sense; what it said is answered.
_CLOSED = 4


@dataclass(frozen=True, slots=True)
class Call:
    """The request or notification that a handler is at work on."""

    #: The connection on which it came; ``call`` and ``notify`` on it go back to the caller.
    connection: Connection
    #: The message as it was decoded: ``[0, msgid, method, params]`` or ``(2, None, method, params)``.
    message: Message

    @property
    def method(self) -> str:
        """The method that was called."""
        return self.message[2]  # type: ignore[no-any-return]

    @property
    def msgid(self) -> int | None:
        """The request's id, as its sender chose it; None for a notification."""
        return self.message[1]  # type: ignore[no-any-return]

    @property
    def peer(self) -> Any:
        """Who calls: an :class:`~gmprpc.InetPeer`, ``(host, port, ...)``, or a :class:`~gmprpc.UnixPeer`."""
        return self.connection.peer


def current_call() -> Call:
    """The call that this greenlet is the handler of, or this thread, if it is that of a ``threadpool``.

    In a thread it tells who calls; only the hub's thread can call back on its connection.

    Raises:
        LookupError: it is the handler of none; greenlets that a handler spawns aren't.
    """
    request = getcurrent()
    if isinstance(request, RequestGreenlet) and request.message is not None:
        return Call(request.requests.owner, request.message)  # type: ignore[arg-type]  # The owner is a Connection.
    if (lent := call_in_thread.get(None)) is not None:
        return Call(*lent)  # type: ignore[arg-type]  # Likewise.
    raise LookupError("there is no current call: this greenlet doesn't run a handler")


def current_reply() -> Reply | None:
    """A Reply for the call that this greenlet is the handler of, None for a notification.

    The connection tells it when the caller has gone. The handler has to return it.
    """
    if current_call().msgid is None:
        return None
    request = getcurrent()
    assert isinstance(request, RequestGreenlet)
    reply = Reply()
    request.reply = weakref.ref(reply)
    return reply


class _Stage:
    """What the connections of one hub share."""

    _of_hub: ClassVar[weakref.WeakKeyDictionary[Any, _Stage]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        #: Who has something to read in this round of the loop, the first one last.
        self.ready: list[Connection] = []
        #: Whose turn it was last.
        self.last_reader: Connection | None = None
        self._turns: Any = None  # The callback of the loop that will give them.

    @classmethod
    def of(cls, hub: Any) -> _Stage:
        """That of ``hub``."""
        if (stage := cls._of_hub.get(hub)) is None:
            stage = cls._of_hub[hub] = cls()
        return stage

    @classmethod
    def forget_hub(cls, hub: Any) -> None:
        """The thread of ``hub`` ends."""
        cls._of_hub.pop(hub, None)

    def wait_for_turn(self, connection: Connection) -> None:
        """Let ``connection`` read when all of this round are known."""
        self.ready.append(connection)
        if self._turns is None or not self._turns.pending:  # Also where Ctrl-C has struck the last one.
            self._turns = connection._loop.run_callback(self._give_turns)

    def _give_turns(self) -> None:
        ready, self.ready = self.ready, []
        for connection in reversed(ready):
            connection._take_turn()


class Connection:
    """A stream with MessagePack-RPC on it.

    Any number of greenlets of the thread that made it may call its methods at once.
    """

    __slots__ = (
        "__weakref__",
        "_backlog",
        "_batch_end",
        "_counters",
        "_decoder",
        "_gathered",
        "_hub",
        "_idle_deadline",
        "_inbox",
        "_is_abandoned",
        "_is_aborted",
        "_is_amid_read",
        "_is_amid_write",
        "_is_active",
        "_is_awake",
        "_is_cut",
        "_is_reading",
        "_life",
        "_looks_skipped",
        "_looks_to_skip",
        "_loop",
        "_max_concurrency",
        "_max_unsent_size",
        "_out",
        "_own_messages",
        "_over",
        "_pending",
        "_phase",
        "_read_deadline",
        "_read_watcher",
        "_recv",
        "_refusals_size",
        "_requests",
        "_send",
        "_stage",
        "_stream",
        "_todo",
        "_turn",
        "_unsent_answers",
        "_unsent_requests",
        "_write_deadline",
        "_write_watcher",
        "calls",
        "error",
        "has_heard",
        "is_settling",
        "peer",
        "unsent_size",
        "used_at",
        "user",
    )

    def __init__(
        self,
        stream: Stream,
        methods: Mapping[str, Callable[..., Any]],
        options: ConnectionOptions,
        *,
        counters: Counters,
        peer: Any = None,
    ) -> None:
        #: The address of the other side.
        self.peer = peer
        #: Who that is, for the application to say, as its ``authenticate`` hook has found out; None until it does.
        self.user: Any = None
        #: What ended the connection; None while it lives and when it ended in good order.
        self.error: Exception | None = None

        self._hub = gevent.get_hub()
        self._loop = self._hub.loop
        self._counters = counters
        counters.connections += 1

        # Reading.
        self._stream = stream
        self._recv = stream.recv
        self._decoder = Decoder(options.max_message_size, options.unpacker_options)
        self._inbox: Iterator[Run] | None = None  # What was read and is not decoded yet.
        self._read_watcher: Any = self._loop.io(stream.fileno(), _READ)
        self._is_reading = False
        self._is_amid_read = False  # What is taken out of the stream has not been taken in here yet.
        self._stage = _Stage.of(self._hub)
        # After a look for the next message that was in vain: how many are skipped, and how many of them are left.
        self._looks_skipped = self._looks_to_skip = 0
        self._turn: Any = None  # The timer that ends a pause made for others.
        self._batch_end = 0.0
        self._is_awake = False  # Looked after by the sweeper.
        self._is_active = False  # Something has been read since it looked last.
        #: True once anything has come from the peer.
        self.has_heard = False
        # The rest of a message has to come in time; time in which this side doesn't read isn't the peer's.
        self._read_deadline = Deadline(self._loop, options.read_timeout, self._on_silence)

        # Carrying out requests.
        self._out: list[bytes] = []  # What is to be written at the end of the batch.
        self._requests = Requests(self, methods, options, counters, self._out)
        self._todo = self._requests.todo  # What is decoded and not carried out yet, the next one last.

        #: The calls to the peer.
        self.calls = Calls(self, self._requests.encoder)
        self._pending = self.calls.pending

        # Writing.
        self._send = stream.send
        self._backlog: list[bytes | memoryview] = []  # What the kernel didn't take; then everything goes here.
        #: How many bytes that is.
        self.unsent_size = 0
        self._max_unsent_size = sys.maxsize if options.max_unsent_size is None else options.max_unsent_size
        # What was answered since the backlog was empty last has not been sent, as far as can be told without a look at
        # each message: so many places of `max_concurrency` are taken by it.
        self._unsent_answers = 0
        self._max_concurrency = sys.maxsize if options.max_concurrency is None else options.max_concurrency
        self._own_messages = 0  # So many of those in `_out` are no answers.
        self._gathered = 0  # How many bytes had to wait in `_out` since they were sent for it.
        self._refusals_size = 0  # Of what was refused since all had been written.
        self._is_amid_write = False  # A part of the backlog's first piece has been written.
        self._unsent_requests: Mapping[int, bytes] = {}  # Their bodies, when the connection was lost.
        self._write_watcher: Any = None
        self._write_deadline = Deadline(self._loop, options.write_timeout, self._on_unread)
        #: `_settle` will be called soon: at the end of a batch, or by the loop.
        self.is_settling = False

        # The end.
        self._phase = _OPEN
        #: When something was read or sent on this side's own account last.
        self.used_at = perf_counter()
        self._idle_deadline = Deadline(self._loop, options.idle_timeout, self._on_idle)
        self._is_cut = False  # Closed by this side before it was quiet.
        self._is_aborted = False  # Nothing more can, or shall, be sent.
        self._is_abandoned = False
        self._over: Event | None = None  # For those who wait for the end, if anybody does.
        self._life: Any = None  # The greenlet that runs the connection, while it has nothing to do but wait.
        _connections.add(self)

    # What the application may call.

    def call(self, method: str, *params: Any, timeout: float | None = None) -> Any:
        """Call ``method`` of the peer and wait, in this greenlet only, for its result.

        ``timeout`` is in seconds, None waits for ever.

        Raises:
            RemoteError: the peer answered an error; MethodNotFound if it has no such method.
            CallTimeout: no answer came in time.
            ConnectionClosed: the connection ended before the answer came.
            ProtocolError: the answer holds a value that can't be decoded. The connection goes on.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        return self.calls.call(method, params, timeout)

    def call_async(self, method: str, *params: Any, timeout: float | None = None) -> PendingCall:
        """Call ``method`` of the peer and go on; what it returns has the result once it is there.

        Raises:
            ConnectionClosed: the connection has ended.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        call = PendingCall(method)
        self.calls.send(call, params, timeout)
        return call

    def notify(self, method: str, *params: Any) -> None:
        """Call ``method`` of the peer without an answer: whether it arrives and succeeds can't be known.

        Raises:
            ConnectionClosed: the connection has ended.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        data = self._requests.encoder.notification(method, params)
        self.check_open()
        self.post(data)

    def check_open(self) -> None:
        """Raise unless calls can be sent, by this thread.

        Raises:
            ConnectionClosed: the connection has ended; ``__cause__`` says why, if not in good order.
            RuntimeError: it belongs to another thread.
        """
        if not self.is_open:
            raise ConnectionClosed("the connection is closed") from self.error
        if gevent.get_hub() is not self._hub:
            raise RuntimeError("this connection belongs to another thread")

    @property
    def is_open(self) -> bool:
        """True while calls can be sent: the connection isn't closed, and the peer hasn't said its last word."""
        return self._phase < _DEAF

    @property
    def is_lasting(self) -> bool:
        """True while it is open, and this side isn't about to close it: see :meth:`finish`."""
        return self._phase == _OPEN

    @property
    def is_closed(self) -> bool:
        """True once nothing can be sent or received any more."""
        return self._phase == _CLOSED

    @property
    def is_abandoned(self) -> bool:
        """True once it was left to the process that this one was forked off from."""
        return self._is_abandoned

    @property
    def is_given_up(self) -> bool:
        """True once this side has closed the connection itself, or left it to another process."""
        return self._is_cut or self._is_abandoned

    def has_room(self, max_pending: int) -> bool:
        """Whether another call may be sent now, so that ``max_pending`` at most wait for their answers.

        Not when this side is about to close it: who has the choice had better take another one.
        """
        return self._phase == _OPEN and len(self._pending) < max_pending and self.unsent_size <= self._max_unsent_size

    @property
    def in_flight(self) -> int:
        """How many requests and notifications of the peer are at work, or answered and the answer not sent yet."""
        return len(self._requests) + self._unsent_answers

    @property
    def pending(self) -> int:
        """How many calls to the peer wait for their answer."""
        return len(self.calls.pending)

    def finish(self) -> None:
        """Answer what has been received, then close; returns at once, :meth:`wait` waits for it."""
        if self._phase == _OPEN:
            self._phase = _FINISHING
            self._loop.run_callback(self._settle)

    def turn_away(self, error: Exception) -> None:
        """Take no further message, answer what is at work, then close, because of ``error``; returns at once."""
        self._loop.run_callback(self._turn_away, error)

    def carry_out(self, methods: Mapping[str, Callable[..., Any]], max_concurrency: int | None) -> None:
        """Have what the peer calls from now on be one of ``methods``, ``max_concurrency`` of them at once."""
        self._requests.methods = methods
        self._requests.limit = max_concurrency

    def close(self) -> None:
        """Close now: calls that wait end with ConnectionClosed, answers that are still to come are dropped.

        What was sent before, a notification perhaps, is still given to the peer.
        """
        if self._phase < _CLOSED:
            self._is_cut = True
            self.flush()
        if self._phase < _CLOSED:  # What is broken may have shown in the attempt to write.
            self._end(self.error)

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self._is_aborted = True
        self.close()

    def lose(self, reason: Exception) -> None:
        """Close at once, because of ``reason``: the peer is known to be gone; in the hub."""
        if self._phase < _CLOSED:
            self._lose(reason)

    def leave(self) -> None:
        """Close at once: the thread in which this is called, its own, ends, and its loop perhaps has."""
        if self._hub.loop is None:
            self._stream.close()
            # Without a loop the greenlet that is its life can't be ended: it stays, and keeps this alive.
            self._phase = _CLOSED
            self._decoder.abandon()
            self._requests.encoder.release()
        else:
            self.abort()

    @staticmethod
    def forget_hub(hub: Any) -> None:
        """Let go of what the connections of ``hub`` shared; they are all gone."""
        Sweeper.forget_hub(hub)
        _Stage.forget_hub(hub)
        forget_buffer_of(hub)

    def abandon(self) -> None:
        """Leave the stream to the process that this one was forked off from; here the connection is closed.

        What the handlers that this process got a copy of still answer is dropped, and no hook is called.
        """
        self._is_abandoned = True
        if self._phase < _CLOSED:
            self._out.clear()
            self._backlog.clear()
            self._end(ConnectionClosed("the connection is that of the process which this one was forked off from"))
        self._stream.abandon()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the connection is closed; False if ``timeout`` seconds pass before."""
        if self.is_closed:
            return True
        if self._over is None:
            self._over = Event()
        return self._over.wait(timeout)

    # The life of the connection, in the greenlet that was made for it.

    def run(self) -> Exception | None:
        """Carry the connection through to its end and close the stream; returns :attr:`error`."""
        try:
            # The first look doesn't wait for the watcher: TLS may have read more than its handshake.
            self._loop.run_callback(self._settle)
            self._loop.run_callback(self._take_turn)
            self._idle_deadline.put_off()
            self._sleep()
            self._idle_deadline.lift()  # Where it had ended before it was run.
        except BaseException:  # This greenlet is killed.
            self._life = None
            self.abort()
            self._stream.close()
            raise
        if self._is_abandoned:
            raise GreenletExit
        error, last_words = self.error, b"".join(self._backlog)
        self._backlog.clear()
        if error is not None:
            self._counters.failed_connections += 1
            level = logging.WARNING if isinstance(error, ProtocolError) else logging.INFO
            peer = format_address(self.peer)
            log(logger, level, "connection with %s: %s: %s", peer, type(error).__name__, error, peer=peer)
        if self._is_aborted:
            self._stream.close()
        else:
            self._stream.finish(last_words, linger=not self._is_cut)
        return error

    def _sleep(self) -> None:
        """Wait until the connection is closed; in the greenlet that is its life.

        Not for an event: the stack that waits for one is 1 KiB larger, and is kept for as long as the connection lives.
        """
        self._life = getcurrent()
        while self._phase < _CLOSED:  # Any switch but that of `_wake` is a stray.
            switch(self._hub)
        self._life = None

    # Reading, in the hub.

    def _on_readable(self) -> None:
        stage = self._stage
        if stage.ready or self._loop.pendingcnt:
            # libev calls those first who came last. When all of this round have been called they get their turns in
            # order, so that none waits for two rounds: the p99 of 50 busy connections is 1.5 ms instead of 1.95.
            stage.wait_for_turn(self)
        else:
            self._take_turn()

    def _take_turn(self) -> None:
        """Read what is there and carry it out; then what a peer that is quick has sent meanwhile."""
        try:
            self._read()
            stage = self._stage
            if stage.last_reader is not self:  # Others have something to say, too, and perhaps soon again.
                stage.last_reader = self
                self._looks_to_skip = max(self._looks_to_skip, _LOOKS_AFTER_OTHERS)
                return
            if self._looks_to_skip:
                self._looks_to_skip -= 1
                return
            # To look at once whether the peer has said something saves a round of the loop: 2 µs of 20 for each
            # message, if it has. Where it hasn't, the look was in vain, and the next ones are skipped.
            until = self.used_at + _STREAK_TIME
            while self.used_at < until and self._is_reading and not self._decoder.unfinished:
                if self._read() or self._read_soon():
                    self._looks_skipped = 0
                else:
                    self._looks_skipped = self._looks_to_skip = min(2 * self._looks_skipped + 1, _SKIPPED_LOOKS)
                    break
        except BaseException:
            # Ctrl-C has struck here, as it does in a caller that waits for a quick peer. It must not escape: the loop
            # stops the watcher of a callback that raises.
            self._hub.handle_error(self, *sys.exc_info())
            if self._is_amid_read and self._phase < _CLOSED:  # What comes next in the stream isn't known any more.
                self._lose(RuntimeError("interrupted while reading"))
            self._settle()

    def _read_soon(self) -> bool:
        """Wait a moment for what the peer says next, without leaving; False if it hasn't said anything.

        To sleep and to be woken up takes 35 µs where a core falls asleep meanwhile, longer than a peer on the same
        machine takes to answer or to ask again.
        """
        until = perf_counter() + _SPIN_TIME
        while perf_counter() < until and not self._loop.pendingcnt:  # Nothing else has happened in this round.
            os.sched_yield()
            if self._read():
                return True
        return False

    def _read(self) -> bool:
        """Read what is there and carry it out; False if there was nothing, or what there was is the end."""
        if self._phase >= _DEAF or self._todo or self._inbox is not None:
            return False
        self._is_amid_read = True
        try:
            data = self._recv()
        except BlockingIOError:
            self._is_amid_read = False
            if self._phase == _FINISHING:
                self._phase = _DRAINED
                self._settle()
            else:
                self._watch_for_the_rest()
            return False
        except EOFError as exc:  # TLS was cut off: nothing more will come, but what has come may be answered.
            error = ConnectionClosed(f"connection lost: {exc}")
            error.__cause__ = exc.with_traceback(None)
            self._fall_silent(error)
            self._settle()
            return False
        except Exception as exc:
            self._lose(exc)
            return False
        if not data:
            self._hear_end()
            return False
        if not self._is_active:
            self._is_active = self.has_heard = True
            if not self._is_awake:
                self._stay_awake()
        self._decode(data)
        self._is_amid_read = False
        self._carry_on()
        return True

    def _decode(self, data: bytes = b"") -> bool:
        """Decode more of what was read, ``data`` just now; says whether there is something to carry out."""
        try:
            if data:
                run, self._inbox = self._decoder.feed(data)
            else:
                run = next(self._inbox, None)  # type: ignore[arg-type]  # There is one.
        except ProtocolError as exc:
            self._counters.protocol_errors += 1
            self._inbox = None
            self._fall_silent(exc)
            return False
        except BaseException:  # Ctrl-C has struck here: what comes next in the stream isn't known any more.
            self._hub.handle_error(self, *sys.exc_info())
            self._lose(RuntimeError("interrupted while decoding"))
            return False
        if run is None:
            self._inbox = None
        else:
            run.reverse()
            self._todo += run
            run.clear()  # The iterator has it, too, until it is asked for the next.
        if self._read_deadline.is_set or self._decoder.unfinished or self._stream.is_amid_record:
            self._watch_for_the_rest()
        return bool(self._todo)

    def _carry_on(self) -> None:
        """Carry out the messages that were read: the one loop of the program."""
        todo, pending, requests = self._todo, self._pending, self._requests
        idle, deferred = requests.idle, requests.deferred
        # Requests that end within this batch don't have to see to it that their answers are sent.
        self.is_settling = True
        self.used_at = perf_counter()
        self._batch_end = self.used_at + _BATCH_TIME
        left = _BATCH_MESSAGES
        try:
            while todo or (self._inbox is not None and self._decode()):
                message = todo[-1]
                kind = message[0]
                if kind == REQUEST or kind == NOTIFICATION:  # noqa: SIM109 - no tuple for each message
                    if (self._backlog and self._is_choked()) or ((deferred or not idle) and requests.is_full()):
                        # No place left: the rest waits where it is, and what isn't read yet in the kernel. But while a
                        # call of this side is pending its answer has to be read, or calls that call back would wait for
                        # each other.
                        if not pending:
                            break
                        self._refuse(todo.pop())
                    else:
                        request = idle.pop() if idle else requests.new_greenlet()
                        request.message = todo.pop()
                        request.gr_context = None  # Every request starts in a fresh context: 40 ns.
                        ahead = len(todo)
                        if ahead and not deferred and not self._backlog:
                            requests.lead_end = self._batch_end  # It goes on with them until its handler blocks.
                        request.switch()
                        requests.lead_end = 0.0
                        left -= ahead - len(todo)
                elif kind == RESPONSE:
                    waiter = pending.pop(todo.pop()[1], None)
                    if waiter is None:
                        self._counters.late_answers += 1
                    else:
                        waiter(message)
                else:
                    self._reject(todo.pop())
                # Time and number: one connection must not keep the hub. What else has to end the batch, as the close of
                # the connection has, sets its end to 0. (A batch's 4 ms are 35 ns a message to measure.)
                left -= 1
                if (todo or self._inbox is not None) and (left <= 0 or perf_counter() > self._batch_end):
                    break
        except BaseException:
            # Not a handler's doing, its greenlet answers for that: a caller's greenlet that isn't gevent's has died.
            self._hub.handle_error(self, *sys.exc_info())
            requests.lead_end = 0.0
        self._settle()

    def _reject(self, message: Message) -> None:
        """Deal with a message that is well framed, but holds what can't be decoded or is no valid request."""
        _, msgid, kind, reason = message
        if kind == RESPONSE:
            waiter = self.calls.pending.pop(msgid, None)
            if waiter is not None:
                waiter(ProtocolError(f"the answer {reason}"))
                return
        self._counters.invalid_messages += 1
        if kind == NOTIFICATION:
            peer = format_address(self.peer)
            log_soon(logger, logging.WARNING, "invalid notification from %s: %s", peer, shown(reason), peer=peer)
        elif kind != RESPONSE:
            self._out.append(self._requests.error_response(msgid, reason))

    def _refuse(self, message: Message) -> None:
        self._counters.refused_messages += 1
        if message[1] is not None:
            answer = self._requests.encoder.response(message[1], TOO_MANY_REQUESTS, None)
            self._out.append(answer)
            self._refusals_size += len(answer)

    def _is_amid_something(self) -> bool:
        return bool(self._decoder.unfinished) or self._stream.is_amid_record

    def _watch_for_the_rest(self) -> None:
        """Let the time run in which the rest has to come of what has come in part."""
        if self._is_amid_something():
            self._read_deadline.put_off()
        elif self._read_deadline.is_set:
            self._read_deadline.lift()

    def _on_silence(self) -> None:
        timeout = self._read_deadline.seconds
        self._fall_silent(ConnectionClosed(f"the rest of a message didn't come within {timeout:g} s"))
        self._settle()

    def _on_idle(self) -> None:
        """The idle time-out has passed since the connection was looked at last: perhaps it was quiet all along."""
        timeout = self._idle_deadline.seconds
        assert timeout is not None
        left = self.used_at + timeout - perf_counter()
        if self._requests or self.calls.pending or self._backlog or self._is_amid_something():
            self._idle_deadline.put_off()
        elif left > 0:
            self._idle_deadline.put_off(left)
        else:
            self.finish()

    def _hear_end(self) -> None:
        """The peer has shut down its writing side: it may still read, but it won't answer any more."""
        if self._decoder.unfinished:
            self._fall_silent(ConnectionClosed("the peer closed the connection amid a message"))
        else:
            self._fall_silent(None)
        self._settle()

    def _fall_silent(self, error: Exception | None) -> None:
        """Take no more messages; what was received is still answered."""
        self._phase = max(self._phase, _DEAF)
        self.error = self.error or (error and error.with_traceback(None))  # Its frames hold what was received.
        self.calls.fail_all(self.error, self._take_back_requests() if self._pending else {})

    def _turn_away(self, error: Exception) -> None:
        if self._phase < _CLOSED:
            self._todo.clear()
            self._inbox = None
            self._fall_silent(error)
            self._settle()

    def _take_back_requests(self) -> dict[int, bytes]:
        """Take the requests that haven't left out of what waits to be sent; returns their bodies by their msgids."""
        # The first piece may have left in part, or be amid a record of TLS.
        bodies, others = parted(b"".join(self._backlog[1:]))
        self._backlog[1:] = others
        self.unsent_size = sum(map(len, self._backlog))
        late_bodies, others = parted(b"".join(self._out))
        self._own_messages -= len(self._out) - len(others)
        self._out[:] = others
        return bodies | late_bodies

    # Between the batches, in the hub.

    def settle_soon(self) -> None:
        """Have `_settle` called by the loop, once for all who ask for it until then."""
        if not self._is_awake and self._phase < _CLOSED:  # What has ended now began long ago, and leaves its greenlet.
            self._stay_awake()
        if self._is_reading and not self._read_watcher.active:
            self._is_reading = False  # Ctrl-C has struck before `_on_readable` could see to it: to be started again.
        self._loop.run_callback(self._settle)
        self.is_settling = True  # Last, or Ctrl-C could leave it true with nobody to settle.

    def _settle(self) -> None:
        """What there is to do when requests have ended: write, go on reading, close when all is quiet."""
        self.is_settling = False
        if self._out:
            self.flush()
        requests = self._requests
        # The usual end of a batch: nothing is held up and nobody wants an end, so nothing has to change.
        if (
            self._is_reading
            and self._phase == _OPEN
            and not self._backlog
            and not self._todo
            and self._inbox is None
            and not requests.deferred
            and len(requests.greenlets) < self._max_concurrency
            and self.calls.on_room is None
        ):
            return
        if self.calls.on_room is not None:
            self.calls.on_room()
        if self._phase == _CLOSED:
            self._clear_away()
            return
        if self.calls.pending:
            # Also with much unsent: the peer may do the same, and then neither would read. But it gets no more than so
            # many refusals that it doesn't take.
            may_read = self._refusals_size <= self._max_unsent_size
        else:
            may_read = not self._is_choked() and not requests.is_full()
        if self._todo or self._inbox is not None:
            if may_read and self._turn is None:
                # A zero timer, since callbacks of the loop don't let timers and other sockets in.
                self._turn = self._loop.timer(0)
                self._turn.start(self._resume)
            may_read = False
        elif self._phase >= _DEAF or (self._phase == _DRAINED and not self.calls.pending):
            if not requests and not self._backlog:
                self._end(self.error)
                return
            may_read = False
        elif self._phase == _FINISHING and may_read:
            # What the kernel holds is read without waiting for more.
            self._loop.run_callback(self._take_turn)
            may_read = False
        if may_read is not self._is_reading:
            self._is_reading = may_read
            if may_read:
                self._read_watcher.start(self._on_readable)
                self._watch_for_the_rest()
            else:
                self._read_watcher.stop()
                self._read_deadline.lift()

    def _end_batch(self) -> None:
        """Have the batch that is under way end with the message that is being carried out."""
        self._batch_end = self._requests.lead_end = 0.0

    def _resume(self) -> None:
        self._turn.close()
        self._turn = None
        self._carry_on()

    # Writing, in any greenlet.

    def post(self, data: bytes) -> None:
        """Send what this side says on its own account: at once, or together with what else this batch brings."""
        self._out.append(data)
        self._own_messages += 1
        if not self.is_settling:
            self.used_at = perf_counter()  # Else something has happened in this very round of the loop.
            self.flush()
            self.settle_soon()
            return
        # Who never lets the loop run must not pile up any number: when they are flushed `unsent_size` tells.
        self._gathered += len(data)
        if self._gathered > _GATHERED_SIZE:
            self._gathered = 0
            self.flush()

    def flush(self) -> None:
        """Write what has gathered, as far as it goes without waiting."""
        out = self._out
        if not out or self._phase == _CLOSED:
            return
        answers = len(out) - self._own_messages
        self._own_messages = 0
        if self._backlog:
            self._backlog += out
            self.unsent_size += sum(map(len, out))
            out.clear()
        else:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            self._write(data)
            if not self._backlog:
                self._refusals_size = 0
                return
        self._unsent_answers += answers
        self._requests.lead_end = 0.0  # Each answer more takes a place from now on: the hub has to look.
        if self._is_choked():
            self._batch_end = 0.0

    def _is_choked(self) -> bool:
        """True when so much waits to be sent that the peer isn't to be read any further."""
        return self.unsent_size > self._max_unsent_size or (
            bool(self._backlog) and self.in_flight + len(self._out) >= self._max_concurrency
        )

    def _write(self, data: bytes | memoryview) -> None:
        """Write ``data``; what isn't taken waits, before all else, for the write watcher."""
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent, is_begun = 0, self._is_amid_write
        except Exception as exc:
            self._backlog.insert(0, data)
            self._lose(exc)
            return
        else:
            is_begun = True  # Also with 0: TLS has a piece of it, which may leave before it says so.
        if sent == len(data):
            self._is_amid_write = False
            return
        self._backlog.insert(0, memoryview(data)[sent:])
        self.unsent_size += len(data) - sent
        self._is_amid_write = is_begun
        if sent or not self._write_deadline.is_set:
            self._write_deadline.put_off()
        if self._write_watcher is None:
            self._write_watcher = self._loop.io(self._stream.write_fileno(), _WRITE)
            self._write_watcher.start(self._on_writable)

    def _on_writable(self) -> None:
        count = size = 0
        while count < len(self._backlog) and size < _JOINED_SIZE:
            size += len(self._backlog[count])
            count += 1
        data = self._backlog[0] if count == 1 else b"".join(self._backlog[:count])
        del self._backlog[:count]
        self.unsent_size -= size
        self._write(data)
        if not self._backlog and self._write_watcher is not None:
            self._write_watcher.close()
            self._write_watcher = None
            self._write_deadline.lift()
            self._refusals_size = self._unsent_answers = 0
        self._settle()

    def _on_unread(self) -> None:
        self._lose(TimeoutError(f"nothing could be written for {self._write_deadline.seconds:g} s"))

    # The end.

    def _lose(self, reason: Exception) -> None:
        """The stream is broken: nothing more can be received or sent."""
        error = ConnectionClosed(f"connection lost: {getattr(reason, 'strerror', None) or reason}")
        error.__cause__ = reason.with_traceback(None)  # Its frames hold what was to be sent.
        if self.calls.pending:  # Else nobody asks; and answers may be many, and large.
            # What is still here has not left; what was partly written may have.
            unsent = self._backlog[1:] if self._is_amid_write else self._backlog
            self._unsent_requests, _ = parted(b"".join([*unsent, *self._out]))
        self._backlog.clear()
        self._out.clear()
        self._is_aborted = True
        self._end(self.error or error)

    def _end(self, error: Exception | None) -> None:
        """Stop; from any greenlet, so nothing is switched into here."""
        self._phase = _CLOSED
        self.error = error
        self._inbox = None
        self._todo.clear()
        self._end_batch()
        for watcher in (self._read_watcher, self._write_watcher, self._turn):
            if watcher is not None:
                # Before the descriptor is closed: a watcher that outlives it fires for the next owner of its number.
                watcher.close()
        self._write_watcher = self._turn = None
        for deadline in (self._read_deadline, self._write_deadline, self._idle_deadline):
            deadline.lift()
        self._backlog += self._out  # The last words; answers that come later are dropped.
        self._out.clear()
        self.settle_soon()
        self._loop.run_callback(self._wake)

    def _wake(self) -> None:
        """Let those go on who wait for the end; in the hub."""
        if self._over is not None:
            self._over.set()
        if self._life is not None:
            self._life.switch()

    def _clear_away(self) -> None:
        """When the connection has ended: let go of everybody who waits for something, and of what is held; in the hub.

        Objects that hold each other are only found by the garbage collector, which may take its time.
        """
        self._counters.dropped_answers += len(self._out)
        self._out.clear()
        self._unsent_answers = 0
        self.calls.fail_all(self.error, self._unsent_requests)
        if not self._is_abandoned:  # There the callers still wait, for the other process.
            self._requests.cancel_replies()
        self._decoder.abandon()
        self._release()
        if self._is_awake:
            Sweeper.of(self._hub).forget(self)
        if self._stage.last_reader is self:
            self._stage.last_reader = None

    def _stay_awake(self) -> None:
        self._is_awake = True
        Sweeper.of(self._hub).watch(self)

    def rest(self) -> bool:
        """Give back what is held for speed if there was nothing to do lately; says whether it was so."""
        if self._is_active:
            self._is_active = False
            return self._phase == _CLOSED
        self._release()
        self._is_awake = False
        return True

    def _release(self) -> None:
        """Give back what is only held to be quicker next time."""
        self._decoder.release()
        self._requests.encoder.release()
        self._requests.dismiss_idle()


# Every connection that there is in this process.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _flush_all() -> None:
    """Write what is held back until the loop runs again, which at exit it doesn't."""
    for connection in list(_connections):
        if connection._hub.thread_ident == get_thread_ident():  # Another thread may be at work on its own.
            connection.flush()


def _abandon_all() -> None:
    """Leave every connection to the process that this one was just forked off from.

    Otherwise its peer would never hear the end when that process dies, and a loop that runs here would read what is not
    meant for it.
    """
    for connection in list(_connections):
        connection.abandon()


atexit.register(_flush_all)
os.register_at_fork(after_in_child=_abandon_all)
