"""A live connection's target: whatever comes, it ends, answers each request once, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from random import Random
from typing import Any, NamedTuple

import gevent
import msgpack
from gevent import Greenlet, getcurrent, socket

import gmprpc
from gmprpc.connection import TOO_MANY_REQUESTS, Connection
from gmprpc.exceptions import ConnectionClosed, MessageTooLarge, ProtocolError
from gmprpc.metrics import Counters
from gmprpc.options import MAX_UNSENT_SIZE, ConnectionOptions
from gmprpc.streams import PlainStream

from .case import Case, Finding, Tally
from .oracle import AMID_MESSAGE, CLEAN, INVALID, NO_PROTOCOL, REQUEST, RESPONSE, TOO_LARGE, Expectation, expectation

# Whatever the input is, it is dealt with within so many seconds; picked arbitrarily, far beyond what it takes.
_DEADLINE = 20.0

# What doesn't fit into a small buffer of the kernel, and four times beyond what may wait to be written.
_LARGE_SIZE = 70_000
_SMALL_BUFFER = 4096

# How many turns of the loop is enough for what is ready to run; picked arbitrarily.
_TURNS = 100

# Longer streams aren't taken without somebody who listens meanwhile.
_HEARD_SIZE = 64 * 1024

_SERVICE = gmprpc.Service()


@_SERVICE.method
def echo(value: Any) -> Any:
    return value


@_SERVICE.method
def add(a: Any, b: Any) -> Any:
    return a + b


@_SERVICE.method
def fail(message: Any) -> None:
    raise ValueError(message)


@_SERVICE.method
def pause(value: Any) -> Any:
    gevent.sleep(0)
    return value


@_SERVICE.method
def ask(value: Any) -> Any:
    return gmprpc.current_call().connection.call("question", value)


@_SERVICE.method
def large(value: Any) -> Any:
    return [value, bytes(_LARGE_SIZE)]


@_SERVICE.method
def leave(value: Any) -> None:
    raise gevent.GreenletExit(value)


def later(reply: gmprpc.Reply | None, value: Any) -> None:
    if reply is not None:
        gevent.spawn(reply.result, value)


def drop(reply: gmprpc.Reply | None) -> None:
    """Never answers."""


_SERVICE.reg_cb(later=later, drop=drop)

# What the methods do that just compute.
_PLAIN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("echo", "pause", "later"), echo),
    "add": add,
    "fail": fail,
    "large": large,
}

#: What a connection may be told by the application.
OPTIONS: Sequence[ConnectionOptions] = (
    ConnectionOptions(),
    ConnectionOptions(max_concurrency=1),
    ConnectionOptions(max_concurrency=3, reuse_greenlets=False),
    ConnectionOptions(max_message_size=300),
    ConnectionOptions(max_message_size=40, max_concurrency=None, hide_errors=True),
)


class Ending(NamedTuple):
    """What has become of a connection, and what the peer knows of it."""

    connection: Connection
    #: Everything that the peer has heard, and whether the stream ended in good order.
    heard: bytes
    reset: OSError | None


def check(case: Case, tally: Tally) -> None:
    """Raise a Finding unless a connection that ``case`` is sent to does as it should."""
    options = OPTIONS[case.options % len(OPTIONS)]
    unpacker_options = {"timestamp": 3, "strict_map_key": False, **options.unpacker_options}
    expected = expectation(case.stream, options.max_message_size, unpacker_options)
    random = Random(case.cuts)
    pieces = [case.stream] if random.random() < 0.2 else case.pieces(random)
    # Most conversations have their proper end; in some of them the peer listens only when it has said everything.
    is_slow = case.limits % 4 == 0 and len(case.stream) < _HEARD_SIZE
    interruption = None
    if case.limits >= 208:
        interruption = Interruption(random.choice(INTERRUPTIONS), random.randint(1, len(pieces)))
    with _watched() as greenlets:
        ending = _converse(pieces, options, greenlets, is_slow=is_slow, interruption=interruption)
    tally.splits += 1
    error = ending.connection.error
    tally.protocol_errors += isinstance(error, ProtocolError)
    tally.messages += len(expected.messages)
    if interruption is None:
        _check_error(error, expected)
        _check_answers(ending, expected, options)
    elif interruption.act is _finish:
        # What had come by then is answered, and perhaps more.
        _check_answers(ending, expected.up_to(sum(map(len, pieces[: interruption.pieces]))), options)


def _hang_up(_: Connection, peer: Any) -> None:
    peer.close()


def _finish(connection: Connection, _: Any) -> None:
    connection.finish()


def _close(connection: Connection, _: Any) -> None:
    connection.close()


def _abort(connection: Connection, _: Any) -> None:
    connection.abort()


#: What may happen before everything has been said and heard.
INTERRUPTIONS = (_hang_up, _finish, _close, _abort)


class Interruption(NamedTuple):
    """One of them, when so many pieces have been sent."""

    act: Callable[[Connection, Any], None]
    pieces: int


def _converse(
    pieces: Sequence[bytes],
    options: ConnectionOptions,
    greenlets: set[Any],
    *,
    is_slow: bool,
    interruption: Interruption | None,
) -> Ending:
    """Send ``pieces``, each in a turn of the loop, say the last word, and listen to the end."""
    hub = gevent.get_hub()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*params: Any) -> Any:
            greenlets.add(getcurrent())
            return function(*params)

        return call

    methods = _SERVICE.table(wrap)
    own, peer = socket.socketpair()
    if is_slow:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
    with peer:
        connection = Connection(PlainStream(own), methods, options, counters=Counters(), peer="the peer")
        runner = gevent.spawn(connection.run)
        heard: list[bytes] = []
        listener = Greenlet(_listen, peer, heard)
        try:
            if not is_slow:
                listener.start()
            try:
                for number, piece in enumerate(pieces, 1):
                    peer.sendall(piece)
                    hub.wait(hub.loop.timer(0))
                    if interruption is not None and number == interruption.pieces:
                        interruption.act(connection, peer)
                peer.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # It has been closed by then; whether it may be, the answers tell.
            listener.start()
            reset = listener.get()
            runner.get()
        finally:
            gevent.killall([runner, listener])
        if not _comes_true(lambda: not connection.in_flight):
            raise Finding(f"it ended with {connection.in_flight} requests in flight")
        if not connection.is_closed or connection.pending:
            raise Finding(f"it ended, {connection.is_closed=}, with {connection.pending} calls pending")
        return Ending(connection, b"".join(heard), reset)


def _listen(peer: Any, heard: list[bytes]) -> OSError | None:
    """Take in everything up to the end of the stream, which is returned if it isn't a proper one."""
    try:
        while data := peer.recv(65536):
            heard.append(data)
    except OSError as exc:
        return exc
    return None


def _check_error(error: Exception | None, expected: Expectation) -> None:
    """Hold what ended the connection against what plain msgpack has found in the stream."""
    end = CLEAN
    if isinstance(error, MessageTooLarge):
        end = TOO_LARGE
    elif isinstance(error, ProtocolError):
        end = NO_PROTOCOL
    elif isinstance(error, ConnectionClosed) and "amid a message" in str(error):
        end = AMID_MESSAGE
    elif error is not None:
        raise Finding(f"it ended with {type(error).__name__}: {error}")
    if end not in expected.ends:
        raise Finding(f"the end should be {' or '.join(sorted(expected.ends))}, not {end} ({error})")


def _check_answers(ending: Ending, expected: Expectation, options: ConnectionOptions) -> None:
    """Hold what the peer has heard against what it has asked."""
    if ending.reset is not None:
        raise Finding(f"the connection was reset: {ending.reset}")
    answers: dict[int, list[bytes]] = defaultdict(list)
    for frame in _frames(ending.heard):
        answers[_msgid_of_answer(frame)].append(frame)
    answers.pop(-1, None)

    wanted: dict[int, list[bytes | None]] = defaultdict(list)
    for kind, msgid, third, *rest in expected.messages:
        if kind == REQUEST:
            wanted[msgid].append(_answer_to(msgid, third, rest[0]))
        elif kind == INVALID and third == REQUEST:
            wanted[msgid].append(None)
    # While a call of this side is pending what would have to wait is refused.
    called = [message[2] for message in expected.messages if message[0] != RESPONSE]
    has_limits = options.max_concurrency is not None or called.count("large") * _LARGE_SIZE > MAX_UNSENT_SIZE
    may_be_refused = has_limits and "ask" in called
    for msgid, frames in answers.items():
        if len(frames) > len(wanted[msgid]) and expected.is_complete:
            raise Finding(f"{len(frames)} answers to {len(wanted[msgid])} requests with the msgid {msgid}")
    for msgid, results in wanted.items():
        frames = answers[msgid]
        if len(frames) < len(results):
            raise Finding(f"{len(frames)} answers to {len(results)} requests with the msgid {msgid}")
        for result in results:
            if result is None or may_be_refused:
                continue
            if result not in frames:
                raise Finding(f"no answer with the msgid {msgid} is {result[:200]!r}: {frames[:3]}")
            frames.remove(result)
        refusal = msgpack.packb([RESPONSE, msgid, TOO_MANY_REQUESTS, None])
        if expected.is_complete and not may_be_refused and refusal in frames:
            raise Finding(f"a request with the msgid {msgid} was refused without need")


def _answer_to(msgid: int, method: str, params: Sequence[Any]) -> bytes | None:
    """The answer that a request has to get, byte for byte; None where it may be any."""
    if method not in ("ask", "drop", "leave", *_PLAIN):
        error = f'No such method "{method}" found'
        return msgpack.packb([RESPONSE, msgid, error, None])
    if method not in _PLAIN:
        return None
    try:
        return msgpack.packb([RESPONSE, msgid, None, _PLAIN[method](*params)], datetime=True)
    except Exception:
        return None


def _frames(heard: bytes) -> Iterator[bytes]:
    """What the peer has heard, message by message."""
    framer = msgpack.Unpacker(max_buffer_size=0)
    framer.feed(heard)
    start = 0
    while start < len(heard):
        try:
            framer.skip()
        except Exception as exc:
            raise Finding(f"what came back is no MessagePack: {exc!r}, {heard[start:][:100]!r}") from exc
        yield heard[start : framer.tell()]
        start = framer.tell()


def _msgid_of_answer(frame: bytes) -> int:
    """The msgid of the response that ``frame`` is, -1 if it is a question of `ask`."""
    message = msgpack.unpackb(frame, raw=True, strict_map_key=False, timestamp=0)
    if type(message) is list and len(message) == 4 and type(message[0]) is type(message[1]) is int:
        kind, msgid, third, fourth = message
        if kind == RESPONSE and 0 <= msgid < 2**32 and (third is None or (type(third) is bytes and fourth is None)):
            return msgid
        if kind == REQUEST and third == b"question" and type(fourth) is list and len(fourth) == 1:
            return -1
    raise Finding(f"what came back is no answer: {frame[:200]!r}")


# What must not be left behind.


class _Log(logging.Handler):
    """Formats what is logged, as an application would, and keeps nothing but failures to do so."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.format(record)
        except Exception as exc:
            self.failures.append(f"{record.msg!r} can't be logged: {exc!r}")


@contextmanager
def _watched() -> Iterator[set[Any]]:
    """Raise a Finding if something is left behind or gets to the hub's error handler; yields a set for greenlets."""
    hub: Any = gevent.get_hub()
    hub.threadpool  # noqa: B018  What is made but once isn't left behind.
    hub.wait(hub.loop.timer(0))
    greenlets: set[Any] = set()
    faults: list[str] = []

    def handle_error(context: Any, kind: Any, value: Any, _: Any) -> None:
        faults.append(f"the hub's error handler got {getattr(kind, '__name__', kind)}: {value} from {context}")

    log, logger = _Log(), logging.getLogger("gmprpc")
    state = logger.level, logger.propagate
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    hub.handle_error = handle_error
    try:
        descriptors = _descriptors()
        with gevent.Timeout(_DEADLINE, Finding(f"it didn't end within {_DEADLINE:g} s")):
            watchers = _active_watchers(hub)
            yield greenlets
            if not _comes_true(lambda: _active_watchers(hub) == watchers and all(done.dead for done in greenlets)):
                alive = sum(not greenlet.dead for greenlet in greenlets)
                raise Finding(f"{alive} greenlets and {_active_watchers(hub) - watchers} watchers are left")
        if left := _descriptors() - descriptors:
            raise Finding(f"{len(left)} descriptors are left")
    finally:
        del hub.handle_error
        logger.removeHandler(log)
        logger.level, logger.propagate = state
    if faults or log.failures:
        raise Finding("; ".join([*faults, *log.failures]))


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` is true when everything that only waits for its turn has had it."""
    hub = gevent.get_hub()
    for _ in range(_TURNS):
        if condition():
            return True
        hub.wait(hub.loop.timer(0))
    return False


def _descriptors() -> set[str]:
    # One of them is the directory's own, and gone by now.
    return {name for name in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{name}")}


def _active_watchers(hub: Any) -> int:
    return hub.loop.activecnt
