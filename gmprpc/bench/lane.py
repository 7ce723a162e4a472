"""One connection under load: it sends requests, and takes in what comes, in callbacks of the hub."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, Protocol

import msgpack

from gmprpc.exceptions import ProtocolError, no_such_method, text_of
from gmprpc.protocol import NOTIFICATION, REQUEST, RESPONSE, Encoder
from gmprpc.streams import Stream

from .ring import FIRST_MSGID, Answers, Ring
from .tally import Tally

_READ, _WRITE = 1, 2

# So many times at most the answer that is expected is taken from one that came otherwise. Picked arbitrarily: there may
# be a first answer that is like no other, but where each is like no other it isn't worth trying.
_MAX_LESSONS = 10

# An answer can't be larger than this. Picked arbitrarily: four times what a client takes.
_MAX_ANSWER_SIZE = 64 * 1024 * 1024

# What an error answer says is shown up to so many characters.
_SHOWN_SIZE = 100


class Owner(Protocol):
    """The load that a lane is a part of: what it needs to know of it, and what it tells it."""

    method: str
    ring: Ring
    tally: Tally
    #: Calls count that were sent, or should have been, at this time or later.
    begin: int
    #: When something came last.
    heard: int
    #: Whether there was ever a result.
    has_result: bool
    #: What to expect, and how often that was learned from an answer.
    answers: Answers | None
    lessons: int
    #: So many calls were answered on the lane.
    go_on: Callable[[Lane, int], None]

    def on_lost(self, lane: Lane, /) -> None:
        """It has ended."""

    def on_unknown_method(self) -> None:
        """The server has said that it doesn't know the method."""


class Lane:
    """A connection.

    As long as the answers are, byte for byte, those that are expected, in the order of the requests, all that came with
    one read is settled by one comparison. Anything else is decoded, until there is order again.
    """

    __slots__ = (
        "in_flight",
        "is_open",
        "_owner",
        "_stream",
        "_ring",
        "_slots",
        # Writing
        "_send",
        "_writer",
        "_unsent",
        "_next",
        "_stop",
        "_used",
        # Reading
        "_recv",
        "_reader",
        "_starts",
        "_expected",
        "_answer_size",
        "_turn",
        "_offset",
        "_oldest",
        "_unpacker",
        "_fed",
    )

    def __init__(self, owner: Owner, stream: Stream, loop: Any) -> None:
        #: How many requests have no answer yet.
        self.in_flight = 0
        self.is_open = True
        self._owner = owner
        self._stream = stream
        self._ring = owner.ring
        self._slots = self._ring.slots

        self._send = stream.send
        self._writer = loop.io(stream.write_fileno(), _WRITE)
        self._unsent = b""
        # The slot of the next request, the one before which to look again, and how many were used in the first round.
        self._next = 0
        self._stop = self._slots // 2
        self._used = 0

        self._recv = stream.recv
        self._reader = loop.io(stream.fileno(), _READ)
        # For each slot when its request was sent, or should have been; 0 if it isn't in flight.
        self._starts = [0] * self._slots
        # What is expected, and the place in it where the next byte has to be; while it is empty all is decoded.
        self._expected = b""
        self._answer_size = self._turn = self._offset = 0
        # The slot of the next answer that is expected.
        self._oldest = 0
        self._unpacker: msgpack.Unpacker | None = None
        self._fed = 0
        self._reader.start(self._on_readable)

    def request(self, starts: Sequence[int]) -> None:
        """Send as many requests as there are times, at which they begin; so many have to fit in flight."""
        count = len(starts)
        self.in_flight += count
        first = self._next
        if first + count <= self._stop:  # Nearly always.
            self._next = first + count
            self._starts[first : self._next] = starts
            self._write(self._ring.requests(first, count))
            return
        done = 0
        while done < count:
            if self._next >= self._stop:
                self._hop()
            first = self._next
            step = min(count - done, self._stop - first)
            self._next = first + step
            self._starts[first : first + step] = starts[done : done + step]
            done += step
            self._write(self._ring.requests(first, step))

    def unanswered(self) -> int:
        """How many calls that count are in flight."""
        if not self.in_flight:
            return 0
        return sum(1 for start in self._starts if start >= self._owner.begin)

    def close(self) -> None:
        """Close at once."""
        if self.is_open:
            self.is_open = False
            self._reader.close()
            self._writer.close()
            self._stream.close()

    # Writing.

    def _hop(self) -> None:
        """Find the next slots that are free, one behind the other.

        One that comes round while its last request is still in flight is left out. To look once in each half of the
        ring is enough: what is in flight ahead is of the last round, and only becomes less.
        """
        self._used = max(self._used, self._next)
        half = self._slots // 2
        position = self._next % self._slots
        while self._starts[position]:
            position = (position + 1) % self._slots
        end = (position // half + 1) * half
        self._next = position
        self._stop = next((slot for slot in range(position, end) if self._starts[slot]), end)

    def _write(self, data: bytes | memoryview) -> None:
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            # It is over, but what came before can still be read, and reading tells what has happened.
            self._send = len
            return
        self._owner.tally.sent += sent
        if sent < len(data):
            self._unsent = bytes(data[sent:])
            self._writer.start(self._on_writable)

    def _on_writable(self) -> None:
        unsent, self._unsent = self._unsent, b""
        self._writer.stop()
        self._write(unsent)

    # Reading.

    def _on_readable(self) -> None:
        try:
            data = self._recv()
        except BlockingIOError:
            return
        except (OSError, EOFError) as exc:
            self._lose(getattr(exc, "strerror", None) or str(exc))
            return
        if not data:
            self._lose("closed by the server")
            return
        owner = self._owner
        owner.heard = now = perf_counter_ns()
        owner.tally.received += len(data)
        if self._expected.startswith(data, self._offset):
            end = self._offset + len(data)
            count = end // self._answer_size - self._oldest
            if count <= self.in_flight:
                self._offset = end
                if count:
                    self._settle(count, now)
                return
        self._decode(data, now)

    def _settle(self, count: int, now: int) -> None:
        """The ``count`` oldest calls were answered, as expected."""
        owner, slots, starts = self._owner, self._slots, self._starts
        begin, record = owner.begin, owner.tally.record
        first = self._oldest
        self._oldest = last = first + count
        if count == 1 and last < slots:  # All there is with one call in flight; the rest would take twice as long.
            start, starts[first] = starts[first], 0
            if start >= begin:
                record(now - start, 1)
            self.in_flight -= 1
            owner.go_on(self, 1)
            return
        if last >= slots:
            self._oldest -= slots
            self._offset -= self._turn
            if last > slots:  # From behind the end.
                starts = starts + starts[: self._oldest]
        position = first
        while position < last:
            # Those that were sent together have the same time, and times only grow.
            start = starts[position]
            end = last if starts[last - 1] == start else bisect_right(starts, start, position, last)
            if start >= begin:
                record(now - start, end - position)
            position = end
        if last <= slots:
            self._starts[first:last] = bytes(count)
        else:
            self._starts[first:] = bytes(slots - first)
            self._starts[: self._oldest] = bytes(self._oldest)
        self.in_flight -= count
        owner.go_on(self, count)

    def _decode(self, data: bytes, now: int) -> None:
        """Take ``data`` as it comes, which isn't as expected."""
        owner = self._owner
        if self._expected:
            begun = self._offset - self._offset % self._answer_size
            data = self._expected[begun : self._offset] + data
            self._expected = b""
        if (unpacker := self._unpacker) is None:
            unpacker = self._unpacker = msgpack.Unpacker(**_UNPACKER_OPTIONS)
        if unpacker.tell() == self._fed and owner.lessons < _MAX_LESSONS:
            self._learn(data)
        self._fed += len(data)
        count = 0
        try:
            unpacker.feed(data)
            for message in unpacker:
                count += self._take(message, now)
        except msgpack.BufferFull:
            self._lose(f"an answer of more than {_MAX_ANSWER_SIZE} bytes")
        except Exception as exc:
            self._lose(f"what came is not MessagePack-RPC: {text_of(exc)}")
        self.in_flight -= count
        if self.is_open and count:
            owner.go_on(self, count)
        if self.is_open and unpacker.tell() == self._fed:
            self._expect_order()

    def _take(self, message: Any, now: int) -> int:
        """What the server says; returns how many calls that has answered."""
        owner = self._owner
        if type(message) is not tuple or len(message) not in (3, 4):
            raise ProtocolError("no message")
        if len(message) == 3 and message[0] == NOTIFICATION:
            return 0  # Not our business.
        kind, msgid, error, _ = message
        if kind == REQUEST:
            method = error.decode(errors="replace") if type(error) is bytes else error
            self._write(Encoder().response(msgid, no_such_method(method), None))
            return 0
        if kind != RESPONSE or type(msgid) is not int:
            raise ProtocolError("no message")
        slot = msgid - FIRST_MSGID
        if not 0 <= slot < self._slots or not (start := self._starts[slot]):
            is_known = 0 <= slot < max(self._used, self._next)
            if now >= owner.begin:
                owner.tally.fail("a call answered twice" if is_known else "an answer to no call")
            return 0
        self._starts[slot] = 0
        if error is None:
            owner.has_result = True
            if start >= owner.begin:
                owner.tally.record(now - start, 1)
        else:
            text = error.decode(errors="replace") if type(error) is bytes else repr(error)
            if text == no_such_method(owner.method) and not owner.has_result:
                owner.on_unknown_method()
            if start >= owner.begin:
                owner.tally.fail(f"error: {text[:_SHOWN_SIZE]}")
        return 1

    def _learn(self, data: bytes) -> None:
        """Expect answers like the one with which ``data`` begins."""
        owner = self._owner
        owner.lessons += 1
        with suppress(Exception):  # It isn't all there, or not what it should be.
            owner.answers = self._ring.answers_like(data) or owner.answers

    def _expect_order(self) -> None:
        """Compare from now on, if all that is in flight are the last requests."""
        if (answers := self._owner.answers) is None:
            return
        first = self._next - self.in_flight
        starts = self._starts[first : self._next] if first >= 0 else self._starts[first:] + self._starts[: self._next]
        if all(starts):
            self._oldest = first % self._slots
            self._expected, self._answer_size, self._turn = answers.data, answers.size, answers.turn
            self._offset = self._oldest * answers.size

    def _lose(self, reason: str) -> None:
        """It is over."""
        if not self.is_open:
            return
        tally = self._owner.tally
        tally.lost[reason] += 1
        if unanswered := self.unanswered():
            tally.fail(f"connection lost: {reason}", unanswered)
        self.close()
        self._owner.on_lost(self)


# What an answer holds is of no interest, and has to be decoded whatever it is.
_UNPACKER_OPTIONS: Mapping[str, Any] = {
    "raw": True,
    "timestamp": 0,
    "use_list": False,
    "strict_map_key": False,
    "max_buffer_size": _MAX_ANSWER_SIZE,
    "read_size": 16 * 1024,
}
