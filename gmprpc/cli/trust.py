"""TLS for the commands that ask a server something: whom they trust, and as whom they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from gmprpc import tls

from .certificates import demand_certfile, password_in, reason_of
from .exits import Unreachable
from .parameters import options_of

options = options_of(
    click.option("--tls", is_flag=True, help="Speak TLS; the other options for it imply this one."),
    click.option(
        "--cafile",
        metavar="FILE",
        help="Trust the authorities in this PEM file only, and not the system's.",
    ),
    click.option(
        "--server-hostname",
        metavar="NAME",
        help="The name in the server's certificate, if it isn't that in ADDRESS.",
    ),
    click.option(
        "--certfile",
        metavar="FILE",
        help="Show the certificate in this PEM file (mutual TLS).",
    ),
    click.option(
        "--keyfile",
        metavar="FILE",
        help="The certificate's key, if it isn't in the same file.",
    ),
    click.option(
        "--keyfile-password-file",
        metavar="FILE",
        help="What opens the key: the first line of this file.",
    ),
)

_NAMES = ("tls", "cafile", "server_hostname", "certfile", "keyfile", "keyfile_password_file")


def keywords(settings: Mapping[str, Any], address: Any) -> dict[str, Any]:
    """What the options say to a :class:`gmprpc.Client` of ``address``: ``ssl_context`` and ``server_hostname``.

    Raises:
        UsageError: options that mean nothing without another one.
        Unreachable: a file can't be used.
    """
    if not any(settings[name] for name in _NAMES):
        return {"ssl_context": None, "server_hostname": None}
    if not isinstance(address, tuple) and not settings["server_hostname"]:
        raise click.UsageError("--server-hostname has to say what name is in the server's certificate.")
    demand_certfile(settings, "keyfile", "keyfile_password_file")
    try:
        context = tls.client_context(
            settings["cafile"],
            certfile=settings["certfile"],
            keyfile=settings["keyfile"],
            password=password_in(settings["keyfile_password_file"]),
        )
    except (OSError, ValueError) as exc:
        raise Unreachable(f"can't speak TLS: {reason_of(exc)}") from exc
    return {"ssl_context": context, "server_hostname": settings["server_hostname"]}
