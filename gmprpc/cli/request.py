"""A request, from words on the command line: what the commands that make one have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from gmprpc.protocol import Encoder

from . import parameters
from .parameters import Decorator, options_of
from .values import InvalidValue, from_argument, from_json

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


def request_with(*data_names: str) -> Decorator:
    """Gives a command the options and arguments that say where and what to call; --data goes by ``data_names``."""
    return options_of(
        click.option(
            "--connect-timeout",
            type=parameters.seconds,
            default=10.0,
            metavar="SECONDS",
            help="Time to resolve the name and to connect.",
        ),
        click.option(*data_names, metavar="JSON|@FILE|@-", help="All params at once, as a JSON array."),
        click.argument("address", type=parameters.address),
        click.argument("method"),
        click.argument("params", nargs=-1, type=click.UNPROCESSED),
    )


#: What commands have that make one request.
request = request_with("-d", "--data")


def values_of(method: str, params: Sequence[str], data: str | None) -> list[Any]:
    """The params for ``method``, from the words that were typed or ``data``; UsageError unless they can be sent."""
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
