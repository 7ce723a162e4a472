"""Bytes to checked messages and back: whatever the bytes are, and in whatever pieces they come."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import gevent
import hypothesis.strategies as st
import msgpack
import msgpack.fallback
import pytest
from gevent.event import Event
from hypothesis import HealthCheck, example, given, settings

from gmprpc.exceptions import MessageTooLarge, MethodNotFound, ProtocolError, RemoteError
from gmprpc.protocol import (
    INVALID,
    MAX_MSGID,
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Decoder,
    Encoder,
    Message,
    Run,
    next_msgid,
    parted,
    request_of,
    result_of,
)

# HYPOTHESIS_PROFILE=thorough is for an afternoon; whoever chose a profile on the command line has said so.
settings.register_profile("brief", max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("brief"), max_examples=20_000)
brief = settings(settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "brief")))

MAX_SIZE = 1024 * 1024

pack = msgpack.packb

#: What came out of a decoder: the messages, and the error that ended the stream, if one did.
Outcome = tuple[list[Message], ProtocolError | None]


def fed(decoder: Decoder, data: bytes) -> Iterator[Message]:
    """The messages that ``data`` completes."""
    return (message for run in runs(decoder, data) for message in run)


def runs(decoder: Decoder, data: bytes) -> Iterator[Run]:
    """The same in runs, of which the empty ones are opportunities for others."""
    run, rest = decoder.feed(data)
    if run:
        yield run
    yield from rest or ()


def decode(
    *pieces: bytes, max_message_size: int = MAX_SIZE, options: Mapping[str, Any] | None = None, rest: bool = False
) -> Outcome:
    """What a decoder makes of a stream that comes in ``pieces``, and whether it was right about the ``rest``."""
    decoder = Decoder(max_message_size, options)
    messages: list[Message] = []
    try:
        for piece in pieces:
            messages += fed(decoder, piece)
    except ProtocolError as exc:
        return messages, exc
    assert bool(decoder.unfinished) is rest
    return messages, None


def messages_of(*pieces: bytes, options: Mapping[str, Any] | None = None) -> list[Message]:
    """The messages in a stream without errors."""
    messages, error = decode(*pieces, options=options)
    assert error is None
    return messages


def shown(outcome: Outcome) -> str:
    """An outcome as something that can be compared, NaN and the types of numbers included."""
    messages, error = outcome
    return repr((messages, type(error), str(error)))


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """``data`` cut at each of ``cuts``."""
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise([0, *ends])]


def in_every_way(data: bytes, options: Mapping[str, Any] | None = None) -> list[Message]:
    """The messages in ``data``, which have to be the same whole, byte by byte, halved, with a tail, and in a crowd."""
    tail = Encoder().notification("tail", [])
    # As many as it takes to be past what is decoded on a guess.
    crowd = Encoder().notification("crowd", ["x" * 200]) * 2
    messages = messages_of(data, options=options)
    for way in (
        [data[i : i + 1] for i in range(len(data))],
        [data[: len(data) // 2], data[len(data) // 2 :]],
        [data[:1], data[1:] + tail],
        [data + tail],
        [crowd + data + crowd],
        [crowd + data[:-1], data[-1:] + crowd],
        [(crowd + data + crowd)[i : i + 7] for i in range(0, 2 * len(crowd) + len(data), 7)],
    ):
        others = messages_of(*way, options=options)
        assert repr([message for message in others if message[2] not in ("tail", "crowd", b"tail")]) == repr(messages)
    return messages


# What messages are made of. (Zones of a fixed offset only: with others Python finds two datetimes of the same moment
# unequal while the clocks are being changed.)

timezones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes)))

moments = st.datetimes(
    datetime.datetime(1, 1, 2),  # noqa: DTZ001
    datetime.datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=timezones,
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40)),
    moments,
)
keys = st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(), st.binary(), st.floats(allow_nan=False), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    max_leaves=15,
)
msgids = st.integers(0, MAX_MSGID) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, MAX_MSGID])
methods = st.text()
arrays_of_params = st.lists(values, max_size=5)
messages = st.one_of(
    st.tuples(st.just(REQUEST), msgids, methods, arrays_of_params),
    st.tuples(st.just(RESPONSE), msgids, values, st.none()),
    st.tuples(st.just(RESPONSE), msgids, st.none(), values),
    st.tuples(st.just(NOTIFICATION), st.none(), methods, arrays_of_params),
)


def encoded(message: Message, encoder: Encoder | None = None) -> bytes:
    """The bytes of one of :data:`messages`."""
    encoder = encoder or Encoder()
    kind, msgid, third, fourth = message
    if kind == REQUEST:
        return encoder.request(msgid, third, fourth)
    if kind == RESPONSE:
        return encoder.response(msgid, third, fourth)
    return encoder.notification(third, fourth)


@st.composite
def broken_streams(draw: st.DrawFn) -> bytes:
    """Valid messages in which some bytes have been changed, lost or put in."""
    data = bytearray().join(encoded(message) for message in draw(st.lists(messages, min_size=1, max_size=6)))
    data *= draw(st.sampled_from([1, 1, 3, 10]))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        drop = draw(st.integers(0, 2))
        data[at : at + drop] = draw(st.binary(max_size=2) | st.sampled_from([b"\xc1", b"\xff", b"\xdd\xff", b"\x94"]))
    return bytes(data)


# Bytes that look like MessagePack far more often than bytes picked at random.
leads = st.sampled_from(
    [b"\x93", b"\x94", b"\x94\x00", b"\x94\x01", b"\x93\x02", b"\x90", b"\x91", b"\x80", b"\x81", b"\x00", b"\x7f"]
    + [b"\xa1m", b"\xa1\xff", b"\xc0", b"\xc1", b"\xc2", b"\xff", b"\xca", b"\xcb", b"\xcc", b"\xcd", b"\xce", b"\xcf"]
    + [
        b"\xc4\x01",
        b"\xc5\x00\x01",
        b"\xc6\x00\x00\x00\x01",
        b"\xc7\x00\x05",
        b"\xc8\x00\x01",
        b"\xd4\x05",
        b"\xd6\xff",
    ]
    + [b"\xd9\x00", b"\xda\x00\x01", b"\xdb\x00\x00\x00\x01", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\xde\x00\x01"]
    + [b"\xdf\x00\x00\x00\x01", b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc9\x00\x10\x00\x00\x05"]
)
garbage = st.one_of(
    st.binary(max_size=400),
    st.lists(leads | st.binary(max_size=3), max_size=150).map(b"".join),
    broken_streams(),
)
cuts = st.lists(st.integers(0, 10_000), max_size=8)


# Round trips.


@brief
@given(messages)
def test_every_message_survives_the_round_trip(message: Message) -> None:
    (decoded,) = messages_of(encoded(message))
    assert list(decoded) == list(message)
    assert decoded[3] is None or type(decoded[3]) is type(message[3]) or isinstance(message[3], datetime.datetime)


@brief
@given(st.lists(messages, max_size=8), cuts)
def test_a_message_in_any_split_is_the_same_message(stream: list[Message], cuts: list[int]) -> None:
    encoder = Encoder()
    data = b"".join(encoded(message, encoder) for message in stream)
    assert [list(message) for message in messages_of(data)] == [list(message) for message in stream]
    for pieces in (pieces_of(data, cuts), [data[i : i + 1] for i in range(len(data))]):
        assert [list(message) for message in messages_of(*pieces)] == [list(message) for message in stream]


def test_nan_and_the_infinities_survive_the_round_trip() -> None:
    values = [float("nan"), float("inf"), float("-inf"), -0.0]
    (message,) = messages_of(Encoder().request(0, "m", values))
    assert repr(message[3]) == "[nan, inf, -inf, -0.0]"


@pytest.mark.parametrize(
    "moment",
    [
        datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(1, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime.max.replace(tzinfo=datetime.UTC),
        datetime.datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=datetime.UTC),
        datetime.datetime(
            2038, 1, 19, 3, 14, 8, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-9, minutes=-30))
        ),
    ],
)
def test_a_timestamp_is_a_datetime_of_the_same_moment_in_utc(moment: datetime.datetime) -> None:
    (message,) = messages_of(Encoder().notification("at", [moment]))
    assert message[3] == [moment]
    assert message[3][0].utcoffset() == datetime.timedelta(0)


def test_a_datetime_of_no_timezone_can_not_be_sent() -> None:
    with pytest.raises((TypeError, ValueError)):
        Encoder().notification("at", [datetime.datetime(2020, 1, 1)])  # noqa: DTZ001


def test_tuples_and_lists_are_both_arrays() -> None:
    assert Encoder().request(1, "m", (1, (2,))) == Encoder().request(1, "m", [1, [2]])


def test_the_bytes_are_those_of_the_specification() -> None:
    encoder = Encoder()
    assert encoder.request(1, "m", [2]) == b"\x94\x00\x01\xa1m\x91\x02"
    assert encoder.response(MAX_MSGID, "no", None) == b"\x94\x01\xce\xff\xff\xff\xff\xa2no\xc0"
    assert encoder.response(300, None, b"\x00") == b"\x94\x01\xcd\x01\x2c\xc0\xc4\x01\x00"
    assert encoder.notification("m", []) == b"\x93\x02\xa1m\x90"


# Garbage.


@brief
@given(st.lists(messages, max_size=30), st.lists(messages, max_size=30))
def test_a_run_is_of_one_kind_and_an_invalid_message_is_a_run_of_its_own(
    before: list[Message], behind: list[Message]
) -> None:
    encoder = Encoder()
    invalid = pack([REQUEST, 1, 5, []])
    stream = [*(encoded(message, encoder) for message in before), invalid, *(encoded(message) for message in behind)]
    count = 0
    for run in runs(Decoder(MAX_SIZE), b"".join(stream)):
        kinds = {message[0] for message in run}
        assert kinds <= {REQUEST, NOTIFICATION} or kinds == {RESPONSE} or (kinds == {INVALID} and len(run) == 1)
        count += len(run)
        run.clear()  # As whoever has carried it out may do.
    assert count == len(stream)


def some_message(random: Random) -> bytes:
    """A message of any kind and of a size on either side of what a decoder treats in different ways."""
    size = random.choice([0, 1, 10, 10, 10, 60, 100, 240, 260, 4000, 4100, 16_000, 16_400])
    few = bytes(random.randrange(max(1, size - 20), size + 20))
    many = [1] * len(few)
    choice: list[list[Any]] = [[few], many, [{"few": few}, many[:100]]]
    params = random.choice(choice)
    msgid = random.randrange(2**32)
    return pack(
        random.choice(
            [
                [REQUEST, msgid, "method", params],
                [REQUEST, msgid, "method", params],
                [REQUEST, msgid, b"bytes", params],
                [REQUEST, msgid, "not an array", few],
                [NOTIFICATION, "method", params],
                [RESPONSE, msgid, None, params],
                [REQUEST, msgid, "no Unicode", ["\udcff", *params]],
            ]
        ),
        unicode_errors="surrogateescape",
    )


@pytest.mark.parametrize("max_message_size", [MAX_SIZE, 16_500, 3000, 200])
@pytest.mark.parametrize("seed", range(4))
def test_many_messages_at_once_are_what_each_is_alone(max_message_size: int, seed: int) -> None:
    random = Random(seed)
    stream = [message for message in (some_message(random) for _ in range(60)) if len(message) <= max_message_size]
    expected = [decode(message, max_message_size=max_message_size)[0][0] for message in stream]
    data = b"".join(stream)
    borders = [size + near for size in (0, 256, 4096, 8192, 16_384, 80 * 1024) for near in (-2, -1, 0, 1, 2)]
    starts = [0, *itertools.accumulate(map(len, stream))]
    for start in random.sample(starts, 5):
        for border in borders:
            assert decode(*pieces_of(data, [start, start + border]), max_message_size=max_message_size) == (
                expected,
                None,
            )


def test_a_large_message_of_few_values_is_decoded_only_where_it_is_alone() -> None:
    large = pack([REQUEST, 1, "method", [b"x" * 20_000]])
    small = pack([NOTIFICATION, "method", [1]])
    for stream in ([large], [large, small], [small, large], [large, large], [large, small, large, small]):
        data = b"".join(stream)
        assert [len(message[3]) for message in messages_of(data)] == [1] * len(stream)
        assert messages_of(data[:-1], data[-1:]) == messages_of(data)
    assert decode(large[:-1], rest=True) == ([], None)
    assert decode(large + b"\x94", rest=True) == (messages_of(large), None)


@brief
@given(garbage, cuts)
@example(b"\x94\x00\x05\xa1m\x91\xa1\xff" + b"\x94\x00\x06\xa1m\x90" * 60, [3])
@example(b"\x93\x02\xa1m\x91\xc1", [])
@example(b"\xc1", [])
def test_garbage_is_messages_or_a_protocol_error_the_same_in_every_split(data: bytes, cuts: list[int]) -> None:
    def outcome(*pieces: bytes, max_message_size: int = MAX_SIZE) -> str:
        # Whether there is a rest is a part of the outcome, too.
        decoder = Decoder(max_message_size)
        messages: list[Message] = []
        try:
            for piece in pieces:
                messages += fed(decoder, piece)
        except ProtocolError as exc:
            return shown((messages, exc))
        return shown((messages, None)) + str(bool(decoder.unfinished))

    for size in (MAX_SIZE, 300, 40):
        whole = outcome(data, max_message_size=size)
        assert outcome(*pieces_of(data, cuts), max_message_size=size) == whole
        assert outcome(*(data[i : i + 1] for i in range(len(data))), max_message_size=size) == whole


@brief
@given(garbage)
def test_garbage_is_framed_as_msgpack_frames_it(data: bytes) -> None:
    """Both ways to find the end of a message, msgpack's and our own, are held against msgpack's."""
    reference = msgpack.Unpacker(max_buffer_size=0, raw=True, strict_map_key=False)
    reference.feed(data)
    ends = []
    try:
        while True:
            reference.skip()
            ends.append(reference.tell())
    except (msgpack.OutOfData, ValueError):
        pass
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        messages, error = decode(*pieces, rest=ends[-1:] != [len(data)] if data else False)
        # What msgpack finds well-formed, we find too, unless it isn't MessagePack-RPC.
        assert len(messages) == len(ends) or (error is not None and len(messages) <= len(ends))


@brief
@given(st.binary(max_size=60), st.lists(messages, max_size=4))
def test_the_messages_before_the_garbage_are_all_there(tail: bytes, stream: list[Message]) -> None:
    data = b"".join(map(encoded, stream))
    messages, error = decode(data + b"\xc1" + tail)
    assert [list(message) for message in messages] == [list(message) for message in stream]
    assert type(error) is ProtocolError
    assert str(error) == "not MessagePack: the byte 0xc1 has no meaning"


@pytest.mark.parametrize("before", [b"", b"\x94", b"\x94\x00", b"\x94\x00\x01\xa1m\x91", b"\x94\x00\x01\xa1m\x91\x81"])
@pytest.mark.parametrize("crowd", [0, 1, 60])
def test_the_byte_0xc1_is_a_protocol_error_wherever_a_value_begins(before: bytes, crowd: int) -> None:
    data = Encoder().notification("ok", []) * crowd + before + b"\xc1"
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], [data + b"tail"]):
        messages, error = decode(*pieces)
        assert len(messages) == crowd
        assert str(error) == "not MessagePack: the byte 0xc1 has no meaning"


def test_the_byte_0xc1_within_a_string_or_a_number_is_as_good_as_any() -> None:
    params = [b"\xc1\xc1", 0xC1C1, msgpack.ExtType(5, b"\xc1")]
    assert in_every_way(Encoder().request(0xC1C1, "m", params)) == [[0, 0xC1C1, "m", params]]


@pytest.mark.parametrize(
    "message, description",
    [
        (None, "a value of type NoneType"),
        (5, "a value of type int"),
        ("hello", "a value of type str"),
        ({0: 1}, "a value of type dict"),
        ([], "an array of 0"),
        ([0], "an array of 1, kind 0"),
        ([0, 1], "an array of 2, kind 0"),
        ([0, 1, "m"], "an array of 3, kind 0"),
        ([1, 1, None], "an array of 3, kind 1"),
        ([2, 1, "m", []], "an array of 4, kind 2"),
        ([0, 1, "m", [], 0], "an array of 5, kind 0"),
        ([3, 1, "m", []], "an array of 4, kind 3"),
        ([-1, 1, "m", []], "an array of 4, kind -1"),
        ([False, 1, "m", []], "an array of 4, kind False"),
        ([True, 1, None, 1], "an array of 4, kind True"),
        ([0.0, 1, "m", []], "an array of 4"),
        ([2.0, "m", []], "an array of 3"),
        ([None, 1, "m", []], "an array of 4"),
        (["0", 1, "secret", []], "an array of 4"),
        ([[0], 1, "m", []], "an array of 4"),
        ([0, -1, "m", []], "an array of 4, kind 0"),
        ([0, MAX_MSGID + 1, "m", []], "an array of 4, kind 0"),
        ([1, MAX_MSGID + 1, None, 0], "an array of 4, kind 1"),
        ([0, True, "m", []], "an array of 4, kind 0"),
        ([0, 1.0, "m", []], "an array of 4, kind 0"),
        ([0, None, "m", []], "an array of 4, kind 0"),
        ([0, "1", "m", []], "an array of 4, kind 0"),
        ([1, 1.0, None, 0], "an array of 4, kind 1"),
    ],
)
def test_what_is_no_message_is_a_protocol_error_that_quotes_no_values(message: Any, description: str) -> None:
    good = Encoder().request(1, "m", [])
    data = pack(message)
    for pieces in ([data], [data[:1], data[1:]], [data + good], [data[i : i + 1] for i in range(len(data))]):
        messages, error = decode(*pieces)
        assert messages == []
        assert type(error) is ProtocolError
        assert str(error) == f"not a MessagePack-RPC message: {description}"
    messages, error = decode(good * 60 + data + good)
    assert (len(messages), str(error)) == (60, f"not a MessagePack-RPC message: {description}")


# A message that is well framed, but can't be carried out.


@pytest.mark.parametrize("msgid", [0, 1, 127, 128, 255, 256, 65535, 65536, MAX_MSGID])
def test_a_msgid_is_the_same_in_every_width_that_holds_it(msgid: int) -> None:
    for lead, size, signed in (
        (b"\xcc", 1, False), (b"\xcd", 2, False), (b"\xce", 4, False), (b"\xcf", 8, False),
        (b"\xd0", 1, True), (b"\xd1", 2, True), (b"\xd2", 4, True), (b"\xd3", 8, True),
    ):  # fmt: skip
        try:
            number = lead + msgid.to_bytes(size, "big", signed=signed)
        except OverflowError:
            continue
        data = b"\x94\x00" + number + b"\xa1m\x90" + b"\x94\x01" + number + b"\xc0\x07"
        assert in_every_way(data) == [[0, msgid, "m", []], [1, msgid, None, 7]]


def test_an_array_may_be_announced_in_every_width() -> None:
    body = b"\x00\x05\xa1m"
    for head in (b"\x94", b"\xdc\x00\x04", b"\xdd\x00\x00\x00\x04"):
        for params in (b"\x90", b"\xdc\x00\x00", b"\xdd\x00\x00\x00\x00"):
            assert in_every_way(head + body + params) == [[0, 5, "m", []]]


def test_a_method_as_bin_or_raw_bytes_is_read_as_utf8() -> None:
    for method in (b"\xc4\x03\xe2\x82\xac", b"\xa3\xe2\x82\xac", b"\xd9\x03\xe2\x82\xac", b"\xda\x00\x03\xe2\x82\xac"):
        (request,) = in_every_way(b"\x94\x00\x05" + method + b"\x90")
        assert list(request) == [REQUEST, 5, "€", []]
        (notification,) = in_every_way(b"\x93\x02" + method + b"\x90")
        assert list(notification) == [NOTIFICATION, None, "€", []]


@pytest.mark.parametrize("params", [b"\x90", b"\x91\xa1\xff", b"\x07"])
@pytest.mark.parametrize("method", [b"\xc4\x03a\xffb", b"\xa3a\xffb"])
def test_a_method_of_invalid_utf8_is_an_unknown_method(method: bytes, params: bytes) -> None:
    (request,) = in_every_way(b"\x94\x00\x05" + method + params)
    (notification,) = in_every_way(b"\x93\x02" + method + params)
    if method.startswith(b"\xa3") or params != b"\x91\xa1\xff":
        assert request == (INVALID, 5, REQUEST, 'No such method "a\ufffdb" found')
        assert notification == (INVALID, None, NOTIFICATION, 'No such method "a\ufffdb" found')
    else:  # Both are wrong, and msgpack stumbles over the one that it has to decode.
        assert request[:3] == (INVALID, 5, REQUEST)


@pytest.mark.parametrize("method", [None, 5, True, 1.5, ["m"], {"m": 1}, msgpack.ExtType(1, b"m")])
def test_a_method_that_is_no_string_is_invalid(method: Any) -> None:
    reason = f"method has to be a string, not {type(method).__name__}"
    assert in_every_way(pack([0, 5, method, []])) == [(INVALID, 5, REQUEST, reason)]
    assert in_every_way(pack([2, method, []])) == [(INVALID, None, NOTIFICATION, reason)]


@pytest.mark.parametrize("params", [None, 5, True, 1.5, "ab", b"ab", {"a": 1}, msgpack.ExtType(1, b"m")])
def test_params_that_are_no_array_are_invalid(params: Any) -> None:
    reason = f"params has to be an array, not {type(params).__name__}"
    assert in_every_way(pack([0, 5, "m", params])) == [(INVALID, 5, REQUEST, reason)]
    assert in_every_way(pack([2, "m", params])) == [(INVALID, None, NOTIFICATION, reason)]


UNDECODABLE = {
    "invalid UTF-8": (b"\xa2\xff\xfe", "can't be decoded: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    "an array for a key": (b"\x81\x90\x01", "can't be decoded: TypeError: unhashable type: 'list'"),
    "a map for a key": (b"\x81\x80\x01", "can't be decoded: TypeError: unhashable type: 'dict'"),
    "nanoseconds": (b"\xd7\xff" + b"\xff" * 8, "can't be decoded: ValueError: nanoseconds"),
    "a year past 9999": (b"\xc7\x0c\xff" + bytes(4) + (2**62).to_bytes(8, "big"), "can't be decoded: OverflowError"),
    "a timestamp of 5 bytes": (b"\xc7\x05\xff" + bytes(5), "can't be decoded: ValueError"),
    "too deep": (b"\x91" * 1100 + b"\xc0", "can't be decoded: StackError"),
    "too deep in maps": (b"\x81\x01" * 1100 + b"\xc0", "can't be decoded: StackError"),
    "too deep in keys": (b"\x81" * 1100 + b"\xc0" * 1101, "can't be decoded: StackError"),
}


@pytest.mark.parametrize("value, reason", UNDECODABLE.values(), ids=UNDECODABLE)
def test_a_value_that_can_not_be_decoded_spoils_its_own_message_only(value: bytes, reason: str) -> None:
    for kind, msgid, data in (
        (REQUEST, 5, b"\x94\x00\x05\xa1m\x92\x01" + value),
        (REQUEST, 5, b"\x94\x00\x05\xa1m" + value),
        (REQUEST, 5, b"\x94\x00\x05\xa1m\x91\x81\xa1k" + value),
        (RESPONSE, 5, b"\x94\x01\x05\xc0" + value),
        (RESPONSE, 5, b"\x94\x01\x05" + value + b"\xc0"),
        (NOTIFICATION, None, b"\x93\x02\xa1m\x91" + value),
    ):
        (message,) = in_every_way(data)
        assert message[:3] == (INVALID, msgid, kind)
        assert message[3].startswith(reason)
        assert not message[3].endswith(": ")
        neighbours = messages_of(b"\x94\x00\x01\xa1a\x90" + data * 2 + b"\x94\x00\x02\xa1b\x90" + data)
        assert neighbours == [[0, 1, "a", []], message, message, [0, 2, "b", []], message]


@pytest.mark.parametrize("value, reason", UNDECODABLE.values(), ids=UNDECODABLE)
def test_a_method_that_can_not_be_decoded_is_answered_too(value: bytes, reason: str) -> None:
    (message,) = in_every_way(b"\x94\x00\x05" + value + b"\x90")
    assert message[:3] == (INVALID, 5, REQUEST)
    assert message[3].startswith('No such method "' if value[0] == 0xA2 else reason)


@pytest.mark.parametrize("value", [value for value, _ in UNDECODABLE.values()], ids=UNDECODABLE)
def test_a_kind_or_a_msgid_that_can_not_be_decoded_is_a_protocol_error(value: bytes) -> None:
    for data in (
        b"\x94" + value + b"\x05\xa1m\x90",
        b"\x94\x00" + value + b"\xa1m\x90",
        b"\x94\x01" + value + b"\xc0\xc0",
        b"\x93" + value + b"\xa1m\x90",
        b"\x95\x00\x05\xa1m\x90" + value,
        b"\x92\x00" + value,
        b"\x91" + value,
        value,
    ):
        for pieces in ([data], [data[:3], data[3:]], [Encoder().notification("m", []) * 60 + data]):
            messages, error = decode(*pieces)
            assert len(messages) in (0, 60)
            assert type(error) is ProtocolError
            assert str(error).startswith("not a MessagePack-RPC message: ")


def test_the_error_for_a_wrong_length_names_it_whatever_else_is_wrong() -> None:
    _, error = decode(b"\x95\x00\x05\xa1\xff\x90\x00")
    assert str(error).startswith("not a MessagePack-RPC message: an array of 5")


def test_the_deepest_nesting_is_that_of_msgpack() -> None:
    for depth, fits in ((1023, True), (1024, True), (1025, False), (100_000, False)):
        # The message is an array, and so are its params.
        data = b"\x94\x00\x05\xa1m" + b"\x91" * (depth - 2) + b"\x90"
        messages = messages_of(data + b"\x94\x00\x06\xa1m\x90")
        assert [message[0] for message in messages] == [REQUEST if fits else INVALID, REQUEST]
        assert [message[1] for message in messages] == [5, 6]


# Limits.


def header_of(family: str, length: int, width: int) -> bytes:
    """The header of a value of ``family`` that announces ``length`` in so many bytes."""
    lead = {
        "bin": {1: b"\xc4", 2: b"\xc5", 4: b"\xc6"},
        "str": {1: b"\xd9", 2: b"\xda", 4: b"\xdb"},
        "ext": {1: b"\xc7", 2: b"\xc8", 4: b"\xc9"},
        "array": {2: b"\xdc", 4: b"\xdd"},
        "map": {2: b"\xde", 4: b"\xdf"},
    }[family][width]
    return lead + length.to_bytes(width, "big") + (b"\x05" if family == "ext" else b"")


ANNOUNCEMENTS = [
    (family, length, width)
    for family, widths in {"bin": (1, 2, 4), "str": (1, 2, 4), "ext": (1, 2, 4), "array": (2, 4), "map": (2, 4)}.items()
    for width in widths
    for length in {1: (0, 1, 200), 2: (1, 300), 4: (1, 70_000)}[width]
]


@pytest.mark.parametrize("family, length, width", ANNOUNCEMENTS)
def test_what_is_announced_is_held_against_max_message_size(family: str, length: int, width: int) -> None:
    head = b"\x94\x00\x05\xa1m\x91" + header_of(family, length, width)
    body = b"".join(b"%c" % (i % 128) for i in range(2 * length)) if family == "map" else b"x" * length
    if family == "map":  # Every key is followed by its value.
        body = b"\x01" * (2 * length)
    size = len(head + body)
    good = Encoder().request(1, "m", [])

    for limit in (size, size + 1):
        for pieces in ([head + body], [head, body], [good * 2 + head + body], [good[:3], good[3:] + head, body + good]):
            messages, error = decode(*pieces, max_message_size=limit)
            assert error is None
            (message,) = (message for message in messages if message != [0, 1, "m", []])
            assert message[:2] == [0, 5]

    # One less: the header is enough, before anything of the body is there.
    for limit in (size - 1, size - length) if length > 1 else (size - 1,):
        for pieces in (
            [head],
            [head[i : i + 1] for i in range(len(head))],
            [head + body],
            [head + body + good],
            [good * 2 + head + body[:1]],
        ):
            if limit < len(good):
                continue
            messages, error = decode(*pieces, max_message_size=limit)
            assert all(message == [0, 1, "m", []] for message in messages)
            assert isinstance(error, MessageTooLarge)
            assert error.max_message_size == limit
            assert limit < error.size <= size
            assert str(error) == (f"message of at least {error.size} bytes exceeds max_message_size ({limit} bytes)")
        assert error.size == size


@pytest.mark.parametrize("value", [b"\x01", b"\xff", b"\xc0", b"\xcb" + bytes(8), b"\xce" + bytes(4), b"\xa1x"])
def test_a_message_of_many_small_parts_is_held_against_max_message_size(value: bytes) -> None:
    count = 400
    data = b"\x94\x00\x05\xa1m\xdc" + count.to_bytes(2, "big") + value * count
    for step in (1, 7, 100, len(data)):
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        for limit in (len(data), len(data) + 1):
            messages, error = decode(*pieces, max_message_size=limit)
            assert error is None
            assert len(messages) == 1
        messages, error = decode(*pieces, max_message_size=len(data) - 1)
        assert messages == []
        assert isinstance(error, MessageTooLarge)
        assert len(data) - 1 < error.size <= len(data)


def test_announcements_add_up() -> None:
    # Each of them fits by itself.
    head = b"\x94\x00\x05\xa1m"
    for header, each in ((b"\xdc\x00\x0a", 9), (b"\xde\x00\x05", 9), (b"\x9f", 14), (b"\x87", 13)):
        limit = len(head) + 5 * (len(header) + each) + 1
        assert decode(head + header * 5, max_message_size=limit, rest=True) == ([], None)
        for pieces in ([head + header * 6], [head, *[header] * 6]):
            _, error = decode(*pieces, max_message_size=limit)
            assert isinstance(error, MessageTooLarge)


def test_small_messages_may_be_more_than_one_may_be_large() -> None:
    good = Encoder().request(1, "m", [])
    for count in (1, 2, 100):
        for limit in (len(good), len(good) + 1, 2 * len(good)):
            messages, error = decode(good * count, max_message_size=limit)
            assert (len(messages), error) == (count, None)
        messages, error = decode(good * count, max_message_size=len(good) - 1)
        assert messages == []
        assert isinstance(error, MessageTooLarge)


@brief
@given(st.lists(messages, min_size=1, max_size=5), st.integers(1, 60), cuts)
def test_the_first_message_that_is_too_large_ends_the_stream(
    stream: list[Message], limit: int, cuts: list[int]
) -> None:
    pieces = [encoded(message) for message in stream]
    fitting = list(itertools.takewhile(lambda piece: len(piece) <= limit, pieces))
    for way in (pieces, [b"".join(pieces)], pieces_of(b"".join(pieces), cuts)):
        messages, error = decode(*way, max_message_size=limit)
        assert len(messages) == len(fitting)
        assert isinstance(error, MessageTooLarge) is (len(fitting) < len(pieces))


def peak_of(function: Callable[[], Any]) -> int:
    """How many bytes ``function`` takes at most, while it works and by what it holds on to."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\x00\xff\x00\x00",
        b"\xdd\x00\x01\x00\x00" * 100,
        b"\xdf\x00\x00\x10\x00" * 400,
        b"\xc6\x00\xff\x00\x00",
        b"\xdb\x00\xff\x00\x00",
        b"\xc9\x00\xff\x00\x00\x05",
        b"\x94\x00\x05\xa1m\xdd\x00\xff\x00\x00",
        b"\xdc\xff\xff" * 200,
        b"\x9f" * 5000,
    ],
)
@pytest.mark.parametrize("step", [1, 7, 5000])
def test_what_is_announced_takes_no_memory_before_it_comes(data: bytes, step: int) -> None:
    decoder = Decoder(2**24)

    def feed() -> None:
        for i in range(0, len(data), step):
            assert list(fed(decoder, data[i : i + step])) == []

    assert peak_of(feed) < 64 * 1024 + 2 * len(data)
    assert decoder.unfinished


@pytest.mark.parametrize("data", [b"\xdc\x01\x00" * 85, b"\xdc\x00\xf0" * 85, b"\x9f" * 256, b"\xde\x00\x7f" * 85])
def test_what_is_decoded_on_a_guess_takes_little(data: bytes) -> None:
    decoder = Decoder(2**24)
    assert peak_of(lambda: list(fed(decoder, data))) < 256 * 1024
    assert decoder.unfinished


def test_a_message_that_never_ends_holds_no_more_than_the_limit() -> None:
    decoder = Decoder(100_000)

    def dribble() -> None:
        with pytest.raises(MessageTooLarge):
            for _ in range(200):
                assert list(fed(decoder, b"\x91" * 1000)) == []

    # A bytearray that grows may have half as much again in reserve.
    assert peak_of(dribble) < 3 * 100_000


def held() -> int:
    """How many bytes are in use since tracing began."""
    return tracemalloc.get_traced_memory()[0]


def test_a_decoder_keeps_no_large_buffer_though_it_goes_on_to_be_used() -> None:
    small = Encoder().request(1, "m", ["x"]) * 3
    large = Encoder().request(1, "m", ["x" * 200_000]) + small
    decoder = Decoder(MAX_SIZE)
    tracemalloc.start()
    try:
        for _ in range(3):
            assert len(list(fed(decoder, large))) == 4
            assert len(list(fed(decoder, small))) == 3
            assert held() < 100_000
    finally:
        tracemalloc.stop()


def test_nothing_large_is_kept_by_a_decoder_that_is_told_to_release() -> None:
    large = Encoder().request(1, "m", ["x" * 500_000])
    decoder = Decoder(MAX_SIZE)
    tracemalloc.start()
    try:
        assert len(list(fed(decoder, large * 2))) == 2
        assert len(list(fed(decoder, large[:100]))) == 0
        assert len(list(fed(decoder, large[100:]))) == 1
        decoder.release()
        assert held() < 10_000
        assert len(list(fed(decoder, large))) == 1  # And it goes on.
        decoder.release()
        assert held() < 10_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [list.clear, lambda items: items.append(4), lambda items: items.pop()])
def test_what_changes_while_it_is_packed_is_no_message(change: Callable[[list[Any]], Any]) -> None:
    items: list[Any] = [object(), 2, 3]

    def default(obj: Any) -> Any:
        change(items)
        return "replaced"

    encoder = Encoder({"default": default})
    with pytest.raises(ValueError, match="has changed meanwhile"):
        encoder.response(1, None, items)
    assert encoder.response(1, None, [[1], "x"]) == b"\x94\x01\x01\xc0\x92\x91\x01\xa1x"


def test_what_a_default_hook_replaces_is_packed_as_it_is() -> None:
    encoder = Encoder({"default": lambda obj: {"a": [1, {}]}})
    assert msgpack.unpackb(encoder.response(1, None, [object()] * 3)) == [1, 1, None, [{"a": [1, {}]}] * 3]


def test_nothing_large_is_kept_by_an_encoder_that_is_told_to_release() -> None:
    params = ["x" * 500_000]
    encoder = Encoder()
    tracemalloc.start()
    try:
        size = len(encoder.request(1, "m", params))
        encoder.release()
        assert held() < 10_000
        assert len(encoder.request(1, "m", params)) == size  # And it goes on.
        encoder.release()
        assert held() < 10_000
    finally:
        tracemalloc.stop()


def test_releasing_amid_a_message_or_a_batch_loses_nothing() -> None:
    data = b"".join(Encoder().request(i, "m", ["x" * 30]) for i in range(100))
    decoder = Decoder(MAX_SIZE)
    seen = []
    for piece in (data[:1000], data[1000:1001], data[1001:]):
        for message in fed(decoder, piece):
            seen.append(message[1])
            decoder.release()
        decoder.release()
    assert seen == list(range(100))


@pytest.mark.parametrize(
    "lead, least",
    [(b"\xc4", 2), (b"\xc5", 3), (b"\xc6", 5), (b"\xc7", 3), (b"\xc8", 4), (b"\xc9", 6)]
    + [(b"\xd9", 2), (b"\xda", 3), (b"\xdb", 5), (b"\xdc", 3), (b"\xdd", 5), (b"\xde", 3), (b"\xdf", 5)],
)
def test_a_header_that_can_not_fit_is_refused_at_its_first_byte(lead: bytes, least: int) -> None:
    size = 1 + least + 3  # The message's own header comes before it, three values of a byte or more behind it.
    assert list(fed(Decoder(size), b"\x94" + lead)) == []
    with pytest.raises(MessageTooLarge, match=f"at least {size} bytes"):
        list(fed(Decoder(size - 1), b"\x94" + lead))


@pytest.mark.parametrize("value", [b"\x01", b"\x90", b"\x91", b"\xa1x", b"\xcd\x01\x02", b"\xdb\x00\x00\x00\x00"])
@pytest.mark.parametrize("piece_size", [2**20, 100_000, 8 * 1024, 100])
def test_others_get_their_turn_while_a_long_message_is_looked_through(value: bytes, piece_size: int) -> None:
    count = 200_000 // len(value)
    data = b"\x94\x00\x05\xa1m\xdd" + (count + 5).to_bytes(4, "big") + value * count
    decoder = Decoder(MAX_SIZE)
    looked_at = stretches = 0
    for start in range(0, len(data), piece_size):
        piece = data[start : start + piece_size]
        pauses = list(runs(decoder, piece))
        assert all(pause == [] for pause in pauses)
        # No more than 4 KiB, and a value that reaches beyond, between two pauses.
        assert len(pauses) >= len(piece) // (4 * 1024 + len(value)) - 1
        looked_at += len(piece)
        stretches += len(pauses)
    assert looked_at == len(data)
    assert stretches <= len(data) // (4 * 1024)
    assert decoder.unfinished


@pytest.mark.parametrize("last, expected", [(b"\x01", REQUEST), (b"\xa1\xff", INVALID)], ids=["sound", "undecodable"])
@pytest.mark.parametrize("size", [1, 50_000, MAX_SIZE])
def test_a_message_that_was_looked_through_in_stretches_is_whole(last: bytes, expected: int, size: int) -> None:
    # Once it is short enough to be unpacked first, and looked through only if that fails, once it isn't.
    params = [[i, "x", [], {}, 1.5, None, b"yy"] for i in range(5000)]
    data = b"\x94\x00\x05\xa1m\x92" + pack(params) + last
    decoder = Decoder(len(data))
    messages = [message for piece in (data[:size], data[size:]) for message in fed(decoder, piece)]
    messages += fed(decoder, data + b"\x94\x00\x06\xa1m\x90")
    assert [message[:2] for message in map(list, messages)] == [[expected, 5], [expected, 5], [REQUEST, 6]]
    if expected == REQUEST:
        assert messages[0][3] == messages[1][3] == [params, 1]


def test_a_message_comes_out_as_soon_as_it_is_complete() -> None:
    decoder = Decoder(MAX_SIZE)
    data = Encoder().request(1, "m", ["x"])
    for byte in data[:-1]:
        assert list(fed(decoder, bytes([byte]))) == []
        assert decoder.unfinished
    assert list(fed(decoder, data[-1:])) == [[0, 1, "m", ["x"]]]
    assert not decoder.unfinished
    assert list(fed(decoder, b"")) == []


# msgpack's options.


def test_raw_gives_bytes_for_every_string_but_the_method() -> None:
    data = Encoder().request(5, "m", ["x", {"k": b"v"}]) + Encoder().notification(
        "n", ["\udc80".encode(errors="replace")]
    )
    request, notification = in_every_way(data, {"raw": True})
    assert list(request) == [REQUEST, 5, "m", [b"x", {b"k": b"v"}]]
    assert list(notification) == [NOTIFICATION, None, "n", [b"?"]]
    invalid = b"\x94\x00\x05\xa1m\x91\xa1\xff"
    assert list(in_every_way(invalid, {"raw": True})[0]) == [REQUEST, 5, "m", [b"\xff"]]
    assert in_every_way(b"\x94\x00\x05\xa1\xff\x90", {"raw": True}) == [
        (INVALID, 5, REQUEST, 'No such method "\ufffd" found')
    ]


def test_tuples_are_as_good_as_lists() -> None:
    options = {"use_list": False}
    data = Encoder().request(5, "m", [1, [2]]) + Encoder().response(6, None, [7]) + Encoder().notification("n", [[]])
    assert in_every_way(data, options) == [
        (REQUEST, 5, "m", (1, (2,))),
        (RESPONSE, 6, None, (7,)),
        (NOTIFICATION, None, "n", ((),)),
    ]
    # A tuple is hashable.
    assert in_every_way(b"\x94\x00\x05\xa1m\x91\x81\x91\x01\x02", options) == [(REQUEST, 5, "m", ({(1,): 2},))]
    assert in_every_way(pack([0, 5, "m", None]), options) == [
        (INVALID, 5, REQUEST, "params has to be an array, not NoneType")
    ]
    (invalid,) = in_every_way(b"\x94\x00\x05\xa1m\x91\xa1\xff", options)
    assert invalid[:3] == (INVALID, 5, REQUEST)
    _, error = decode(pack([0, 5, "m"]), options=options)
    assert str(error) == "not a MessagePack-RPC message: an array of 3, kind 0"


def test_strict_map_keys_and_other_options_reach_msgpack() -> None:
    data = Encoder().request(5, "m", [{1: 2}])
    (message,) = in_every_way(data, {"strict_map_key": True})
    assert message[:3] == (INVALID, 5, REQUEST)
    assert in_every_way(data, {"object_pairs_hook": lambda pairs: tuple(pairs)}) == [[0, 5, "m", [((1, 2),)]]]
    moment = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    assert in_every_way(Encoder().request(5, "m", [moment]), {"timestamp": 1}) == [[0, 5, "m", [moment.timestamp()]]]


EXT = msgpack.ExtType(5, b"x")


def raising(exc: BaseException) -> dict[str, Any]:
    """Options with an ext_hook that raises ``exc``."""

    def ext_hook(code: int, data: bytes) -> Any:
        raise exc

    return {"ext_hook": ext_hook}


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("no such type"),
        TypeError("no such type"),
        KeyError("x"),
        RuntimeError(),
        RecursionError("x"),
        MemoryError(),
        OSError(5, "x"),
        msgpack.OutOfData(),
        msgpack.ExtraData(1, b""),
        pytest.param(
            StopIteration(),
        ),
        pytest.param(
            ProtocolError("of an inner stream"),
        ),
    ],
    ids=repr,
)
def test_what_a_hook_raises_spoils_its_own_message_only(exc: Exception) -> None:
    reason = f"can't be decoded: {type(exc).__name__}: {exc}".removesuffix(": ")
    for kind, msgid, data in (
        (REQUEST, 5, pack([0, 5, "m", [EXT]])),
        (RESPONSE, 5, pack([1, 5, None, EXT])),
        (NOTIFICATION, None, pack([2, "m", [EXT]])),
    ):
        assert in_every_way(data, raising(exc)) == [(INVALID, msgid, kind, reason)]
        good = Encoder().request(1, "a", [])
        messages = messages_of(good * 60 + data + good + data, options=raising(exc))
        assert [message[0] for message in messages] == [REQUEST] * 60 + [INVALID, REQUEST, INVALID]


def test_a_hook_may_raise_what_can_not_be_shown() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    (message,) = messages_of(pack([0, 5, "m", [EXT]]), options=raising(Unspeakable()))
    assert message[:3] == (INVALID, 5, REQUEST)


def test_a_hook_may_be_none() -> None:
    options = {"object_hook": None, "object_pairs_hook": None}
    assert in_every_way(pack([0, 5, "m", [{"a": 1}]]), options) == [[0, 5, "m", [{"a": 1}]]]


def test_an_object_hook_sees_the_maps_and_may_refuse_them() -> None:
    def hook(pairs: dict[str, Any]) -> Any:
        if "bad" in pairs:
            raise LookupError("bad")
        return sorted(pairs)

    options = {"object_hook": hook}
    assert in_every_way(pack([0, 5, "m", [{"b": 1, "a": 2}]]), options) == [[0, 5, "m", [["a", "b"]]]]
    assert in_every_way(pack([0, 5, "m", [{"bad": 1}]]), options) == [
        (INVALID, 5, REQUEST, "can't be decoded: LookupError: bad")
    ]


# The encoder.


class Custom:
    """Nothing that msgpack knows."""


def test_what_can_not_be_packed_raises_and_the_next_message_is_unharmed() -> None:
    encoder = Encoder()
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    for bad, error in (
        (Custom(), TypeError),
        (2**64, OverflowError),
        ("\udc80", UnicodeEncodeError),
        (deep, ValueError),
        ([1, 2, "x" * 1000, Custom()], TypeError),
    ):
        with pytest.raises(error):
            encoder.request(1, "m", [bad])
        with pytest.raises(error):
            encoder.response(1, None, bad)
        with pytest.raises(error):
            encoder.notification("m", [bad])
        assert encoder.request(1, "m", [2]) == b"\x94\x00\x01\xa1m\x91\x02"
        assert encoder.response(1, None, 2) == b"\x94\x01\x01\xc0\x02"


def test_a_default_hook_and_other_options_reach_msgpack() -> None:
    encoder = Encoder({"default": lambda obj: "custom", "use_bin_type": False, "use_single_float": True})
    assert encoder.response(1, None, Custom()) == b"\x94\x01\x01\xc0\xa6custom"
    assert encoder.response(1, None, b"raw") == b"\x94\x01\x01\xc0\xa3raw"
    assert encoder.response(1, None, 1.5) == b"\x94\x01\x01\xc0\xca\x3f\xc0\x00\x00"


def test_messages_can_be_packed_with_strict_types() -> None:
    encoder = Encoder({"strict_types": True})
    assert encoder.request(1, "m", (2,)) == b"\x94\x00\x01\xa1m\x91\x02"
    assert encoder.response(1, None, 2) == b"\x94\x01\x01\xc0\x02"
    assert encoder.notification("m", [2]) == b"\x93\x02\xa1m\x91\x02"


def test_a_default_hook_may_raise_anything() -> None:
    class Stop(BaseException):
        pass

    def default(obj: Any) -> Any:
        raise Stop

    encoder = Encoder({"default": default})
    with pytest.raises(Stop):
        encoder.response(1, None, ["x", Custom()])
    assert encoder.response(1, None, 2) == b"\x94\x01\x01\xc0\x02"


def test_greenlets_may_pack_while_a_default_hook_waits() -> None:
    entered, proceed = Event(), Event()

    def default(obj: Any) -> Any:
        entered.set()
        proceed.wait()
        return "late"

    encoder = Encoder({"default": default})
    ways: list[Callable[[Any], bytes]] = [
        lambda value: encoder.request(1, "m", ["before", value, "after"]),
        lambda value: encoder.response(1, None, ["before", value, "after"]),
        lambda value: encoder.notification("m", ["before", value, "after"]),
    ]
    for slow, quick in itertools.product(ways, ways):
        entered.clear()
        proceed.clear()
        waiting = gevent.spawn(slow, Custom())
        entered.wait()
        assert msgpack.unpackb(quick("quick"))[-1][-3:] == ["before", "quick", "after"]
        other = gevent.spawn(quick, Custom())
        gevent.idle()
        proceed.set()
        assert msgpack.unpackb(waiting.get())[-1][-3:] == ["before", "late", "after"]
        assert msgpack.unpackb(other.get())[-1][-3:] == ["before", "late", "after"]
        assert msgpack.unpackb(quick("quick"))[-1][-3:] == ["before", "quick", "after"]


def test_a_default_hook_may_use_the_encoder_itself() -> None:
    def default(obj: Any) -> Any:
        return encoder.request(2, "inner", [])

    encoder = Encoder({"default": default})
    message = msgpack.unpackb(encoder.request(1, "outer", [Custom(), 3]))
    assert message == [0, 1, "outer", [Encoder().request(2, "inner", []), 3]]


# The small things.


def test_msgids_go_up_wrap_around_and_skip_those_in_flight() -> None:
    assert next_msgid(-1, ()) == 0
    assert next_msgid(0, ()) == 1
    assert next_msgid(MAX_MSGID, ()) == 0
    assert next_msgid(MAX_MSGID - 1, {MAX_MSGID: None, 0: None, 1: None, 3: None}) == 2
    assert next_msgid(4, {5, 6, 8}) == 7


@brief
@given(st.integers(-1, MAX_MSGID), st.sets(st.integers(0, 5) | st.integers(MAX_MSGID - 5, MAX_MSGID)))
def test_the_next_msgid_is_always_free_and_in_bounds(msgid: int, pending: set[int]) -> None:
    following = next_msgid(msgid, pending)
    assert 0 <= following <= MAX_MSGID
    assert following not in pending
    assert all(i % (MAX_MSGID + 1) in pending for i in range(msgid + 1, msgid + 1 + (following - msgid - 1) % 2**32))


def requests_in(data: Any) -> list[int]:
    return list(parted(data)[0])


def test_the_requests_in_some_bytes_are_told_by_their_msgids() -> None:
    encoder = Encoder()
    data = (
        encoder.request(7, "m", ["x" * 500])
        + encoder.response(8, None, 1)
        + encoder.notification("m", [])
        + encoder.request(MAX_MSGID, "€", [datetime.datetime.now(datetime.UTC), {1: b""}])
        + encoder.request(0, "m", [])
    )
    assert requests_in(data) == [7, MAX_MSGID, 0]
    assert requests_in(memoryview(data)) == [7, MAX_MSGID, 0]
    assert requests_in(b"") == []
    assert requests_in(encoder.request(3, "m", [])) == [3]


@brief
@given(st.lists(messages, max_size=6))
def test_no_request_is_overlooked(stream: list[Message]) -> None:
    data = b"".join(map(encoded, stream))
    assert requests_in(data) == list({message[1]: None for message in stream if message[0] == REQUEST})


@pytest.mark.parametrize("value", [{(1, 2): 3}, msgpack.Timestamp(2**40, 0)], ids=repr)
def test_a_request_counts_though_its_params_can_not_be_decoded_here(value: Any) -> None:
    assert requests_in(Encoder().request(5, "m", [value])) == [5]


@brief
@given(st.lists(messages, max_size=6))
def test_bytes_are_parted_into_the_bodies_of_requests_and_the_other_messages(stream: list[Message]) -> None:
    data = [encoded(message) for message in stream]
    bodies, others = parted(b"".join(data))
    expected = {message[1]: packed for message, packed in zip(stream, data, strict=True) if message[0] == REQUEST}
    assert {msgid: request_of(msgid, body) for msgid, body in bodies.items()} == expected
    assert others == [packed for message, packed in zip(stream, data, strict=True) if message[0] != REQUEST]


@pytest.mark.parametrize("msgid", [0, 127, 128, 255, 256, 65535, 65536, MAX_MSGID])
def test_a_request_is_the_same_whether_its_msgid_is_known_when_it_is_packed_or_later(msgid: int) -> None:
    encoder = Encoder()
    assert request_of(msgid, encoder.body("method", [1, "x"])) == encoder.request(msgid, "method", [1, "x"])


def test_only_requests_are_told_whatever_is_wrong_with_the_others() -> None:
    encoder = Encoder()
    unreadable = {(1, 2): 3}
    for other in (
        encoder.notification("m", [unreadable]),
        encoder.response(6, None, unreadable),
        encoder.response(6, 0, None),
        encoder.response(6, unreadable, None),
    ):
        assert requests_in(other + encoder.request(5, "m", []) + other) == [5]


def test_the_result_of_a_response_is_returned_and_its_error_raised() -> None:
    assert result_of([1, 5, None, 7], "m") == 7
    assert result_of([1, 5, None, None], "m") is None
    for error in (0, False, "", [], {}, b"", "no", 1.5):
        with pytest.raises(RemoteError) as caught:
            result_of([1, 5, error, None], "m")
        assert caught.value.error is error
        assert caught.value.method == "m"
        assert type(caught.value) is RemoteError
    with pytest.raises(MethodNotFound):
        result_of([1, 5, 'No such method "m" found', None], "m")
    with pytest.raises(RemoteError) as caught:  # An error wins over a result.
        result_of([1, 5, "no", 7], "m")
    assert type(caught.value) is RemoteError


# msgpack without its C extension.

SAMPLES = [
    pack([0, 5, "m", [1, "x", {1: [None]}]]) * 30,
    pack([0, 5, "m", []]) + b"\x94\x00\x05\xa1m\x91\xa1\xff" + pack([1, 5, None, 7]),
    b"\x94\x00\x05\xa1m\x91\x81\x90\x01" + pack([2, "m", [b"x" * 400]]),
    b"\x94\x00\x05" + b"\x91" * 5000 + b"\xc0\x90" + pack([0, 6, "m", []]),
    pack([0, 6, "m", []]) * 40 + b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\x94\x00\x05\xc4\x01m\x90\x93\x02\xa1m\x91",
]


def outcomes_of_samples() -> Iterator[str]:
    """What is made of each sample, whole and in pieces."""
    for sample in SAMPLES:
        for step in (1, 50, len(sample)):
            decoder = Decoder(MAX_SIZE)
            seen: list[Message] = []
            try:
                for i in range(0, len(sample), step):
                    seen += fed(decoder, sample[i : i + step])
            except ProtocolError as exc:
                yield shown((seen, exc))
            else:
                yield shown((seen, None)) + str(bool(decoder.unfinished))


def test_the_pure_python_msgpack_warns_and_gives_the_same_messages() -> None:
    program = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import {__name__} as this_test
print([str(warning.message) for warning in caught if warning.category is RuntimeWarning])
print(*this_test.outcomes_of_samples(), sep="\\n")
"""
    # The tests needn't be where modules are looked for, and must not bring another gmprpc with them.
    path = [*filter(None, sys.path), str(Path(__file__).parent.parent)]
    env = {**os.environ, "MSGPACK_PUREPYTHON": "1", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    warned, *outcomes = done.stdout.splitlines()
    assert "msgpack runs without its C extension" in warned
    assert outcomes == list(outcomes_of_samples())


def test_the_pure_python_msgpack_warns_where_the_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "Packer", msgpack.fallback.Packer)
    spec = importlib.util.find_spec("gmprpc.protocol")
    assert spec is not None
    assert spec.loader is not None
    with pytest.warns(RuntimeWarning, match="without its C extension"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_c_extension_is_what_is_tested_here() -> None:
    assert msgpack.Packer.__module__ != "msgpack.fallback"
