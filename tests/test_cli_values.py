"""Values to JSON and back: nothing is lost, and whatever isn't a value is refused with InvalidValue."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgpack import ExtType, Timestamp

from gmprpc.cli.values import UNPACKER_OPTIONS, InvalidValue, from_argument, from_json, to_json

# What can be a map's key, too. (No NaN: it equals nothing, itself included.)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.builds(ExtType, st.integers(0, 127), st.binary())
    | st.builds(Timestamp, st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9 - 1))
    # Around the years that a datetime can say.
    | st.builds(Timestamp, st.integers(-62_135_596_810, 253_402_300_810), st.integers(0, 10**9 - 1))
)
FORM_NAMES = st.sampled_from(["$bytes", "$timestamp", "$ext", "$float", "$map"])
KEYS = st.recursive(SCALARS | FORM_NAMES, lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=5)
VALUES = st.recursive(
    SCALARS,
    lambda values: (
        st.lists(values, max_size=4)
        | st.dictionaries(KEYS, values, max_size=4)
        | st.dictionaries(FORM_NAMES, values, min_size=1, max_size=1)
    ),
    max_leaves=20,
)


def pack(value: Any) -> bytes:
    return msgpack.packb(value)


def unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False, **UNPACKER_OPTIONS)


@given(VALUES)
def test_what_a_peer_sent_can_be_sent_back_as_it_was(value: Any) -> None:
    received = unpack(pack(value))
    assert pack(from_json(to_json(received))) == pack(received)
    assert pack(from_json(to_json(received, indent=2))) == pack(received)


@given(VALUES)
def test_json_is_json(value: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(to_json(unpack(pack(value))), parse_constant=refuse)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.text() | FORM_NAMES, values, max_size=3)
        | st.dictionaries(FORM_NAMES, values, min_size=1, max_size=1)
    ),
    max_leaves=10,
)


@given(JSON)
def test_any_json_is_a_value_or_invalid(document: Any) -> None:
    with suppress(InvalidValue):
        from_json(json.dumps(document))


@given(st.text())
def test_any_argument_is_json_or_a_string(text: str) -> None:
    try:
        value = from_argument(text)
    except InvalidValue:
        return
    try:
        expected = from_json(text)
    except ValueError:
        expected = text
    assert value == expected or value != value


@pytest.mark.parametrize(
    "value, form",
    [
        (b"\x00\xff", {"$bytes": "AP8="}),
        (Timestamp(0), {"$timestamp": "1970-01-01T00:00:00Z"}),
        (Timestamp(1_738_324_800, 500_000_000), {"$timestamp": "2025-01-31T12:00:00.5Z"}),
        (Timestamp(-1, 1), {"$timestamp": "1969-12-31T23:59:59.000000001Z"}),
        (Timestamp(2**40), {"$ext": [-1, "AAAAAAAAAQAAAAAA"]}),
        (ExtType(5, b"x"), {"$ext": [5, "eA=="]}),
        (math.nan, {"$float": "NaN"}),
        (-math.inf, {"$float": "-Infinity"}),
        ({1: "one"}, {"$map": [[1, "one"]]}),
        ({"a": 1, b"b": 2}, {"$map": [["a", 1], [{"$bytes": "Yg=="}, 2]]}),
        ({(1, 2): None}, {"$map": [[[1, 2], None]]}),
        ({"$bytes": 1}, {"$map": [["$bytes", 1]]}),
        ({"$bytes": 1, "b": 2}, {"$bytes": 1, "b": 2}),
        ({"$set": 1}, {"$set": 1}),
        ([1.0, 1, True, None, "é"], [1.0, 1, True, None, "é"]),
    ],
)
def test_each_form_both_ways(value: Any, form: Any) -> None:
    assert to_json(value) == json.dumps(form, ensure_ascii=False)
    assert pack(from_json(json.dumps(form))) == pack(value)


def test_string_that_is_not_unicode_is_shown_as_bytes() -> None:
    received = unpack(b"\x93\xa2\xff!\x81\xa1\xfe\x01\xa2\xc3\xa9")  # ["\xff!", {"\xfe": 1}, "é"], as raw strings
    assert json.loads(to_json(received)) == [{"$bytes": "/yE="}, {"$map": [[{"$bytes": "/g=="}, 1]]}, "é"]


@pytest.mark.parametrize(
    "text, timestamp",
    [
        ("2025-01-31T12:00:00+01:00", Timestamp(1_738_321_200)),
        ("2025-01-31T12:00Z", Timestamp(1_738_324_800)),
        ("20250131T120000Z", Timestamp(1_738_324_800)),
        ("2025-01-31 12:00:00,25Z", Timestamp(1_738_324_800, 250_000_000)),
        ("2025-01-31T12:00:00.1234567899Z", Timestamp(1_738_324_800, 123_456_789)),
    ],
)
def test_timestamps_may_be_written_as_iso_8601_allows(text: str, timestamp: Timestamp) -> None:
    assert from_json(json.dumps({"$timestamp": text})) == timestamp


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"$bytes": "?"}', "$bytes: not base64"),
        ('{"$bytes": 1}', "$bytes: give a string of base64"),
        ('{"$timestamp": "yesterday"}', "$timestamp: Invalid isoformat string"),
        ('{"$timestamp": "2025-01-31T12:00:00"}', "$timestamp: say of which time zone"),
        ('{"$timestamp": 5}', "$timestamp: give a string in ISO 8601"),
        ('{"$ext": "x"}', "$ext: give an array of the code and a string of base64"),
        ('{"$ext": ["1", ""]}', "$ext: code must be int"),
        ('{"$ext": [128, ""]}', "$ext: code must be 0~127"),
        ('{"$ext": [-1, ""]}', "$ext: "),
        ('{"$float": "one"}', "$float: no such value"),
        ('{"$float": []}', "$float: "),
        ('{"$map": {"a": 1}}', "$map: give an array of pairs"),
        ('{"$map": [[1]]}', "$map: give an array of pairs"),
        ('{"$map": [[{}, 1]]}', "$map: a map can't be a key"),
        ('[[{"$map": 0}]]', "$map: give an array of pairs"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_what_is_filled_in_wrongly_is_invalid(text: str, reason: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        from_json(text)
    assert str(caught.value).startswith(reason)
    with pytest.raises(InvalidValue):
        from_argument(text)


@pytest.mark.parametrize("text", ["", "abc", "NaN", "-Infinity", "01", "1_000", "'a'", "{", "nil", "--x", "[1,]"])
def test_argument_that_is_not_json_is_a_string(text: str) -> None:
    assert from_argument(text) == text


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), (" 1 ", 1), ("-1.5", -1.5), ("1e3", 1000.0), ("null", None), ('"1"', "1"), ("[]", []), ("{}", {})],
)
def test_argument_that_is_json_is_what_it_says(text: str, value: Any) -> None:
    assert from_argument(text) == value


def test_result_that_is_nested_too_deeply_is_invalid() -> None:
    value: Any = []
    for _ in range(10_000):
        value = [value]
    with pytest.raises(InvalidValue, match="nested too deeply"):
        to_json(value)
