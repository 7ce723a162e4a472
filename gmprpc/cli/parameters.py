"""Options and arguments of kinds that click doesn't know; each function raises BadParameter for what is none."""

from __future__ import annotations

import math
from typing import Any

import click

from gmprpc.transport import FD_PREFIX, parse_address


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
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{text!r} is no number of seconds.")
    return number


def file_mode(text: Any) -> int:
    """Permissions as `chmod` takes them: an octal number."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} are no permissions: give an octal number, as in 660.")
    return mode
