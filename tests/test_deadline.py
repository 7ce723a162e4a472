"""A deadline that is put off, with a loop in which time is what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmprpc.deadline import Deadline


class Timer:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.callback: Callable[[], Any] | None = None
        self.is_closed = False

    def start(self, callback: Callable[[], Any], *, update: bool) -> None:
        assert update
        self.callback = callback

    def close(self) -> None:
        self.is_closed = True


class Loop:
    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def timer(self, seconds: float) -> Timer:
        self.timers.append(Timer(seconds))
        return self.timers[-1]

    def fire(self) -> None:
        (timer,) = [timer for timer in self.timers if not timer.is_closed]
        assert timer.callback is not None
        timer.callback()


def test_it_calls_back_once_when_it_has_passed() -> None:
    loop, calls = Loop(), []
    deadline = Deadline(loop, 5, lambda: calls.append(deadline.is_set))
    assert not loop.timers
    deadline.put_off()
    assert deadline.is_set
    assert [timer.seconds for timer in loop.timers] == [5]
    loop.fire()
    assert calls == [False]
    assert all(timer.is_closed for timer in loop.timers)


def test_it_begins_anew_whenever_it_is_put_off() -> None:
    loop, calls = Loop(), []
    deadline = Deadline(loop, 5, lambda: calls.append(1))
    for _ in range(3):
        deadline.put_off()
    deadline.put_off(2)
    assert [(timer.seconds, timer.is_closed) for timer in loop.timers] == [(5, True)] * 3 + [(2, False)]
    deadline.lift()
    deadline.lift()
    assert not deadline.is_set
    assert all(timer.is_closed for timer in loop.timers)
    assert not calls


def test_without_seconds_it_never_passes() -> None:
    loop = Loop()
    deadline = Deadline(loop, None, lambda: None)
    deadline.put_off()
    assert not deadline.is_set
    assert not loop.timers
