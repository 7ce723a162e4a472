"""What a handler may do wrong: each fault costs its own call one error, and nobody else anything.

Every test ends with the proof: the connection goes on, a bystander's call was not disturbed, nothing is left over, and
neither the log nor the peer was told what is none of their business.
"""

from __future__ import annotations

import gc
import logging
import mmap
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gevent
import pytest
from gevent import getcurrent
from gevent.event import AsyncResult, Event
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, collected, wait_until

#: A param of each call at fault; it must never be seen in a log.
SECRET = "tell nobody 8d1f0c"

#: The msgid of each request at fault.
MSGID = 9


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    """When all tests of this module are through, their greenlets are, too."""

    def living() -> set[gevent.Greenlet]:
        collected()
        return {thing for thing in gc.get_objects() if isinstance(thing, gevent.Greenlet) and not thing.dead}

    before = living()
    yield
    gevent.joinall(list(living() - before), timeout=5)
    assert living() <= before


@pytest.fixture(autouse=True)
def nothing_reaches_the_hub(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[list[Any]]:
    """gevent's hub has no error to report, and nobody prints anything; a test that knows better clears the list."""
    reported: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: reported.append(args))
    yield reported
    assert not reported
    assert capfd.readouterr() == ("", "")


@pytest.fixture(autouse=True)
def _nobody_else_notices(
    nothing_reaches_the_hub: list[Any], server: gmprpc.Server, bystander: Peer, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """The bystander's call is still in flight, alone; and no log has the params of another."""
    caplog.set_level(logging.INFO)
    yield
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    assert SECRET not in caplog.text


class Way(NamedTuple):
    """How a handler comes to its fault, and how it was called."""

    style: str
    has_blocked: bool
    is_notification: bool

    def __str__(self) -> str:
        when = "after blocking" if self.has_blocked else "at once"
        return f"{'notification' if self.is_notification else 'request'}, {self.style}, {when}"

    def handler(self, fault: Callable[[], Any], begun: Event) -> Callable[..., Any]:
        """What does ``fault``, when it is called with the secret param; it sets ``begun``."""

        def begin_and_do(secret: str) -> Any:
            assert secret == SECRET
            begun.set()
            if self.has_blocked:
                gevent.sleep(0)
            return fault()

        def call_back(reply: gmprpc.Reply | None, secret: str) -> None:
            result = begin_and_do(secret)
            if reply is not None:
                reply.result(result)

        def complete(outcome: AsyncResult[Any], secret: str) -> None:
            try:
                outcome.set(begin_and_do(secret))
            except BaseException as exc:
                outcome.set_exception(exc)

        def later(secret: str) -> AsyncResult[Any]:
            outcome: AsyncResult[Any] = AsyncResult()
            if self.has_blocked:
                gevent.spawn(complete, outcome, secret)
            else:
                complete(outcome, secret)
            return outcome

        handlers: dict[str, Callable[..., Any]] = {"function": begin_and_do, "callback": call_back, "later": later}
        return handlers[self.style]


STYLES = ("function", "callback", "later")
WAYS = [
    Way(style, *flags) for style in STYLES for flags in ((False, False), (True, False), (False, True), (True, True))
]

each_way = pytest.mark.parametrize("way", WAYS, ids=str)
#: Those in which the fault is done by the request's own greenlet.
each_way_in_its_own_greenlet = pytest.mark.parametrize("way", [way for way in WAYS if way.style != "later"], ids=str)


class Court:
    """Has a handler do a fault, and says what came of it."""

    def __init__(self, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture, others: int = 1) -> None:
        self.server = server
        self._others = others  # How many calls are in flight all along.
        self.peer = peer
        self._caplog = caplog

    def answers(self, way: Way, fault: Callable[[], Any]) -> list[Any]:
        """Every answer that a call of what does ``fault`` gets; the connection goes on."""
        begun = Event()
        self.server.register(way.handler(fault, begun), "bad", deferred=way.style == "callback")
        self.peer.send([2, "bad", [SECRET]] if way.is_notification else [0, MSGID, "bad", [SECRET]])
        begun.wait()
        # A large answer is in flight until it has been read.
        first = [] if way.is_notification else [self.peer.receive()]
        wait_until(lambda: self.server.statistics()["in_flight"] == self._others)
        return first + self.answers_so_far()

    def answers_so_far(self) -> list[Any]:
        """The answers that have come until a call that is made now is answered."""
        self.peer.send([0, 4242, "echo", ["goes on"]])
        answers = list(iter(self.peer.receive, [1, 4242, None, "goes on"]))
        assert ".py" not in repr(answers)
        return answers

    def logged(self) -> list[str]:
        """What the log says of the faults so far."""
        name = ":".join(map(str, self.peer.socket.getsockname()))
        return [record.getMessage().replace(name, "PEER") for record in self._caplog.records]

    def assert_error(self, way: Way, fault: Callable[[], Any], error: Any) -> None:
        """``fault`` is answered with ``error``, once, and logged, once; a notification is just logged."""
        answers = self.answers(way, fault)
        if way.is_notification:
            assert answers == []
            assert self.logged() == ["notification of bad from PEER failed"]
        else:
            assert answers == [[1, MSGID, error, None]]
            assert self.logged() == [f"request {MSGID} of bad from PEER failed"]
        assert self._caplog.records[0].exc_info is not None
        assert self.server.statistics()["handler_errors"] == 1


@pytest.fixture
def court(server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture) -> Court:
    return Court(server, peer, caplog)


# What a handler raises.


def raising(make: Callable[[], BaseException]) -> Callable[[], NoReturn]:
    """What raises a fresh exception."""

    def fault() -> NoReturn:
        raise make()

    return fault


class Unspeakable(Exception):
    """Of which nothing can be said: the attempt raises ``obstacle``."""

    def __init__(self, obstacle: type[BaseException]) -> None:
        super().__init__()
        self.obstacle = obstacle

    def __str__(self) -> str:
        raise self.obstacle

    __repr__ = __str__


class Endless(Exception):
    """Of which there is no end to what can be said."""

    def __str__(self) -> str:
        return str(self)

    __repr__ = __str__


class Numeric(Exception):
    def __str__(self) -> Any:
        return 5


class Blocking(Exception):
    """What is said of it, is said after a while."""

    def __str__(self) -> str:
        if getcurrent() is not gevent.get_hub():
            gevent.sleep(0)
        return "patience"


class Impostor(Exception):
    """Can't be asked for its class."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ValueError("no class")


class Evasive(gmprpc.ErrorResponse):
    """Can't be asked for its error."""

    def __init__(self) -> None:
        pass

    @property
    def error(self) -> Any:
        raise ValueError("no error")


def in_a_cycle(exc: BaseException) -> BaseException:
    """``exc``, which is the cause of its cause."""
    exc.__cause__ = ValueError("cause")
    exc.__cause__.__cause__ = exc
    exc.__context__ = exc.__cause__
    return exc


def recurse() -> None:
    recurse()


def time_out() -> None:
    with gevent.Timeout(0):
        gevent.sleep(1000)


def throw_at_itself() -> None:
    current: Any = getcurrent()
    current.throw(ValueError("thrown"))


RECURSION = "RecursionError: maximum recursion depth exceeded"

#: What does it, and the error that answers it.
RAISED: dict[str, tuple[Callable[[], Any], str]] = {
    "Exception": (raising(lambda: ValueError("oops")), "ValueError: oops"),
    "an Exception without a message": (raising(ValueError), "ValueError"),
    "SystemExit": (lambda: sys.exit(3), "SystemExit: 3"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt), "KeyboardInterrupt"),
    "GreenletExit": (raising(lambda: gevent.GreenletExit("x")), "GreenletExit: x"),
    "CallCancelled": (raising(gmprpc.CallCancelled), "CallCancelled"),
    "a Timeout": (raising(lambda: gevent.Timeout(5)), "Timeout: 5 seconds"),
    "a Timeout that strikes": (time_out, "Timeout: 0 seconds"),
    "BaseException": (raising(lambda: BaseException("base")), "BaseException: base"),
    "BaseExceptionGroup": (
        raising(lambda: BaseExceptionGroup("group", [KeyboardInterrupt(), SystemExit(1)])),
        "BaseExceptionGroup: group (2 sub-exceptions)",
    ),
    "StopIteration": (raising(lambda: StopIteration(5)), "StopIteration: 5"),
    "StopAsyncIteration": (raising(StopAsyncIteration), "StopAsyncIteration"),
    "GeneratorExit": (raising(GeneratorExit), "GeneratorExit"),
    "MemoryError": (raising(MemoryError), "MemoryError"),
    "SystemError": (raising(lambda: SystemError("x")), "SystemError: x"),
    "what is thrown at itself": (throw_at_itself, "ValueError: thrown"),
    "a TypeError of its own": (lambda: len(5), "TypeError: object of type 'int' has no len()"),  # type: ignore[arg-type]
    "what no exception is": (raising(lambda: 5), "TypeError: exceptions must derive from BaseException"),  # type: ignore[arg-type, return-value]
    "a text that is not Unicode": (raising(lambda: ValueError("\udcff")), "ValueError: \\udcff"),
    "what can't be pickled": (raising(lambda: KeyError(threading.Lock)), f"KeyError: {threading.Lock!r}"),
    "a cycle of causes": (raising(lambda: in_a_cycle(ValueError("effect"))), "ValueError: effect"),
    "what can't be told, since that raises": (raising(lambda: Unspeakable(ValueError)), "Unspeakable"),
    "what can't be told, since that exits": (raising(lambda: Unspeakable(SystemExit)), "Unspeakable"),
    "what can't be told, since that kills": (raising(lambda: Unspeakable(gevent.GreenletExit)), "Unspeakable"),
    "what can't be told, since that has no end": (raising(Endless), "Endless"),
    "what can't be told, since that is a number": (raising(Numeric), "Numeric"),
    "what holds what can't be shown": (raising(lambda: ValueError(Unspeakable(ValueError))), "ValueError"),
    "what takes a while to tell": (raising(Blocking), "Blocking: patience"),
    "an error response without its error": (raising(Evasive), "Evasive"),
}


@each_way
@pytest.mark.parametrize("fault, error", RAISED.values(), ids=RAISED.keys())
def test_whatever_a_handler_raises_is_an_error_answer(
    court: Court, way: Way, fault: Callable[[], Any], error: str
) -> None:
    court.assert_error(way, fault, error)


@each_way
def test_recursion_to_the_limit_is_an_error_answer(court: Court, way: Way) -> None:
    answers = court.answers(way, recurse)
    # Python says differently in different versions how it came to the limit.
    assert [answer[2][: len(RECURSION)] for answer in answers] == [RECURSION] * (not way.is_notification)
    assert len(court.logged()) == 1


@each_way
def test_an_exception_that_logging_itself_cant_take_is_an_error_answer(
    court: Court, way: Way, nothing_reaches_the_hub: list[Any]
) -> None:
    answers = court.answers(way, raising(Impostor))
    assert answers == ([] if way.is_notification else [[1, MSGID, "Impostor", None]])
    # There is no other place left to say it.
    assert [str(exc) for _, _, exc, _ in nothing_reaches_the_hub] == ["no class"]
    nothing_reaches_the_hub.clear()


@pytest.mark.parametrize("fault", [fault for fault, _ in RAISED.values()], ids=RAISED.keys())
@pytest.mark.parametrize("style", STYLES)
def test_hidden_errors_are_hidden_whatever_they_are(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, style: str, fault: Callable[[], Any]
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, hide_errors=True) as server,
        Peer.connect(server.address) as peer,
    ):
        ((_, _, error, _),) = Court(server, peer, caplog, others=0).answers(Way(style, False, False), fault)
    assert error.startswith("internal error (")
    assert [record.getMessage().endswith(error.removeprefix("internal error ")) for record in caplog.records] == [True]


@pytest.mark.parametrize("style", STYLES)
def test_a_huge_message_of_an_exception_arrives_whole(court: Court, style: str) -> None:
    text = "x" * 10_000_000
    court.assert_error(Way(style, False, False), raising(lambda: ValueError(text)), f"ValueError: {text}")


# What a handler returns.


class Unpackable:
    def __repr__(self) -> str:
        return repr(self)  # Nobody needs it.


class Shifting(dict[str, int]):
    """Changes while it is looked at."""

    def items(self) -> Any:
        for item in super().items():
            self[str(len(self))] = 1
            yield item


class Elusive:
    """A proxy of something that isn't there."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("not here")


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


def recursive() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


async def coroutine() -> None:
    """Never awaited, and not missed."""


def started() -> Any:
    made = coroutine()
    made.close()  # Otherwise Python warns that nobody did.
    return made


#: What makes the result, and the error that answers it.
RETURNED: dict[str, tuple[Callable[[], Any], str]] = {
    "an object": (Unpackable, "TypeError: can not serialize 'Unpackable' object"),
    "an object within": (lambda: {"a": [Unpackable()]}, "TypeError: can not serialize 'Unpackable' object"),
    "too large a number": (lambda: 2**64, "OverflowError: Integer value out of range"),
    "too small a number": (lambda: -(2**63) - 1, "OverflowError: Integer value out of range"),
    "a set": (lambda: {1, 2}, "TypeError: can not serialize 'set' object"),
    "a lone surrogate": (
        lambda: "\udcff",
        "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udcff' in position 0: surrogates not allowed",
    ),
    "a list in itself": (recursive, "ValueError: recursion limit exceeded."),
    "too deep a list": (lambda: nested(2000), "ValueError: recursion limit exceeded."),
    "a dict that changes": (lambda: Shifting(a=1), "RuntimeError: dictionary changed size during iteration"),
    "a generator": (lambda: (n for n in ()), "TypeError: can not serialize 'generator' object"),
    "a coroutine": (started, "TypeError: can not serialize 'coroutine' object"),
    "a class": (lambda: Unpackable, "TypeError: can not serialize 'type' object"),
    "a function": (lambda: nested, "TypeError: can not serialize 'function' object"),
    "an exception": (lambda: ValueError("oops"), "TypeError: can not serialize 'ValueError' object"),
    "what isn't there": (Elusive, "RuntimeError: not here"),
}


@each_way
@pytest.mark.parametrize("fault, error", RETURNED.values(), ids=RETURNED.keys())
def test_a_result_that_cant_be_packed_is_an_error_answer_and_logged(
    court: Court, way: Way, fault: Callable[[], Any], error: str
) -> None:
    if way.is_notification:
        assert court.answers(way, fault) == []
        assert court.logged() == []  # Nobody wants the result.
    else:
        court.assert_error(way, fault, error)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "obstacle", [ValueError, SystemExit, gevent.GreenletExit, StopIteration], ids=lambda obstacle: obstacle.__name__
)
def test_a_result_on_which_a_packer_hook_fails_is_an_error_answer(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, style: str, obstacle: type[BaseException]
) -> None:
    def default(obj: Any) -> Any:
        raise obstacle("hook")

    with (
        gmprpc.Server(("127.0.0.1", 0), service, packer_options={"default": default}) as server,
        Peer.connect(server.address) as peer,
    ):
        court = Court(server, peer, caplog, others=0)
        court.assert_error(Way(style, False, False), Unpackable, f"{obstacle.__name__}: hook")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "obstacle", [ValueError, SystemExit, gevent.GreenletExit, StopIteration], ids=lambda obstacle: obstacle.__name__
)
def test_an_error_on_which_a_packer_hook_fails_is_an_error_answer(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, style: str, obstacle: type[BaseException]
) -> None:
    def default(obj: Any) -> Any:
        raise obstacle("hook")

    with (
        gmprpc.Server(("127.0.0.1", 0), service, packer_options={"default": default}) as server,
        Peer.connect(server.address) as peer,
    ):
        court = Court(server, peer, caplog, others=0)
        answers = court.answers(Way(style, False, False), raising(lambda: gmprpc.ErrorResponse(Unpackable())))
    assert answers == [[1, MSGID, f"an error that can't be sent: {obstacle.__name__}: hook", None]]


def test_a_dict_that_changes_in_a_packer_hook_is_an_error_answer(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    result: dict[str, Any] = {"a": Unpackable(), "b": Unpackable()}
    with (
        gmprpc.Server(("127.0.0.1", 0), service, packer_options={"default": lambda _: result.clear()}) as server,
        Peer.connect(server.address) as peer,
    ):
        court = Court(server, peer, caplog, others=0)
        error = "RuntimeError: dictionary changed size during iteration"
        court.assert_error(Way("function", False, False), lambda: result, error)


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_of_64_mib_arrives_whole(court: Court, style: str) -> None:
    result = b"0123456789abcdef" * (4 * 1024 * 1024)
    ((_, _, error, received),) = court.answers(Way(style, False, False), lambda: result)
    assert error is None
    assert received == result


def test_a_result_that_is_longer_than_messagepack_can_say_is_an_error_answer(court: Court, tmp_path: Path) -> None:
    # All of it is a hole: it takes no room anywhere.
    with open(tmp_path / "hole", "w+b") as file:
        file.truncate(2**32)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as hole, memoryview(hole) as view:
            court.assert_error(Way("function", False, False), lambda: view, "ValueError: memoryview is too large")


def test_a_greenlet_that_is_returned_and_killed_is_an_error_answer(court: Court) -> None:
    def spawn() -> gevent.Greenlet:
        spawned = gevent.spawn(gevent.sleep, 1000)
        spawned.kill(block=False)
        return spawned

    court.assert_error(Way("function", False, False), spawn, "GreenletExit")


def test_an_exception_that_is_none_and_cant_be_shown_is_an_error_answer(court: Court) -> None:
    def complete() -> Any:
        outcome: AsyncResult[Any] = AsyncResult()
        outcome.set_exception(Unspeakable(ValueError).__str__)  # type: ignore[call-overload]
        return outcome

    ((_, _, error, _),) = court.answers(Way("function", False, False), complete)
    assert error.startswith("TypeError: ")


# A handler that is killed.


def kill_itself() -> None:
    current: Any = getcurrent()
    current.kill()


def exit_itself() -> None:
    raise gevent.GreenletExit


@each_way_in_its_own_greenlet
def test_a_handler_that_kills_itself_is_an_error_answer(court: Court, way: Way) -> None:
    court.assert_error(way, kill_itself, "GreenletExit")


@each_way_in_its_own_greenlet
@pytest.mark.parametrize("strike", ["kill", "killall"])
def test_a_handler_that_kills_itself_in_a_moment_has_answered_by_then(court: Court, way: Way, strike: str) -> None:
    killed: list[Any] = []

    def fault() -> str:
        killed.append(getcurrent())
        if strike == "kill":
            killed[0].kill(block=False)
        else:
            gevent.killall(killed, block=False)
        return "done"

    assert court.answers(way, fault) == ([] if way.is_notification else [[1, MSGID, None, "done"]])
    wait_until(lambda: killed[0].dead)
    assert court.logged() == []


@pytest.mark.parametrize("exception", [gevent.GreenletExit, ValueError("stray")], ids=["GreenletExit", "ValueError"])
def test_a_kill_that_comes_late_doesnt_strike_the_next_request(
    service: gmprpc.Service, court: Court, peer: Peer, exception: Any
) -> None:
    greenlets: list[Any] = []
    go = Event()

    def fault() -> None:
        greenlets.append(getcurrent())
        greenlets[0].kill(exception, block=False)

    @service.method
    def wait() -> str:
        greenlets.append(getcurrent())
        go.wait()
        return "undisturbed"

    service.register(fault, "fault")
    # Both in one batch, so that the second begins before the first one's greenlet is struck.
    peer.send([0, 1, "fault", []], [0, 2, "wait", []])
    assert peer.receive() == [1, 1, None, None]
    wait_until(lambda: greenlets[0].dead)
    go.set()
    assert peer.receive() == [1, 2, None, "undisturbed"]
    assert court.logged() == []


KILLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "kill": (lambda victim: victim.kill(), "GreenletExit"),
    "kill with an exception": (lambda victim: victim.kill(ValueError("from outside")), "ValueError: from outside"),
    "kill with a BaseException": (lambda victim: victim.kill(SystemExit(1)), "SystemExit: 1"),
    "kill with a call's end": (lambda victim: victim.kill(gmprpc.CallCancelled("enough")), "CallCancelled: enough"),
    "kill twice": (lambda victim: (victim.kill(block=False), victim.kill()), "GreenletExit"),
    "killall": (lambda victim: gevent.killall([victim]), "GreenletExit"),
}


@each_way_in_its_own_greenlet
@pytest.mark.parametrize("kill, error", KILLS.values(), ids=KILLS.keys())
def test_a_handler_that_is_killed_from_outside_is_an_error_answer(
    court: Court, way: Way, kill: Callable[[Any], Any], error: str
) -> None:
    victims: list[Any] = []

    def fault() -> None:
        victims.append(getcurrent())
        gevent.sleep(1000)

    def strike() -> None:
        wait_until(lambda: victims)
        kill(victims[0])

    killer = gevent.spawn(strike)
    court.assert_error(way, fault, error)
    killer.get()
    assert victims[0].dead


@each_way_in_its_own_greenlet
def test_a_handler_that_is_killed_while_it_dies_is_an_error_answer(court: Court, way: Way) -> None:
    victims: list[Any] = []
    dying = Event()

    def fault() -> None:
        victims.append(getcurrent())
        try:
            gevent.sleep(1000)
        finally:
            dying.set()
            gevent.sleep(1000)  # The second one strikes here.

    def strike() -> None:
        wait_until(lambda: victims)
        victims[0].kill(ValueError("first"), block=False)
        dying.wait()
        victims[0].kill(ValueError("second"))

    killer = gevent.spawn(strike)
    court.assert_error(way, fault, "ValueError: second")
    killer.get()
    assert victims[0].dead


def test_a_handler_that_is_killed_while_its_error_is_told_is_answered_all_the_same(court: Court) -> None:
    victims: list[Any] = []

    class Slow(Exception):
        def __str__(self) -> str:
            victims.append(getcurrent())
            if len(victims) == 1:
                gevent.sleep(1000)
            return "told to the log"

    def strike() -> None:
        wait_until(lambda: victims)
        victims[0].kill()

    killer = gevent.spawn(strike)
    ((_, _, error, _),) = court.answers(Way("function", False, False), raising(Slow))
    assert error == "Slow"
    killer.get()
    assert victims[0].dead


@each_way_in_its_own_greenlet
def test_a_handler_that_takes_no_notice_of_its_killing_is_answered_as_if_nothing_was(court: Court, way: Way) -> None:
    victims: list[Any] = []

    def fault() -> str:
        victims.append(getcurrent())
        try:
            gevent.sleep(1000)
        except gevent.GreenletExit:
            return "still here"
        return "not killed"

    def strike() -> None:
        wait_until(lambda: victims)
        victims[0].kill()

    killer = gevent.spawn(strike)
    assert court.answers(way, fault) == ([] if way.is_notification else [[1, MSGID, None, "still here"]])
    killer.get()  # Who kills with `block` isn't kept waiting: the greenlet takes no other request.
    assert victims[0].dead
    assert court.logged() == []


# Replies.


def drop_in_a_thread(pool: ThreadPool, reply: gmprpc.Reply) -> None:
    pool.spawn(lambda reply: None, reply)


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    pool = ThreadPool(4)
    yield pool
    pool.kill()


@pytest.mark.parametrize("has_blocked", [False, True], ids=["at once", "after blocking"])
def test_a_reply_that_is_dropped_is_an_error_answer(service: gmprpc.Service, court: Court, has_blocked: bool) -> None:
    def drop(secret: str) -> gmprpc.Reply:
        if has_blocked:
            gevent.sleep(0)
        return gmprpc.Reply()

    for name, deferred in (("drop", False), ("forget", True)):
        service.register(drop if name == "drop" else lambda reply, secret: None, name, deferred=deferred)
        court.peer.send([2, name, [SECRET]], [0, MSGID, name, [SECRET]])
        assert court.peer.receive() == [1, MSGID, "the reply was dropped unanswered", None]
    assert court.answers_so_far() == []
    assert court.logged() == ["notification of drop from PEER failed: the reply was dropped unanswered"]


def test_a_reply_that_is_dropped_in_a_cycle_or_a_thread_is_an_error_answer(
    service: gmprpc.Service, court: Court, pool: ThreadPool
) -> None:
    def lose(reply: gmprpc.Reply, secret: str) -> None:
        cycle: list[Any] = [reply]
        cycle.append(cycle)

    service.reg_cb(lose=lose, hand_over=lambda reply, secret: drop_in_a_thread(pool, reply))
    answers = []
    for method in ("lose", "hand_over"):
        court.peer.send([0, MSGID, method, [SECRET]])
        answers += court.answers_so_far()
        collected()
    wait_until(lambda: court.server.statistics()["in_flight"] == 1)
    answers += court.answers_so_far()
    assert answers == [[1, MSGID, "the reply was dropped unanswered", None]] * 2
    assert court.logged() == []


@pytest.mark.parametrize("style", ["function", "callback"])
def test_who_never_answers_holds_up_nobody(service: gmprpc.Service, court: Court, style: str) -> None:
    kept: list[gmprpc.Reply | None] = []
    go = Event()
    if style == "callback":
        service.reg_cb(never=lambda reply, secret: kept.append(reply))
    else:
        service.register(lambda secret: go.wait() and None, "never")
    court.peer.send(*([0, number, "never", [SECRET]] for number in range(20)), [2, "never", [SECRET]])
    assert court.answers_so_far() == []
    assert court.server.statistics()["in_flight"] == (21 if style == "callback" else 22)
    # In the end they do.
    go.set()
    for reply in kept:
        if reply is not None:
            reply.result()
    answers = sorted(court.peer.receive() for _ in range(20))
    assert answers == [[1, number, None, None] for number in range(20)]


@pytest.mark.parametrize("verbs", [("result", "error"), ("error", "result"), ("result", "result"), ("error", "error")])
@pytest.mark.parametrize("where", ["callback", "greenlets", "threads", "callback and thread"])
def test_a_reply_that_is_answered_twice_answers_once(
    service: gmprpc.Service, court: Court, pool: ThreadPool, verbs: tuple[str, str], where: str
) -> None:
    outcomes: list[str] = []
    go = Event()

    def answer(reply: gmprpc.Reply, verb: str, value: str) -> None:
        try:
            getattr(reply, verb)(value)
        except gmprpc.AlreadyAnswered:
            outcomes.append("refused")
        else:
            outcomes.append(f"{verb} {value}")

    def twice(reply: gmprpc.Reply, secret: str) -> None:
        first, second = ((reply, verb, value) for verb, value in zip(verbs, ("one", "two"), strict=True))
        if where == "callback":
            answer(*first)
            answer(*second)
        elif where == "greenlets":
            gevent.spawn(answer, *first)
            gevent.spawn(answer, *second)
        elif where == "threads":
            pool.spawn(answer, *first)
            pool.spawn(answer, *second)
        else:
            pool.spawn(answer, *first)
            answer(*second)

    service.reg_cb(twice=twice)
    court.peer.send([0, MSGID, "twice", [SECRET]])
    _, msgid, error, result = court.peer.receive()
    wait_until(lambda: len(outcomes) == 2)
    go.set()
    assert court.answers_so_far() == []
    assert msgid == MSGID
    said = f"result {result}" if error is None else f"error {error}"
    assert sorted(outcomes) == sorted(["refused", said])
    assert court.logged() == []


@pytest.mark.parametrize("verb", ["result", "error", "set_exception"])
def test_a_native_thread_may_answer_whatever_it_likes(
    service: gmprpc.Service, court: Court, pool: ThreadPool, verb: str
) -> None:
    value: Any = ValueError("oops") if verb == "set_exception" else Unpackable()
    service.reg_cb(bad=lambda reply, secret: pool.spawn(getattr(reply, verb), value))
    court.peer.send([0, MSGID, "bad", [SECRET]])
    error = {
        "result": "TypeError: can not serialize 'Unpackable' object",
        "error": "an error that can't be sent: TypeError: can not serialize 'Unpackable' object",
        "set_exception": "ValueError: oops",
    }[verb]
    assert court.peer.receive() == [1, MSGID, error, None]
    assert court.answers_so_far() == []
    assert len(court.logged()) == (verb != "error")


def test_an_async_result_that_is_set_twice_answers_once(service: gmprpc.Service, court: Court) -> None:
    made: list[AsyncResult[Any]] = []

    @service.method
    def bad(secret: str) -> AsyncResult[Any]:
        made.append(AsyncResult())
        return made[0]

    court.peer.send([0, MSGID, "bad", [SECRET]])
    wait_until(lambda: made)
    # gevent lets the second overwrite the first, until somebody has been told.
    made[0].set("one")
    made[0].set("two")
    assert court.peer.receive() == [1, MSGID, None, "two"]
    made[0].set_exception(ValueError("three"))
    assert court.answers_so_far() == []


# When the peer has gone.


def reset(peer: Peer) -> None:
    """End ``peer``'s connection without a goodbye."""
    peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def test_an_answer_after_the_peer_has_gone_is_dropped_and_counted(
    service: gmprpc.Service, server: gmprpc.Server, pool: ThreadPool
) -> None:
    go, done = Event(), Event()
    replies: list[gmprpc.Reply] = []
    told: list[bool] = []

    @service.method
    def slow() -> str:
        go.wait()
        done.set()
        return "too late"

    def later(reply: gmprpc.Reply) -> None:
        replies.append(reply)
        reply.on_cancel(lambda: told.append(reply.cancelled()))

    service.reg_cb(later=later)
    peer = Peer.connect(server.address)
    peer.send([0, 1, "slow", []], *([0, number, "later", []] for number in (2, 3, 4)))
    peer.send([0, 5, "echo", [b"x" * 100_000]])
    wait_until(lambda: len(replies) == 3 and server.statistics()["in_flight"] == 5)
    reset(peer)
    wait_until(lambda: len(server.connections) == 1)
    assert all(reply.cancelled() for reply in replies)
    wait_until(lambda: len(told) == 3)
    assert told == [True] * 3
    replies[0].result("too late")
    replies[1].error("too late")
    pool.spawn(replies[2].result, "too late").get()
    go.set()
    done.wait()
    wait_until(lambda: server.statistics()["dropped_answers"] == 4)
    with pytest.raises(gmprpc.AlreadyAnswered):
        replies[0].result("later still")


@pytest.mark.parametrize("fault", [fault for fault, _ in RAISED.values()], ids=RAISED.keys())
def test_a_handler_that_raises_after_the_peer_has_gone_is_logged(
    service: gmprpc.Service, server: gmprpc.Server, caplog: pytest.LogCaptureFixture, fault: Callable[[], Any]
) -> None:
    caplog.set_level(logging.WARNING)
    begun, go = Event(), Event()

    def bad(secret: str) -> None:
        begun.set()
        go.wait()
        fault()

    service.register(bad)
    peer = Peer.connect(server.address)
    peer.send([0, MSGID, "bad", [SECRET]])
    begun.wait()
    reset(peer)
    wait_until(lambda: len(server.connections) == 1)
    go.set()
    wait_until(lambda: caplog.records)
    assert [record.getMessage().partition(" from ")[0] for record in caplog.records] == [f"request {MSGID} of bad"]


@pytest.mark.parametrize(
    "obstacle", [ValueError, SystemExit, KeyboardInterrupt, gevent.Timeout, gevent.GreenletExit, BaseException]
)
def test_an_on_cancel_that_raises_is_logged_and_keeps_nobody_from_being_told(
    service: gmprpc.Service, server: gmprpc.Server, caplog: pytest.LogCaptureFixture, obstacle: type[BaseException]
) -> None:
    caplog.set_level(logging.WARNING)
    replies: list[gmprpc.Reply] = []
    told: list[str] = []

    def fail(param: str) -> None:
        raise obstacle

    def later(reply: gmprpc.Reply, secret: str) -> None:
        reply.on_cancel(lambda: fail(secret))
        reply.on_cancel(lambda: told.append("told"))
        replies.append(reply)

    service.reg_cb(later=later)
    peer = Peer.connect(server.address)
    peer.send([0, MSGID, "later", [SECRET]])
    wait_until(lambda: replies)
    reset(peer)
    wait_until(lambda: told)
    replies[0].on_cancel(lambda: fail(SECRET))  # At once, since it is cancelled.
    replies[0].result("too late")
    expected = 0 if obstacle is gevent.GreenletExit else 2
    wait_until(lambda: len(caplog.records) >= expected)
    assert [record.getMessage() for record in caplog.records] == ["a callback of on_cancel failed"] * expected


def test_a_handler_may_complete_a_reply_in_its_own_cancellation(service: gmprpc.Service, server: gmprpc.Server) -> None:
    done = Event()

    def later(reply: gmprpc.Reply) -> None:
        def give_up() -> None:
            reply.error("given up")
            done.set()

        reply.on_cancel(give_up)

    service.reg_cb(later=later)
    peer = Peer.connect(server.address)
    peer.send([0, 1, "later", []])
    wait_until(lambda: server.statistics()["in_flight"] == 2)
    reset(peer)
    done.wait()
    wait_until(lambda: server.statistics()["in_flight"] == 1)


# What a handler does to what is around it.


def test_a_handler_that_computes_delays_others_but_loses_nothing(service: gmprpc.Service, court: Court) -> None:
    @service.method
    def compute(count: int) -> int:
        return sum(number % 7 for number in range(count))

    court.peer.send(*([0, number, "echo", [number]] for number in range(100)), [0, 100, "compute", [1_000_000]])
    court.peer.send(*([0, number, "echo", [number]] for number in range(101, 200)))
    answers = [court.peer.receive() for _ in range(200)]
    assert [answer[1] for answer in answers] == list(range(200))
    assert answers[100] == [1, 100, None, 2_999_997]
    assert court.logged() == []


@pytest.mark.parametrize("way", ["close", "abort", "finish"])
@pytest.mark.parametrize("has_blocked", [False, True], ids=["at once", "after blocking"])
def test_a_handler_may_end_its_own_connection(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, way: str, has_blocked: bool
) -> None:
    @service.method
    def end(secret: str) -> str:
        if has_blocked:
            gevent.sleep(0)
        connection = gmprpc.current_call().connection
        getattr(connection, way)()
        getattr(connection, way)()
        return "the end"

    peer.send([0, MSGID, "end", [SECRET]])
    assert peer.receive_rest() == ([[1, MSGID, None, "the end"]] if way == "finish" else [])
    peer.close()
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["dropped_answers"] == (way != "finish")


def test_greenlets_that_a_handler_spawns_may_outlive_it_and_its_connection(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    go, done = Event(), Event()

    def work() -> None:
        go.wait()
        done.set()

    service.register(lambda: gevent.spawn(work) and None, "start")
    assert peer.call("start") == [1, 0, None, None]
    peer.close()
    wait_until(lambda: len(server.connections) == 1)
    go.set()
    done.wait()


class Broken:
    """A stream to which nothing can be written."""

    def write(self, text: str) -> NoReturn:
        raise ValueError("broken")

    flush = write


def test_a_handler_that_breaks_the_standard_streams_is_answered(
    court: Court, monkeypatch: pytest.MonkeyPatch, nothing_reaches_the_hub: list[Any]
) -> None:
    def fault() -> None:
        sys.stdout = sys.stderr = Broken()
        raise ValueError("oops")

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # They are whole again after the test.
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    # Neither the log nor gevent can say anything now.
    monkeypatch.delattr(gevent.get_hub(), "handle_error")
    monkeypatch.setitem(vars(gevent.get_hub()), "exception_stream", Broken())
    handler = logging.StreamHandler(Broken())
    logger = logging.getLogger("gmprpc")
    logger.addHandler(handler)
    try:
        for style in STYLES:
            answers = court.answers(Way(style, False, False), fault)
            assert answers == [[1, MSGID, "ValueError: oops", None]]
    finally:
        logger.removeHandler(handler)


def test_a_handler_may_forget_or_replace_its_own_method(service: gmprpc.Service, court: Court) -> None:
    def replaced(too: int, many: int, params: int) -> None:
        """Not what is at work."""

    def fault(how: str) -> None:
        if how == "forget":
            service.unregister("fault")
        else:
            service.register(replaced, "fault")
        raise TypeError(how)

    for number, how in enumerate(("forget", "replace")):
        service.register(fault)
        court.peer.send([0, number, "fault", [how]])
        assert court.peer.receive() == [1, number, f"TypeError: {how}", None]
    assert court.peer.call("fault")[2].startswith("wrong params for fault(too, many, params)")
    service.unregister("fault")
    assert court.peer.call("fault") == [1, 0, 'No such method "fault" found', None]


def test_calls_that_are_at_work_end_as_they_began_when_their_method_is_replaced(
    service: gmprpc.Service, court: Court
) -> None:
    go = Event()
    service.register(lambda: go.wait() and "old", "method")
    court.peer.send([0, 1, "method", []])
    wait_until(lambda: court.server.statistics()["in_flight"] == 2)
    service.register(lambda: "new", "method")
    assert court.peer.call("method", msgid=2) == [1, 2, None, "new"]
    go.set()
    assert court.peer.receive() == [1, 1, None, "old"]


# Hooks.

HOOKS = ("on_accept", "on_dispatch", "on_eof", "on_error")


#: What a hook does, and the error that answers a call if it is on_dispatch.
HOOK_FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (raising(lambda: ValueError("oops")), "ValueError: oops"),
    "exits": (lambda: sys.exit(3), "SystemExit: 3"),
    "interrupts": (raising(KeyboardInterrupt), "KeyboardInterrupt"),
    "times out": (time_out, "Timeout: 0 seconds"),
    "raises a BaseException": (raising(lambda: BaseException("base")), "BaseException: base"),
    "stops an iteration": (raising(StopIteration), "StopIteration"),
    "raises what can't be told": (raising(lambda: Unspeakable(ValueError)), "Unspeakable"),
    "kills itself": (kill_itself, "GreenletExit"),
    "is over at once": (exit_itself, "GreenletExit"),
}


@pytest.mark.parametrize("fault, error", HOOK_FAULTS.values(), ids=HOOK_FAULTS.keys())
@pytest.mark.parametrize("has_blocked", [False, True], ids=["at once", "after blocking"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_at_fault_hurts_nobody_else(
    service: gmprpc.Service,
    caplog: pytest.LogCaptureFixture,
    hook: str,
    fault: Callable[[], Any],
    error: str,
    has_blocked: bool,
) -> None:
    caplog.set_level(logging.WARNING, "gmprpc.server")
    is_at_fault = True

    def at_fault(*_: Any) -> None:
        if is_at_fault:
            if has_blocked:
                gevent.sleep(0)
            fault()

    options: dict[str, Any] = {hook: at_fault}
    with gmprpc.Server(("127.0.0.1", 0), service, **options) as server:
        with Peer.connect(server.address) as peer:
            if hook == "on_accept":
                assert peer.receive_rest() == []  # It is refused.
            elif hook == "on_dispatch":
                peer.send([2, "echo", [SECRET]])
                assert peer.call("echo", SECRET) == [1, 0, error, None]
            else:
                peer.send_bytes(b"" if hook == "on_eof" else b"\xc1")
                peer.shutdown()
                assert peer.receive_rest() == []
        wait_until(lambda: not server._greenlets and not server.connections)
        is_at_fault = False
        with Peer.connect(server.address) as peer:
            assert peer.call("echo", "next") == [1, 0, None, "next"]
    if hook != "on_dispatch":
        of_hooks = [record for record in caplog.records if record.name == "gmprpc.server"]
        # Who ends its own greenlet meant to.
        assert len(of_hooks) == (error != "GreenletExit")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_blocks_holds_up_nobody_else(service: gmprpc.Service, hook: str) -> None:
    go = Event()
    blocked: list[str] = []

    def block(*_: Any) -> None:
        if not blocked:
            blocked.append("here")
            go.wait()

    options: dict[str, Any] = {hook: block}
    with gmprpc.Server(("127.0.0.1", 0), service, **options) as server, Peer.connect(server.address) as peer:
        if hook in ("on_eof", "on_error"):
            peer.send_bytes(b"" if hook == "on_eof" else b"\xc1")
            peer.shutdown()
        else:
            peer.send([0, 1, "echo", ["held up"]])
        wait_until(lambda: blocked)
        with Peer.connect(server.address) as other:
            assert other.call("echo", "quick") == [1, 0, None, "quick"]
        go.set()
        if hook in ("on_accept", "on_dispatch"):
            assert peer.receive() == [1, 1, None, "held up"]
        else:
            assert peer.receive_rest() == []
