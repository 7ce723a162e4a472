"""``call`` and ``notify``: one request or notification, from words on the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from gmprpc.exceptions import MethodNotFound
from gmprpc.options import CLIENT_MAX_MESSAGE_SIZE
from gmprpc.protocol import Encoder

from . import parameters
from .asking import OPTIONS_FIRST, asking, unknown_method
from .exits import Broken, TimedOut
from .values import UNPACKER_OPTIONS, InvalidValue, from_argument, from_json, to_json

C = TypeVar("C", bound=Callable[..., Any])

FORMS = """
\b
A parameter is JSON where it parses as JSON, a string otherwise. What JSON
lacks, in parameters and in results:
  {"$bytes": "<base64>"}               bytes
  {"$timestamp": "2025-01-31T12:00Z"}  a timestamp, in ISO 8601
  {"$ext": [<code>, "<base64>"]}       any other ext type
  {"$map": [[<key>, <value>], ...]}    a map with keys that aren't strings
  {"$float": "NaN"}                    or "Infinity", "-Infinity"
"""

# Its number: `sys.stdout` may be None.
_STDOUT = 1


def _request(command: C) -> C:
    """What `call` and `notify` have in common."""
    for decorate in (  # From the innermost outwards: arguments are taken in the opposite order.
        click.argument("params", nargs=-1, type=click.UNPROCESSED),
        click.argument("method"),
        click.argument("address", type=parameters.address),
        click.option("-d", "--data", metavar="JSON|@FILE|@-", help="All params at once, as a JSON array."),
        click.option(
            "--connect-timeout",
            type=parameters.seconds,
            default=10.0,
            metavar="SECONDS",
            help="Time to resolve the name and to connect.",
        ),
    ):
        command = decorate(command)
    return command


@click.command(context_settings=OPTIONS_FIRST, epilog=FORMS)
@click.option("--timeout", type=parameters.seconds, metavar="SECONDS", help="Time for the answer; no limit by default.")
@click.option(
    "--max-message-size",
    type=click.IntRange(min=1),
    default=CLIENT_MAX_MESSAGE_SIZE,
    metavar="BYTES",
    help="Refuse a larger answer.",
)
@_request
def call(
    address: Any,
    method: str,
    params: Sequence[str],
    data: str | None,
    timeout: float | None,
    connect_timeout: float,
    max_message_size: int,
) -> None:
    """Call METHOD and print its result as JSON.

    ADDRESS is HOST:PORT or unix:PATH. Options come before it; everything after METHOD is a parameter, -1 too.
    """
    values = _values_of(method, params, data)
    with asking(
        address,
        timeout=timeout,
        connect_timeout=connect_timeout,
        max_message_size=max_message_size,
        unpacker_options=UNPACKER_OPTIONS,
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
@_request
def notify(
    address: Any,
    method: str,
    params: Sequence[str],
    data: str | None,
    timeout: float | None,
    connect_timeout: float,
) -> None:
    """Call METHOD without an answer.

    It ends when the notification has left; whether METHOD succeeds can't be known.

    ADDRESS is HOST:PORT or unix:PATH. Options come before it; everything after METHOD is a parameter, -1 too.
    """
    values = _values_of(method, params, data)
    with asking(address, connect_timeout=connect_timeout) as client:
        client.notify(method, *values)
        connection = client.connection
        assert connection is not None
        # Not `close`, which gives up on a peer that doesn't read for a moment.
        connection.finish()
        if not connection.wait(timeout):
            raise TimedOut(f"not sent within {timeout:g} s; --timeout gives it longer")
        if connection.error is not None:
            raise connection.error


def _values_of(method: str, params: Sequence[str], data: str | None) -> list[Any]:
    """The params, from the words that were typed or from ``data``; UsageError unless they can be sent."""
    if data is not None and params:
        raise click.UsageError("--data gives all params: there can't be others.")
    try:
        values = [from_argument(word) for word in params] if data is None else _from_data(data)
        Encoder().request(0, method, values)
    except InvalidValue as exc:
        raise click.UsageError(f"these params can't be had: {exc}.") from exc
    except (TypeError, ValueError, OverflowError) as exc:
        raise click.UsageError(f"these params can't be sent: {exc}.") from exc
    return values


def _from_data(data: str) -> list[Any]:
    try:
        values = from_json(_read(data.removeprefix("@")) if data.startswith("@") else data)
    except ValueError as exc:
        raise click.BadParameter(f"not JSON: {exc}.", param_hint="--data") from exc
    if not isinstance(values, list):
        raise click.BadParameter("it has to be an array, of all params.", param_hint="--data")
    return values


def _read(name: str) -> str:
    """The text in the file ``name``, or on standard input if it is ``-``."""
    try:
        with click.open_file(name, "rb") as file:
            return bytes(file.read()).decode("utf-8-sig")
    except OSError as exc:
        raise click.BadParameter(f"can't read {name}: {exc.strerror}.", param_hint="--data") from exc
