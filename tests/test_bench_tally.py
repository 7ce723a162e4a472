"""Counts of calls, durations and errors."""

from __future__ import annotations

import pickle

import pytest

from gmprpc.bench.tally import OTHER, Tally, percentiles_of


def test_durations_are_kept_to_a_few_per_mille() -> None:
    tally = Tally()
    for duration in (1, 1000, 123_456_789, 10**12):
        tally.record(duration, 1)
    kept = list(tally.latencies)
    assert kept[0] == 1
    for duration, rounded in zip((1, 1000, 123_456_789, 10**12), kept, strict=True):
        assert 0.998 * duration <= rounded <= duration


def test_any_number_of_durations_takes_little_room() -> None:
    tally = Tally()
    for duration in range(10_000, 10_000_000, 50):
        tally.record(duration, 1)
    assert tally.answered == sum(tally.latencies.values()) == 199_800
    assert len(tally.latencies) < 6000


def test_what_another_has_counted_is_added() -> None:
    tally, other = Tally(), Tally()
    for counts in (tally, other):
        counts.record(1000, 2)
        counts.record_late(500, 1)
        counts.fail("no answer", 3)
        counts.lost["reset"] += 1
        counts.sent, counts.received = 10, 20
    other.record(7, 1)
    tally.add(pickle.loads(pickle.dumps(other)))
    assert (tally.answered, dict(tally.latencies), dict(tally.lateness)) == (5, {1000: 4, 7: 1}, {500: 2})
    assert (dict(tally.errors), dict(tally.lost)) == ({"no answer": 6}, {"reset": 2})
    assert (tally.sent, tally.received) == (20, 40)


def test_errors_with_numbers_of_their_own_become_one_kind() -> None:
    tally = Tally()
    for number in range(1000):
        tally.fail(f"internal error ({number})")
    tally.fail("internal error (0)")
    assert sum(tally.errors.values()) == 1001
    assert tally.errors["internal error (0)"] == 2
    assert tally.errors[OTHER] == 980


@pytest.mark.parametrize(
    "counts, expected",
    [
        ({}, [0, 0, 0]),
        ({5: 1}, [5, 5, 5]),
        ({3: 1, 1: 50, 2: 49}, [1, 2, 3]),
        ({10: 1000}, [10, 10, 10]),
    ],
)
def test_percentiles_are_those_of_the_ordered_durations(counts: dict[int, int], expected: list[int]) -> None:
    assert percentiles_of(counts, 50, 99, 100) == expected
