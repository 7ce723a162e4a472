"""Observers are told of every call when it starts and, just once, how it has ended."""

from __future__ import annotations

import contextvars
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gevent
import pytest
from gevent.event import AsyncResult, Event

import gmprpc
from gmprpc import Outcome, observing
from gmprpc.exceptions import ErrorResponse
from gmprpc.observing import Observing
from gmprpc.streams import PlainStream

from .helpers import Peer, collected, wait_until
from .programs import FORKING_PYTHON, Program


class End(NamedTuple):
    """What an observer was told at the end of a call."""

    method: str
    msgid: int | None
    outcome: Outcome
    error: BaseException | None


class Recorder:
    """An observer that keeps what it was told; the number of the call is its token."""

    def __init__(self) -> None:
        self.started: list[gmprpc.Call] = []
        self.ends: list[End] = []
        self.durations: list[float] = []
        self.tokens: list[int] = []

    def call_started(self, call: gmprpc.Call) -> int:
        self.started.append(call)
        return len(self.started)

    def call_ended(
        self, call: gmprpc.Call, outcome: Outcome, duration: float, token: Any, error: BaseException | None
    ) -> None:
        assert call is self.started[token - 1]
        self.ends.append(End(call.method, call.msgid, outcome, error))
        self.durations.append(duration)
        self.tokens.append(token)

    @property
    def outcomes(self) -> list[tuple[str, int | None, str]]:
        """How which call has ended."""
        return [(end.method, end.msgid, str(end.outcome)) for end in self.ends]

    def wait_all(self) -> None:
        """Wait until every call that has started has ended."""
        wait_until(lambda: len(self.ends) == len(self.started))

    def check(self) -> None:
        """Each call has ended, and only once."""
        assert sorted(self.tokens) == list(range(1, len(self.started) + 1))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.check()


@pytest.fixture
def server(service: gmprpc.Service, recorder: Recorder) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder]) as server:
        yield server


def test_a_request_and_a_notification_end_ok(peer: Peer, recorder: Recorder) -> None:
    peer.send([2, "echo", ["x"]])
    assert peer.call("add", 1, 2, msgid=7) == [1, 7, None, 3]
    recorder.wait_all()
    assert recorder.ends == [End("echo", None, Outcome.OK, None), End("add", 7, Outcome.OK, None)]
    assert all(0 <= duration < 10 for duration in recorder.durations)


def test_an_observer_sees_the_call_in_the_greenlet_of_its_handler(service: gmprpc.Service) -> None:
    variable: contextvars.ContextVar[int | None] = contextvars.ContextVar("variable", default=None)
    seen: list[Any] = []

    class Observer(gmprpc.Observer):
        def call_started(self, call: gmprpc.Call) -> gmprpc.Call:
            assert call == gmprpc.current_call()
            variable.set(call.msgid)
            seen.append((call.peer, call.connection, gevent.getcurrent()))
            return call

    @service.method
    def handle() -> int | None:
        call = gmprpc.current_call()
        assert seen == [(call.peer, call.connection, gevent.getcurrent())]
        return variable.get()

    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[Observer()]) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("handle", msgid=3) == [1, 3, None, 3]


def test_the_end_is_told_in_the_context_of_the_start(service: gmprpc.Service, replies: list[Any]) -> None:
    variable: contextvars.ContextVar[int | None] = contextvars.ContextVar("variable", default=None)
    seen: list[Any] = []

    class First(gmprpc.Observer):
        def call_ended(self, call: gmprpc.Call, *_: Any) -> None:
            gevent.sleep(0.001)  # Nobody else's is in force meanwhile.
            seen.append((call.msgid, variable.get()))

    class Second(gmprpc.Observer):
        def call_started(self, call: gmprpc.Call) -> None:
            variable.set(call.msgid)

    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[First(), Second()]) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 1, "later", []], [0, 2, "fail", ["x"]], [0, 3, "echo", [1]])
        wait_until(lambda: len(seen) == 2)
        replies.pop().set(None)
        wait_until(lambda: len(seen) == 3)
    assert seen == [(2, 2), (3, 3), (1, 1)]
    assert variable.get() is None


def test_built_in_and_unknown_methods_are_observed(peer: Peer, recorder: Recorder) -> None:
    peer.call("$/health", msgid=1)
    peer.call("nosuch", 5, msgid=2)
    peer.send([2, "nosuch", []])
    peer.call("$/list", msgid=3)
    recorder.wait_all()
    assert recorder.outcomes == [
        ("$/health", 1, "ok"),
        ("nosuch", 2, "unknown_method"),
        ("nosuch", None, "unknown_method"),
        ("$/list", 3, "ok"),
    ]


class Odd:
    """What can't be packed."""


def raise_(exc: BaseException) -> Any:
    raise exc


def takes_one(_: Any) -> None:
    """Takes a param."""


HANDLERS: list[tuple[str, Callable[..., Any], Outcome, type[BaseException]]] = [
    ("raises", lambda: raise_(KeyError("x")), Outcome.FAILED, KeyError),
    ("exits", lambda: raise_(SystemExit(3)), Outcome.FAILED, SystemExit),
    ("is killed", lambda: raise_(gevent.GreenletExit()), Outcome.FAILED, gevent.GreenletExit),
    ("cancels itself", lambda: raise_(gmprpc.CallCancelled()), Outcome.FAILED, gmprpc.CallCancelled),
    ("chooses an error", lambda: raise_(ErrorResponse(["no", 1])), Outcome.ERROR, ErrorResponse),
    ("raises a TypeError", lambda: raise_(TypeError("x")), Outcome.FAILED, TypeError),
    ("takes a param", takes_one, Outcome.INVALID_PARAMS, TypeError),
]


@pytest.mark.parametrize("is_request", [True, False])
@pytest.mark.parametrize("hide_errors", [True, False])
def test_how_a_handler_fails_is_told(
    service: gmprpc.Service, recorder: Recorder, is_request: bool, hide_errors: bool
) -> None:
    for name, handler, _, _ in HANDLERS:
        service.register(handler, name)
    msgid = 4 if is_request else None
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder], hide_errors=hide_errors) as server,
        Peer.connect(server.address) as peer,
    ):
        for name, *_ in HANDLERS:
            peer.send([0, msgid, name, []] if is_request else [2, name, []])
            if is_request:
                peer.receive()
        wait_until(lambda: len(recorder.ends) == len(HANDLERS))
    assert [(*end[:3], type(end.error)) for end in recorder.ends] == [
        (name, msgid, outcome, kind) for name, _, outcome, kind in HANDLERS
    ]


def test_a_result_that_cannot_be_packed_is_a_failure(service: gmprpc.Service, peer: Peer, recorder: Recorder) -> None:
    service.register(Odd, "odd")
    service.register(lambda: 2**64, "large")
    service.register(lambda: "\udc80", "surrogate")
    for method in ("odd", "large", "surrogate"):
        assert peer.call(method)[2]
    peer.send([2, "odd", []])
    peer.call("echo", None)
    recorder.wait_all()
    assert recorder.outcomes == [
        ("odd", 0, "failed"),
        ("large", 0, "failed"),
        ("surrogate", 0, "failed"),
        ("odd", None, "ok"),  # Nobody is answered: nothing has to be packed.
        ("echo", 0, "ok"),
    ]


def test_large_results_and_batches_are_told_like_others(peer: Peer, recorder: Recorder) -> None:
    peer.send(*([0, number, "echo", ["x" * 300_000 if number % 10 == 0 else number]] for number in range(50)))
    for number in range(50):
        assert peer.receive()[:3] == [1, number, None]
    recorder.wait_all()
    assert recorder.outcomes == [("echo", number, "ok") for number in range(50)]


# Deferred replies


@pytest.fixture
def replies(service: gmprpc.Service) -> list[Any]:
    """What the methods ``defer`` (a Reply) and ``later`` (an AsyncResult) have to answer with, for the test to set."""
    replies: list[Any] = []

    @service.method(deferred=True)
    def defer(reply: gmprpc.Reply) -> None:
        replies.append(reply)

    @service.method
    def later() -> AsyncResult:
        replies.append(AsyncResult())
        return replies[-1]

    return replies


@pytest.mark.parametrize("method", ["defer", "later"])
@pytest.mark.parametrize(
    "complete, outcome",
    [
        (lambda reply: reply.set(5), Outcome.OK),
        (lambda reply: reply.set_exception(ValueError("x")), Outcome.FAILED),
        (lambda reply: reply.set_exception(ErrorResponse("x")), Outcome.ERROR),
        (lambda reply: reply.set(Odd()), Outcome.FAILED),
    ],
)
def test_a_deferred_reply_ends_when_it_is_set(
    replies: list[Any], peer: Peer, recorder: Recorder, method: str, complete: Callable[[Any], None], outcome: Outcome
) -> None:
    peer.send([0, 1, method, []])
    wait_until(lambda: replies)
    assert peer.call("echo", 1, msgid=2) == [1, 2, None, 1]
    wait_until(lambda: recorder.ends)
    assert recorder.outcomes == [("echo", 2, "ok")]
    complete(replies.pop())
    assert peer.receive()[:2] == [1, 1]
    recorder.wait_all()
    assert recorder.outcomes[1:] == [(method, 1, outcome)]


def test_a_reply_that_is_set_at_once_ends_once(service: gmprpc.Service, peer: Peer, recorder: Recorder) -> None:
    service.reg_cb(now=lambda reply: reply.result(5), wrong=lambda reply: reply.error("no"))
    assert peer.call("now", msgid=1) == [1, 1, None, 5]
    assert peer.call("wrong", msgid=2) == [1, 2, "no", None]
    recorder.wait_all()
    assert recorder.outcomes == [("now", 1, "ok"), ("wrong", 2, "error")]


def test_a_reply_that_is_dropped_unanswered_is_told_so(replies: list[Any], peer: Peer, recorder: Recorder) -> None:
    peer.send([0, 1, "defer", []])
    wait_until(lambda: replies)
    replies.clear()
    collected()
    assert peer.receive() == [1, 1, "the reply was dropped unanswered", None]
    recorder.wait_all()
    assert recorder.outcomes == [("defer", 1, "dropped")]


def test_a_deferred_notification_ends_when_it_completes(
    service: gmprpc.Service, replies: list[Any], peer: Peer, recorder: Recorder
) -> None:
    peer.send([2, "later", []], [2, "later", []], [0, 1, "echo", [1]])
    peer.receive()
    wait_until(lambda: len(recorder.ends) == 1)
    replies[0].set(None)
    replies[1].set_exception(ValueError("x"))
    recorder.wait_all()
    assert sorted(recorder.outcomes[1:]) == [("later", None, "failed"), ("later", None, "ok")]


# Lost connections


@pytest.mark.parametrize("method", ["defer", "later"])
@pytest.mark.parametrize("is_answered", [True, False])
def test_what_is_deferred_ends_when_the_connection_is_lost(
    server: gmprpc.Server, replies: list[Any], recorder: Recorder, method: str, is_answered: bool
) -> None:
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, method, []])
        wait_until(lambda: replies)
        peer.reset()
        recorder.wait_all()
    assert recorder.outcomes == [(method, 1, "dropped")]
    if is_answered:
        replies[0].set(5)
    replies.clear()
    collected()
    gevent.sleep(0)
    assert len(recorder.ends) == 1


def test_a_handler_whose_connection_is_lost_ends_dropped(
    service: gmprpc.Service, server: gmprpc.Server, recorder: Recorder
) -> None:
    go = Event()
    service.register(go.wait, "wait")
    service.register(lambda: go.wait() and raise_(ValueError()), "fail_late")
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "wait", []], [0, 2, "fail_late", []], [2, "wait", []])
        wait_until(lambda: len(recorder.started) == 3)
        peer.reset()
    wait_until(lambda: not server.connections)
    assert not recorder.ends
    go.set()
    recorder.wait_all()
    # There was no answer that could be dropped to the last one.
    assert sorted(recorder.outcomes, key=str) == [
        ("fail_late", 2, "dropped"),
        ("wait", 1, "dropped"),
        ("wait", None, "ok"),
    ]


def test_a_deferred_notification_outlives_its_connection(
    server: gmprpc.Server, replies: list[Any], recorder: Recorder
) -> None:
    with Peer.connect(server.address) as peer:
        peer.send(*[[2, "later", []]] * 3)
        wait_until(lambda: len(replies) == 3)
        peer.reset()
    wait_until(lambda: not server.connections)
    replies[0].set(1)
    replies[1].set_exception(ValueError())
    replies[2].set_exception(ErrorResponse("x"))
    recorder.wait_all()
    assert sorted(recorder.outcomes) == [("later", None, "error"), ("later", None, "failed"), ("later", None, "ok")]


# Cancelling and expiry


@pytest.mark.parametrize("way", ["end", "return", "raise"])
def test_what_its_caller_has_cancelled_ends_cancelled_whatever_it_does(
    service: gmprpc.Service, peer: Peer, recorder: Recorder, way: str
) -> None:
    @service.method
    def wait() -> int:
        try:
            Event().wait()
        except gmprpc.CallCancelled:
            if way == "end":
                raise
            if way == "raise":
                raise ValueError("x") from None
        return 5

    peer.send([0, 1, "wait", []])
    wait_until(lambda: recorder.started)
    peer.send([2, "$/cancel", [1]])
    assert peer.receive()[:2] == [1, 1]
    recorder.wait_all()
    assert sorted(recorder.outcomes) == [("$/cancel", None, "ok"), ("wait", 1, "cancelled")]


@pytest.mark.parametrize("method", ["defer", "later"])
def test_what_is_deferred_and_cancelled_ends_cancelled_when_it_is_answered(
    replies: list[Any], peer: Peer, recorder: Recorder, method: str
) -> None:
    peer.send([0, 1, method, []], [2, "$/cancel", [2]], [2, "$/cancel", [1]], [0, 2, "echo", [1]])
    assert peer.receive() == [1, 2, None, 1]
    assert "cancelled" not in str(recorder.outcomes)
    replies.pop().set(5)
    assert peer.receive() == [1, 1, None, 5]
    recorder.wait_all()
    assert recorder.outcomes[-1] == (method, 1, "cancelled")


@pytest.mark.parametrize("way", ["return", "raise", "notice"])
def test_what_takes_too_long_ends_expired_when_it_is_answered(
    service: gmprpc.Service, recorder: Recorder, way: str
) -> None:
    go = Event()

    @service.method
    def slow() -> int:
        try:
            Event().wait()
        except gmprpc.CallCancelled:
            go.wait()
            if way == "notice":
                raise
            if way == "raise":
                raise ValueError("x") from None
        return 5

    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder], reply_timeout=0.02) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("slow") == [1, 0, "no answer within 0.02 s", None]
        recorder.wait_all()
        assert recorder.outcomes == [("slow", 0, "expired")]
        assert recorder.durations[0] >= 0.02
        go.set()


@pytest.mark.parametrize("method", ["defer", "later"])
def test_what_is_deferred_too_long_ends_expired(
    service: gmprpc.Service, replies: list[Any], recorder: Recorder, method: str
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder], reply_timeout=0.02) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call(method) == [1, 0, "no answer within 0.02 s", None]
        recorder.wait_all()
        assert recorder.outcomes == [(method, 0, "expired")]
        replies.pop().set(5)
        assert peer.call("echo", 1) == [1, 0, None, 1]


def test_hooks_and_their_errors_are_seen_from_outside(service: gmprpc.Service, recorder: Recorder) -> None:
    def refuse(connection: gmprpc.Connection, message: Any) -> None:
        assert recorder.started
        raise ErrorResponse("not you")

    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder], on_dispatch=refuse) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("echo", 1) == [1, 0, "not you", None]
        recorder.wait_all()
    assert recorder.outcomes == [("echo", 0, "error")]


# Observers that misbehave


class Faulty:
    """Raises ``exc`` at every turn."""

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc

    def call_started(self, call: gmprpc.Call) -> None:
        raise self.exc

    def call_ended(self, *_: Any) -> None:
        raise AssertionError("it was told that it doesn't know")


class FaultyAtTheEnd(Faulty):
    """Raises only at the end."""

    def call_started(self, call: gmprpc.Call) -> None: ...

    def call_ended(self, *_: Any) -> None:
        raise self.exc


@pytest.mark.parametrize("kind", [Faulty, FaultyAtTheEnd])
@pytest.mark.parametrize("exc", [ValueError("x"), SystemExit(3), ErrorResponse("x"), gevent.Timeout(5)])
def test_what_an_observer_raises_is_logged_and_changes_nothing(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, recorder: Recorder, kind: type[Faulty], exc: Any
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[kind(exc), recorder]) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("echo", 1) == [1, 0, None, 1]
        assert peer.call("fail", "y")[2] == "ValueError: y"
        wait_until(lambda: len(recorder.ends) == 2)
    failures = [record for record in caplog.records if record.name == "gmprpc.observing"]
    assert len(failures) == 2
    assert all(record.levelno == logging.ERROR and record.exc_info and record.exc_info[1] is exc for record in failures)


@pytest.mark.parametrize("exc", [gevent.GreenletExit(), gmprpc.CallCancelled()])
def test_a_kill_that_strikes_in_an_observer_is_that_of_the_request(
    service: gmprpc.Service, recorder: Recorder, exc: BaseException
) -> None:
    entered: list[int] = []
    service.register(lambda: entered.append(1), "enter")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder, Faulty(exc)]) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("enter")[2] == type(exc).__name__
        assert peer.call("$/health")[2] == type(exc).__name__  # The next greenlet is at it.
        recorder.wait_all()
    assert recorder.outcomes == [("enter", 0, "failed"), ("$/health", 0, "failed")]
    assert not entered


class Blocking(Recorder):
    """Takes its time at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.go = Event()

    def call_ended(self, *end: Any) -> None:
        self.go.wait()
        super().call_ended(*end)


def test_an_observer_that_blocks_holds_up_no_answer(service: gmprpc.Service) -> None:
    blocking = Blocking()
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[blocking]) as server,
        Peer.connect(server.address) as peer,
    ):
        for number in range(5):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
        assert server.statistics()["in_flight"] == 0
        assert not blocking.ends
        blocking.go.set()
        blocking.wait_all()
    assert blocking.outcomes == [("echo", number, "ok") for number in range(5)]


def test_calls_wait_for_an_observer_that_is_far_behind(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "_MAX_UNTOLD", 3)
    blocking = Blocking()
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[blocking]) as server,
        Peer.connect(server.address) as peer,
    ):
        # One end is being told, three wait.
        for number in range(4):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
        peer.send([0, 4, "echo", [4]], [0, 5, "echo", [5]])
        wait_until(lambda: server.statistics()["in_flight"] == 2)
        assert len(blocking.started) == 4
        blocking.go.set()
        assert [peer.receive(), peer.receive()] == [[1, 4, None, 4], [1, 5, None, 5]]
        blocking.wait_all()
    blocking.check()


def test_a_call_that_waits_for_an_observer_is_answered_in_time(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "_MAX_UNTOLD", 1)
    blocking = Blocking()
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[blocking], reply_timeout=0.02) as server,
        Peer.connect(server.address) as peer,
    ):
        for number in range(2):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
        assert peer.call("echo", 2, msgid=2) == [1, 2, "no answer within 0.02 s", None]
        blocking.go.set()
        assert peer.call("echo", 3, msgid=3) == [1, 3, None, 3]
        blocking.wait_all()
    assert [number for _, number, _ in blocking.outcomes] == [0, 1, 3]  # The other one hadn't started.


def test_stopping_waits_a_moment_for_the_observers(service: gmprpc.Service) -> None:
    blocking = Blocking()
    server = gmprpc.Server(("127.0.0.1", 0), service, observers=[blocking])
    server.start()
    with Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        peer.shutdown()
        stopping = gevent.spawn(server.stop)
        assert peer.receive_rest() == []
    wait_until(lambda: not server.connections)
    gevent.sleep(0.001)
    assert not stopping.ready()
    blocking.go.set()
    stopping.get()
    assert blocking.outcomes == [("echo", 0, "ok")]


def test_the_end_of_a_stream_waits_a_moment_for_the_observers(
    service: gmprpc.Service, sockets: tuple[Any, Any]
) -> None:
    blocking = Blocking()
    server = gmprpc.Server(None, service, observers=[blocking])
    serving = gevent.spawn(server.serve_stream, PlainStream(sockets[0]))
    with Peer(sockets[1]) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        peer.shutdown()
        assert peer.receive_rest() == []
        wait_until(lambda: not server.connections)
        gevent.sleep(0.001)
        assert not serving.ready()
        blocking.go.set()
        assert serving.get() is None
    assert blocking.outcomes == [("echo", 0, "ok")]


def test_what_is_no_observer_is_refused() -> None:
    with pytest.raises(TypeError, match="call_ended"):
        gmprpc.Server(None, observers=[type("Half", (), {"call_started": print})()])
    with pytest.raises(TypeError, match="call_started"):
        gmprpc.Server(None).add_observer(object())  # type: ignore[arg-type]


# Adding and forgetting


def test_an_observer_that_is_added_is_told_of_connections_that_come(service: gmprpc.Service) -> None:
    first, second = Recorder(), Recorder()
    with gmprpc.Server(("127.0.0.1", 0), service) as server, Peer.connect(server.address) as before:
        assert before.call("echo", 1) == [1, 0, None, 1]
        server.add_observer(first)
        with Peer.connect(server.address) as peer:
            assert before.call("echo", 1) == [1, 0, None, 1]
            peer.call("add", 1, 2)
            server.add_observer(second)
            service.register(lambda: 5, "new")
            peer.call("new")
            first.wait_all()
            second.wait_all()
    assert first.outcomes == [("add", 0, "ok"), ("new", 0, "ok")]
    assert second.outcomes == [("new", 0, "ok")]


def test_several_observers_each_get_their_own_token(service: gmprpc.Service) -> None:
    recorders = [Recorder(), Recorder()]
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=recorders) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.call("echo", 1)
        recorders[0].started.append(recorders[0].started[0])  # Their numbers differ from now on.
        peer.call("add", 1, 1)
        wait_until(lambda: len(recorders[1].ends) == 2)
    assert [recorder.tokens for recorder in recorders] == [[1, 3], [1, 2]]


def test_observed_methods_are_still_described(peer: Peer) -> None:
    assert peer.call("$/describe", "add")[3]["signature"] == "(a, b)"
    assert peer.call("add", 1)[2] == "wrong params for add(a, b): missing a required argument: 'b'"
    assert inspect.signature(Observing().observed(inspect.signature)) == inspect.signature(inspect.signature)


def test_a_teller_that_is_struck_is_followed_by_another(service: gmprpc.Service, recorder: Recorder) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service, observers=[recorder])
    with server, Peer.connect(server.address) as peer:
        peer.call("echo", 1)
        recorder.wait_all()
        assert server._observing._teller
        gevent.get_hub().loop.run_callback(server._observing._teller.throw, gevent.GreenletExit)
        gevent.sleep(0)
        assert server._observing._teller.dead
        peer.call("echo", 2)
        recorder.wait_all()
    assert recorder.outcomes == [("echo", 0, "ok")] * 2


def test_nothing_is_held_when_all_has_been_told(service: gmprpc.Service) -> None:
    connections: weakref.WeakSet[gmprpc.Connection] = weakref.WeakSet()

    class Forgetful(gmprpc.Observer):
        def call_started(self, call: gmprpc.Call) -> None:
            connections.add(call.connection)

    server = gmprpc.Server(("127.0.0.1", 0), service, observers=[Forgetful()])
    server.start()
    with Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
    assert len(connections) == 1
    server.stop()
    gevent.sleep(0)
    collected()
    assert not connections
    forgotten = weakref.ref(server._observing)
    teller = weakref.ref(server._observing._teller)
    assert teller() is not None
    del server
    collected()
    assert forgotten() is None
    assert teller() is None


def test_a_child_tells_nothing_of_its_parent_s_calls() -> None:
    with Program(*FORKING_PYTHON, "-c", FORKS) as program:
        lines = program.lines()
        assert program.wait() == 0
    pid = lines[0]
    assert lines[1:] == [f"{pid} before ok", f"{pid} fork ok"]


FORKS = """
import os
import gevent
import gmprpc

class Observer(gmprpc.Observer):
    def call_ended(self, call, outcome, *_):
        print(os.getpid(), call.method, outcome, flush=True)

server = gmprpc.Server(("127.0.0.1", 0), observers=[Observer()])

@server.method
def before():
    return 1

@server.method
def fork():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return child

print(os.getpid(), flush=True)
parent = os.getpid()
with server, gmprpc.Client(server.address) as client:
    calls = [client.call_async("before"), client.call_async("fork")]
    try:
        assert calls[0].get() == 1
        calls[1].get()
    finally:
        if os.getpid() != parent:
            gevent.sleep(0.01)  # What is still to be told would be told now.
            os._exit(0)
"""
