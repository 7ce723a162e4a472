"""A method with ``threadpool`` is carried out by a native thread, and is a method like any other otherwise."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc.requests import CANCELLED

from .helpers import Peer, wait_until
from .programs import DEADLINE, Program


class Gate:
    """Keeps threads waiting, really blocked, and knows who came."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self._is_open = threading.Event()

    def wait(self, who: Any) -> Any:
        self.came.append(who)
        assert self._is_open.wait(DEADLINE)
        return who

    def open(self) -> None:
        self._is_open.set()

    def wait_for(self, *who: Any) -> None:
        """Wait until they have come, in any order."""
        wait_until(lambda: sorted(self.came) == sorted(who))


@pytest.fixture
def gate(service: gmprpc.Service) -> Iterator[Gate]:
    """A gate, at which the method ``wait`` waits."""
    gate = Gate()
    service.register(gate.wait, threadpool=True)
    yield gate
    gate.open()  # However the test went: the threads are the hub's own.


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    """A pool of a single thread. It takes two tasks: that is gevent's way."""
    pool = ThreadPool(1)
    yield pool
    pool.kill()


def in_flight(server: gmprpc.Server) -> int:
    return server.statistics()["in_flight"]


def test_a_thread_that_blocks_holds_nobody_up(gate: Gate, peer: Peer) -> None:
    peer.send([0, 1, "wait", ["a"]], [0, 2, "wait", ["b"]])
    gate.wait_for("a", "b")
    assert peer.call("echo", 3, msgid=3) == [1, 3, None, 3]
    gate.open()
    assert sorted([peer.receive(), peer.receive()]) == [[1, 1, None, "a"], [1, 2, None, "b"]]


def test_it_is_carried_out_in_another_thread(service: gmprpc.Service, peer: Peer) -> None:
    service.register(threading.get_ident, "thread", threadpool=True)
    service.register(threading.get_ident, "hub", threadpool=False)
    assert peer.call("thread")[3] != threading.get_ident()
    assert peer.call("hub")[3] == threading.get_ident()


def test_it_is_carried_out_by_the_pool_that_is_given(service: gmprpc.Service, peer: Peer, pool: ThreadPool) -> None:
    assert not pool  # As long as it isn't at work.

    @service.method(threadpool=pool)
    def tasks() -> int:
        return len(pool)

    assert peer.call("tasks")[3] == 1
    assert pool.size == 1


@pytest.mark.parametrize(
    "exc, error",
    [
        (ValueError("x"), "ValueError: x"),
        (gmprpc.ErrorResponse([1, "x"]), [1, "x"]),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StopIteration(), "StopIteration"),
        (gevent.GreenletExit(), "GreenletExit"),
    ],
)
def test_what_it_raises_is_the_error(
    service: gmprpc.Service,
    peer: Peer,
    exc: BaseException,
    error: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    @service.method(threadpool=True)
    def fail_in_thread() -> None:
        raise exc

    assert peer.call("fail_in_thread", msgid=1) == [1, 1, error, None]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert capfd.readouterr().err == ""  # gevent would print it.
    if isinstance(error, str):
        (record,) = caplog.records
        assert record.exc_info is not None
        traceback = record.exc_info[2]
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        assert traceback is not None
        assert traceback.tb_frame.f_code.co_name == "fail_in_thread"


def test_what_was_raised_is_forgotten_at_once_and_not_by_the_garbage_collector(
    service: gmprpc.Service, peer: Peer
) -> None:
    class Refused(gmprpc.ErrorResponse):
        """Isn't logged."""

    raised: list[weakref.ref[Refused]] = []

    @service.method(threadpool=True)
    def refuse() -> None:
        exc = Refused("refused")
        raised.append(weakref.ref(exc))
        try:
            raise exc
        finally:
            del exc

    gc.disable()
    try:
        assert peer.call("refuse") == [1, 0, "refused", None]
        assert peer.call("echo", 1) == [1, 0, None, 1]
        (reference,) = raised
        assert reference() is None
    finally:
        gc.enable()


def test_a_result_that_cannot_be_packed_and_wrong_params_are_answered_as_always(
    service: gmprpc.Service, peer: Peer
) -> None:
    @service.method(threadpool=True)
    def make(kind: str) -> Any:
        return object() if kind == "object" else int(None)  # type: ignore[call-overload]

    assert peer.call("make", "object")[2].startswith("TypeError: can not serialize 'object' object")
    assert peer.call("make")[2] == "wrong params for make(kind): missing a required argument: 'kind'"
    assert peer.call("make", "int")[2].startswith("TypeError: int() argument must be")
    assert peer.call("$/describe", "make")[3]["signature"] == "(kind)"


def test_a_notification_is_carried_out_and_its_failure_logged(
    gate: Gate, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([2, "wait", ["a"]], [2, "wait", []])
    gate.wait_for("a")
    gate.open()
    assert peer.call("echo", 1) == [1, 0, None, 1]
    wait_until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "notification of wait" in record.getMessage()


def test_it_is_told_who_calls_in_the_thread_and_only_for_this_call(service: gmprpc.Service, peer: Peer) -> None:
    @service.method(threadpool=True)
    def tell() -> list[Any]:
        call = gmprpc.current_call()
        with pytest.raises(RuntimeError, match="belongs to another thread"):
            call.connection.call("back")
        return [call.method, call.msgid, call.peer]

    assert peer.call("tell", msgid=7)[3] == ["tell", 7, list(peer.socket.getsockname())]
    with pytest.raises(LookupError):
        gevent.get_hub().threadpool.apply(gmprpc.current_call)


def test_context_variables_of_the_request_are_there_in_the_thread_and_end_with_it(service: gmprpc.Service) -> None:
    user: ContextVar[str] = ContextVar("user", default="nobody")

    @service.method(threadpool=True)
    def whoami(*_: Any) -> str:
        try:
            return user.get()
        finally:
            user.set("somebody else")

    def on_dispatch(_: Any, message: Any) -> None:
        if message[3]:
            user.set(message[3][0])

    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("whoami", "alice")[3] == "alice"
        assert peer.call("whoami")[3] == "nobody"


def test_a_call_that_is_cancelled_in_the_thread_ends_when_that_is_done_as_cancelled(
    gate: Gate, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 1, "wait", ["a"]])
    gate.wait_for("a")
    peer.send([2, "$/cancel", [1]])
    assert peer.call("echo", 2) == [1, 0, None, 2]
    wait_until(lambda: server.statistics()["cancelled_requests"] == 1)
    assert in_flight(server) == 1  # It takes its place.
    gate.open()
    assert peer.receive() == [1, 1, CANCELLED, None]
    wait_until(lambda: in_flight(server) == 0)
    assert caplog.records == []


def test_a_call_that_is_cancelled_while_it_waits_for_a_thread_is_never_carried_out(
    service: gmprpc.Service, peer: Peer, pool: ThreadPool
) -> None:
    gate = Gate()
    service.register(gate.wait, threadpool=pool)
    # One is in the thread, one is in the pool's queue, and one waits for room there.
    peer.send(*([0, msgid, "wait", [msgid]] for msgid in (1, 2, 3)))
    gate.wait_for(1)
    peer.send([2, "$/cancel", [2]], [2, "$/cancel", [3]])
    assert sorted([peer.receive(), peer.receive()]) == [[1, 2, CANCELLED, None], [1, 3, CANCELLED, None]]
    peer.send([0, 4, "wait", [4]])
    gate.open()
    assert sorted([peer.receive(), peer.receive()]) == [[1, 1, None, 1], [1, 4, None, 4]]
    assert gate.came == [1, 4]


def test_a_thread_that_takes_too_long_is_answered_for_in_time(service: gmprpc.Service, gate: Gate) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=0.02) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("wait", "a", msgid=1) == [1, 1, "no answer within 0.02 s", None]
        assert in_flight(server) == 1
        peer.send([2, "$/cancel", [1]])  # Told once more, it waits for its thread all the same.
        assert peer.call("echo", 2) == [1, 0, None, 2]
        gate.open()
        wait_until(lambda: in_flight(server) == 0)
        statistics = server.statistics()
    assert (statistics["expired_requests"], statistics["dropped_answers"], statistics["handler_errors"]) == (1, 0, 0)


@pytest.mark.parametrize("place", ["thread", "queue"])
def test_a_request_that_is_killed_does_not_wait_for_its_thread(
    service: gmprpc.Service, peer: Peer, pool: ThreadPool, place: str
) -> None:
    gate = Gate()
    service.register(gate.wait, threadpool=pool)
    requests: list[Any] = []

    @service.method
    def kill() -> None:
        requests[-1].kill()

    def on_dispatch(_: Any, message: Any) -> None:
        if message[2] == "wait":
            requests.append(gevent.getcurrent())

    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 1, "wait", [1]])
        gate.wait_for(1)
        if place == "queue":
            peer.send([0, 2, "wait", [2]])
            wait_until(lambda: len(requests) == 2)
        peer.send([0, 9, "kill", []])
        answers = sorted([peer.receive(), peer.receive()])
        assert answers == [[1, len(requests), "GreenletExit", None], [1, 9, None, None]]
        gate.open()
    assert gate.came == [1]


def test_a_stop_waits_for_a_thread(gate: Gate, server: gmprpc.Server, peer: Peer) -> None:
    peer.send([0, 1, "wait", ["a"]])
    gate.wait_for("a")
    stopping = gevent.spawn(server.stop)
    wait_until(lambda: not server.started)
    gate.open()
    assert peer.receive_rest() == [[1, 1, None, "a"]]
    peer.close()
    assert stopping.get() == 0


def test_a_program_ends_while_a_thread_is_still_at_work(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import gmprpc\n"
        "from gevent import monkey\n"
        "sleep = monkey.get_original('time', 'sleep')\n"
        "service = gmprpc.Service()\n"
        "service.register(lambda: (print('begun', flush=True), sleep(3600)), 'block', threadpool=True)\n"
    )
    serve = (sys.executable, "-m", "gmprpc", "serve", "--app-dir", tmp_path, "-b", "127.0.0.1:0")
    with Program(*serve, "--graceful-timeout", "0", "app:service") as program:
        address = program.line_with("listening on ").removeprefix("listening on ")
        with gmprpc.Client(address) as client:
            call = client.call_async("block")
            program.line_with("begun")
            program.terminate()
            with pytest.raises(gmprpc.ConnectionClosed):
                call.get()
        assert program.wait() == 0


def test_what_a_thread_returns_may_complete_later(service: gmprpc.Service, peer: Peer) -> None:
    later: AsyncResult = AsyncResult()
    service.register(lambda: later, "later", threadpool=True)
    peer.send([0, 1, "later", []])
    assert peer.call("echo", 2) == [1, 0, None, 2]
    later.set("late")
    assert peer.receive() == [1, 1, None, "late"]


def test_a_method_for_a_thread_stays_what_it_is_and_wants_a_name(service: gmprpc.Service, pool: ThreadPool) -> None:
    def function() -> None:
        pass

    assert service.method(name="other", threadpool=pool)(function) is function
    assert list(service.methods)[-1] == "other"
    with pytest.raises(TypeError, match="has no name of its own"):
        service.register(_Nameless(), threadpool=True)
    service.register(_Nameless(), "nameless", threadpool=True)
    with pytest.raises(TypeError, match="has to be callable"):
        service.register(3, "three", threadpool=True)  # type: ignore[arg-type]


class _Nameless:
    def __call__(self) -> None:
        pass


@pytest.mark.parametrize("threadpool", [1, None, "yes", ThreadPool])
def test_a_threadpool_is_true_or_one(service: gmprpc.Service, threadpool: Any) -> None:
    with pytest.raises(TypeError, match="threadpool has to be"):
        service.method(threadpool=threadpool)(len)


def test_a_callback_that_answers_later_has_no_need_of_a_thread(service: gmprpc.Service, pool: ThreadPool) -> None:
    for threadpool in (True, pool):
        with pytest.raises(ValueError, match="deferred and threadpool"):
            service.method(deferred=True, threadpool=threadpool)(len)
