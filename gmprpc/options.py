"""The limits and settings of one connection, checked once; this module knows no socket and no greenlet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgpack import Packer, Unpacker

#: What a server takes in one message: the precedent of websockets and nginx. 1 MiB of empty containers already becomes
#: 74 MiB of Python objects, so a server that faces strangers shouldn't allow much more.
SERVER_MAX_MESSAGE_SIZE = 1024 * 1024

#: What a client takes in one message: it chose its server, and answers are larger than questions.
CLIENT_MAX_MESSAGE_SIZE = 16 * 1024 * 1024

#: Between Envoy's 100 and the 250 of Go's HTTP/2 server.
MAX_CONCURRENCY = 256

#: When so much waits to be written reading stops. Four times Go's and gRPC's HTTP/2 window: one answer of usual size
#: shouldn't stop anything.
MAX_UNSENT_SIZE = 256 * 1024

#: Redis's number for its clients. Each takes a descriptor, of which the system may allow less.
MAX_CONNECTIONS = 10_000

#: How long the rest of a message, and the place for an answer, are waited for: nginx's numbers.
READ_TIMEOUT = 60.0
WRITE_TIMEOUT = 60.0

#: How long a connection may take, on either side: the precedent of websockets.
CONNECT_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 10.0

#: The first wait before another attempt to connect, at most, and the longest one. Between a server that is restarted,
#: which takes a second, and one that is gone, which 1,000 clients shouldn't keep busy. Picked arbitrarily.
RETRY_INTERVAL = 0.1
MAX_RETRY_INTERVAL = 5.0

#: How many calls may wait for their answers on one connection: Envoy's number.
MAX_PENDING = 1024


class _Default:
    """Says that a parameter wasn't given, where None means something."""

    def __repr__(self) -> str:
        return "<as for all calls>"


DEFAULT: Any = _Default()

# Beyond 4 GiB msgpack miscounts the bytes of a value.
_MAX_MESSAGE_SIZE = 2**32 - 1

# What msgpack's Unpacker would understand, but the framing of the stream depends on.
_RESERVED_UNPACKER_OPTIONS = frozenset(
    ("file_like", "list_hook", "max_array_len", "max_bin_len", "max_buffer_size", "max_ext_len", "max_map_len")
    + ("max_str_len", "read_size")
)
_RESERVED_PACKER_OPTIONS = frozenset(("autoreset",))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """What a :class:`~gmprpc.Connection` may take and hold; see :class:`~gmprpc.Server` for each field."""

    max_message_size: int = SERVER_MAX_MESSAGE_SIZE
    max_concurrency: int | None = MAX_CONCURRENCY
    max_unsent_size: int | None = MAX_UNSENT_SIZE
    read_timeout: float | None = READ_TIMEOUT
    write_timeout: float | None = WRITE_TIMEOUT
    idle_timeout: float | None = None
    reuse_greenlets: bool = True
    hide_errors: bool = False
    #: The methods are those of :meth:`gmprpc.observing.Observing.observed`.
    is_observed: bool = False
    packer_options: Mapping[str, Any] = field(default_factory=dict)
    unpacker_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limit("max_message_size", self.max_message_size)
        if self.max_message_size is None or self.max_message_size > _MAX_MESSAGE_SIZE:
            raise ValueError(f"max_message_size has to be a number, of {_MAX_MESSAGE_SIZE} at most")
        check_limit("max_concurrency", self.max_concurrency)
        check_limit("max_unsent_size", self.max_unsent_size)
        for name in ("read_timeout", "write_timeout", "idle_timeout"):
            check_timeout(name, getattr(self, name))
        _check_free("packer_options", self.packer_options, _RESERVED_PACKER_OPTIONS)
        _check_free("unpacker_options", self.unpacker_options, _RESERVED_UNPACKER_OPTIONS)
        # What msgpack doesn't take shall be known now, not when the first connection is made.
        Packer(**self.packer_options)
        Unpacker(**self.unpacker_options)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How a client holds its connection; see :class:`~gmprpc.Client` for each field."""

    connection: ConnectionOptions
    connect_timeout: float | None = CONNECT_TIMEOUT
    retry_interval: float | None = RETRY_INTERVAL
    max_retry_interval: float = MAX_RETRY_INTERVAL
    keep_connected: bool = False
    draining: bool = False
    is_greeted: bool = False  # Something is to be said before any call.
    max_pending: int | None = MAX_PENDING
    ping_interval: float | None = None

    def __post_init__(self) -> None:
        check_timeout("connect_timeout", self.connect_timeout)
        check_timeout("retry_interval", self.retry_interval)
        check_timeout("max_retry_interval", self.max_retry_interval)
        if self.max_retry_interval is None:
            raise ValueError("max_retry_interval has to be a number of seconds; retry_interval=None never tries again")
        check_limit("max_pending", self.max_pending)
        if self.ping_interval is not None:
            check_timeout("ping_interval", self.ping_interval)
            if self.ping_interval == 0:
                raise ValueError("ping_interval has to be None or more than 0 s")


def check_timeout(name: str, seconds: float | None) -> None:
    """Raise ValueError unless ``seconds`` is None or a time that can pass."""
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds >= 0):
        raise ValueError(f"{name} has to be None or a number of seconds from 0 on, not {seconds!r}")


def check_limit(name: str, number: int | None) -> None:
    """Raise ValueError unless ``number`` is None or at least 1."""
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ValueError(f"{name} has to be a whole number from 1 on, not {number!r}")


def _check_free(name: str, options: Mapping[str, Any], reserved: frozenset[str]) -> None:
    if taken := reserved.intersection(options):
        raise ValueError(f"{name} can't set {', '.join(sorted(taken))}: gmprpc frames the stream itself")
