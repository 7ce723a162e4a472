"""Bytes to checked MessagePack-RPC messages and back; no I/O, no clock, no greenlets.

The specification is https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md: a message is a MessagePack array,

* a request ``[0, msgid, method, params]``,
* a response ``[1, msgid, error, result]``,
* a notification ``[2, method, params]``.

A :class:`Decoder` finds the end of a message before it decodes it. So a declared length takes no memory until that many
bytes are there, and a value that can't be decoded spoils its own message and not the stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgpack
from msgpack import OutOfData, Packer, Unpacker

from .exceptions import MessageTooLarge, ProtocolError, no_such_method, remote_error, text_of

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2
#: Not on the wire: how a :class:`Decoder` hands over a message that is well framed but can't be carried out.
INVALID: Final = -1

MAX_MSGID: Final = 2**32 - 1

#: A decoded message, always of four: ``[REQUEST, msgid, method, params]``, ``[RESPONSE, msgid, error, result]``,
#: ``(NOTIFICATION, None, method, params)`` or ``(INVALID, msgid, kind, reason)``, in which ``kind`` is that of the
#: message and ``reason`` the text to answer or raise.
Message = Sequence[Any]

#: Messages that have come one after the other: requests and notifications, or responses, or a single one that is
#: INVALID. An empty run is an opportunity for others while a long message is looked through. Whoever gets a run may
#: change it, to let go of its messages.
Run = list[Message]

Buffer = bytes | bytearray | memoryview

if Packer.__module__ == "msgpack.fallback":
    warnings.warn(
        "msgpack runs without its C extension: decoding is slow, and quadratic for a message that comes in many parts",
        RuntimeWarning,
        stacklevel=2,
    )


def result_of(response: Message, method: str) -> Any:
    """The result that ``response`` carries; its error is raised as :exc:`RemoteError` of ``method``."""
    _, _, error, result = response
    # "error" is nil or it is an error: 0, False and "" are errors too.
    if error is not None:
        raise remote_error(error, method)
    return result


def request_of(msgid: int, body: bytes) -> bytes:
    """The request ``msgid`` with the ``body`` that :meth:`Encoder.body` has packed."""
    return b"\x94\x00" + msgpack.packb(msgid) + body


def parted(data: Buffer) -> tuple[dict[int, bytes], list[bytes]]:
    """The bodies of the requests in ``data`` by their msgids, and all other messages in their order.

    ``data`` begins with a message and was made by an :class:`Encoder`.
    """
    reader = Unpacker(read_size=len(data) or 1, max_buffer_size=0, raw=True)
    reader.feed(data)
    bodies: dict[int, bytes] = {}
    others: list[bytes] = []
    view = memoryview(data)
    while (start := reader.tell()) < len(data):
        length = reader.read_array_header()
        kind, msgid = reader.unpack(), reader.unpack()
        body_start = reader.tell()
        for _ in range(length - 2):
            reader.skip()  # It may be large, or hold what can be packed but not be read back.
        if kind == REQUEST:
            bodies[msgid] = bytes(view[body_start : reader.tell()])
        else:
            others.append(bytes(view[start : reader.tell()]))
    return bodies, others


def next_msgid(msgid: int, pending: Container[int]) -> int:
    """The first msgid after ``msgid`` that no call in flight uses; 0 follows 2^32-1."""
    while True:
        msgid = (msgid + 1) & MAX_MSGID
        if msgid not in pending:
            return msgid


class Encoder:
    """Packs messages.

    Its methods raise what msgpack raises for values that it can't pack: TypeError, ValueError, OverflowError,
    UnicodeEncodeError, and whatever a ``default`` hook raises.
    """

    __slots__ = ("_options", "_pack")

    # A Packer keeps the largest buffer that it ever needed: it begins with little (msgpack's default is 256 KiB).
    # Picked arbitrarily.
    _INITIAL_SIZE = 512

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = options or {}
        self._pack: Callable[[Any], bytes] | None = None

    def new_pack(self) -> Callable[[list[Any]], bytes]:
        """A function that packs one message as a list, for one greenlet: a hook that it calls may switch to another."""
        options: dict[str, Any] = {"datetime": True, "buf_size": self._INITIAL_SIZE, **self._options}
        pack = Packer(**options).pack
        return pack if options.get("default") is None else _verified(pack)

    def request(self, msgid: int, method: str, params: Sequence[Any]) -> bytes:
        """The bytes of ``[0, msgid, method, params]``."""
        return self._packed([REQUEST, msgid, method, list(params)])

    def body(self, method: str, params: Sequence[Any]) -> bytes:
        """What follows the msgid in a request, for one that is made before it has a msgid; see :func:`request_of`."""
        return self.request(0, method, params)[3:]

    def response(self, msgid: int, error: Any, result: Any) -> bytes:
        """The bytes of ``[1, msgid, error, result]``; one of the last two has to be None."""
        return self._packed([RESPONSE, msgid, error, result])

    def notification(self, method: str, params: Sequence[Any]) -> bytes:
        """The bytes of ``[2, method, params]``."""
        return self._packed([NOTIFICATION, method, list(params)])

    def release(self) -> None:
        """Give back what was only held to be quicker next time."""
        self._pack = None

    def _packed(self, message: list[Any]) -> bytes:
        # The packer is taken out while it works: what it calls (a `default` hook, the `items` of some dict) may switch
        # to another greenlet, which must not pack into the same buffer. A new one costs less than a lock.
        pack, self._pack = self._pack or self.new_pack(), None
        data = pack(message)
        self._pack = pack
        return data


def _verified(pack: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """``pack``, which raises ValueError where it hasn't packed one whole message.

    A ``default`` hook may change, or let others change, the list that is being packed, of which the length has been
    written: the peer would take what comes next for its rest. (Without a hook nobody can: it costs 1 µs.)
    """

    def pack_verified(message: Any) -> bytes:
        data = pack(message)
        framer = Unpacker(read_size=len(data), max_buffer_size=0)
        framer.feed(data)
        try:
            framer.skip()
        except (OutOfData, ValueError):
            size = 0
        else:
            size = framer.tell()
        if size != len(data):
            raise ValueError("what was to be packed has changed meanwhile")
        return data

    return pack_verified


class Decoder:
    """Turns the bytes of one stream, fed in any pieces, into checked messages.

    ``options`` are msgpack's Unpacker's. By default timestamps become timezone-aware datetimes and the keys of a map
    may be of any hashable type.
    """

    __slots__ = ("_array", "_framer", "_max_size", "_options", "_unpacker", "_unpackb", "_walk", "unfinished")

    # Up to this size a read is decoded at once, on the guess that it holds just one message: in 256 bytes, however they
    # nest their headers, msgpack preallocates less than 256 KiB before it finds out that the guess was wrong.
    _GUESS_SIZE = 256
    # So many bytes of small messages are decoded ahead of their turn. Picked arbitrarily: an ordinary read is one run,
    # and what a peer can do at worst with as many bytes takes 1 ms.
    _RUN_SIZE = 4 * 1024
    # From this size on it pays to look whether a read is one message of few values. Picked arbitrarily.
    _LARGE_SIZE = 16 * 1024
    # Unpackers keep the largest buffer that they ever needed, twice what they were fed: past this they aren't kept.
    # Picked so that a message of 64 KiB doesn't need new ones.
    _KEPT_SIZE = 80 * 1024

    def __init__(self, max_message_size: int, options: Mapping[str, Any] | None = None) -> None:
        self._max_size = max_message_size
        self._options = options or {}
        self._array = list if self._options.get("use_list", True) else tuple
        # Unpackers take 41 KiB each: they are made when they are needed, and `release` drops them.
        self._framer: Unpacker | None = None
        self._unpacker: Unpacker | None = None
        self._unpackb: Callable[[Buffer], Any] | None = None
        #: A message of which the end hasn't come yet.
        self.unfinished = bytearray()
        # How far into it the search for its end has got.
        self._walk = _Walk(max_message_size)

    def release(self) -> None:
        """Give back what was only held to be quicker next time; a stream that has gone quiet needs little."""
        self._framer = self._unpacker = self._unpackb = None

    def abandon(self) -> None:
        """Give everything back: nothing more will be fed."""
        self.release()
        self.unfinished = bytearray()

    def feed(self, data: bytes) -> tuple[Run, Iterator[Run] | None]:
        """The first messages that ``data`` completes, and an iterator that decodes the others when they are asked for.

        Exhaust it before you feed again.

        Raises, at once or when a run is asked for:
            MessageTooLarge: a message has, or announces, more than ``max_message_size`` bytes.
            ProtocolError: the stream is not MessagePack-RPC. In both cases every message before it has been handed
                over, and the stream can't be decoded any further.
        """
        if len(data) <= self._GUESS_SIZE and len(data) <= self._max_size and not self.unfinished:
            try:
                message = (self._unpackb or self._new_unpackb())(data)
            except Exception:
                pass  # More than a message or less, or one that needs a closer look.
            else:
                return [self._checked(message)], None
        return [], self._runs(data)

    def _runs(self, data: bytes) -> Iterator[Run]:
        if self.unfinished:
            self.unfinished += data
            if (end := (yield from self._walk.through(self.unfinished))) is None:
                return
            unfinished, self.unfinished = memoryview(self.unfinished), bytearray()
            data = bytes(unfinished[end:])
            yield [self._decoded(unfinished[:end])]
        elif len(data) > self._LARGE_SIZE and self._walk.is_short(data):
            # Without a copy for the framer and another one for the unpacker: a tenth of all, at 64 KiB.
            yield [self._decoded(data)]
            return
        while data:
            end = yield from self._complete_runs(data)
            if end == len(data):
                return
            # What is left is a message that is unfinished, too large, invalid, or too deep for the framer.
            data = data[end:]
            if (end := (yield from self._walk.through(data))) is None:
                self.unfinished += data
                return
            yield [self._decoded(data[:end])]
            data = data[end:]

    def _complete_runs(self, data: bytes) -> Generator[Run, None, int]:
        """Decode what is complete, as far as msgpack can tell that without allocating; returns where that ends."""
        size = len(data)
        if size > self._max_size:
            return 0  # One of them may be too large: each one's size has to be looked at.
        if (framer := self._framer) is None:
            framer = self._framer = Unpacker(read_size=size, max_buffer_size=0)
        skip, tell = framer.skip, framer.tell
        first = tell()
        framer.feed(data)
        start = end = 0
        while end < size and self._framer is framer:
            limit = first + min(start + self._RUN_SIZE, size)
            try:
                while (position := tell()) < limit:
                    skip()
            except (OutOfData, ValueError):
                self._framer = None  # It is amid a message; at the end of one it is as good as new.
            end = position - first
            if end > start:
                yield from self._unpacked(data[start:end])
                start = end
        if size > self._KEPT_SIZE:
            self.release()
        return end

    def _unpacked(self, data: bytes) -> Iterator[Run]:
        """The messages in ``data``, in which each is complete."""
        if (unpacker := self._unpacker) is None:
            unpacker = self._unpacker = Unpacker(read_size=len(data), max_buffer_size=0, **self._all_options())
        unpacker.feed(data)
        array = self._array
        requests: Run = []
        responses: Run = []  # At most one of the two has something in it.
        count = 0  # Of what was handed over before.
        try:
            for message in unpacker:
                # The common cases of `_checked`, spelled out: a call for each message would be a tenth of all.
                if type(message) is array and len(message) == 4:
                    kind, msgid, method, params = message
                    if type(msgid) is int and 0 <= msgid <= MAX_MSGID and type(kind) is int:
                        if kind == REQUEST and type(method) is str and type(params) is array:
                            if responses:
                                count += len(responses)
                                yield responses
                                responses = []
                            requests.append(message)
                            continue
                        if kind == RESPONSE:
                            if requests:
                                count += len(requests)
                                yield requests
                                requests = []
                            responses.append(message)
                            continue
                message = self._checked(message)
                if message[0] == NOTIFICATION and not responses:
                    requests.append(message)
                    continue
                if run := requests or responses:
                    count += len(run)
                    yield run
                    requests, responses = [], []
                count += 1
                yield [message]
        except ProtocolError:
            if run := requests or responses:
                yield run
            raise
        except Exception:
            # A value can't be decoded, and the unpacker is out of step.
            self._unpacker = None
            if run := requests or responses:
                count += len(run)
                yield run
            yield from self._decoded_singly(data, count)
        else:
            if run := requests or responses:
                yield run

    def _new_unpackb(self) -> Callable[[Buffer], Any]:
        options = self._all_options()
        self._unpackb = _unpackb if options == _DEFAULTS else partial(msgpack.unpackb, **options)
        return self._unpackb

    def _all_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {**_DEFAULTS, **self._options}
        for name in _HOOKS.intersection(options):
            options[name] = _guarded(options[name])
        return options

    def _decoded_singly(self, data: bytes, skipped: int) -> Iterator[Run]:
        """The messages in ``data``, in which each is complete, but for the first ones."""
        walk = _Walk(self._max_size)
        start = 0
        while start < len(data):
            end = start + ((yield from walk.through(memoryview(data)[start:])) or 0)
            if skipped:
                skipped -= 1
            else:
                yield [self._decoded(data[start:end])]
            start = end

    def _decoded(self, data: Buffer) -> Message:
        """The one message that ``data`` is."""
        try:
            message = (self._unpackb or self._new_unpackb())(data)
        except Exception as exc:
            return self._undecodable(data, exc)
        return self._checked(message)

    def _checked(self, message: Any) -> Message:
        """``message`` as one of :data:`Message`, or ProtocolError."""
        array = self._array
        if type(message) is array:
            if len(message) == 4:
                kind, msgid, method, params = message
                # `type() is`, since True and 1.0 equal 1.
                if type(msgid) is int and 0 <= msgid <= MAX_MSGID and type(kind) is int:
                    if kind == REQUEST:
                        if type(method) is str and type(params) is array:
                            return message
                        return self._normalised(REQUEST, msgid, method, params)
                    if kind == RESPONSE:
                        return message
            elif len(message) == 3:
                kind, method, params = message
                if type(kind) is int and kind == NOTIFICATION:
                    return self._normalised(NOTIFICATION, None, method, params)
        raise ProtocolError(f"not a MessagePack-RPC message: {_described(message)}")

    def _normalised(self, kind: int, msgid: int | None, method: Any, params: Any) -> Message:
        """A request or notification with its method as text, or the reason why it can't be carried out."""
        if type(method) is bytes:
            # Peers older than MessagePack's str type send raw bytes.
            try:
                method = method.decode()
            except UnicodeDecodeError:
                return INVALID, msgid, kind, no_such_method(method.decode(errors="replace"))
        if type(method) is not str:
            return INVALID, msgid, kind, f"method has to be a string, not {type(method).__name__}"
        if type(params) is not self._array:
            return INVALID, msgid, kind, f"params has to be an array, not {type(params).__name__}"
        return kind, msgid, method, params

    def _undecodable(self, data: Buffer, exc: Exception) -> Message:
        """What there is to say about the one message that ``data`` is, of which a value can't be decoded."""
        reader = Unpacker(read_size=len(data), max_buffer_size=0, raw=True, strict_map_key=False, timestamp=0)
        reader.feed(data)
        try:
            length = reader.read_array_header()
            head = [reader.unpack() for _ in range(length - 2)] if length in (3, 4) else []
        except Exception:
            raise ProtocolError(f"not a MessagePack-RPC message: {text_of(exc)}") from exc
        if not head:
            raise ProtocolError(f"not a MessagePack-RPC message: an array of {length}") from exc
        # What stands before method and params, or error and result, has to be right all the same.
        kind, msgid, _, _ = self._checked(self._array([*head, "", self._array()]))
        try:
            method = reader.unpack()
            if kind != RESPONSE and type(method) is bytes:
                method.decode()
        except UnicodeDecodeError:
            return INVALID, msgid, kind, no_such_method(method.decode(errors="replace"))
        except Exception:
            pass  # It is the method itself that msgpack can't decode: say the same as of params.
        return INVALID, msgid, kind, f"can't be decoded: {text_of(exc.cause if isinstance(exc, _HookError) else exc)}"


# By a value's first byte: its size, where that byte alone tells it.
_SIZES: Final = bytes(
    [1] * 128  # positive fixint
    + ([1] + [0] * 15) * 2  # fixmap, fixarray, of which the empty ones hold nothing
    + [1 + length for length in range(32)]  # fixstr
    + [1, 0, 1, 1]  # nil, (never used), false, true
    + [0] * 6  # bin, ext
    + [5, 9]  # float
    + [2, 3, 5, 9, 2, 3, 5, 9]  # uint, int
    + [3, 4, 6, 10, 18]  # fixext
    + [0] * 7  # str, array, map
    + [1] * 32  # negative fixint
)

# Where a length follows the first byte: the size of the length, the size of the type of an ext, whether the length
# counts bytes of a body, and how many values each of it stands for.
_HEADERS: Final = {
    **{lead: (size, 0, 1, 0) for lead, size in ((0xC4, 1), (0xC5, 2), (0xC6, 4))},  # bin
    **{lead: (size, 1, 1, 0) for lead, size in ((0xC7, 1), (0xC8, 2), (0xC9, 4))},  # ext
    **{lead: (size, 0, 1, 0) for lead, size in ((0xD9, 1), (0xDA, 2), (0xDB, 4))},  # str
    **{lead: (size, 0, 0, 1) for lead, size in ((0xDC, 2), (0xDD, 4))},  # array
    **{lead: (size, 0, 0, 2) for lead, size in ((0xDE, 2), (0xDF, 4))},  # map
}


# What of the Unpacker's options is not msgpack's default.
_DEFAULTS: Final[Mapping[str, Any]] = {"timestamp": 3, "strict_map_key": False}


def _unpackb(data: Buffer, unpackb: Callable[..., Any] = msgpack.unpackb) -> Any:
    """As `partial` would do it with the default options, at half the cost beyond msgpack's own."""
    return unpackb(data, timestamp=3, strict_map_key=False)


# What of the Unpacker's options is called while it decodes.
_HOOKS: Final = frozenset(("object_hook", "object_pairs_hook", "ext_hook"))


class _HookError(Exception):
    """A hook has raised ``cause``."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


def _guarded(hook: Any) -> Any:
    """``hook``, whose errors can't be taken for the Unpacker's own: a StopIteration would be its end."""
    if not callable(hook):
        return hook

    def call(*args: Any) -> Any:
        try:
            return hook(*args)
        except BaseException as exc:  # Out of step it would be after any of them.
            raise _HookError(exc) from exc

    return call


class _Walk:
    """Looks for the end of one message, over any number of calls, without a stack and without allocating.

    msgpack's own ``skip`` is 20 times as fast, but it can't tell what a header announces, gives up on 1,024 levels of
    nesting, and keeps a second copy of the unfinished bytes.
    """

    __slots__ = ("_left", "_max_size", "_position")

    # So many bytes at a time: if each of them is a value of its own that takes less than half a millisecond.
    _STRETCH = 4 * 1024
    # A message is short when its last value begins within so many bytes. Picked arbitrarily.
    _SHORT = 100

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._position = 0  # Where the next value begins; it may lie beyond the bytes that are there.
        self._left = 1  # Values still to come: the message itself at first, then what its containers announce.

    def through(self, data: Buffer) -> Generator[Run, None, int | None]:
        """The size of the message at the beginning of ``data``, or None when its end isn't there yet.

        Until there is an end, the next call goes on with the same bytes and more behind them. Yields an empty
        run after each stretch that hasn't brought one.

        Raises:
            MessageTooLarge: as soon as what is there and what the headers announce make it certain.
            ProtocolError: the bytes are not MessagePack.
        """
        available = len(data)
        while True:
            stop = min(available, self._position + self._STRETCH)
            if self._advance(data, stop, available):
                size = self._position
                self._position, self._left = 0, 1
                return size
            if self._position < stop or stop == available:
                return None
            yield []

    def is_short(self, data: Buffer) -> bool:
        """Whether ``data`` is exactly one message, and no more than a few values.

        Raises like :meth:`through`; nothing must have been looked through before.
        """
        is_whole = self._advance(data, self._SHORT, len(data)) and self._position == len(data)
        self._position, self._left = 0, 1
        return is_whole

    def _advance(self, data: Buffer, stop: int, available: int) -> bool:
        """Look through the values that begin before ``stop``; says whether the end of the message is there."""
        position, left, max_size, sizes = self._position, self._left, self._max_size, _SIZES
        while left and position < stop:
            lead = data[position]
            if size := sizes[lead]:
                position += size
                left -= 1
                if size == 1:
                    continue  # Nothing has changed in how large the message is at least.
            elif lead < 0xA0:  # fixmap, fixarray
                position += 1
                left += (lead & 0x0F) * (2 if lead < 0x90 else 1) - 1
            elif lead == 0xC1:
                raise ProtocolError("not MessagePack: the byte 0xc1 has no meaning")
            else:
                length_size, type_size, is_body, values = _HEADERS[lead]
                header_end = position + 1 + length_size
                if (least := header_end + type_size + left - 1) > max_size:
                    raise MessageTooLarge(least, max_size)
                if header_end > available:
                    break
                length = int.from_bytes(data[position + 1 : header_end], "big")
                position = header_end + type_size + is_body * length
                left += values * length - 1
            # Each value that is still to come has at least one byte.
            if position + left > max_size:
                raise MessageTooLarge(position + left, max_size)
        self._position, self._left = position, left
        return not left and position <= available


def _described(message: Any) -> str:
    """What kind of thing ``message`` is, without what it says: logs are no place for the values of a request."""
    if isinstance(message, (list, tuple)):
        head = f", kind {message[0]!r}" if message and isinstance(message[0], int) else ""
        return f"an array of {len(message)}{head}"
    return f"a value of type {type(message).__name__}"
