"""Counters count, and show how far they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from gmprpc.metrics import Counters, Statistics


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


CHANGES: list[Callable[[Any], Any]] = [
    lambda statistics: statistics.update(x=1),
    lambda statistics: statistics.__setitem__("x", 1),
    lambda statistics: statistics.__delitem__("connections"),
    lambda statistics: statistics.__ior__({"x": 1}),
    lambda statistics: statistics.setdefault("x", 1),
    lambda statistics: statistics.pop("connections"),
    lambda statistics: statistics.popitem(),
    lambda statistics: statistics.clear(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_statistics_can_not_be_changed(change: Callable[[Any], Any]) -> None:
    statistics = Statistics({"connections": 5}, in_flight=2)
    with pytest.raises(TypeError, match="can't be changed"):
        change(statistics)
    assert statistics == {"connections": 5, "in_flight": 2}


def test_statistics_can_be_copied_and_sent_anywhere() -> None:
    statistics = Statistics({"connections": 5}, in_flight=2)
    assert statistics | {"in_flight": 3} == {"connections": 5, "in_flight": 3}
    assert msgpack.unpackb(msgpack.packb(statistics)) == statistics
    assert json.loads(json.dumps(statistics)) == statistics
    for same in (pickle.loads(pickle.dumps(statistics)), copy.deepcopy(statistics)):
        assert (type(same), same) == (Statistics, statistics)
