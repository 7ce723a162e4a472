"""Percentiles, bars and notices."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hdrh.histogram import HdrHistogram

from gmprpc.bench.figures import Durations, Figures
from gmprpc.bench.load import Result
from gmprpc.bench.tally import Ending, Tally

MILLISECOND = 1_000_000
THOUSAND = {number * MILLISECOND: 1 for number in range(1, 1001)}


def result(
    tally: Tally | None = None, *, ending: Ending = Ending.DONE, busy: float = 0.0, waited: float = 0.0
) -> Result:
    return Result(ending, tally or Tally(), 2.0, busy, waited)


def test_percentiles_have_three_digits() -> None:
    durations = Durations(THOUSAND)
    assert durations.count == 1000
    assert durations.min == 0.001
    assert durations.max == 1.0
    assert durations.mean == pytest.approx(0.5005)
    for percent in (50, 90, 99, 99.9):
        assert durations.percentile(percent) == pytest.approx(percent / 100, rel=0.001)
    assert durations.percentile(100) == 1.0


def test_nothing_has_no_percentiles() -> None:
    durations = Durations({})
    assert [durations.min, durations.mean, durations.max, durations.percentile(50)] == [None] * 4
    assert durations.bars() == []


def test_more_than_an_hour_is_an_hour() -> None:
    durations = Durations({10**15: 1, 2 * 10**15: 1})
    assert durations.max == durations.percentile(50) == 3600
    assert durations.count == 2


@pytest.mark.parametrize("counts", [THOUSAND, {5: 3}, {1: 1}, {20_000: 1, 10**12: 1}, {10_000: 5, 10_001: 5}])
def test_bars_hold_everything_and_are_few(counts: dict[int, int]) -> None:
    bars = Durations(counts).bars()
    assert sum(count for _, _, count in bars) == sum(counts.values())
    assert 1 <= len(bars) <= 16
    assert bars[0][0] * 1e9 <= min(counts) * 1.0001
    assert bars[-1][1] * 1e9 > max(counts)
    for (_, high, _), (low, _, _) in itertools.pairwise(bars):
        assert high == low


def test_the_whole_histogram_can_be_read_by_others() -> None:
    read = HdrHistogram.decode(Durations(THOUSAND).encoded())
    assert read.get_total_count() == 1000
    assert read.get_value_at_percentile(50) == pytest.approx(500 * MILLISECOND, rel=0.001)


def test_processes_add_up() -> None:
    tallies = [Tally(), Tally()]
    for tally in tallies:
        tally.record(MILLISECOND, 50)
        tally.fail("no answer", 1)
        tally.lost["reset"] += 1
        tally.sent, tally.received = 100, 200
    figures = Figures([result(tallies[0]), result(tallies[1])])
    assert (figures.calls, figures.rate, figures.seconds) == (100, 50.0, 2.0)
    assert (figures.errors, figures.error_count, figures.lost) == ({"no answer": 2}, 2, {"reset": 2})
    assert (figures.sent, figures.received) == (200, 400)


def test_the_most_frequent_errors_come_first() -> None:
    tally = Tally(errors=Counter({"rare": 1, "frequent": 5, "usual": 3}))
    assert list(Figures([result(tally)]).errors) == ["frequent", "usual", "rare"]


def test_the_worst_ending_is_that_of_all() -> None:
    endings = [Ending.DONE, Ending.LOST, Ending.STALLED]
    assert Figures([result(ending=ending) for ending in endings]).ending is Ending.LOST


def test_without_time_there_is_no_rate() -> None:
    assert Figures([Result(Ending.INTERRUPTED, Tally(), 0.0, 0.0, 0.0)]).rate == 0


def test_a_load_generator_with_time_to_spare_says_nothing() -> None:
    tally = Tally()
    tally.record_late(50_000, 1000)
    assert Figures([result(tally, busy=0.8, waited=0.05), result()]).notices() == []


def test_a_load_generator_that_can_do_no_more_says_so() -> None:
    (notice,) = Figures([result(), result(busy=0.97)]).notices()
    assert "itself was the bottleneck" in notice
    assert "97%" in notice
    assert "--processes" in notice


def test_a_load_generator_that_waits_for_a_core_says_so() -> None:
    (notice,) = Figures([result(waited=0.4)]).notices()
    assert "had to wait for a core for 40%" in notice


def test_a_load_generator_that_sends_late_says_so() -> None:
    tally = Tally()
    tally.record_late(50_000, 950)
    tally.record_late(5 * MILLISECOND, 50)
    figures = Figures([result(tally)])
    assert figures.lateness == pytest.approx([0.00005, 0.005, 0.005], rel=0.002)
    (notice,) = figures.notices()
    assert "itself was late: 1 % of the calls left 5 ms or more" in notice
