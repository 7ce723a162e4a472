"""When the calls of an open loop should be sent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmprpc.bench.plan import Plan
from gmprpc.bench.schedule import Schedule

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND + 123


def plan(rate: float, **settings: Any) -> Plan:
    def open_stream() -> Any:
        raise AssertionError("no I/O here")

    return Plan(open_stream, "echo", b"", rate=rate, connections=8, **settings)


def test_calls_are_evenly_spread() -> None:
    schedule = Schedule(plan(1000, calls=5), START)
    assert [schedule.time(number) - START for number in range(3)] == [0, 1_000_000, 2_000_000]


def test_processes_take_turns() -> None:
    parts = [Schedule(part, START) for part in plan(1000, duration=1).parts(3)]
    times = sorted(part.time(number) for part in parts for number in range(part.calls))
    assert len(times) == 1000
    assert {later - earlier for earlier, later in itertools.pairwise(times)} <= {
        999_999,
        1_000_000,
        1_000_001,
    }


def test_the_warm_up_comes_before_the_calls_that_count() -> None:
    schedule = Schedule(plan(10, warm_up=0.5, calls=7), START)
    assert schedule.begin == START + SECOND // 2
    assert (schedule.first, schedule.calls, schedule.end) == (5, 12, None)


def test_the_duration_begins_after_the_warm_up() -> None:
    schedule = Schedule(plan(10, warm_up=0.5, duration=2), START)
    assert schedule.end == START + 5 * SECOND // 2
    assert (schedule.first, schedule.calls) == (5, 25)


@pytest.mark.parametrize("moment, due", [(-1, 0), (0, 1), (99_999_999, 1), (100_000_000, 2), (10**12, 25)])
def test_a_call_is_due_at_its_time(moment: int, due: int) -> None:
    schedule = Schedule(plan(10, duration=2.5), START)
    assert schedule.due(START + moment) == due


@given(st.floats(0.01, 1e6), st.integers(1, 8), st.integers(0, 100_000))
def test_what_is_due_agrees_with_the_times(rate: float, processes: int, number: int) -> None:
    for part in plan(rate, calls=1_000_000).parts(processes):
        schedule = Schedule(part, START)
        if number + 1 < schedule.calls:
            time = schedule.time(number)
            assert schedule.due(time) >= number + 1
            assert schedule.due(time - 1) <= number


def test_parts_make_up_the_whole() -> None:
    parts = list(plan(10, calls=11).parts(3))
    assert [part.connections for part in parts] == [3, 3, 2]
    assert [part.calls for part in parts] == [4, 4, 3]
    assert [part.place for part in parts] == [0, 1, 2]
