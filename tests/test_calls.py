"""The calls that wait for their answers: whoever gives up is off the books, and whoever waits is told how it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import msgpack
import pytest

from gmprpc.calls import Calls
from gmprpc.exceptions import CallCancelled, CallTimeout, ConnectionClosed, MethodNotFound
from gmprpc.protocol import Encoder
from gmprpc.reply import PendingCall


class Line:
    """What the calls go out on: it keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.settled = 0
        self.closes_after = 1000  # Looks whether it is open.

    def check_open(self) -> None:
        self.closes_after -= 1
        if self.closes_after < 0:
            raise ConnectionClosed

    def post(self, data: bytes) -> None:
        self.sent.append(msgpack.unpackb(data))

    def settle_soon(self) -> None:
        self.settled += 1


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def calls(line: Line) -> Calls:
    return Calls(line, Encoder())


def in_hub(function: Callable[..., Any], *args: Any) -> None:
    """Have ``function`` called by the loop, and wait until that is done."""
    gevent.get_hub().loop.run_callback(function, *args)
    gevent.sleep(0)


def waiting(calls: Calls, method: str = "method", timeout: float | None = None) -> gevent.Greenlet:
    """A greenlet that has made a call and waits for its answer."""
    caller = gevent.spawn(calls.call, method, (), timeout)
    gevent.sleep(0)
    return caller


def test_a_call_has_the_result_or_raises_the_error(line: Line, calls: Calls) -> None:
    callers = [waiting(calls, "add"), waiting(calls, "nosuch")]
    assert line.sent == [[0, 0, "add", []], [0, 1, "nosuch", []]]
    in_hub(calls.pending.pop(1), [1, 1, 'No such method "nosuch" found', None])
    in_hub(calls.pending.pop(0), [1, 0, None, 3])
    assert callers[0].get() == 3
    with pytest.raises(MethodNotFound):
        callers[1].get()


def test_nothing_is_sent_on_a_line_that_is_closed_or_closes_meanwhile(line: Line, calls: Calls) -> None:
    for line.closes_after in (0, 1):
        with pytest.raises(ConnectionClosed):
            calls.call("method", (), None)
    assert not line.sent
    assert not calls.pending


def test_a_caller_that_is_killed_is_off_the_books(line: Line, calls: Calls) -> None:
    first, last = waiting(calls), waiting(calls)
    first.kill()
    assert list(calls.pending) == [1]
    assert line.settled == 0  # Another one still waits.
    last.kill()
    assert not calls.pending
    assert line.settled == 1


def test_the_end_of_the_line_ends_every_call_and_says_whether_it_was_sent(calls: Calls) -> None:
    cause = OSError("broken")
    callers = [waiting(calls), waiting(calls)]
    pending = PendingCall("method")
    calls.send(pending, (), None)
    in_hub(calls.fail_all, cause, {1: b""})
    outcomes: list[Any] = [*callers, pending]
    for outcome, is_sent in zip(outcomes, (True, False, True), strict=True):
        with pytest.raises(ConnectionClosed) as caught:
            outcome.get()
        assert caught.value.sent is is_sent
        assert caught.value.__cause__ is cause


def test_a_caller_that_dies_of_the_end_keeps_nobody_from_being_told(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[type[BaseException]] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, exc, traceback: died.append(kind))
    gevent.spawn_raw(calls.call, "method", (), None)
    gevent.sleep(0)
    other = waiting(calls)
    in_hub(calls.fail_all, None, {})
    with pytest.raises(ConnectionClosed):
        other.get()
    assert died == [ConnectionClosed] * 2  # gevent shows the end of the other one, too.


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_a_call_that_is_not_answered_in_time_says_so(line: Line, calls: Calls, timeout: float) -> None:
    pending = PendingCall("async")
    calls.send(pending, (), timeout)
    with pytest.raises(CallTimeout):
        waiting(calls, "sync", timeout).get()
    with pytest.raises(CallTimeout):
        pending.get()
    assert not calls.pending


def test_a_time_out_that_comes_together_with_the_answer_changes_nothing(calls: Calls) -> None:
    pending = PendingCall("method")
    calls.send(pending, (), 1000)
    in_hub(calls.pending.pop(0), [1, 0, None, "answer"])
    in_hub(calls._expire, 0, "method", 1000)
    assert pending.get() == "answer"


def test_an_answer_that_comes_together_with_a_cancellation_changes_nothing(calls: Calls) -> None:
    pending = PendingCall("method")
    calls.send(pending, (), None)
    waiter = calls.pending[0]
    pending.cancel()
    in_hub(waiter, [1, 0, None, "answer"])
    with pytest.raises(CallCancelled):
        pending.get()


def test_an_error_that_cant_be_looked_at_is_an_end_too(calls: Calls) -> None:
    class Strange:
        """As a hook of the unpacker may make it."""

        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value of an array is ambiguous")

        __hash__ = None  # type: ignore[assignment]  # As whoever compares in a way of their own says.

    pending = PendingCall("method")
    calls.send(pending, (), None)
    in_hub(calls.pending.pop(0), [1, 0, Strange(), None])
    with pytest.raises(ValueError, match="ambiguous"):
        pending.get()


def test_a_time_out_of_call_async_that_comes_together_with_the_answer_changes_nothing() -> None:
    pending = PendingCall("method")
    pending.limit(gevent.get_hub().loop, 1000, False)
    pending.set("answer")
    pending._expire(1000, False)
    assert pending.get() == "answer"
