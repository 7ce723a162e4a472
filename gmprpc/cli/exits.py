"""The exit codes, and the errors that end the program with one line on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import IO, Any

import click

from gmprpc.exceptions import CallTimeout, ConnectFailed, ConnectionClosed, MessageTooLarge, ProtocolError, RemoteError

from .values import InvalidValue, to_json


class ExitCode(IntEnum):
    """What the exit code of a command means."""

    OK = 0
    ANSWERED_ERROR = 1
    USAGE = 2
    UNREACHABLE = 3
    TIMED_OUT = 4
    BROKEN = 5
    # As a shell reports what a signal has ended.
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class AnsweredError(click.ClickException):
    """The peer answered with an error, which is shown as it is: a string as plain text, anything else as JSON."""

    exit_code = ExitCode.ANSWERED_ERROR

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file, err=True)


class Misuse(click.ClickException):
    """What was typed makes no sense, and the message alone says what would."""

    exit_code = ExitCode.USAGE


class Unreachable(click.ClickException):
    """There is nothing to talk to, nothing to serve, or no place to serve it."""

    exit_code = ExitCode.UNREACHABLE


class TimedOut(click.ClickException):
    """It took too long."""

    exit_code = ExitCode.TIMED_OUT


class Broken(click.ClickException):
    """The peer doesn't speak the protocol, or the connection was lost."""

    exit_code = ExitCode.BROKEN


@contextmanager
def call_errors() -> Iterator[None]:
    """Turn what a call may raise into the errors above."""
    try:
        yield
    except RemoteError as exc:
        raise AnsweredError(_text_of(exc.error)) from exc
    except CallTimeout as exc:
        raise TimedOut(f"no answer to {exc.method!r} within {exc.timeout:g} s; --timeout gives it longer") from exc
    except ConnectFailed as exc:
        is_deserted = isinstance(exc.__cause__, (ConnectionRefusedError, FileNotFoundError))
        raise Unreachable(f"{exc}; is the server running?" if is_deserted else str(exc)) from exc
    except (ProtocolError, ConnectionClosed) as exc:
        reason = f"{exc}: {exc.__cause__}" if exc.__cause__ else str(exc)
        if isinstance(exc.__cause__, MessageTooLarge):
            reason += "; --max-message-size allows more"
        elif isinstance(exc.__cause__, ProtocolError):
            reason += "; is that a MessagePack-RPC server?"
        raise Broken(reason) from exc


def _text_of(error: Any) -> str:
    if not isinstance(error, str):
        try:
            return to_json(error)
        except InvalidValue as exc:
            return f"an error that can't be shown: {exc}"
    return printable(error)


def printable(text: str, *, but: str = "\n\t") -> str:
    """``text`` without anything that a terminal would act on, ``but`` what is allowed."""
    return "".join(char if char.isprintable() or char in but else ascii(char)[1:-1] for char in text)
