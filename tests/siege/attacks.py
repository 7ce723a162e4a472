"""What is sent to a server by those who mean it harm, or are gone before their answer comes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import gevent
import msgpack

from tests.helpers import Peer
from tests.test_bad_input import PROTOCOL_ERRORS, UNDECODABLE

from .field import SiegeError, Target, is_closed_by_server, reset

pack = msgpack.packb

#: The beginning of a request, up to the header of its params' only element.
HEAD = b"\x94\x00\x01\xa4echo\x91"

MAX_MESSAGE_SIZE = 1024 * 1024


def unfinished(size: int) -> dict[str, bytes]:
    """By name, beginnings of messages: ``size`` bytes each, legal as far as they go."""

    def filled(head: bytes, unit: bytes) -> bytes:
        return (head + unit * (size // len(unit) + 1))[:size]

    # So many elements may be announced: each has a byte at least, and the message must not be too large for certain.
    count = MAX_MESSAGE_SIZE - size - 1000
    array, mapping = b"\xdd" + struct.pack(">I", count), b"\xdf" + struct.pack(">I", count // 2)
    tiny = {
        "ints": b"\x01",
        "nils": b"\xc0",
        "empty strings": b"\xa0",
        "empty arrays": b"\x90",
        "empty maps": b"\x80",
        "short strings": b"\xa2ab",
        "floats": b"\xcb" + bytes(8),
        "timestamps": b"\xd6\xff" + bytes(4),
    }
    return {
        "nested fixarrays": filled(HEAD, b"\x91"),
        "nested fixarrays, no request": filled(b"", b"\x91"),
        "nested arrays of 15": filled(HEAD, b"\x9f"),
        "nested array16s": filled(HEAD, b"\xdc\x00\x01"),
        "nested array32s": filled(HEAD, b"\xdd\x00\x00\x00\x01"),
        "nested fixmaps": filled(HEAD, b"\x81\xa1k"),
        "nested map16s": filled(HEAD, b"\xde\x00\x01\x01"),
        "nested map32s": filled(HEAD, b"\xdf\x00\x00\x00\x01\x01"),
        "maps as keys": filled(HEAD, b"\x81"),
        "a str announced": filled(HEAD + b"\xdb" + struct.pack(">I", count), b"x"),
        "a bin announced": filled(HEAD + b"\xc6" + struct.pack(">I", count), b"x"),
        "an ext announced": filled(HEAD + b"\xc9" + struct.pack(">I", count) + b"\x05", b"x"),
        "a method announced": filled(b"\x94\x00\x01\xdb" + struct.pack(">I", count), b"x"),
        **{f"an array of {name}": filled(HEAD + array, unit) for name, unit in tiny.items()},
        "a map of different keys": (
            HEAD + mapping + b"".join(b"\xce" + struct.pack(">I", number) + b"\xc0" for number in range(size // 6 + 1))
        )[:size],
        "random values": (HEAD + array + _random_values(size))[:size],
        "whole notifications, then a part of one": (
            pack([2, "echo", [b"x" * 100]]) * (size // 200) + filled(HEAD + array, b"\x90")
        )[:size],
    }


def _random_values(size: int) -> bytes:
    """Legal values of every kind, at random."""
    source = random.Random(size)

    def value(depth: int) -> object:
        kind = source.randrange(9 if depth < 5 else 7)
        if kind < 2:
            return source.getrandbits(source.randrange(1, 64)) - source.getrandbits(7)
        if kind == 2:
            return source.choice([None, True, False])
        if kind == 3:
            return source.random()
        if kind == 4:
            return "ä" * source.randrange(40)
        if kind == 5:
            return source.randbytes(source.randrange(300))
        if kind == 6:
            return msgpack.ExtType(source.randrange(100), source.randbytes(source.randrange(20)))
        if kind == 7:
            return [value(depth + 1) for _ in range(source.randrange(20))]
        return {source.getrandbits(30): value(depth + 1) for _ in range(source.randrange(20))}

    data = bytearray()
    while len(data) < size:
        data += pack(value(0))
    return bytes(data)


# Each of the following does its worst to a server once, and raises SiegeError if that doesn't react as it has to.

Attack = Callable[[Target, random.Random], None]


def send_protocol_error(target: Target, source: random.Random) -> None:
    name, data = source.choice(list(PROTOCOL_ERRORS.items()))
    with target.connect() as peer:
        peer.send_bytes(data)
        _expect_closed(peer, name)


def send_protocol_error_behind_calls(target: Target, source: random.Random) -> None:
    name, data = source.choice(list(PROTOCOL_ERRORS.items()))
    with target.connect() as peer:
        # Little enough to be read at once: what is unread when the server closes would reset the answers.
        peer.send_bytes(pack([0, 1, "pause", [0.001, 1]]) + pack([0, 2, "later", [0.001, 2]]) + data[:100])
        answers = sorted([peer.receive(), peer.receive()])
        if answers != [[1, 1, None, 1], [1, 2, None, 2]]:
            raise SiegeError(f"calls before a protocol error were answered by {answers}")
        _expect_closed(peer, name)


def announce_too_much(target: Target, source: random.Random) -> None:
    header = source.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6"]) + source.choice(
        [b"\xff\xff\xff\xff", b"\x00\x10\x00\x00"]
    )
    with target.connect() as peer:
        peer.send_bytes(HEAD + header)
        _expect_closed(peer, "too much announced")


def send_too_much(target: Target, source: random.Random) -> None:
    with target.connect() as peer:
        part = source.choice([b"\xa0", b"\x81\x01\x90", b"\xda\x40\x00" + bytes(0x4000)])
        data = HEAD + b"\xdd\x00\x0f\x00\x00" + part * (MAX_MESSAGE_SIZE // len(part) + 1)
        try:
            peer.send_bytes(data)
        except OSError:
            return  # Closed meanwhile.
        _expect_closed(peer, "a message that is too large")


def leave_amid_message(target: Target, source: random.Random) -> None:
    name = source.choice(list(_UNFINISHED))
    _leave(target, source, _UNFINISHED[name][: source.randrange(1, len(_UNFINISHED[name]))])


def leave_amid_flood(target: Target, source: random.Random) -> None:
    message = source.choice([pack([2, "echo", [b"x"]]), pack([2, "pause", [0.001, 1]]), pack([2, "nosuch", []])])
    _leave(target, source, message * source.randrange(50))


def leave_answers_unread(target: Target, source: random.Random) -> None:
    _leave(target, source, pack([0, 1, "large", [128 * 1024]]) * source.randrange(10), receive_size=4096)


def send_undecodable(target: Target, source: random.Random) -> None:
    value = source.choice(list(UNDECODABLE.values()))
    with target.connect() as peer:
        peer.send_bytes(HEAD + value + pack([0, 2, "echo", ["behind"]]))
        answers = sorted([peer.receive(), peer.receive()], key=lambda answer: int(answer[1]))
        if answers[0][2] is None or answers[1] != [1, 2, None, "behind"]:
            raise SiegeError(f"an undecodable request was answered by {answers}")


def send_answers(target: Target, source: random.Random) -> None:
    with target.connect() as peer:
        peer.send(*([1, source.getrandbits(32), None, "nobody asked"] for _ in range(100)), [0, 1, "echo", [1]])
        if peer.receive() != [1, 1, None, 1]:
            raise SiegeError("a call behind answers that nobody asked for wasn't answered")


def send_noise(target: Target, source: random.Random) -> None:
    _leave(target, source, source.randbytes(source.randrange(2000)))


HOSTILE: tuple[Attack, ...] = (
    send_protocol_error,
    send_protocol_error_behind_calls,
    announce_too_much,
    send_too_much,
    leave_amid_message,
    leave_amid_flood,
    leave_answers_unread,
    send_undecodable,
    send_answers,
    send_noise,
)


def abandon_calls(target: Target, source: random.Random) -> None:
    """Go away in mid-call."""
    requests = [
        pack([0, 1, "pause", [0.02, "slow"]]),
        pack([0, 2, "later", [0.02, "slow"]]),
        pack([0, 3, "large_after", [0.01, 100_000]]),
        pack([0, 4, "echo", ["quick"]]),
    ]
    _leave(target, source, b"".join(source.choices(requests, k=source.randrange(1, 8))))


def _leave(target: Target, source: random.Random, data: bytes, receive_size: int | None = None) -> None:
    """Send ``data`` and go, at once or a little later, with a FIN or an RST."""
    peer = target.connect(receive_size)
    try:
        peer.send_bytes(data)
    except OSError:  # It was closed meanwhile.
        peer.close()
        return
    gevent.sleep(source.choice([0, 0, 0.001, 0.005]))
    if source.random() < 0.5:
        reset(peer)
    else:
        peer.close()


def _expect_closed(peer: Peer, what: str) -> None:
    if not is_closed_by_server(peer):
        raise SiegeError(f"not closed after {what}")


_UNFINISHED = unfinished(16 * 1024)
