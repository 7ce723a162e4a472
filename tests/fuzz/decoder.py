"""The decoder's target: any bytes are messages or a ProtocolError, the same in every split, and take bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import msgpack

from gmprpc import protocol
from gmprpc.exceptions import MessageTooLarge, ProtocolError
from gmprpc.protocol import INVALID, MAX_MSGID, NOTIFICATION, REQUEST, RESPONSE, Decoder, Message

from .case import Case, Finding, Tally
from .oracle import AMID_MESSAGE, CLEAN, NO_PROTOCOL, TOO_LARGE, Expectation, expectation, shown

# What a decoder of unfinished input may hold beyond it, and while it looks for the end of a message.
_HELD_SIZE = 256 * 1024
_PEAK_SIZE = 512 * 1024


# Longer streams aren't fed byte by byte.
_LARGE_SIZE = 3000


class HookExit(BaseException):
    """What no `except Exception` catches."""


def _ext_that_raises(code: int, data: bytes) -> Any:
    """A hook that raises what could be taken for something else, by the type of the ext; 0 and 1 become numbers."""
    exceptions = {5: StopIteration, 0x7F: HookExit, -2: msgpack.OutOfData, -128: RecursionError}
    if code in exceptions:
        raise exceptions[code](data)
    return code


def _object_that_raises(obj: Any) -> Any:
    """A hook that doesn't like some keys."""
    if "key" in obj:
        raise KeyError("key")
    return len(obj) if "a" in obj else obj


def _pairs_that_raise(pairs: Any) -> Any:
    if len(pairs) > 2:
        raise ProtocolError("too many pairs for the hook")
    return tuple(pairs)


#: What the Unpacker may be told by the application.
OPTIONS: Sequence[Mapping[str, Any]] = (
    {},
    {"raw": True},
    {"use_list": False},
    {"unicode_errors": "surrogateescape"},
    {"unicode_errors": "replace", "use_list": False},
    {"ext_hook": _ext_that_raises},
    {"object_hook": _object_that_raises},
    {"object_pairs_hook": _pairs_that_raise, "raw": True},
    {"timestamp": 0, "strict_map_key": True},
    {"timestamp": 1, "use_list": False, "ext_hook": _ext_that_raises, "object_hook": _object_that_raises},
)

# How many bytes are looked through before others get a turn: what it is, and so few that short streams are enough.
_STRETCHES = (protocol._Walk._STRETCH, 16, 7)

#: Around what the decoder treats in different ways, and around the inputs' own sizes.
SIZES = (1024 * 1024, 1024 * 1024, 1, 7, 16, 40, 255, 256, 257, 300, 1000, 65536)


class Outcome(NamedTuple):
    """What a decoder has made of a stream."""

    messages: list[Message]
    end: str
    error: str

    def __str__(self) -> str:
        return f"{len(self.messages)} messages, then {self.end} {self.error}: {shown(self.messages)[:300]}"


def messages_of(decoder: Decoder, data: bytes) -> Iterator[Message]:
    """The messages that ``data`` completes."""
    run, runs = decoder.feed(data)
    yield from run
    for run in runs or ():
        yield from run


def check(case: Case, tally: Tally) -> None:
    """Raise a Finding unless ``case`` is decoded as it should be, in every split."""
    protocol._Walk._STRETCH = _STRETCHES[case.cuts % len(_STRETCHES)]
    try:
        _check(case, tally)
    finally:
        protocol._Walk._STRETCH = _STRETCHES[0]


def _check(case: Case, tally: Tally) -> None:
    options = OPTIONS[case.options % len(OPTIONS)]
    max_size = SIZES[case.limits % len(SIZES)]
    expected = expectation(case.stream, max_size, {"timestamp": 3, "strict_map_key": False, **options})
    splits = splits_of(case)
    whole = outcome(splits[0], max_size, options, expected)
    _check_expected(whole, expected)
    for number, pieces in enumerate(splits[1:], 1):
        other = outcome(pieces, max_size, options, expected, rests=number % 2 == 0)
        if shown(other) != shown(whole):
            raise Finding(f"in {len(pieces)} pieces {[*map(len, pieces)][:40]}: {other}; whole: {whole}")
    tally.splits += len(splits)
    if case.limits >= 240 or len(case.stream) > _LARGE_SIZE:
        _check_memory(splits[-1], max_size, options)
    tally.messages += len(whole.messages)
    tally.protocol_errors += whole.end in (NO_PROTOCOL, TOO_LARGE)


def splits_of(case: Case) -> list[list[bytes]]:
    """The stream whole, in pieces of one size, by the byte if it isn't too long, and in pieces at random."""
    random = Random(case.cuts)
    splits = [[case.stream]]
    if len(case.stream) > 1:
        step = 1 if len(case.stream) <= _LARGE_SIZE else random.randint(100, 5000)
        splits.append(case.cut_at(range(step, len(case.stream), step)))
        splits += [case.pieces(random), case.pieces(random, 3)]
    return splits


def outcome(
    pieces: Sequence[bytes],
    max_size: int,
    options: Mapping[str, Any],
    expected: Expectation,
    *,
    rests: bool = False,
) -> Outcome:
    """What a decoder makes of ``pieces``, and whether it says it as soon as it can; ``rests`` in between."""
    decoder = Decoder(max_size, options)
    array = list if options.get("use_list", True) else tuple
    messages: list[Message] = []
    ends = expected.message_ends
    fed = 0
    try:
        for piece in pieces:
            fed += len(piece)
            for message in messages_of(decoder, piece):
                if (fault := fault_of(message, array)) is not None:
                    raise Finding(f"{fault}: {shown(message)[:300]}")
                messages.append(message)
                if rests:
                    decoder.release()
            if rests:
                decoder.release()
            # What msgpack says is there, has to be there now.
            count = len(messages)
            if count < len(ends) and ends[count] <= fed:
                raise Finding(f"after {fed} bytes only {count} messages, though the next one ends at {ends[count]}")
            if not expected.is_complete and count >= len(ends):
                continue
            is_unfinished = bool(decoder.unfinished)
            if is_unfinished is (fed == ([0, *ends][min(count, len(ends))])):
                raise Finding(f"after {fed} bytes and {count} messages is_unfinished is {is_unfinished}")
    except MessageTooLarge as exc:
        return Outcome(messages, TOO_LARGE, str(exc))
    except ProtocolError as exc:
        return Outcome(messages, NO_PROTOCOL, str(exc))
    except Finding:
        raise
    except (Exception, HookExit) as exc:
        raise Finding(
            f"after {fed} bytes in pieces of {[*map(len, pieces)][:40]}: {type(exc).__name__}: {exc}"
        ) from exc
    return Outcome(messages, AMID_MESSAGE if decoder.unfinished else CLEAN, "")


def fault_of(message: Any, array: type) -> str | None:
    """Why ``message`` is none as `gmprpc.protocol` documents them."""
    if type(message) not in (list, tuple) or len(message) != 4:
        return "not four values in an array"
    kind, msgid, third, fourth = message
    if type(kind) is not int:
        return "the kind is no number"
    if kind == NOTIFICATION or (kind == INVALID and type(third) is int and third == NOTIFICATION):
        if msgid is not None:
            return "a notification with a msgid"
    elif type(msgid) is not int or not 0 <= msgid <= MAX_MSGID:
        return "a msgid out of range"
    if kind == RESPONSE:
        return None
    if kind in (REQUEST, NOTIFICATION):
        return None if type(third) is str and type(fourth) is array else "a method or params of a wrong type"
    if kind != INVALID:
        return "no such kind"
    is_right = type(third) is int and third in (REQUEST, RESPONSE, NOTIFICATION) and type(fourth) is str
    return None if is_right else "no kind or no reason"


def _check_expected(whole: Outcome, expected: Expectation) -> None:
    """Hold the outcome against what plain msgpack has found in the stream."""
    for number, (message, wanted) in enumerate(zip(whole.messages, expected.messages, strict=False)):
        if shown(tuple(message[: len(wanted)])) != shown(wanted):
            raise Finding(f"message {number} should be {shown(wanted)[:300]}: {shown(message)[:300]}")
    if len(whole.messages) < len(expected.messages):
        raise Finding(f"a message is missing: {len(expected.messages)} well-formed ones are there; {whole}")
    if expected.is_complete and len(whole.messages) > len(expected.messages):
        raise Finding(f"a message too many: {len(expected.messages)} are there; {whole}")
    if whole.end not in expected.ends:
        raise Finding(f"the end should be {' or '.join(sorted(expected.ends))}; {whole}")


def _check_memory(pieces: Sequence[bytes], max_size: int, options: Mapping[str, Any]) -> None:
    """Raise a Finding if a decoder takes much more memory than the bytes that it was given."""
    # Twice: now and then a table of the interpreter's own grows, of interned strings say, which isn't the decoder's.
    if _memory_fault(pieces, max_size, options) and (fault := _memory_fault(pieces, max_size, options)):
        raise Finding(fault)


def _memory_fault(pieces: Sequence[bytes], max_size: int, options: Mapping[str, Any]) -> str | None:
    """What there is to say against the memory that a decoder takes for ``pieces``."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        decoder = Decoder(max_size, options)
        fed = 0
        for piece in pieces:
            fed += len(piece)
            tracemalloc.reset_peak()
            try:
                count = sum(1 for _ in messages_of(decoder, piece))
            except ProtocolError:
                break
            held, peak = (size - start for size in tracemalloc.get_traced_memory())
            if held > _HELD_SIZE + 2 * max(0, fed - 64 * 1024):
                return f"{held} bytes are held after {fed} of unfinished input or more"
            # What a complete message becomes is another matter.
            if not count and peak > _PEAK_SIZE + 4 * max(0, fed - 64 * 1024):
                return f"{peak} bytes were taken for {fed} of unfinished input"
    finally:
        if not was_tracing:
            tracemalloc.stop()
    return None
