"""A timer that goes off on time."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns

import gevent
import pytest
from gevent.event import Event

from gmprpc.bench import alarm as alarm_module
from gmprpc.bench.alarm import Alarm

MILLISECOND = 1_000_000


class Rung:
    """Waits for alarms."""

    def __init__(self) -> None:
        self.count = 0
        self._event = Event()
        self.alarm = Alarm(gevent.get_hub().loop, self._ring)

    def wait(self) -> int:
        self._event.wait()
        self._event.clear()
        return perf_counter_ns()

    def _ring(self) -> None:
        self.count += 1
        self._event.set()


@pytest.fixture(params=["timerfd", "timer"])
def rung(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rung]:
    if request.param == "timer":
        monkeypatch.setattr(alarm_module, "_timer_fd", lambda: -1)
    rung = Rung()
    yield rung
    rung.alarm.close()


def test_it_goes_off_once_and_never_early(rung: Rung) -> None:
    at = perf_counter_ns() + 3 * MILLISECOND
    rung.alarm.set(at)
    # The loop's own timers count in another clock, by its microseconds.
    assert rung.wait() >= at - MILLISECOND // 2
    gevent.sleep(0.005)
    assert rung.count == 1


def test_it_goes_off_at_once_when_the_time_has_passed(rung: Rung) -> None:
    rung.alarm.set(perf_counter_ns() - MILLISECOND)
    rung.wait()


def test_only_the_last_time_counts(rung: Rung) -> None:
    rung.alarm.set(perf_counter_ns() + 60_000 * MILLISECOND)
    rung.alarm.set(perf_counter_ns() + MILLISECOND)
    rung.wait()
    assert rung.count == 1


def test_it_can_be_set_again(rung: Rung) -> None:
    for _ in range(3):
        rung.alarm.set(perf_counter_ns() + MILLISECOND)
        rung.wait()


def test_closed_it_never_goes_off(rung: Rung) -> None:
    rung.alarm.set(perf_counter_ns() + MILLISECOND)
    rung.alarm.close()
    rung.alarm.close()
    gevent.sleep(0.005)
    assert rung.count == 0
