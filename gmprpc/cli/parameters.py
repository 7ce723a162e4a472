"""How options are declared, and kinds of them that click doesn't know: each raises BadParameter for what is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from gmprpc.proxyprotocol import AllowedProxies
from gmprpc.transport import FD_PREFIX, parse_address

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(*names: str, **settings: Any) -> Decorator:
    """An option that has a name in the environment, too: GMPRPC_MAX_MESSAGE_SIZE for --max-message-size."""
    (name,) = (name for name in names if name.startswith("--"))
    variable = "GMPRPC_" + name.removeprefix("--").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


def options_of(*options: Decorator) -> Decorator:
    """A decorator that gives a command all ``options``, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate


def address(text: str) -> tuple[str, int] | str:
    """A place to connect to: ``(host, port)`` or ``"unix:/path"``."""
    try:
        return parse_address(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no address: give HOST:PORT or unix:PATH.") from None


def bind(text: str) -> tuple[str, int] | str:
    """A place to listen on: ``(host, port)``, ``"unix:/path"`` or ``"fd://3"``."""
    if text.startswith(FD_PREFIX) and text.removeprefix(FD_PREFIX).isdecimal():
        return text
    try:
        # A host that is left out is 127.0.0.1 here too: nothing is opened to the world that wasn't named.
        return parse_address(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no address: give HOST:PORT, unix:PATH or fd://N.") from None


def seconds(text: Any) -> float:
    """A length of time: a finite number from 0 on."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{text!r} is no number of seconds.")
    return number


def positive_seconds(text: Any) -> float:
    """A length of time that isn't none."""
    if (number := seconds(text)) == 0:
        raise click.BadParameter(f"{text!r}: give more than 0 seconds.")
    return number


def rate(text: Any) -> float:
    """How many a second: a finite number of more than 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{text!r} is no number of calls a second.")
    return number


def _number(text: Any) -> float:
    """The number that ``text`` is, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def file_mode(text: Any) -> int:
    """Permissions as `chmod` takes them: an octal number."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} are no permissions: give an octal number, as in 660.")
    return mode


def proxies(text: Any) -> list[str]:
    """Networks and addresses, with commas between them, and ``unix``."""
    names = [name.strip() for name in text.split(",")]
    try:
        AllowedProxies(names)
    except ValueError as exc:
        raise click.BadParameter(f"{exc}: give networks, as in 10.0.0.0/8,::1,unix.") from None
    return names
