"""Conditions that are typed, and what they say of figures."""

from __future__ import annotations

from collections import Counter

import pytest

from gmprpc.bench.conditions import Condition
from gmprpc.bench.figures import Figures
from gmprpc.bench.load import Result
from gmprpc.bench.tally import Ending, Tally

MILLISECOND = 1_000_000


def figures(*, errors: int = 0, calls: int = 100) -> Figures:
    """Calls of 1 ms to 100 ms, in two seconds."""
    tally = Tally(errors=Counter({"no answer": errors} if errors else {}))
    for number in range(calls):
        tally.record((number + 1) * MILLISECOND, 1)
    return Figures([Result(Ending.DONE, tally, 2.0, 0.0, 0.0)])


@pytest.mark.parametrize(
    "text",
    [
        *("p99>98ms", "p50 > 0.049s", "p99.9>=99ms", "max>99ms", "min<2ms", "mean<=51ms", "p90>89000us", "p90>89000µs"),
        *("errors>0", "errors>=5", "errors>4.7%", "rate<51", "rate<=50", "calls<101", " calls >= 100 "),
    ],
)
def test_condition_that_is_met(text: str) -> None:
    assert Condition.parse(text).is_met(figures(errors=5))


@pytest.mark.parametrize(
    "text",
    [
        *("p99>100ms", "p50>51ms", "max>101ms", "min>1.1ms", "mean>51ms", "p100>100.1ms"),
        *("errors>5", "errors>4.8%", "rate<50", "rate>50", "calls<100"),
    ],
)
def test_condition_that_is_not_met(text: str) -> None:
    assert not Condition.parse(text).is_met(figures(errors=5))


def test_what_was_not_measured_is_not_good_either() -> None:
    nothing = figures(calls=0)
    assert Condition.parse("p99>50ms").is_met(nothing)
    assert Condition.parse("errors>1%").is_met(nothing)
    assert Condition.parse("rate<1").is_met(nothing)
    assert not Condition.parse("errors>0").is_met(nothing)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "give a figure"),
        ("p99", "give a figure"),
        ("p99=50ms", "give a figure"),
        ("p99>ms", "give a figure"),
        ("p99>-1ms", "give a figure"),
        ("p99>50", "of which unit"),
        ("max>50%", "of which unit"),
        ("p>50ms", "percentile"),
        ("p0>50ms", "percentile"),
        ("p101>50ms", "percentile"),
        ("p9.9.9>50ms", "percentile"),
        ("q99>50ms", "q99 is none of"),
        ("errors5>1", "errors5 is none of"),
        ("latency>50ms", "latency is none of"),
        ("errors>5ms", "errors has no unit ms"),
        ("rate<5%", "rate has no unit %"),
    ],
)
def test_condition_that_makes_no_sense_says_why(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Condition.parse(text)
