"""How a request is carried out: its greenlet, what it may do, how its answer comes."""

from __future__ import annotations

import contextvars
import functools
import logging
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult, Event
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, collected, wait_until


def test_a_handler_that_blocks_delays_no_other_request(peer: Peer) -> None:
    peer.send([0, 1, "hold", ["slow"]], [0, 2, "echo", ["quick"]])
    assert peer.receive() == [1, 2, None, "quick"]
    assert peer.call("release", msgid=3) == [1, 3, None, None]
    assert peer.receive() == [1, 1, None, "slow"]


def test_requests_begin_in_the_order_in_which_they_came(service: gmprpc.Service, peer: Peer) -> None:
    begun: list[int] = []

    @service.method
    def work(number: int) -> None:
        begun.append(number)
        gevent.sleep(0.001 if number % 2 else 0)

    peer.send(*([0, number, "work", [number]] for number in range(100)))
    for _ in range(100):
        peer.receive()
    assert begun == list(range(100))


def test_a_greenlet_that_has_finished_is_used_again_on_its_connection_only(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    used: list[Any] = []
    service.register(lambda: used.append(gevent.getcurrent()), "note")
    for _ in range(3):
        peer.call("note")
    with Peer.connect(server.address) as other:
        other.call("note")
    assert used[0] is used[1] is used[2]
    assert used[3] is not used[0]
    assert isinstance(used[0], gevent.Greenlet)


def test_without_reuse_every_request_has_a_fresh_greenlet(service: gmprpc.Service) -> None:
    used: list[Any] = []
    service.register(lambda: used.append(gevent.getcurrent()), "note")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, reuse_greenlets=False) as server,
        Peer.connect(server.address) as peer,
    ):
        for _ in range(3):
            peer.call("note")
        wait_until(lambda: all(greenlet.dead for greenlet in used))
        assert len(set(used)) == 3
        assert server.statistics()["in_flight"] == 0


def test_every_request_starts_in_a_fresh_context(service: gmprpc.Service, peer: Peer) -> None:
    variable = contextvars.ContextVar("variable", default="pristine")

    @service.method
    def leave_a_trace() -> str:
        before = variable.get()
        variable.set("trace")
        return before

    assert [peer.call("leave_a_trace")[3] for _ in range(3)] == ["pristine"] * 3


def test_what_is_meant_for_an_earlier_request_doesnt_disturb_an_idle_greenlet(
    service: gmprpc.Service, peer: Peer
) -> None:
    used: list[Any] = []
    service.register(lambda: used.append(gevent.getcurrent()), "note")
    peer.call("note")
    loop = gevent.get_hub().loop
    for stray in (used[0].switch, used[0].throw):
        loop.run_callback(stray, *([ValueError("stray")] if stray == used[0].throw else ["stray"]))
        gevent.sleep(0)
        assert peer.call("note", msgid=1) == [1, 1, None, None]
    assert used[0] is used[1] is used[2]


def test_a_greenlet_that_is_killed_answers_an_error_and_ends(service: gmprpc.Service, peer: Peer) -> None:
    used: list[Any] = []

    @service.method
    def wait() -> None:
        used.append(gevent.getcurrent())
        gevent.sleep(1000)

    peer.send([0, 1, "wait", []])
    wait_until(lambda: used)
    used[0].kill()
    assert used[0].dead
    assert peer.receive() == [1, 1, "GreenletExit", None]
    assert peer.call("echo", 1) == [1, 0, None, 1]


@pytest.mark.parametrize("kill", [lambda greenlet: greenlet.kill(), lambda greenlet: gevent.killall([greenlet])])
def test_an_idle_greenlet_that_is_killed_ends_and_takes_no_request_along(
    service: gmprpc.Service, peer: Peer, kill: Any
) -> None:
    used: list[Any] = []
    service.register(lambda: used.append(gevent.getcurrent()), "note")
    peer.call("note")
    kill(used[0])
    assert used[0].dead
    peer.call("note")
    assert used[1] is not used[0]


def test_a_greenlet_that_is_killed_while_it_logs_has_answered(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging_: list[Any] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging_.append(gevent.getcurrent())
            gevent.sleep(1000)

    monkeypatch.setattr(logging.getLogger("gmprpc.connection"), "handlers", [Slow()])
    peer.send([0, 1, "fail", ["oops"]])
    wait_until(lambda: logging_)
    gevent.killall(logging_)
    assert peer.receive() == [1, 1, "ValueError: oops", None]
    assert peer.call("echo", "next") == [1, 0, None, "next"]
    assert server.statistics()["in_flight"] == 0


def test_an_async_result_may_be_completed_by_a_native_thread(service: gmprpc.Service, peer: Peer) -> None:
    @service.method
    def later(value: int) -> AsyncResult[int]:
        made: AsyncResult[int] = AsyncResult()
        threading.Thread(target=made.set, args=(value,)).start()
        return made

    assert peer.call("later", 5) == [1, 0, None, 5]


def test_a_connection_that_goes_quiet_gives_greenlets_back(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    used: set[Any] = set()
    go = Event()

    @service.method
    def wait() -> None:
        used.add(gevent.getcurrent())
        go.wait()

    peer.send(*([0, number, "wait", []] for number in range(50)))
    wait_until(lambda: len(used) == 50)
    go.set()
    for _ in range(50):
        peer.receive()
    wait_until(lambda: all(greenlet.dead for greenlet in used))
    assert peer.call("echo", "awake")[3] == "awake"


def test_what_a_request_held_is_not_kept_alive_by_its_greenlet(service: gmprpc.Service, peer: Peer) -> None:
    class Thing(list[Any]):
        pass

    things: list[weakref.ref[Thing]] = []

    @service.method
    def give() -> Thing:
        thing = Thing()
        things.append(weakref.ref(thing))
        return thing

    assert peer.call("give") == [1, 0, None, []]
    collected()
    assert things[0]() is None


def test_what_a_request_brought_and_gave_is_not_kept_alive_by_the_next_of_its_batch(service: gmprpc.Service) -> None:
    class Thing(dict[Any, Any]):
        pass

    things: list[weakref.ref[Thing]] = []
    alive: list[int] = []

    @service.method
    def give(thing: Thing) -> Thing:
        alive.append(sum(reference() is not None for reference in things))
        result = Thing()
        things.extend((weakref.ref(thing), weakref.ref(result)))
        return result

    with (
        gmprpc.Server(("127.0.0.1", 0), service, unpacker_options={"object_hook": Thing}) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send(*([0, number, "give", [{"a": 1}]] for number in range(6)))
        for _ in range(6):
            peer.receive()
        # The hub looks at the first message, and hands the others over.
        assert alive == [0, 1, 1, 1, 1, 1]


def test_in_a_batch_the_current_call_is_that_of_each_request(service: gmprpc.Service, peer: Peer) -> None:
    calls: list[gmprpc.Call] = []

    @service.method
    def look(number: int) -> None:
        before = gmprpc.current_call()
        if number % 10 == 5:
            gevent.sleep(0)
        assert gmprpc.current_call() == before
        calls.append(before)

    peer.send(*([0, number, "look", [number]] if number % 7 else [2, "look", [number]] for number in range(50)))
    for _ in range(42):
        peer.receive()
    wait_until(lambda: len(calls) == 50)
    for call in calls:
        (number,) = call.message[3]
        assert call.msgid == (number if number % 7 else None)


def test_in_a_batch_every_request_starts_in_a_fresh_context(service: gmprpc.Service, peer: Peer) -> None:
    variable = contextvars.ContextVar("variable", default="pristine")
    used: list[Any] = []

    @service.method
    def leave_a_trace(number: int) -> str:
        before = variable.get()
        variable.set(f"trace of {number}")
        used.append(gevent.getcurrent())
        if number == 5:
            gevent.sleep(0)
        assert variable.get() == f"trace of {number}"
        return before

    peer.send(*([0, number, "leave_a_trace", [number]] for number in range(10)))
    assert sorted(peer.receive() for _ in range(10)) == [[1, number, None, "pristine"] for number in range(10)]
    assert len(set(used)) == 2


def test_without_reuse_every_request_of_a_batch_has_a_fresh_greenlet(service: gmprpc.Service) -> None:
    used: list[Any] = []
    service.register(lambda: used.append(gevent.getcurrent()), "note")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, reuse_greenlets=False) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send(*([0, number, "note", []] for number in range(50)))
        assert [peer.receive()[1] for _ in range(50)] == list(range(50))
        assert len(set(used)) == 50
        wait_until(lambda: all(greenlet.dead for greenlet in used))


def _raise_a_kill() -> None:
    raise gevent.GreenletExit


def _itself() -> Any:
    return gevent.getcurrent()


@pytest.mark.parametrize(
    "die, answer",
    [
        (_raise_a_kill, [1, 1, "GreenletExit", None]),
        (lambda: _itself().kill(), [1, 1, "GreenletExit", None]),
        (lambda: _itself().kill(block=False), [1, 1, None, None]),
        (lambda: _itself().throw(SystemExit), [1, 1, "SystemExit", None]),
        (lambda: _itself().throw(ValueError("thrown")), [1, 1, "ValueError: thrown", None]),
    ],
)
def test_a_greenlet_that_dies_amid_a_batch_takes_no_other_request_along(
    service: gmprpc.Service, peer: Peer, die: Any, answer: Any
) -> None:
    service.register(die, "die")
    peer.send([0, 0, "echo", [0]], [0, 1, "die", []], *([0, number, "echo", [number]] for number in range(2, 50)))
    answers = sorted(peer.receive() for _ in range(50))
    assert answers == [[1, 0, None, 0], answer, *([1, number, None, number] for number in range(2, 50))]
    assert peer.call("echo", "next") == [1, 0, None, "next"]


def test_what_completes_later_takes_its_place_from_the_rest_of_the_batch(service: gmprpc.Service) -> None:
    replies: list[gmprpc.Reply] = []
    most = 0

    @service.method
    def later() -> gmprpc.Reply:
        nonlocal most
        most = max(most, server.statistics()["in_flight"])
        replies.append(gmprpc.Reply())
        return replies[-1]

    with gmprpc.Server(("127.0.0.1", 0), service, max_concurrency=3) as server, Peer.connect(server.address) as peer:
        peer.send([0, 0, "echo", [0]], *([0, number, "later", []] for number in range(1, 20)))
        assert peer.receive() == [1, 0, None, 0]
        for number in range(1, 20):
            wait_until(lambda: len(replies) == min(number + 2, 19))  # noqa: B023 - it is called at once
            replies[number - 1].result(number)
            assert peer.receive() == [1, number, None, number]
    assert most == 3


def test_the_table_may_change_amid_a_batch(service: gmprpc.Service, peer: Peer) -> None:
    @service.method
    def change() -> None:
        service.register(lambda: "new", "late")

    peer.send([0, 0, "late", []], [0, 1, "change", []], [0, 2, "late", []])
    assert peer.receive() == [1, 0, 'No such method "late" found', None]
    assert peer.receive() == [1, 1, None, None]
    assert peer.receive() == [1, 2, None, "new"]


def test_the_current_call_tells_who_calls_what(service: gmprpc.Service, server: gmprpc.Server, peer: Peer) -> None:
    calls: list[gmprpc.Call] = []
    outside: list[Exception] = []

    def look() -> None:
        try:
            gmprpc.current_call()
        except LookupError as exc:
            outside.append(exc)

    @service.method(name="who.is")
    def who(_: int) -> None:
        calls.append(gmprpc.current_call())
        gevent.spawn(look).join()

    peer.call("who.is", 5, msgid=9)
    peer.send([2, "who.is", [6]])
    peer.call("echo", 1)
    request, notification = calls
    assert (request.method, request.msgid, request.peer) == ("who.is", 9, peer.socket.getsockname())
    assert request.message == [0, 9, "who.is", [5]]
    assert (notification.msgid, notification.message[3]) == (None, [6])
    assert request.connection in server.connections
    assert len(outside) == 2
    with pytest.raises(LookupError):
        gmprpc.current_call()


# Answers that come later.


@pytest.mark.parametrize("make", [gmprpc.Reply, AsyncResult])
def test_a_function_may_return_what_completes_later(service: gmprpc.Service, peer: Peer, make: Any) -> None:
    made: list[Any] = []

    @service.method
    def later(value: str) -> Any:
        made.append(make())
        return made[-1]

    peer.send([0, 1, "later", ["a"]], [0, 2, "later", ["b"]], [0, 3, "later", ["c"]])
    wait_until(lambda: len(made) == 3)
    made[1].set("second")
    assert peer.receive() == [1, 2, None, "second"]
    made[0].set_exception(ValueError("first"))
    assert peer.receive() == [1, 1, "ValueError: first", None]
    made[2].set(object())
    assert peer.receive() == [1, 3, "TypeError: can not serialize 'object' object", None]


@pytest.mark.parametrize("nothing", [None, "text"])
def test_what_completes_with_an_exception_that_is_none_is_answered(
    service: gmprpc.Service, peer: Peer, nothing: Any
) -> None:
    @service.method
    def later() -> Any:
        made: AsyncResult[Any] = AsyncResult()
        made.set_exception(nothing)
        return made

    assert peer.call("later") == [1, 0, f"TypeError: {type(nothing).__name__} is no exception", None]


def test_a_function_may_return_a_greenlet(service: gmprpc.Service, peer: Peer) -> None:
    def work(value: int) -> int:
        gevent.sleep(0)
        return 10 // value

    service.register(lambda value: gevent.spawn(work, value), "work")
    assert peer.call("work", 5) == [1, 0, None, 2]
    assert peer.call("work", 0)[2] == "ZeroDivisionError: integer division or modulo by zero"


def test_a_function_may_return_what_has_completed(service: gmprpc.Service, peer: Peer) -> None:
    done: AsyncResult[str] = AsyncResult()
    done.set("done")
    service.register(lambda: done, "done")
    assert peer.call("done") == [1, 0, None, "done"]


def test_what_completes_later_is_never_given_to_a_default_hook(service: gmprpc.Service) -> None:
    later: AsyncResult[object] = AsyncResult()
    service.register(lambda: later, "later")
    service.register(lambda: [later], "within")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, packer_options={"default": str}) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("within")[2].startswith("TypeError: can not serialize")
        peer.send([0, 1, "later", []])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        later.set(frozenset())
        assert peer.receive() == [1, 1, None, "frozenset()"]


def test_a_type_error_that_comes_later_isnt_mistaken_for_wrong_params(service: gmprpc.Service, peer: Peer) -> None:
    service.reg_cb(later=lambda reply, a: gevent.spawn(reply.set_exception, TypeError("later")))
    assert peer.call("later", 1) == [1, 0, "TypeError: later", None]


def test_a_reply_that_is_dropped_unanswered_is_an_error_answer(service: gmprpc.Service, peer: Peer) -> None:
    service.register(lambda: gmprpc.Reply(), "drop")
    service.reg_cb(forget=lambda reply: None)
    assert peer.call("drop") == [1, 0, "the reply was dropped unanswered", None]
    assert peer.call("forget") == [1, 0, "the reply was dropped unanswered", None]


def test_a_reply_may_be_answered_from_a_native_thread(service: gmprpc.Service, peer: Peer) -> None:
    pool = ThreadPool(2)
    service.reg_cb(compute=lambda reply, value: pool.spawn(reply.result, value * 2))
    service.reg_cb(refuse=lambda reply: pool.spawn(reply.error, "no"))
    assert peer.call("compute", 21) == [1, 0, None, 42]
    assert peer.call("refuse") == [1, 0, "no", None]
    pool.kill()


def test_a_reply_that_is_answered_twice_keeps_its_first_answer(service: gmprpc.Service, peer: Peer) -> None:
    raised: list[BaseException] = []

    def twice(reply: gmprpc.Reply, first: str, second: str) -> None:
        getattr(reply, first)("first")
        with pytest.raises(gmprpc.AlreadyAnswered) as caught:
            getattr(reply, second)("second")
        raised.append(caught.value)

    service.reg_cb(twice=twice)
    assert peer.call("twice", "result", "error") == [1, 0, None, "first"]
    assert peer.call("twice", "error", "result") == [1, 0, "first", None]
    assert peer.call("echo", "next") == [1, 0, None, "next"]
    assert len(raised) == 2


def test_a_callback_that_raises_after_its_answer_has_answered(
    service: gmprpc.Service, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(reply: gmprpc.Reply) -> None:
        reply.result("answer")
        raise ValueError("afterwards")

    service.reg_cb(callback=callback)
    assert peer.call("callback") == [1, 0, None, "answer"]
    assert "ValueError: afterwards" in caplog.text


def test_a_callback_that_raises_before_its_answer_answers_that(service: gmprpc.Service, peer: Peer) -> None:
    kept: list[gmprpc.Reply] = []

    def callback(reply: gmprpc.Reply) -> None:
        kept.append(reply)
        raise ValueError("instead")

    service.reg_cb(callback=callback)
    assert peer.call("callback") == [1, 0, "ValueError: instead", None]
    kept[0].result("too late")
    assert peer.call("echo", "next") == [1, 0, None, "next"]


def test_the_loss_of_the_connection_cancels_replies_even_while_the_callback_runs(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    told: list[str] = []
    begun, go = Event(), Event()

    def callback(reply: gmprpc.Reply) -> None:
        reply.on_cancel(lambda: told.append("told"))
        begun.set()
        go.wait()
        told.append(f"cancelled: {reply.cancelled()}")

    service.reg_cb(callback=callback)
    peer = Peer.connect(server.address)
    peer.send([0, 1, "callback", []])
    begun.wait()
    (connection,) = server.connections
    connection.abort()
    wait_until(lambda: told)
    go.set()
    wait_until(lambda: len(told) == 2)
    assert told == ["told", "cancelled: True"]
    peer.close()


def test_one_reply_may_answer_several_requests(service: gmprpc.Service, peer: Peer) -> None:
    shared = [gmprpc.Reply(), gmprpc.Reply()]
    service.register(lambda number: shared[number], "share")
    peer.send(*([0, number, "share", [number // 2]] for number in range(4)))
    peer.call("echo", 1)
    shared[0].result("all")
    assert sorted([peer.receive(), peer.receive()]) == [[1, 0, None, "all"], [1, 1, None, "all"]]
    shared.clear()
    answers = sorted([peer.receive(), peer.receive()])
    assert answers == [[1, number, "the reply was dropped unanswered", None] for number in (2, 3)]


@pytest.mark.parametrize("function", [functools.partial(print), 5], ids=["nameless", "not callable"])
def test_what_cant_be_a_callback_is_refused_when_it_is_registered(service: gmprpc.Service, function: Any) -> None:
    with pytest.raises(TypeError):
        service.register(function, deferred=True)
    with pytest.raises(TypeError):
        service.reg_cb(callback=5)  # type: ignore[arg-type]


# Errors.


def test_an_error_response_answers_with_exactly_its_object(
    service: gmprpc.Service, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    @service.method
    def refuse(error: Any) -> None:
        raise gmprpc.ErrorResponse(error)

    for error in ("no", 0, False, "", {"code": 5}, [1, 2]):
        assert peer.call("refuse", error) == [1, 0, error, None]
    assert not caplog.records
    assert peer.call("refuse", None)[2].startswith("ValueError: ")


def test_an_error_response_that_cant_be_packed_is_still_an_error(service: gmprpc.Service, peer: Peer) -> None:
    @service.method
    def refuse() -> None:
        raise gmprpc.ErrorResponse(object())

    assert peer.call("refuse")[2] == "an error that can't be sent: TypeError: can not serialize 'object' object"


def test_a_fault_is_logged_with_traceback_method_msgid_and_peer_and_without_params(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    assert peer.call("fail", "oops", msgid=7) == [1, 7, "ValueError: oops", None]
    (record,) = caplog.records
    port = peer.socket.getsockname()[1]
    assert record.getMessage() == f"request 7 of fail from 127.0.0.1:{port} failed"
    assert record.exc_info is not None
    assert record.name == "gmprpc.connection"


def test_hidden_errors_tell_the_peer_an_id_that_the_log_has_too(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, hide_errors=True) as server,
        Peer.connect(server.address) as peer,
    ):
        error = peer.call("fail", "secret")[2]
        assert error.startswith("internal error (")
        assert error.removeprefix("internal error ") in caplog.records[0].getMessage()
        # What is not a fault of the handler isn't hidden.
        assert peer.call("nosuch")[2] == 'No such method "nosuch" found'
        assert peer.call("add", 1)[2].startswith("wrong params for add(a, b)")


class Stubborn(logging.Handler):
    """A log that can't be written to, and says so."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no space left on device")


def test_a_log_that_fails_costs_no_answer(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, exc, traceback: errors.append(exc))
    handler = Stubborn()
    logging.getLogger("gmprpc").addHandler(handler)
    try:
        assert peer.call("fail", "oops") == [1, 0, "ValueError: oops", None]
        assert peer.call("echo", "next") == [1, 0, None, "next"]
    finally:
        logging.getLogger("gmprpc").removeHandler(handler)
    assert [str(exc) for exc in errors] == ["no space left on device"]


def test_recursion_to_the_limit_is_an_error_answer(service: gmprpc.Service, peer: Peer) -> None:
    @service.method
    def recurse() -> None:
        recurse()

    assert peer.call("recurse")[2].startswith("RecursionError: maximum recursion depth exceeded")
    assert peer.call("echo", "next") == [1, 0, None, "next"]


@pytest.mark.parametrize("later", [False, True])
def test_an_error_response_that_forgot_its_error_is_a_fault(service: gmprpc.Service, peer: Peer, later: bool) -> None:
    class Forgetful(gmprpc.ErrorResponse):
        def __init__(self) -> None:
            pass

    @service.method(deferred=True)
    def refuse(reply: gmprpc.Reply) -> None:
        if not later:
            raise Forgetful
        reply.set_exception(Forgetful())

    assert peer.call("refuse") == [1, 0, "Forgetful", None]


@pytest.fixture
def pythons_own_sigint() -> Iterator[None]:
    """Python's own handler of SIGINT, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_sigint")
def test_a_ctrl_c_that_strikes_a_handler_is_not_the_handlers(service: gmprpc.Service, peer: Peer) -> None:
    @service.method
    def compute() -> None:
        signal.raise_signal(signal.SIGINT)
        sum(range(1000))

    peer.send([0, 1, "compute", []])
    with pytest.raises(KeyboardInterrupt):
        peer.receive()
    assert peer.receive() == [1, 1, "KeyboardInterrupt", None]


def test_where_sigint_means_something_else_no_interrupt_is_passed_on(
    service: gmprpc.Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_system_error", lambda *args: passed_on.append(args))

    def compute() -> None:
        gevent.getcurrent().throw(KeyboardInterrupt)  # No statement raises it.

    service.register(compute)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert peer.call("compute") == [1, 0, "KeyboardInterrupt", None]
    finally:
        signal.signal(signal.SIGINT, before)
    assert not passed_on


@pytest.mark.parametrize("later", [False, True])
def test_a_log_that_is_ended_while_it_writes_costs_no_answer(
    service: gmprpc.Service, peer: Peer, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    class Late(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise gevent.Timeout(5)

    errors: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, exc, traceback: errors.append(kind))
    monkeypatch.setattr(logging.getLogger("gmprpc.connection"), "handlers", [Late()])

    @service.method(deferred=True)
    def refuse(reply: gmprpc.Reply) -> None:
        if not later:
            raise ValueError("oops")
        reply.set_exception(ValueError("oops"))

    assert peer.call("refuse") == [1, 0, "ValueError: oops", None]
    assert peer.call("echo", "next") == [1, 0, None, "next"]
    assert errors == [gevent.Timeout]
