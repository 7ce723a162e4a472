"""``bench``: the same call, again and again, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click

from gmprpc.bench import crew
from gmprpc.bench.plan import Plan
from gmprpc.bench.tally import Ending
from gmprpc.client import Client
from gmprpc.exceptions import no_such_method
from gmprpc.protocol import Encoder
from gmprpc.transport import format_address

from . import parameters, trust
from .asking import OPTIONS_FIRST, asking, unknown_method
from .exits import AnsweredError, Broken, ExitCode, TimedOut, Unreachable, call_errors, printable
from .request import FORMS, request_with, values_of

# For how long to measure, and to warm up before that; picked arbitrarily. Where the number of calls is given there
# shouldn't be any others.
_DURATION = 10.0
_WARM_UP = 1.0
# How many calls may be in flight on a connection where not the answers make the next ones begin. Picked arbitrarily:
# less than a server of ours lets be at work.
_MAX_DEPTH = 100


def _positive(text: Any) -> float:
    number = parameters.seconds(text)
    if not number:
        raise click.BadParameter("0 is too short.")
    return number


@click.command(context_settings=OPTIONS_FIRST, epilog=FORMS)
@click.option(
    "-c",
    "--connections",
    type=click.IntRange(min=1),
    metavar="N",
    help="Connections, of all processes together.  [default: one for each process]",
)
@click.option(
    "-d",
    "--depth",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Calls in flight on each connection; with --rate, at most.  [default: 1; with --rate {_MAX_DEPTH}]",
)
@click.option(
    "--rate",
    type=parameters.rate,
    metavar="N",
    help="Begin so many calls a second, whether the server keeps up or not; latencies count from when a call should "
    "have left.",
)
@click.option("-n", "--calls", type=click.IntRange(min=1), metavar="N", help="End after so many calls.")
@click.option(
    "--duration", type=_positive, metavar="SECONDS", help=f"End after so long.  [default: {_DURATION:g}, without -n]"
)
@click.option(
    "--warm-up",
    type=parameters.seconds,
    metavar="SECONDS",
    help=f"How long calls are made before they count.  [default: {_WARM_UP:g}; with -n 0]",
)
@click.option(
    "-p", "--processes", type=click.IntRange(min=1), default=1, metavar="N", help="Make the load from so many."
)
@click.option(
    "--timeout",
    type=_positive,
    default=10.0,
    metavar="SECONDS",
    help="Time for the last answers, and with -n for any answer at all.",
)
@click.option(
    "--fail-if",
    "fail_ifs",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 if it is so: 'p99>50ms', 'errors>0', 'errors>0.1%', 'rate<10000'; also min, mean, max, calls. "
    "May be given several times.",
)
@click.option("--output", type=click.Choice(["text", "json"]), default="text", help="How to print what came of it.")
@trust.options
@request_with("--data")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    address: Any,
    method: str,
    params: Sequence[str],
    data: str | None,
    connections: int | None,
    depth: int | None,
    rate: float | None,
    calls: int | None,
    duration: float | None,
    warm_up: float | None,
    processes: int,
    timeout: float,
    connect_timeout: float,
    fail_ifs: Sequence[str],
    output: str,
    **settings: Any,
) -> None:
    """Call METHOD again and again, and tell how many calls a second there were and how long they took.

    Each connection makes its next call when one is answered (a closed loop), or calls are made at a --rate (an open
    loop). Ctrl-C ends it early and shows what was. Rates and latencies are those of calls that were answered with a
    result.

    ADDRESS is HOST:PORT or unix:PATH. Options come before it; everything after METHOD is a parameter, -1 too.
    """
    try:
        from gmprpc.bench.conditions import Condition
        from gmprpc.bench.figures import Figures

        from . import bench_output
    except ModuleNotFoundError as exc:
        raise Unreachable(f"bench needs {exc.name}: pip install 'gmprpc[bench]'") from exc

    if calls is not None and duration is not None:
        raise click.UsageError("Give --calls or --duration: one of them says when to end.")
    try:
        conditions = [Condition.parse(text) for text in fail_ifs]
    except ValueError as exc:
        raise click.BadParameter(f"{exc}.", param_hint="--fail-if") from exc
    connections = processes if connections is None else connections
    if min(connections, calls or connections) < processes:
        raise click.UsageError("Each process needs a connection and a call of its own.")
    values = values_of(method, params, data)
    how_to_connect: dict[str, Any] = {"connect_timeout": connect_timeout, **trust.keywords(settings, address)}
    client = Client(address, **how_to_connect)
    plan = Plan(
        open_stream=partial(client.open_stream, lambda _: None),
        method=method,
        body=Encoder().body(method, values),
        connections=connections,
        depth=depth or (1 if rate is None else _MAX_DEPTH),
        rate=rate,
        warm_up=(_WARM_UP if calls is None else 0.0) if warm_up is None else warm_up,
        calls=calls,
        duration=duration or (_DURATION if calls is None else None),
        timeout=timeout,
    )
    try:
        with call_errors(), bench_output.progress(plan) as on_progress:
            figures = Figures(crew.run(plan, processes, on_progress))
    except crew.WorkerDied as exc:
        raise Broken(f"{exc}.") from exc
    if figures.ending is Ending.UNKNOWN_METHOD:
        raise _unknown_method(method, address, how_to_connect)

    show = bench_output.json_of if output == "json" else bench_output.text_of
    failed = [condition for condition in conditions if condition.is_met(figures)]
    click.echo(show(format_address(address), plan, processes, figures, failed).encode())  # Whatever the locale.
    for condition in failed:
        click.echo(f"failed: {condition.text} ({bench_output.shown_value(condition, figures)})", err=True)
    match figures.ending:
        case _ if failed:
            ctx.exit(ExitCode.ANSWERED_ERROR)
        case Ending.LOST:
            reasons = ", ".join(printable(reason, but="") for reason in figures.lost)
            raise Broken(f"all connections were lost: {reasons}")
        case Ending.STALLED:
            raise TimedOut(f"calls were left without an answer for {timeout:g} s; --timeout gives them longer")
        case Ending.INTERRUPTED:
            ctx.exit(ExitCode.INTERRUPTED)
        case _ if figures.errors and not figures.calls:
            raise AnsweredError(f"no call has succeeded: {printable(next(iter(figures.errors)), but='')}")


def _unknown_method(method: str, address: Any, how_to_connect: Mapping[str, Any]) -> AnsweredError:
    """What to say to whoever has typed ``method``."""
    try:
        with asking(address, **how_to_connect) as client:
            client.connect()
            return unknown_method(client, method)
    except click.ClickException:  # It has gone meanwhile.
        return AnsweredError(printable(no_such_method(method)))
