"""``list``, ``describe`` and ``health``: what a server tells of itself, through its built-in methods."""

from __future__ import annotations

from typing import Any

import click

from gmprpc.builtin import SERVING
from gmprpc.client import Client
from gmprpc.exceptions import MethodNotFound, RemoteError, no_such_method
from gmprpc.methods import DESCRIBE, HEALTH, LIST

from . import parameters, trust
from .asking import OPTIONS_FIRST, asking, unknown_method
from .exits import AnsweredError, Broken, ExitCode, printable
from .parameters import options_of

# What the three have in common.
_question = options_of(
    click.option(
        "--timeout",
        type=parameters.seconds,
        # Whoever asks for the health of a server has to hear that it hangs. As long as a connection may take.
        default=10.0,
        metavar="SECONDS",
        help="Time for all of it.",
    ),
    trust.options,
    click.argument("address", type=parameters.address),
)


@click.command("list", context_settings=OPTIONS_FIRST)
@_question
def list_(address: Any, timeout: float, **settings: Any) -> None:
    """Print the names of the methods, one a line.

    ADDRESS is HOST:PORT or unix:PATH.
    """
    with asking(address, timeout=timeout, **trust.keywords(settings, address)) as client:
        names = _answer(client, LIST)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _senseless(LIST)
    click.echo("".join(f"{printable(name, but='')}\n" for name in names).encode(), nl=False)


@click.command(context_settings=OPTIONS_FIRST)
@_question
@click.argument("method")
def describe(address: Any, method: str, timeout: float, **settings: Any) -> None:
    """Print what METHOD takes, and the first line of its docstring.

    ADDRESS is HOST:PORT or unix:PATH.
    """
    with asking(address, timeout=timeout, **trust.keywords(settings, address)) as client:
        try:
            description = _answer(client, DESCRIBE, method)
        except RemoteError as exc:
            if exc.error == no_such_method(method):
                raise unknown_method(client, method) from exc
            raise
    try:
        name, signature, doc = (printable(description[key], but="") for key in ("name", "signature", "doc"))
    except (TypeError, KeyError, AttributeError):
        raise _senseless(DESCRIBE) from None
    click.echo(f"{name}{signature}".encode())
    if doc:
        click.echo(f"    {doc}".encode())


@click.command(context_settings=OPTIONS_FIRST)
@_question
@click.pass_context
def health(ctx: click.Context, /, address: Any, timeout: float, **settings: Any) -> None:
    """Print SERVING, or NOT_SERVING and exit with 1.

    ADDRESS is HOST:PORT or unix:PATH.
    """
    with asking(address, timeout=timeout, **trust.keywords(settings, address)) as client:
        word = _answer(client, HEALTH)
    if not isinstance(word, str):
        raise _senseless(HEALTH)
    click.echo(printable(word, but="").encode())
    ctx.exit(ExitCode.OK if word == SERVING else ExitCode.ANSWERED_ERROR)


def _answer(client: Client, method: str, *params: Any) -> Any:
    try:
        return client.call(method, *params)
    except MethodNotFound as exc:
        raise AnsweredError(f"{exc}; this server doesn't tell") from exc


def _senseless(method: str) -> Broken:
    return Broken(f"the answer to {method} makes no sense; is that a gmprpc server?")
