"""What has gone quiet is asked to rest, until it does; nobody is kept alive for that."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gmprpc.sweeper import Sweeper

from .helpers import collected


class Timer:
    """A timer of the loop that goes off when the test says so."""

    def __init__(self, *settings: Any, ref: bool) -> None:
        self.settings = settings
        self.ref = ref
        self.callback: Callable[[], Any] | None = None
        self.starts = 0

    def start(self, callback: Callable[[], Any]) -> None:
        assert self.callback is None
        self.callback = callback
        self.starts += 1

    def stop(self) -> None:
        self.callback = None

    close = stop

    def go_off(self) -> None:
        assert self.callback is not None
        self.callback()


class Loop:
    """A loop of which the timers are kept: the first one begins sweeps, the others go on with them."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def timer(self, *settings: Any, ref: bool = True) -> Timer:
        self.timers.append(Timer(*settings, ref=ref))
        return self.timers[-1]

    @property
    def made(self) -> Timer:
        return self.timers[0]


class Busy:
    """Rests when it has been asked so many times."""

    def __init__(self, times: int, event: Event | None = None) -> None:
        self.times = times
        self.asked = 0
        self.event = event

    def rest(self) -> bool:
        self.asked += 1
        if self.asked == self.times and self.event is not None:
            self.event.set()
        return self.asked >= self.times


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def sweeper(loop: Loop) -> Sweeper:
    return Sweeper(loop)


def test_who_is_watched_is_asked_until_it_rests(sweeper: Sweeper, loop: Loop) -> None:
    first, second = Busy(1), Busy(3)
    sweeper.watch(first)
    sweeper.watch(second)
    assert (first.asked, second.asked) == (0, 0)
    loop.made.go_off()
    loop.made.go_off()
    assert (first.asked, second.asked) == (1, 2)
    loop.made.go_off()
    assert (first.asked, second.asked) == (1, 3)


def test_the_timer_runs_while_there_is_somebody_to_ask(sweeper: Sweeper, loop: Loop) -> None:
    assert loop.made.callback is None
    sweeper.watch(Busy(1))
    sweeper.watch(Busy(2))
    assert loop.made.starts == 1
    loop.made.go_off()
    assert loop.made.callback is not None
    loop.made.go_off()
    assert loop.made.callback is None
    sweeper.watch(Busy(1))
    assert loop.made.starts == 2
    loop.made.go_off()
    assert loop.made.callback is None


def test_who_has_rested_can_be_watched_again(sweeper: Sweeper, loop: Loop) -> None:
    busy = Busy(1)
    for times in (1, 2, 3):
        sweeper.watch(busy)
        loop.made.go_off()
        assert busy.asked == times


def test_who_has_rested_is_let_go(sweeper: Sweeper, loop: Loop) -> None:
    busy = Busy(1)
    gone = weakref.ref(busy)
    sweeper.watch(busy)
    loop.made.go_off()
    del busy
    collected()
    assert gone() is None


def test_of_many_some_are_asked_at_a_time(sweeper: Sweeper, loop: Loop) -> None:
    crowd = [Busy(2) for _ in range(2 * Sweeper._AT_ONCE + 1)]
    for busy in crowd:
        sweeper.watch(busy)
    for sweep in (1, 2):
        loop.made.go_off()
        for turn in (1, 2):
            assert sum(busy.asked == sweep for busy in crowd) == turn * Sweeper._AT_ONCE
            assert loop.timers[-1].settings == (0,)
            assert not loop.timers[-1].ref
            loop.made.go_off()  # A sweep that takes longer than it should isn't begun anew.
            loop.timers[-1].go_off()
        assert all(busy.asked == sweep for busy in crowd)
    assert loop.made.callback is None
    assert all(timer.callback is None for timer in loop.timers)


def test_who_is_forgotten_is_asked_no_more(sweeper: Sweeper, loop: Loop) -> None:
    crowd = [Busy(5) for _ in range(Sweeper._AT_ONCE + 1)]
    for busy in crowd:
        sweeper.watch(busy)
    loop.made.go_off()
    (waiting,) = [busy for busy in crowd if not busy.asked]
    sweeper.forget(waiting)
    sweeper.forget(waiting)
    loop.timers[-1].go_off()
    loop.made.go_off()
    assert waiting.asked == 0
    assert all(busy.asked == 2 for busy in crowd if busy is not waiting)
    for busy in crowd:
        sweeper.forget(busy)
    loop.made.go_off()
    assert loop.made.callback is None


def test_who_fails_is_let_go_and_the_others_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Troubled(Busy):
        def rest(self) -> bool:
            super().rest()
            raise RuntimeError("no")

    failures: list[Any] = []
    monkeypatch.setattr(Sweeper, "_INTERVAL", 0.001)
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: failures.append(args[:2]))
    event = Event()
    sweeper = Sweeper(gevent.get_hub().loop)
    troubled = Troubled(10)
    sweeper.watch(troubled)
    sweeper.watch(Busy(3, event))
    event.wait()
    assert failures == [(troubled, RuntimeError)]
    assert troubled.asked == 1
    sweeper._timer.close()


def test_who_comes_while_others_are_asked_is_watched_too(sweeper: Sweeper, loop: Loop) -> None:
    late = Busy(1)

    class Waking(Busy):
        def rest(self) -> bool:
            sweeper.watch(late)
            return True

    sweeper.watch(Waking(1))
    loop.made.go_off()
    assert loop.made.callback is not None
    loop.made.go_off()
    assert late.asked == 1


def test_the_sweep_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sweeper, "_INTERVAL", 0.001)
    event = Event()
    sweeper = Sweeper(gevent.get_hub().loop)
    busy = Busy(3, event)
    sweeper.watch(busy)
    event.wait()
    assert busy.asked == 3
    assert not sweeper._timer.active
    sweeper._timer.close()


def test_there_is_one_sweeper_for_a_hub() -> None:
    hub = gevent.get_hub()
    assert Sweeper.of(hub) is Sweeper.of(hub)


def test_waiting_for_the_next_sweep_keeps_no_loop_alive() -> None:
    ended: list[bool] = []

    def run() -> None:
        hub = gevent.get_hub()
        Sweeper.of(hub).watch(Busy(1_000_000))
        # Waits until nothing is left to wait for.
        ended.append(hub.join(timeout=10))
        hub.destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True]
