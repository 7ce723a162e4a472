"""The program itself: its commands, and how it ends."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import click
from gevent.hub import Hub

from gmprpc.transport import parse_address

from .bench import bench
from .call import call, notify
from .exits import ExitCode, Misuse
from .inspection import describe, health, list_
from .serve import serve

EXIT_CODES = """
\b
Exit codes:
  0  ok
  1  the peer answered an error, or isn't serving
  2  wrong usage
  3  can't connect, listen or load
  4  timed out
  5  protocol error, or the connection was lost
"""


class _Program(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["serve"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and ":" in args[0]:
            meant = "call" if _is_address(args[0]) else "serve"
            raise Misuse(f"{args[0]} is no command; type: {ctx.command_path} {meant} {shlex.join(args)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        # An interrupt that strikes while the hub runs comes here like any other; gevent needn't print it on the way.
        Hub.NOT_ERROR = (*Hub.NOT_ERROR, KeyboardInterrupt)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has enough. What is still in the buffer must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(ExitCode.BROKEN_PIPE)


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except ValueError:
        return False
    return True


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="gmprpc")
def main() -> None:
    """MessagePack-RPC on the command line.

    Without a command it serves a demo on 127.0.0.1:4423.
    """


main.add_command(serve)
main.add_command(call)
main.add_command(notify)
main.add_command(list_)
main.add_command(describe)
main.add_command(health)
main.add_command(bench)
