"""Counters count, and show how far they are."""

from __future__ import annotations

import dataclasses

import pytest

from gmprpc.metrics import Counters


def test_everything_is_counted_from_0_on() -> None:
    assert set(Counters().snapshot().values()) == {0}


def test_a_snapshot_has_each_counter_by_its_name() -> None:
    counters = Counters()
    names = [field.name for field in dataclasses.fields(counters)]
    for number, name in enumerate(names, 1):
        setattr(counters, name, number)
    assert counters.snapshot() == {name: number for number, name in enumerate(names, 1)}
    assert list(counters.snapshot()) == names


def test_a_snapshot_stays_as_it_is() -> None:
    counters = Counters()
    snapshot = counters.snapshot()
    counters.connections += 1
    assert snapshot["connections"] == 0
    snapshot["connections"] = 7
    assert counters.connections == 1


def test_a_misspelt_counter_is_an_error() -> None:
    with pytest.raises(AttributeError):
        Counters().conections = 1  # type: ignore[attr-defined]
