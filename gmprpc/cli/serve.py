"""``serve``: listen, and run until a signal says stop."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import click
import gevent
from click.core import ParameterSource
from gevent import monkey
from gevent.event import Event

from gmprpc import stacks
from gmprpc.pipes import stream_over
from gmprpc.server import Server
from gmprpc.service import Service
from gmprpc.streams import Stream
from gmprpc.transport import format_address

from . import certificates, demo, limits, logs, metrics, otel, parameters, peers, stopping
from .exits import Broken, Unreachable
from .loading import load_service, split
from .making import make_server
from .parameters import option
from .running import serve_until, start
from .stdio import take_standard_streams

#: The port of AnyEvent::MPRPC's examples.
DEFAULT_BIND = "127.0.0.1:4423"


@click.command(context_settings={"show_default": True})
@click.argument("app", metavar="[MODULE:ATTR]", required=False)
@option(
    "-b",
    "--bind",
    "binds",
    type=parameters.bind,
    multiple=True,
    show_default=DEFAULT_BIND,
    metavar="ADDRESS",
    help="Listen on HOST:PORT, unix:PATH or fd://N; may be given several times.",
)
@option(
    "-w",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Serve in so many processes, which gunicorn runs; by default in this one.",
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
@stopping.options
@limits.options
@peers.options
@certificates.options
@logs.options
@otel.options
@metrics.options
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    app: str | None,
    binds: Sequence[Any],
    workers: int | None,
    stdio: bool,
    app_dir: str,
    factory: bool,
    no_patch: bool,
    **settings: Any,
) -> None:
    """Serve the service ATTR of MODULE, or a demo.

    ATTR is a gmprpc.Service, or a gmprpc.Server, of which the service counts, the hooks, and its ssl_context unless
    there is a --certfile: where it listens and its limits don't.

    SIGTERM and SIGINT (Ctrl-C) stop gracefully: whatever has been received is still answered. SIGINT doesn't wait for
    the delay, and a second one stops at once. SIGHUP reads the certificate again, if there is one.
    SIGUSR1 prints to standard error what each greenlet and thread is doing.

    With --workers gunicorn runs the processes, and the signals are its own: SIGTERM stops gracefully, SIGINT and
    SIGQUIT at once, SIGHUP has new processes load MODULE anew while the old ones stop gracefully, SIGTTIN and SIGTTOU
    make them more or fewer. Its other settings come from the environment variable GUNICORN_CMD_ARGS, for example
    "--max-requests 100000 --timeout 60" (a process whose handlers block it for --timeout seconds is killed).

    With --stdio it ends when its standard input does and everything is answered. What a method prints goes to standard
    error then.
    """
    if stdio and ctx.get_parameter_source("binds") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--stdio serves nobody but who started this program: there can be no --bind.")
    if stdio and ctx.get_parameter_source("workers") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--stdio serves nobody but who started this program: there can be no --workers.")
    if stdio and ctx.get_parameter_source("certfile") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--stdio serves over pipes and the like: there can be no --certfile.")
    if not stdio:
        certificates.keywords(settings)  # What can't be used is said now, once, and not by each worker.
    load = partial(_load, app, app_dir, factory, settings)
    signals = stopping.StopSignals()
    if workers is not None and not stdio:
        if app is not None:
            split(app)  # Before there is any process that would fail.
        with signals.heeded():  # Until gunicorn heeds them.
            _workers().serve_in_workers(
                workers,
                lambda: make_server(load(), settings),
                binds,
                settings,
                default_bind=DEFAULT_BIND,
                patches=not no_patch,
                on_listening=_tell,
            )
    with signals.heeded():  # The import of the application may take its time.
        certificates.outlive_hangup(settings)
        if not no_patch:
            # What is imported by now keeps no reference to what is replaced: gevent would warn, and a test would tell.
            monkey.patch_all()
        descriptors = take_standard_streams() if stdio else None  # Before the application, which may print something.
        stacks.dump_on_signal()  # The application may have another use for the signal.
        service = load()
    signals.leave_to_loop()
    if descriptors is not None:
        server = make_server(service, settings)
        metrics.tell(ctx.with_resource(metrics.served(settings, [server])))
        logs.watch(settings)
        _serve_stream(server, stream_over(*descriptors), signals)
        return
    servers = [make_server(service, settings, bind) for bind in binds or [DEFAULT_BIND]]
    certificates.reload_on_hangup(servers, settings)
    admin = ctx.with_resource(metrics.served(settings, servers))
    start(servers)
    logs.watch(settings)  # Not before: to import what was asked for may take longer than a method should.
    for server in servers:
        _tell(server.address)
    metrics.tell(admin)
    if app is None:
        _suggest(ctx.find_root().command_path, servers[0].address)
    serve_until(Event(), servers, signals)


def _workers() -> ModuleType:
    """The module that needs an extra."""
    try:
        from . import workers
    except ModuleNotFoundError as exc:
        if exc.name != "gunicorn":
            raise
        raise Unreachable("--workers needs gunicorn: pip install 'gmprpc[gunicorn]'.") from exc
    return workers


def _load(app: str | None, app_dir: str, factory: bool, settings: Mapping[str, Any]) -> Service | Server:
    service = demo.service if app is None else load_service(app, app_dir=app_dir, factory=factory)
    # After the application, which may have an idea of its own; then this does nothing.
    logs.configure(settings)
    return service


def _tell(address: Any) -> None:
    click.echo(f"listening on {format_address(address)}", err=True)


def _serve_stream(server: Server, stream: Stream, signals: stopping.StopSignals) -> None:
    """Serve until the stream ends or a signal comes."""
    over = Event()
    serving = gevent.spawn(server.serve_stream, stream, "stdio")
    serving.rawlink(lambda _: over.set())
    serve_until(over, [server], signals)
    if (error := serving.get()) is not None:
        raise Broken(str(error)) from error


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
