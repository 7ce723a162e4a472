"""Waits that grow, and never beyond what they may."""

from __future__ import annotations

import pytest

from gmprpc.backoff import Backoff


def longest(interval: float, max_interval: float) -> Backoff:
    return Backoff(interval, max_interval, random=lambda: 1.0)


def test_the_longest_wait_doubles_up_to_the_maximum() -> None:
    backoff = longest(0.1, 5.0)
    assert [backoff.next() for _ in range(8)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])
    assert backoff.failures == 8


def test_a_wait_is_anywhere_from_zero_to_the_longest() -> None:
    parts = [0.0, 0.5, 0.25]
    backoff = Backoff(1.0, 100.0, random=lambda: parts[backoff.failures - 1])
    assert [backoff.next() for _ in range(3)] == [0, 2, 2]


def test_a_success_starts_over() -> None:
    backoff = longest(0.1, 5.0)
    first = backoff.next()
    for _ in range(10):
        backoff.next()
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next() == first


def test_any_number_of_failures_can_be_counted() -> None:
    backoff = longest(0.1, 5.0)
    backoff.failures = 10**6
    assert backoff.next() == 5


def test_waits_are_random_by_default() -> None:
    backoff = Backoff(1.0, 1.0)
    waits = {backoff.next() for _ in range(100)}
    assert len(waits) > 90
    assert all(0 <= wait < 1 for wait in waits)
