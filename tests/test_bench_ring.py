"""Requests that are encoded ahead, and the answers that are expected to them."""

from __future__ import annotations

import msgpack
import pytest

from gmprpc.bench.ring import FIRST_MSGID, Ring
from gmprpc.protocol import Encoder


def body(*params: object) -> bytes:
    return Encoder().body("echo", params)


@pytest.mark.parametrize("size", [0, 100, 40_000, 200_000])
def test_requests_are_whole_messages_one_behind_the_other(size: int) -> None:
    ring = Ring(body("x" * size), depth=20)
    data = ring.requests(3, 4)
    assert len(data) == 4 * ring.size
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    assert list(unpacker) == [[0, FIRST_MSGID + slot, "echo", ["x" * size]] for slot in (3, 4, 5, 6)]


@pytest.mark.parametrize("depth, size", [(1, 0), (1, 3_000_000), (17, 0), (1000, 0), (1000, 1000)])
def test_a_half_has_room_for_twice_what_can_be_in_flight(depth: int, size: int) -> None:
    ring = Ring(body("x" * size), depth)
    assert ring.slots % 2 == 0
    assert ring.slots // 2 >= 2 * depth


def test_small_requests_leave_a_msgid_alone_for_a_while() -> None:
    assert Ring(body(), depth=1).slots >= 64


def answer(slot: int, error: object = None, result: object = "hello") -> bytes:
    return msgpack.packb([1, FIRST_MSGID + slot, error, result])


def test_answers_are_expected_to_be_like_one_that_came() -> None:
    ring = Ring(body(), depth=1)
    answers = ring.answers_like(answer(5) + answer(6, result="another"))
    assert answers is not None
    assert answers.size == len(answer(0))
    assert answers.turn == ring.slots * answers.size
    turn = b"".join(answer(slot) for slot in range(ring.slots))
    assert answers.data.startswith(turn + turn[:100])
    assert len(answers.data) >= len(turn) + 256 * 1024


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(answer(1, error="no", result=None), id="an error"),
        pytest.param(b"\x94\x01\xcf\x00\x00\x00\x00\x00\x01\x00\x00\xc0\xc0", id="msgid in more bytes than it needs"),
        pytest.param(answer(1, result=b"x" * 1_000_000), id="large"),
    ],
)
def test_nothing_is_expected_after_an_answer_that_the_others_cant_be_like(data: bytes) -> None:
    assert Ring(body(), depth=1).answers_like(data) is None
