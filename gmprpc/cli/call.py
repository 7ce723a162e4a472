"""``call`` and ``notify``: one request or notification, from words on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from gmprpc.exceptions import MethodNotFound
from gmprpc.options import CLIENT_MAX_MESSAGE_SIZE

from . import parameters, trust
from .asking import OPTIONS_FIRST, asking, unknown_method
from .exits import Broken, TimedOut
from .request import FORMS, request, values_of
from .values import UNPACKER_OPTIONS, InvalidValue, to_json

# Its number: `sys.stdout` may be None.
_STDOUT = 1


@click.command(context_settings=OPTIONS_FIRST, epilog=FORMS)
@click.option("--timeout", type=parameters.seconds, metavar="SECONDS", help="Time for the answer; no limit by default.")
@click.option(
    "--max-message-size",
    type=click.IntRange(min=1),
    default=CLIENT_MAX_MESSAGE_SIZE,
    metavar="BYTES",
    help="Refuse a larger answer.",
)
@trust.options
@request
def call(
    address: Any,
    method: str,
    params: Sequence[str],
    data: str | None,
    timeout: float | None,
    connect_timeout: float,
    max_message_size: int,
    **settings: Any,
) -> None:
    """Call METHOD and print its result as JSON.

    ADDRESS is HOST:PORT or unix:PATH. Options come before it; everything after METHOD is a parameter, -1 too.
    """
    values = values_of(method, params, data)
    with asking(
        address,
        timeout=timeout,
        connect_timeout=connect_timeout,
        max_message_size=max_message_size,
        unpacker_options=UNPACKER_OPTIONS,
        **trust.keywords(settings, address),
    ) as client:
        try:
            result = client.call(method, *values)
        except MethodNotFound as exc:
            raise unknown_method(client, method) from exc
    try:
        text = to_json(result, indent=2 if os.isatty(_STDOUT) else None)
    except InvalidValue as exc:
        raise Broken(f"the result can't be shown as JSON: {exc}.") from exc
    click.echo(text.encode())  # JSON is UTF-8, whatever the locale.


@click.command(context_settings=OPTIONS_FIRST, epilog=FORMS)
@click.option("--timeout", type=parameters.seconds, metavar="SECONDS", help="Time to send it; no limit by default.")
@trust.options
@request
def notify(
    address: Any,
    method: str,
    params: Sequence[str],
    data: str | None,
    timeout: float | None,
    connect_timeout: float,
    **settings: Any,
) -> None:
    """Call METHOD without an answer.

    It ends when the notification has left; whether METHOD succeeds can't be known.

    ADDRESS is HOST:PORT or unix:PATH. Options come before it; everything after METHOD is a parameter, -1 too.
    """
    values = values_of(method, params, data)
    with asking(address, connect_timeout=connect_timeout, **trust.keywords(settings, address)) as client:
        client.notify(method, *values)
        connection = client.connection
        assert connection is not None
        # Not `close`, which gives up on a peer that doesn't read for a moment.
        connection.finish()
        if not connection.wait(timeout):
            raise TimedOut(f"not sent within {timeout:g} s; --timeout gives it longer")
        if connection.error is not None:
            raise connection.error
