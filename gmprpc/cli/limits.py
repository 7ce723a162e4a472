"""The options of ``serve`` that are keywords of :class:`gmprpc.Server`: limits, time-outs, and the files of sockets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from gmprpc.options import (
    HANDSHAKE_TIMEOUT,
    MAX_CONCURRENCY,
    MAX_CONNECTIONS,
    MAX_UNSENT_SIZE,
    READ_TIMEOUT,
    SERVER_MAX_MESSAGE_SIZE,
    WRITE_TIMEOUT,
)
from gmprpc.transport import UNIX_PREFIX, SocketFile

from . import parameters
from .parameters import option, options_of

options = options_of(
    option(
        "--max-message-size",
        type=click.IntRange(min=1),
        default=SERVER_MAX_MESSAGE_SIZE,
        metavar="BYTES",
        help="Close a connection on which a larger message comes.",
    ),
    option(
        "--max-concurrency",
        type=click.IntRange(min=1),
        default=MAX_CONCURRENCY,
        metavar="N",
        help="Requests in flight on one connection; further ones wait unread.",
    ),
    option(
        "--max-connections",
        type=click.IntRange(min=1),
        default=MAX_CONNECTIONS,
        metavar="N",
        help="Connections at each place; one more is closed at once.",
    ),
    option(
        "--max-unsent-size",
        type=click.IntRange(min=1),
        default=MAX_UNSENT_SIZE,
        metavar="BYTES",
        help="Read nothing from a peer that leaves more than this unread.",
    ),
    option(
        "--handshake-timeout",
        type=parameters.seconds,
        default=HANDSHAKE_TIMEOUT,
        metavar="SECONDS",
        help="Time for TLS, and for what a balancer says before.",
    ),
    option(
        "--read-timeout",
        type=parameters.seconds,
        default=READ_TIMEOUT,
        metavar="SECONDS",
        help="Close a connection on which the rest of a message doesn't come.",
    ),
    option(
        "--write-timeout",
        type=parameters.seconds,
        default=WRITE_TIMEOUT,
        metavar="SECONDS",
        help="Close a connection whose peer doesn't take its answers.",
    ),
    option(
        "--idle-timeout",
        type=parameters.seconds,
        metavar="SECONDS",
        help="Close a connection on which nothing happens; never by default.",
    ),
    option(
        "--reply-timeout",
        type=parameters.seconds,
        metavar="SECONDS",
        help="Answer a request that takes longer with an error; never by default.",
    ),
    option(
        "--socket-mode",
        type=parameters.file_mode,
        metavar="OCTAL",
        help="Permissions of the files of unix sockets: who may write may connect.",
    ),
    option(
        "--socket-user",
        metavar="NAME",
        help="Owner of the files of unix sockets.",
    ),
    option(
        "--socket-group",
        metavar="NAME",
        help="Group of the files of unix sockets.",
    ),
    option(
        "--hide-errors",
        is_flag=True,
        help="Don't tell callers what a method raised; the log has it.",
    ),
    option(
        "--no-introspection",
        is_flag=True,
        help="Don't tell callers what methods there are and what they take.",
    ),
)

_EVERYWHERE = (
    "max_message_size",
    "max_concurrency",
    "max_connections",
    "max_unsent_size",
    "handshake_timeout",
    "read_timeout",
    "write_timeout",
    "idle_timeout",
    "reply_timeout",
    "hide_errors",
)
_FOR_FILES = ("socket_mode", "socket_user", "socket_group")


def socket_file(settings: Mapping[str, Any]) -> SocketFile:
    """What the options say about the files of unix sockets."""
    return SocketFile(*(settings[name] for name in _FOR_FILES))


def keywords(settings: Mapping[str, Any], bind: Any = None) -> dict[str, Any]:
    """What the options say to the :class:`gmprpc.Server` that listens at ``bind``, if it listens."""
    is_file = isinstance(bind, str) and bind.startswith(UNIX_PREFIX)
    names = _EVERYWHERE + _FOR_FILES if is_file else _EVERYWHERE
    return {**{name: settings[name] for name in names}, "introspection": not settings["no_introspection"]}
