"""What a stream has to come to, as plain msgpack sees it; this module knows nothing of gmprpc but its documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

REQUEST, RESPONSE, NOTIFICATION, INVALID = 0, 1, 2, -1

# How a stream may end.
CLEAN, AMID_MESSAGE, TOO_LARGE, NO_PROTOCOL = "between messages", "amid a message", "MessageTooLarge", "ProtocolError"
#: Where msgpack's framing can't be relied upon: from there on nothing is known.
ENDS = frozenset((CLEAN, AMID_MESSAGE, TOO_LARGE, NO_PROTOCOL))

# An ext of 2^32-1 bytes: msgpack adds one to that in 32 bits, and takes the header for all of it.
_WRAPPED = b"\xc9\xff\xff\xff\xff"

# By the first byte: the size of a header with its length.
_HEADER_SIZES = {
    **dict.fromkeys((0xC4, 0xC7, 0xD9), 2),
    **dict.fromkeys((0xC5, 0xC8, 0xDA, 0xDC, 0xDE), 3),
    **dict.fromkeys((0xC6, 0xC9, 0xDB, 0xDD, 0xDF), 5),
}


@dataclass
class Expectation:
    """The messages that have to come, and what may come behind them."""

    #: ``(kind, msgid, method or error, params or result)``; of one that can't be carried out ``(-1, msgid, kind)``.
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    #: Where each of them ends.
    message_ends: list[int] = field(default_factory=list)
    #: The ways in which the stream may end after them.
    ends: frozenset[str] = ENDS

    @property
    def is_complete(self) -> bool:
        """True when no other messages may come."""
        return self.ends is not ENDS

    def up_to(self, size: int) -> Expectation:
        """What has to come of so many bytes, whatever may come of those behind them."""
        count = sum(end <= size for end in self.message_ends)
        return Expectation(self.messages[:count], self.message_ends[:count])


def expectation(stream: bytes, max_message_size: int, options: Mapping[str, Any]) -> Expectation:
    """What has to come of ``stream``; ``options`` are all that the Unpacker is to be given."""
    expected = Expectation()
    framer = msgpack.Unpacker(max_buffer_size=0, raw=True, strict_map_key=False)
    framer.feed(stream)
    start = 0
    while True:
        try:
            framer.skip()
        except msgpack.OutOfData:
            if start == len(stream):
                expected.ends = frozenset((CLEAN,))
            elif _WRAPPED not in stream[start:]:
                expected.ends = _ends_amid(stream[start:], max_message_size)
            return expected
        except msgpack.StackError:  # Nested deeper than 1,024.
            return expected
        except ValueError:
            expected.ends = frozenset((NO_PROTOCOL, TOO_LARGE))  # What announced too much may have come before.
            return expected
        end = framer.tell()
        if _WRAPPED in stream[start:end]:
            return expected
        if end - start > max_message_size:
            expected.ends = frozenset((TOO_LARGE,))
            return expected
        message = _message(stream[start:end], options)
        if message is None:
            expected.ends = frozenset((NO_PROTOCOL,))
            return expected
        expected.messages.append(message)
        expected.message_ends.append(end)
        start = end


def _ends_amid(rest: bytes, max_message_size: int) -> frozenset[str]:
    """How a stream may end with ``rest``, the beginning of a message."""
    if _least_size(rest, max_message_size) <= max_message_size:
        return frozenset((AMID_MESSAGE,))
    for size in range(1, min(5, len(rest) + 1)):
        lead, up_to_lead = rest[-size], rest[: len(rest) - size + 1]
        # A header that isn't complete counts for no more than itself yet, whatever it begins to announce.
        if size < _HEADER_SIZES.get(lead, 0) and _least_size(up_to_lead, max_message_size) <= max_message_size:
            return frozenset((AMID_MESSAGE, TOO_LARGE))
    return frozenset((TOO_LARGE,))


def _least_size(rest: bytes, limit: int) -> int:
    """The size that a message which begins with ``rest`` will have at least, or any beyond ``limit``."""
    framer = msgpack.Unpacker(max_buffer_size=0, raw=True, strict_map_key=False)
    framer.feed(rest)
    fed, padding = len(rest), 64
    while fed <= limit:
        # Zeros are the shortest way to its end, whatever is still to come: a length, bytes of a body, values.
        framer.feed(bytes(padding))
        fed += padding
        padding = min(16 * padding, limit)
        try:
            framer.skip()
        except msgpack.OutOfData:
            continue
        return framer.tell()
    return limit + 1


def _message(frame: bytes, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The message that ``frame`` holds, None for something else."""
    try:
        message = msgpack.unpackb(frame, **options)
    except BaseException:  # Hooks may raise anything.
        return _undecodable(frame)
    array = list if options.get("use_list", True) else tuple
    if type(message) is not array or not _is_head(message[:-2], len(message)):
        return None
    kind, *rest = message
    if kind == RESPONSE:
        return tuple(message)
    msgid, method, params = rest if kind == REQUEST else [None, *rest]
    if type(method) is bytes:
        try:
            method = method.decode()
        except UnicodeDecodeError:
            return INVALID, msgid, kind
    if type(method) is not str or type(params) is not array:
        return INVALID, msgid, kind
    return kind, msgid, method, params


def _undecodable(frame: bytes) -> tuple[Any, ...] | None:
    """The message in ``frame``, of which a value can't be decoded, if what stands before its last two values can."""
    reader = msgpack.Unpacker(max_buffer_size=0, raw=True, strict_map_key=False, timestamp=0)
    reader.feed(frame)
    try:
        length = reader.read_array_header()
        head = [reader.unpack() for _ in range(min(length, 4) - 2)]
    except Exception:
        return None
    if not _is_head(head, length):
        return None
    return INVALID, head[1] if length == 4 else None, head[0]


def _is_head(head: Any, length: int) -> bool:
    """Whether a message of ``length`` may begin so."""
    if any(type(value) is not int for value in head):
        return False
    if length == 4:
        kind, msgid = head
        return kind in (REQUEST, RESPONSE) and 0 <= msgid < 2**32
    return length == 3 and head[0] == NOTIFICATION


def shown(value: Any) -> str:
    """``value`` as something that can be compared, NaN and the types of numbers included."""
    try:
        return repr(value)
    except RecursionError:
        return _shown_flat(value)


def _shown_flat(value: Any) -> str:
    """Like ``repr``, for values that are nested too deeply for it."""
    parts, rest = [], [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            parts.append(f"dict of {len(value)}")
            rest.extend(part for item in value.items() for part in item)
        elif isinstance(value, (list, tuple)):
            parts.append(f"{type(value).__name__} of {len(value)}")
            rest.extend(value)
        else:
            parts.append(repr(value))
    return " ".join(parts)
