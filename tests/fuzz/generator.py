"""Bytes that are almost MessagePack-RPC, made from a source of random numbers; this module knows nothing of gmprpc."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

# By family: how many a header of each width can count, its first byte, and the size of the count behind it. The first
# byte of the narrowest holds the count itself.
_WIDTHS = {
    "str": ((32, 0xA0, 0), (2**8, 0xD9, 1), (2**16, 0xDA, 2), (2**32, 0xDB, 4)),
    "bin": ((2**8, 0xC4, 1), (2**16, 0xC5, 2), (2**32, 0xC6, 4)),
    "ext": ((2**8, 0xC7, 1), (2**16, 0xC8, 2), (2**32, 0xC9, 4)),
    "array": ((16, 0x90, 0), (2**16, 0xDC, 2), (2**32, 0xDD, 4)),
    "map": ((16, 0x80, 0), (2**16, 0xDE, 2), (2**32, 0xDF, 4)),
}
_NUMBERS = (
    (0xCC, 1),
    (0xCD, 2),
    (0xCE, 4),
    (0xCF, 8),
    (0xD0, 1),
    (0xD1, 2),
    (0xD2, 4),
    (0xD3, 8),
    (0xCA, 4),
    (0xCB, 8),
)
_FIXEXTS = ((0xD4, 1), (0xD5, 2), (0xD6, 4), (0xD7, 8), (0xD8, 16))
_EXT_TYPES = (0xFF, 0xFF, 0xFF, 0, 1, 5, 0x7F, 0x80, 0xFE)

_WORDS = (
    b"",
    b"a",
    b"key",
    b"echo",
    b"\xe2\x82\xac",
    b"\xff",
    b"\xe2\x82",
    b"\xed\xa0\x80",
    b"\xc1",
    b"x" * 40,
    b"y" * 300,
)
_METHODS = (
    b"echo",
    b"add",
    b"fail",
    b"pause",
    b"later",
    b"ask",
    b"drop",
    b"large",
    b"leave",
    b"large",
    b"leave",
    b"nosuch",
    b"_private",
    b"__class__",
    b"",
)
_MSGIDS = (
    b"\x00",
    b"\x01",
    b"\x02",
    b"\x7f",
    b"\xcc\xff",
    b"\xcd\x01\x00",
    b"\xce\xff\xff\xff\xff",
    b"\xd3" + b"\0" * 8,
)
_BAD_HEADS = (
    b"\xff",
    b"\xc0",
    b"\xc2",
    b"\xc3",
    b"\x03",
    b"\xca\0\0\0\0",
    b"\xa10",
    b"\x90",
    b"\xcf\0\0\0\1\0\0\0\0",
    b"\xa1\xff",
)

# What a message or a value may begin with, and headers that announce more than there is.
_LEADS = (
    (b"\x93", b"\x94", b"\x94\x00", b"\x94\x01", b"\x93\x02", b"\x94\x00\x01", b"\x94\x00\x01\xa4echo\x91", b"\x90")
    + (
        b"\x91",
        b"\x80",
        b"\x81",
        b"\x8f",
        b"\x9f",
        b"\x00",
        b"\xff",
        b"\xa1",
        b"\xa1m",
        b"\xbf",
        b"\xc0",
        b"\xc1",
        b"\xc2",
    )
    + (
        b"\xc4\x01",
        b"\xc5\x00\x01",
        b"\xc6\x00\x00\x00\x01",
        b"\xc7\x00\x05",
        b"\xc7\x0c\xff",
        b"\xc8\x00\x01",
        b"\xca",
    )
    + (
        b"\xcb",
        b"\xcc",
        b"\xcd",
        b"\xce",
        b"\xcf",
        b"\xd0",
        b"\xd3",
        b"\xd4\x05",
        b"\xd6\xff",
        b"\xd7\xff",
        b"\xd8\x01",
    )
    + (b"\xd9\x00", b"\xda\x00\x01", b"\xdb\x00\x00\x00\x01", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\xde\x00\x01")
)
_ANNOUNCEMENTS = (
    (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
    + (
        b"\xc9\xff\xff\xff\xff\x05",
        b"\xdc\xff\xff",
        b"\xde\xff\xff",
        b"\xda\xff\xff",
        b"\xc5\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
    )
    + (b"\xdb\x00\x10\x00\x00", b"\xdd\x00\x0f\xff\xff", b"\xdc\x03\xe8", b"\xd9\xff", b"\xc4\xff", b"\xc8\x01\x00\x05")
)


class Generator:
    """Makes streams by itself and from others."""

    def __init__(self, random: Random, corpus: Sequence[bytes]) -> None:
        self._random = random
        self._corpus = corpus

    def stream(self) -> bytes:
        """A stream: valid messages, a mutation of some, or garbage, each in its share."""
        random = self._random
        share = random.random()
        if share < 0.3:
            return self.messages()
        if share < 0.55:
            return self.mutated(self.messages())
        if share < 0.85:
            return self.mutated(random.choice(self._corpus))
        if share < 0.93:
            return self._leads(60)
        if share < 0.995:
            return random.randbytes(random.randrange(random.choice((5, 20, 300))))
        return self._large()

    def messages(self) -> bytes:
        """A few messages, most of them right; sometimes so many that they are decoded as a batch."""
        random = self._random
        stream = b"".join(self.message() for _ in range(random.choice((1, 1, 1, 2, 3, 6))))
        return stream * random.choice((1, 1, 1, 1, 1, 2, 10, 40))

    def message(self) -> bytes:
        """A request, a response or a notification, in which each part may be wrong."""
        random = self._random
        kind = random.choice((0, 0, 0, 1, 2))
        parts = [bytes([kind])]
        if kind != 2:
            parts.append(self._msgid())
        if kind == 1:
            is_error = random.random() < 0.4
            parts += [self.value(), b"\xc0"] if is_error else [b"\xc0", self.value()]
        else:
            parts += [self._method(), self._params()]
        while random.random() < 0.04:
            place = random.randrange(len(parts) + 1)
            parts[place : place + random.randint(0, 1)] = random.choice(
                ((), (self.value(),), (random.choice(_BAD_HEADS),))
            )
        return self._header("array", len(parts)) + b"".join(parts)

    def value(self, depth: int = 0) -> bytes:
        """One value of any type and width; it may be one that can't be decoded."""
        random = self._random
        share = random.random()
        if share < 0.3:
            return bytes([random.choice((random.getrandbits(7), 0xC0, 0xC2, 0xC3, 0xE0 | random.getrandbits(5)))])
        if share < 0.45:
            return self._text("str")
        if share < 0.6:
            lead, size = random.choice(_NUMBERS)
            return bytes([lead]) + random.choice((random.randbytes(size), bytes(size), b"\xff" * size))
        if share < 0.65:
            return self._text("bin")
        if share < 0.72:
            return self._ext()
        if share < 0.73:
            return random.choice(_ANNOUNCEMENTS)
        if share < 0.74:
            return self._nested()
        if depth > 4:
            return b"\x90"
        if share < 0.9:
            count = random.choice((0, 1, 2, 3, 5, 17))
            return self._header("array", count) + b"".join(self.value(depth + 1) for _ in range(count))
        count = random.choice((0, 1, 1, 2, 16))
        pairs = [self._key(depth) + self.value(depth + 1) for _ in range(count)]
        return self._header("map", count) + b"".join(pairs)

    def mutated(self, stream: bytes) -> bytes:
        """``stream`` with a few changes."""
        data = bytearray(stream)
        for _ in range(self._random.choice((1, 1, 1, 2, 3, 6))):
            self._mutate(data)
        return bytes(data)

    def _mutate(self, data: bytearray) -> None:
        random = self._random
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((0, 0, 1, 1, 2, 4, 9, 40)))
        way = random.randrange(12)
        if way == 0:
            del data[start:]
        elif way == 1 and data:
            data[start % len(data)] ^= 1 << random.randrange(8)
        elif way == 2 and data:
            data[start % len(data)] = random.choice((0xC1, 0xFF, 0, 0x90, 0x94, random.getrandbits(8)))
        elif way == 3:
            data[start:end] = b""
        elif way == 4:
            data[start:start] = data[start:end] * random.choice((1, 1, 5, 50))
        elif way == 5:
            data[start:end] = random.choice(_LEADS)
        elif way == 6:
            data[start:end] = random.choice(_ANNOUNCEMENTS)
        elif way == 7:
            data[start:end] = self._nested()
        elif way == 8:
            data[start:end] = self.value()
        elif way == 9:
            data[start:end] = self.message()
        elif way == 10:
            other = random.choice(self._corpus)
            cut = random.randrange(len(other) + 1)
            data[start:] = other[cut:]
        else:
            data += random.choice(self._corpus)

    def _msgid(self) -> bytes:
        random = self._random
        return random.choice(_MSGIDS) if random.random() < 0.7 else b"\xce" + random.randbytes(4)

    def _method(self) -> bytes:
        random = self._random
        share = random.random()
        if share < 0.9:
            name = random.choice(_METHODS)
            return self._header(random.choice(("str", "str", "str", "bin")), len(name)) + name
        return self._text(random.choice(("str", "bin"))) if share < 0.96 else self.value()

    def _params(self) -> bytes:
        if self._random.random() < 0.05:
            return self.value()
        count = self._random.choice((0, 1, 1, 1, 2, 2, 3))
        return self._header("array", count) + b"".join(self.value(1) for _ in range(count))

    def _key(self, depth: int) -> bytes:
        return self._text("str") if self._random.random() < 0.7 else self.value(depth + 1)

    def _text(self, family: str) -> bytes:
        text = self._random.choice(_WORDS)
        return self._header(family, len(text)) + text

    def _ext(self) -> bytes:
        random = self._random
        kind = bytes([random.choice(_EXT_TYPES)])
        if random.random() < 0.5:
            lead, size = random.choice(_FIXEXTS)
            return bytes([lead]) + kind + random.choice((random.randbytes(size), bytes(size)))
        size = random.choice((0, 1, 12, 12, 20))
        return self._header("ext", size) + kind + random.choice((random.randbytes(size), bytes(size)))

    def _header(self, family: str, length: int) -> bytes:
        widths = [width for width in _WIDTHS[family] if length < width[0]]
        _, lead, size = widths[0] if self._random.random() < 0.8 else self._random.choice(widths)
        return bytes([lead]) + length.to_bytes(size, "big") if size or lead > 0xBF else bytes([lead | length])

    def _nested(self) -> bytes:
        header = self._random.choice(
            (b"\x91", b"\x81", b"\x81\x00", b"\x92", b"\x9f", b"\xdc\x00\x01", b"\xdc\x00\x40")
        )
        depth = self._random.choice((3, 20, 200, 505, 512, 1015, 1022, 1024, 1100))
        return header * depth + self._random.choice((b"", b"\x00", b"\xc1", b"\xa1\xff"))

    def _leads(self, limit: int) -> bytes:
        random = self._random
        pieces = [
            random.choice(_LEADS) if random.random() < 0.9 else random.randbytes(2)
            for _ in range(random.randrange(limit))
        ]
        return b"".join(pieces)

    def _large(self) -> bytes:
        """Up to 64 KiB, of which most keeps the decoder waiting."""
        random = self._random
        size = random.randrange(2**10, 2**16)
        way = random.randrange(6)
        head = random.choice((b"", b"\x94\x00\x01\xa4echo", b"\x94\x00\x01\xa4echo\xdd\x00\x00\xff\xff"))
        if way == 0:
            return head + bytes(size)
        if way == 1:
            return head + b"".join(random.choice(_LEADS) for _ in range(size // 3))
        if way == 2:
            header = random.choice(
                (b"\x91", b"\x81", b"\x9f", b"\x8f", b"\xdc\x00\x40", b"\xdc\x10\x00", b"\xdd\x00\x00\x10\x00")
            )
            return (head + header * (size // len(header)))[:size]
        if way == 3:
            return (
                head
                + self._header("array", 1)
                + self._header("str", size)
                + bytes(size - random.choice((0, 0, 1, 100)))
            )
        if way == 4:
            return head + b"\xdd\x00\x00\xff\xff" + random.choice((b"\x90", b"\x80", b"\xa1x", b"\xc0")) * (size // 2)
        return (self.message() or b"\xc0") * random.choice((300, 1000))
