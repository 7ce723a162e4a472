"""The options of ``serve`` for TLS, and the certificate that is renewed while the program runs."""

from __future__ import annotations

import logging
import signal
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import click
import gevent

from gmprpc import tls
from gmprpc.server import Server

from .exits import Unreachable
from .parameters import option, options_of

logger = logging.getLogger("gmprpc.cli")

options = options_of(
    option(
        "--certfile",
        metavar="FILE",
        help="Speak TLS, with the certificate in this PEM file. SIGHUP has it read again, for new connections.",
    ),
    option(
        "--keyfile",
        metavar="FILE",
        help="The certificate's key, if it isn't in the same file.",
    ),
    option(
        "--keyfile-password-file",
        metavar="FILE",
        help="What opens the key: the first line of this file.",
    ),
    option(
        "--client-cafile",
        metavar="FILE",
        help="Demand certificates of clients, from the authorities in this PEM file (mutual TLS).",
    ),
)


def keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say to a :class:`gmprpc.Server`.

    Raises:
        UsageError: one of them means nothing without another one.
        Unreachable: a file can't be used.
    """
    demand_certfile(settings, "keyfile", "keyfile_password_file", "client_cafile")
    if settings["certfile"] is None:
        return {}
    try:
        return {"ssl_context": _context(settings)}
    except (OSError, ValueError) as exc:
        raise Unreachable(f"can't speak TLS: {reason_of(exc)}") from exc


def outlive_hangup(settings: Mapping[str, Any]) -> None:
    """Have SIGHUP do nothing until :func:`reload_on_hangup` sees to it: the files are read after that anyway."""
    if settings["certfile"] is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def reload_on_hangup(servers: Sequence[Server], settings: Mapping[str, Any]) -> None:
    """Have SIGHUP give ``servers`` what is in the files by then; what can't be used changes nothing."""

    def reload() -> None:
        try:
            contexts = [_context(settings) for _ in servers]
        except (OSError, ValueError) as exc:
            logger.error("SIGHUP: the certificates stay as they were: %s", reason_of(exc))
            return
        # A context of its own, and not the old one with another certificate: what fails in between would be half of it.
        for server, context in zip(servers, contexts, strict=True):
            server.ssl_context = context
        logger.info("SIGHUP: new connections get the certificate that is in %s now", settings["certfile"])

    if settings["certfile"] is not None:
        gevent.signal_handler(signal.SIGHUP, reload)


def _context(settings: Mapping[str, Any]) -> ssl.SSLContext:
    return tls.server_context(
        settings["certfile"],
        settings["keyfile"],
        client_cafile=settings["client_cafile"],
        password=password_in(settings["keyfile_password_file"]),
    )


def demand_certfile(settings: Mapping[str, Any], *names: str) -> None:
    """Raise UsageError if one of the options ``names`` is there, and no --certfile."""
    for name in names:
        if settings[name] is not None and settings["certfile"] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} needs a --certfile.")


def password_in(path: str | None) -> bytes | None:
    """The first line of the file at ``path``, if there is one."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.readline().rstrip(b"\r\n")


def reason_of(exc: OSError | ValueError) -> str:
    """Why a file of certificates or keys can't be used, in one line."""
    if isinstance(exc, ssl.SSLError):
        return str(exc.strerror)
    if isinstance(exc, OSError):
        return f"{exc.filename}: {exc.strerror}"
    return f"{exc}, with --keyfile-password-file" if "password" in str(exc) else str(exc)
