"""Requests that are encoded before they are needed, and the answers that are expected to them; bytes, and no I/O."""

from __future__ import annotations

from typing import Final

from msgpack import Unpacker

from gmprpc.protocol import RESPONSE

#: Of all the msgids that a ring has the first one. From here on MessagePack has one size for all of them, so that every
#: request is as long as the others, and every answer with the same result, too.
FIRST_MSGID: Final = 0x10000

_REQUEST_HEAD = b"\x94\x00\xce"
_RESPONSE_HEAD = b"\x94\x01\xce"
_MSGID_SIZE = 4
_NIL = 0xC0

# How many slots there are: so many times what can be in flight, but no fewer than that, and no more than stay in a
# processor's cache, if that is possible. Picked arbitrarily.
_TURNS = 16
_MIN_SLOTS = 64
_CACHED_SIZE = 256 * 1024
# What is larger isn't encoded ahead, or not compared as a whole: it is copied, or decoded, and that isn't much beside
# what the system does with it.
_MAX_SIZE = 4 * 1024 * 1024
# As much may be read at once: so far the expected answers go on behind the last one with the first ones.
_READ_SIZE = 256 * 1024


class Ring:
    """The requests of all connections, with the same params and a msgid for each slot, to be sent in this order.

    A msgid comes round again when all the others have been used. So an answer that comes a second time is noticed, if
    it isn't very late.
    """

    def __init__(self, body: bytes, depth: int) -> None:
        """``body`` is what follows the msgid; ``depth`` is how many requests a connection has in flight at most."""
        self._body = body
        #: How long each request is.
        self.size = len(_REQUEST_HEAD) + _MSGID_SIZE + len(body)
        #: How many there are: so many that in each half there are twice as many as can be in flight.
        self.slots = max(4 * depth, min(max(_TURNS * depth, _MIN_SLOTS), _CACHED_SIZE // self.size // 2 * 2))
        is_small = self.slots * self.size <= _MAX_SIZE
        self._encoded = memoryview(self._joined(0, self.slots)) if is_small else None

    def requests(self, first: int, count: int) -> bytes | memoryview:
        """The bytes of ``count`` requests from slot ``first`` on; the ring's end must not lie between them."""
        if self._encoded is None:
            return self._joined(first, count)
        return self._encoded[first * self.size : (first + count) * self.size]

    def answers_like(self, data: bytes) -> Answers | None:
        """What is to be expected if the answer with which ``data`` begins, a result, comes from every slot."""
        framer = Unpacker(read_size=len(data), max_buffer_size=0)
        framer.feed(data)
        framer.skip()
        size, head = framer.tell(), len(_RESPONSE_HEAD) + _MSGID_SIZE
        # Another server may write a msgid in more bytes than it takes; then nothing is expected, and all is decoded.
        if not data.startswith(_RESPONSE_HEAD) or data[head] != _NIL or size * self.slots > _MAX_SIZE:
            return None
        return Answers(self.slots, data[head:size])

    def _joined(self, first: int, count: int) -> bytes:
        return _joined(_REQUEST_HEAD, first, count, self._body)


class Answers:
    """The answers to every slot of a ring, one after the other, and then the first ones again."""

    def __init__(self, slots: int, tail: bytes) -> None:
        #: How long each of them is.
        self.size = len(_RESPONSE_HEAD) + _MSGID_SIZE + len(tail)
        #: How long all of them are.
        self.turn = slots * self.size
        self.data = _joined(_RESPONSE_HEAD, 0, slots, tail)
        while len(self.data) < self.turn + _READ_SIZE:
            self.data += self.data[: self.turn]
        assert self.data[1] == RESPONSE


def _joined(head: bytes, first: int, count: int, tail: bytes) -> bytes:
    msgids = range(FIRST_MSGID + first, FIRST_MSGID + first + count)
    return b"".join([b"%b%b%b" % (head, msgid.to_bytes(_MSGID_SIZE, "big"), tail) for msgid in msgids])
