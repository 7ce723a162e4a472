"""The result condition variable: set once, from any thread, and never forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult, Event

from gmprpc.exceptions import AlreadyAnswered, CallCancelled, ErrorResponse
from gmprpc.reply import PendingCall, Reply, get_thread_ident

from .helpers import collected

#: Each way to answer, with what it makes of the reply: a value or the type of an exception.
VERBS: dict[str, tuple[Callable[[Reply], Any], Any]] = {
    "result": (lambda reply: reply.result(1), 1),
    "result of nothing": (lambda reply: reply.result(), None),
    "error": (lambda reply: reply.error("no"), ErrorResponse),
    "set": (lambda reply: reply.set(2), 2),
    "set to nothing": (lambda reply: reply.set(), None),
    "set_exception": (lambda reply: reply.set_exception(KeyError("x")), KeyError),
    "called with what succeeded": (lambda reply: reply(completed(3)), 3),
    "called with what failed": (lambda reply: reply(failed(OSError("x"))), OSError),
}


def completed(value: Any) -> AsyncResult[Any]:
    """What has the result ``value``."""
    result: AsyncResult[Any] = AsyncResult()
    result.set(value)
    return result


def failed(exc: BaseException) -> AsyncResult[Any]:
    """What has failed with ``exc``."""
    result: AsyncResult[Any] = AsyncResult()
    result.set_exception(exc)
    return result


def in_native_thread(function: Callable[[], Any]) -> Any:
    """What ``function`` returns or raises in a thread that isn't gevent's; the hub stands still meanwhile."""
    outcomes: list[tuple[Any, BaseException | None]] = []
    here = get_thread_ident()

    def run() -> None:
        assert get_thread_ident() != here
        try:
            outcomes.append((function(), None))
        except BaseException as exc:
            outcomes.append((None, exc))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((result, exc),) = outcomes
    if exc is not None:
        raise exc
    return result


# The verbs.


@pytest.mark.parametrize("values, result", [((), None), ((1,), 1), ((None,), None), (([],), []), ((1, 2), (1, 2))])
def test_no_value_is_nil_one_is_itself_and_several_are_an_array(values: tuple[Any, ...], result: Any) -> None:
    reply = Reply()
    reply.result(*values)
    assert reply.successful()
    assert reply.get() == reply.value == result


@pytest.mark.parametrize("error", ["no such thing", 0, False, "", {"code": 5}])
def test_an_error_may_be_anything_but_nil(error: Any) -> None:
    reply = Reply()
    reply.error(error)
    assert not reply.successful()
    assert isinstance(reply.exception, ErrorResponse)
    assert reply.exception.error is error
    with pytest.raises(ErrorResponse):
        reply.get()


def test_nil_is_no_error_and_leaves_the_reply_to_be_answered() -> None:
    reply = Reply()
    with pytest.raises(ValueError, match="nil is MessagePack-RPC's word for success"):
        reply.error(None)
    assert not reply.answered()
    reply.result(1)
    assert reply.get() == 1


def test_set_exception_takes_a_traceback_along() -> None:
    reply = Reply()
    try:
        raise KeyError("here")
    except KeyError as exc:
        reply.set_exception(exc, (type(exc), exc, exc.__traceback__))
    with pytest.raises(KeyError) as caught:
        reply.get()
    assert caught.traceback[-1].name == "test_set_exception_takes_a_traceback_along"


@pytest.mark.parametrize("second", VERBS)
@pytest.mark.parametrize("first", VERBS)
def test_a_reply_is_set_once_and_the_first_answer_stands(first: str, second: str) -> None:
    reply = Reply()
    answer, outcome = VERBS[first]
    answer(reply)
    with pytest.raises(AlreadyAnswered, match="the first answer stands"):
        VERBS[second][0](reply)
    with pytest.raises(AlreadyAnswered):
        in_native_thread(lambda: VERBS[second][0](reply))
    gevent.idle()
    assert reply.answered()
    if isinstance(outcome, type):
        assert isinstance(reply.exception, outcome)
        assert not reply.successful()
    else:
        assert reply.successful()
        assert reply.value == outcome


def test_gevents_other_name_for_set_sets_once_too() -> None:
    reply = Reply()
    reply.set_result(1)
    assert reply.answered()
    with pytest.raises(AlreadyAnswered):
        reply.set_result(2)
    assert reply.get() == 1


@pytest.mark.parametrize("nothing", [None, KeyError, "no"])
def test_only_an_exception_can_be_set_as_one(nothing: Any) -> None:
    reply = Reply()
    with pytest.raises(TypeError):
        reply.set_exception(nothing)
    assert not reply.answered()


def test_a_reply_is_unanswered_until_it_is() -> None:
    reply = Reply()
    assert not reply.answered()
    assert not reply.ready()
    assert not reply.cancelled()
    reply.result()
    assert reply.answered()
    assert reply.ready()
    assert not reply.cancelled()


def test_a_reply_can_be_linked_to_a_greenlet(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("x")

    reply = Reply()
    greenlet = gevent.spawn(lambda: 7)
    greenlet.link(reply)
    assert reply.get() == 7

    reply = Reply()
    monkeypatch.setitem(vars(gevent.get_hub()), "exception_stream", None)  # Not onto the screen.
    failing = gevent.spawn(fail)
    failing.link(reply)
    with pytest.raises(KeyError):
        reply.get()


def test_whoever_is_linked_to_a_reply_is_told() -> None:
    reply = Reply()
    told: list[Reply] = []
    reply.rawlink(told.append)
    other: AsyncResult[Any] = AsyncResult()
    reply.rawlink(other)
    reply.result(5)
    assert other.get() == 5
    assert told == [reply]


# Threads.


@pytest.mark.parametrize("verb", VERBS)
def test_a_reply_may_be_answered_in_a_native_thread(verb: str) -> None:
    reply = Reply()
    told: list[int] = []
    reply.rawlink(lambda _: told.append(get_thread_ident()))
    answer, outcome = VERBS[verb]
    in_native_thread(lambda: answer(reply))
    assert reply.answered()
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            reply.get()
    else:
        assert reply.get() == outcome
    gevent.idle()
    # Links run where the connection lives, never in a foreign thread.
    assert told == [get_thread_ident()]


def test_a_greenlet_that_waits_is_woken_by_a_native_thread() -> None:
    reply = Reply()
    waiting = gevent.spawn(reply.get)
    gevent.idle()
    gevent.get_hub().threadpool.apply(reply.result, ("hello",))
    assert waiting.get() == "hello"


def test_an_answer_on_its_way_from_a_thread_counts_as_given() -> None:
    reply = Reply()
    in_native_thread(lambda: reply.set(1))
    assert reply.answered()
    assert not reply.ready()
    with pytest.raises(AlreadyAnswered):
        reply.result(2)
    # Nor is it taken back by the loss of the connection.
    reply._cancel()
    assert not reply.cancelled()
    assert reply.get() == 1


def test_of_many_threads_that_answer_at_once_just_one_succeeds() -> None:
    pool = gevent.get_hub().threadpool
    for _ in range(20):
        reply = Reply()

        def answer(number: int, reply: Reply = reply) -> int | None:
            try:
                reply.result(number)
            except AlreadyAnswered:
                return None
            return number

        winners = [number for number in pool.map(answer, range(8)) if number is not None]
        assert winners == [reply.get()]


# Dropped unanswered.


def test_a_reply_that_is_dropped_unanswered_says_so() -> None:
    dropped = Event()
    reply = Reply()
    reply._on_drop = dropped.set
    del reply
    collected()
    dropped.wait()


def test_a_reply_that_is_dropped_within_a_cycle_says_so() -> None:
    dropped = Event()
    reply = Reply()
    reply._on_drop = dropped.set
    reply.myself = reply  # type: ignore[attr-defined]
    del reply
    collected()
    dropped.wait()


def test_a_reply_that_is_dropped_in_a_native_thread_says_so_in_its_own() -> None:
    idents: AsyncResult[Any] = AsyncResult()
    replies = [Reply()]
    replies[0]._on_drop = lambda: idents.set(get_thread_ident())
    in_native_thread(replies.clear)
    assert idents.get() == get_thread_ident()


@pytest.mark.parametrize("verb", VERBS)
def test_a_reply_that_was_answered_may_be_dropped(verb: str) -> None:
    dropped: list[bool] = []
    for run in (lambda function: function(), in_native_thread):
        reply = Reply()
        reply._on_drop = lambda: dropped.append(True)
        run(partial(VERBS[verb][0], reply))
        gevent.idle()
        del reply
    collected()
    gevent.idle()
    assert dropped == []


def test_a_reply_that_nobody_waits_for_may_be_dropped() -> None:
    Reply()
    Reply.__new__(Reply)  # Half made: __init__ was never reached.
    collected()


def orphan() -> Reply:
    """A reply whose hub is gone, as that of a thread that has ended."""

    def make() -> Reply:
        reply = Reply()
        gevent.get_hub().destroy(destroy_loop=True)
        return reply

    reply: Reply = in_native_thread(make)
    return reply


def test_a_reply_that_outlives_its_hub_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: unraisable.append(args.exc_value))
    reply = orphan()
    reply._on_drop = unraisable.clear
    del reply
    collected()
    assert unraisable == []


def test_a_reply_that_outlives_its_hub_may_be_answered() -> None:
    reply = orphan()
    reply.result(1)
    assert reply.answered()


# The caller has gone.


def test_a_reply_that_is_cancelled_says_so_and_calls_back() -> None:
    reply = Reply()
    first, second, late = Event(), Event(), Event()
    reply.on_cancel(first.set)
    reply.on_cancel(second.set)
    assert not reply.cancelled()
    reply._cancel()
    assert reply.cancelled()
    first.wait()
    second.wait()
    reply.on_cancel(late.set)
    late.wait()


def test_what_is_called_back_runs_in_a_greenlet_of_its_own() -> None:
    reply = Reply()
    greenlets: list[Any] = []
    finished = Event()

    def callback() -> None:
        gevent.sleep(0)  # May wait, as nothing may in the hub.
        greenlets.append(gevent.getcurrent())
        if len(greenlets) == 2:
            finished.set()

    reply.on_cancel(callback)
    gevent.get_hub().loop.run_callback(reply._cancel)
    finished_one = gevent.spawn(lambda: None)
    finished_one.join()
    reply.on_cancel(callback)
    finished.wait()
    assert gevent.get_hub() not in greenlets
    assert gevent.getcurrent() not in greenlets


def test_a_reply_is_cancelled_once() -> None:
    reply = Reply()
    calls: list[int] = []
    reply.on_cancel(lambda: calls.append(1))
    reply._cancel()
    reply._cancel()
    gevent.idle()
    assert calls == [1]


@pytest.mark.parametrize("verb", VERBS)
def test_an_answered_reply_is_never_cancelled(verb: str) -> None:
    reply = Reply()
    calls: list[int] = []
    reply.on_cancel(lambda: calls.append(1))
    VERBS[verb][0](reply)
    reply._cancel()
    gevent.idle()
    assert not reply.cancelled()
    assert calls == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_cancelled_reply_may_still_be_answered_once(verb: str) -> None:
    reply = Reply()
    reply._cancel()
    VERBS[verb][0](reply)
    assert reply.cancelled()
    with pytest.raises(AlreadyAnswered):
        reply.result()


def test_a_native_thread_may_ask_to_be_called_back() -> None:
    reply = Reply()
    called: AsyncResult[Any] = AsyncResult()
    reply._cancel()
    loop = gevent.get_hub().loop
    in_native_thread(lambda: reply.on_cancel(lambda: loop.run_callback_threadsafe(called.set, True)))
    gevent.idle()
    assert called.ready()


# Calls.


def test_an_answer_from_a_thread_may_come_just_before_it_is_too_late() -> None:
    class Meanwhile(list[Any]):
        def append(self, item: Any) -> None:
            super().append(item)
            reply.result("just in time")

    reply = Reply()
    reply._right_to_be_late = Meanwhile()
    assert reply.expire("too late", lambda: None) is False
    assert reply.get() == "just in time"
    assert not reply._right_to_be_late


def test_a_reply_that_is_answered_does_not_expire_but_one_that_is_cancelled_does() -> None:
    answered, cancelled = Reply(), Reply()
    answered.result("in time")
    assert answered.expire("too late", lambda: None) is False
    assert answered.get() == "in time"
    cancelled._cancel()
    assert cancelled.expire("too late", lambda: None) is True
    with pytest.raises(ErrorResponse, match="too late"):
        cancelled.get()


def test_a_pending_call_has_its_outcome() -> None:
    call = PendingCall("m")
    assert call.method == "m"
    assert not call.ready()
    waiting = gevent.spawn(call.get)
    gevent.idle()
    call.set(5)
    assert waiting.get() == call.get() == 5


def test_a_timeout_leaves_a_call_pending() -> None:
    call = PendingCall("m")
    with pytest.raises(gevent.Timeout):
        call.get(timeout=0)
    with pytest.raises(gevent.Timeout):
        call.get(block=False)
    assert not call.ready()
    call.set(5)
    assert call.get() == 5


def test_a_cancelled_call_ends_who_waits_and_is_taken_off_the_books() -> None:
    call = PendingCall("m")
    forgotten: list[bool] = []

    def forget(tell: bool) -> bool:
        forgotten.append(not call.ready())
        return tell

    call._forget = forget
    outcomes: list[BaseException] = []

    def wait() -> None:
        try:
            call.get()
        except CallCancelled as exc:
            outcomes.append(exc)

    greenlets = [gevent.spawn(wait) for _ in range(2)]
    gevent.idle()
    assert call.cancel() is True
    gevent.joinall(greenlets)
    assert [str(exc) for exc in outcomes] == ["call of 'm' was cancelled"] * 2
    assert forgotten == [True]
    assert call.cancel() is False
    assert forgotten == [True]


def test_a_call_that_is_not_on_the_books_can_be_cancelled() -> None:
    call = PendingCall("m")
    assert call.cancel() is True
    with pytest.raises(CallCancelled):
        call.get()


@pytest.mark.parametrize("outcome", [None, 5, KeyError("x")], ids=repr)
def test_a_call_that_has_ended_can_not_be_cancelled(outcome: Any) -> None:
    call = PendingCall("m")
    if isinstance(outcome, Exception):
        call.set_exception(outcome)
    else:
        call.set(outcome)
    assert call.cancel() is False
    assert call.exception is (outcome if isinstance(outcome, Exception) else None)


def test_a_cancelled_call_ends_a_greenlet_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    call = PendingCall("m")
    greenlet = gevent.spawn(call.get)
    gevent.idle()
    call.cancel()
    greenlet.join()
    assert isinstance(greenlet.value, CallCancelled)
    assert capsys.readouterr().err == ""
