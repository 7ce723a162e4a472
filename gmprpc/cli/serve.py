"""``serve``: listen, and run until a signal says stop."""

from __future__ import annotations

import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import gevent
from click.core import ParameterSource
from gevent import monkey
from gevent.event import Event
from gevent.pool import Group

from gmprpc.options import (
    MAX_CONCURRENCY,
    MAX_CONNECTIONS,
    MAX_UNSENT_SIZE,
    READ_TIMEOUT,
    SERVER_MAX_MESSAGE_SIZE,
    WRITE_TIMEOUT,
)
from gmprpc.pipes import stream_over
from gmprpc.server import Server
from gmprpc.streams import Stream
from gmprpc.transport import UNIX_PREFIX, format_address

from . import demo, parameters
from .exits import Broken, Misuse, Unreachable
from .loading import load_service

logger = logging.getLogger("gmprpc.cli")

#: The port of AnyEvent::MPRPC's examples.
DEFAULT_BIND = "127.0.0.1:4423"

_STDIN, _STDOUT, _STDERR = 0, 1, 2


def _option(*names: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that has a name in the environment, too: GMPRPC_MAX_MESSAGE_SIZE for --max-message-size."""
    (name,) = (name for name in names if name.startswith("--"))
    variable = "GMPRPC_" + name.removeprefix("--").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


@click.command(context_settings={"show_default": True})
@click.argument("app", metavar="[MODULE:ATTR]", required=False)
@_option(
    "-b",
    "--bind",
    "binds",
    type=parameters.bind,
    multiple=True,
    show_default=DEFAULT_BIND,
    metavar="ADDRESS",
    help="Listen on HOST:PORT, unix:PATH or fd://N; may be given several times.",
)
@click.option(
    "--stdio",
    is_flag=True,
    help="Serve who started this program, over its standard input and output, and nobody else.",
)
@click.option(
    "--app-dir",
    type=click.Path(exists=True, file_okay=False),
    default=".",
    metavar="DIR",
    help="Look for MODULE here first.",
)
@click.option("--factory", is_flag=True, help="ATTR is a function that makes the service.")
@click.option("--no-patch", is_flag=True, help="Don't monkey-patch the standard library for gevent.")
@_option(
    "--max-message-size",
    type=click.IntRange(min=1),
    default=SERVER_MAX_MESSAGE_SIZE,
    metavar="BYTES",
    help="Close a connection on which a larger message comes.",
)
@_option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    default=MAX_CONCURRENCY,
    metavar="N",
    help="Requests in flight on one connection; further ones wait unread.",
)
@_option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=MAX_CONNECTIONS,
    metavar="N",
    help="Connections at each place; one more is closed at once.",
)
@_option(
    "--max-unsent-size",
    type=click.IntRange(min=1),
    default=MAX_UNSENT_SIZE,
    metavar="BYTES",
    help="Read nothing from a peer that leaves more than this unread.",
)
@_option(
    "--read-timeout",
    type=parameters.seconds,
    default=READ_TIMEOUT,
    metavar="SECONDS",
    help="Close a connection on which the rest of a message doesn't come.",
)
@_option(
    "--write-timeout",
    type=parameters.seconds,
    default=WRITE_TIMEOUT,
    metavar="SECONDS",
    help="Close a connection whose peer doesn't take its answers.",
)
@_option(
    "--idle-timeout",
    type=parameters.seconds,
    metavar="SECONDS",
    help="Close a connection on which nothing happens; never by default.",
)
@_option(
    "--reply-timeout",
    type=parameters.seconds,
    metavar="SECONDS",
    help="Answer a request that takes longer with an error; never by default.",
)
@_option(
    "--socket-mode",
    type=parameters.file_mode,
    metavar="OCTAL",
    help="Permissions of the files of unix sockets: who may write may connect.",
)
@_option(
    "--socket-user",
    metavar="NAME",
    help="Owner of the files of unix sockets.",
)
@_option(
    "--socket-group",
    metavar="NAME",
    help="Group of the files of unix sockets.",
)
@_option(
    "--graceful-timeout",
    type=parameters.seconds,
    default=30.0,
    metavar="SECONDS",
    help="Time for what is in flight when a signal says stop.",
)
@_option(
    "--hide-errors",
    is_flag=True,
    help="Don't tell callers what a method raised; the log has it.",
)
@_option(
    "--no-introspection",
    is_flag=True,
    help="Don't tell callers what methods there are and what they take.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    app: str | None,
    binds: Sequence[Any],
    stdio: bool,
    app_dir: str,
    factory: bool,
    no_patch: bool,
    max_message_size: int,
    max_concurrency: int,
    max_connections: int,
    max_unsent_size: int,
    read_timeout: float,
    write_timeout: float,
    idle_timeout: float | None,
    reply_timeout: float | None,
    socket_mode: int | None,
    socket_user: str | None,
    socket_group: str | None,
    graceful_timeout: float,
    hide_errors: bool,
    no_introspection: bool,
) -> None:
    """Serve the service ATTR of MODULE, or a demo.

    ATTR is a gmprpc.Service, or a gmprpc.Server, of which only the service counts: where it listens, its limits and its
    hooks don't.

    SIGTERM and SIGINT (Ctrl-C) stop gracefully: whatever has been received is still answered. A second SIGINT stops at
    once.

    With --stdio it ends when its standard input does and everything is answered. What a method prints goes to standard
    error then.
    """
    if stdio and ctx.get_parameter_source("binds") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--stdio serves nobody but who started this program: there can be no --bind.")
    if not no_patch:
        # What is imported by now keeps no reference to what is replaced: gevent would warn, and a test would tell.
        monkey.patch_all()
    descriptors = _take_standard_streams() if stdio else None  # Before the application, which may print something.
    service = demo.service if app is None else load_service(app, app_dir=app_dir, factory=factory)
    # After the application, which may have an idea of its own; then this does nothing.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    socket_file: dict[str, Any] = {
        "socket_mode": socket_mode,
        "socket_user": socket_user,
        "socket_group": socket_group,
    }
    limits: dict[str, Any] = {
        "max_message_size": max_message_size,
        "max_concurrency": max_concurrency,
        "max_connections": max_connections,
        "max_unsent_size": max_unsent_size,
        "reply_timeout": reply_timeout,
        "read_timeout": read_timeout,
        "write_timeout": write_timeout,
        "idle_timeout": idle_timeout,
        "hide_errors": hide_errors,
        "introspection": not no_introspection,
    }
    if descriptors is not None:
        _serve_stream(Server(None, service, **limits), stream_over(*descriptors), graceful_timeout)
        return
    servers = [
        Server(
            bind,
            service,
            **(socket_file if isinstance(bind, str) and bind.startswith(UNIX_PREFIX) else {}),
            **limits,
        )
        for bind in binds or [DEFAULT_BIND]
    ]
    _start(servers)
    for server in servers:
        click.echo(f"listening on {format_address(server.address)}", err=True)
    if app is None:
        _suggest(ctx.find_root().command_path, servers[0].address)
    _serve_until(Event(), servers, graceful_timeout)


def _take_standard_streams() -> tuple[int, int]:
    """What to read requests from and to write answers to: descriptors of our own.

    In their old places are nothing to read and standard error, so that neither a method nor a program that it runs
    takes a request away, or gets something between the answers.
    """
    if sys.__stdin__ is None or sys.__stdout__ is None:  # Their numbers may be those of something else by now.
        raise Unreachable("standard input or output is closed: there is nobody to serve.")
    for fd, name in ((_STDIN, "input"), (_STDOUT, "output")):
        if os.isatty(fd):
            raise Misuse(
                f"standard {name} is a terminal: --stdio is for a program that starts this one and speaks "
                "MessagePack-RPC with it. Without it whoever connects is served."
            )
    reading, writing = os.dup(_STDIN), os.dup(_STDOUT)
    nothing = os.open(os.devnull, os.O_RDWR)
    has_stderr = sys.__stderr__ is not None
    if has_stderr and (_is_same(_STDERR, reading) or _is_same(_STDERR, writing)):
        os.dup2(nothing, _STDERR)  # As inetd has it: the log would get between the answers.
    os.dup2(nothing, _STDIN)
    os.dup2(_STDERR if has_stderr else nothing, _STDOUT)
    os.close(nothing)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # As standard error is.
    return reading, writing


def _is_same(fd: int, other: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.fstat(other))


def _serve_stream(server: Server, stream: Stream, graceful_timeout: float) -> None:
    """Serve until the stream ends or a signal comes."""
    over = Event()
    serving = gevent.spawn(server.serve_stream, stream, "stdio")
    serving.rawlink(lambda _: over.set())
    _serve_until(over, [server], graceful_timeout)
    if (error := serving.get()) is not None:
        raise Broken(str(error)) from error


def _start(servers: Sequence[Server]) -> None:
    """Start all or none."""
    for server in servers:
        place = format_address(server.address)
        try:
            server.start()
        except (OSError, LookupError) as exc:
            for started in servers:
                started.close()
            if isinstance(exc, LookupError):
                raise Unreachable(f"can't listen on {place}: {exc.args[0]}.") from exc
            raise Unreachable(f"can't listen on {place}: {exc.strerror or exc}; --bind names another place.") from exc


def _suggest(program: str, address: Any) -> None:
    """Tell what to type next, at another terminal."""
    if isinstance(address, tuple):
        # What stands for every address of this machine is no address to call.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        address = (host, address[1])
    where = shlex.quote(format_address(address))
    methods = ", ".join(sorted(demo.service.methods))
    click.echo(f"This is the demo, with the methods {methods}. Try, at another terminal:", err=True)
    click.echo(f"    {program} call {where} sum 1 2 3", err=True)


def _serve_until(over: Event, servers: Sequence[Server], graceful_timeout: float) -> None:
    """Wait until it is ``over``, or for SIGTERM or SIGINT, then stop all servers together.

    A second SIGINT stops them at once.
    """
    asked = Event()
    asked.rawlink(lambda _: over.set())
    stops = Group()

    def stop(signum: signal.Signals) -> None:
        is_first = not asked.is_set()
        if not is_first and signum != signal.SIGINT:
            return
        in_flight = sum(server.statistics()["in_flight"] for server in servers)
        for server in servers:
            server.close()  # Now, so that whoever reads the log knows that nobody new can connect.
            stops.spawn(server.stop, graceful_timeout if is_first else 0)
        asked.set()
        if is_first:
            logger.info(
                "stopping on %s: %d requests in flight, %g s for them", signum.name, in_flight, graceful_timeout
            )

    for signum in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(signum, stop, signum)
    over.wait()
    stops.join()
