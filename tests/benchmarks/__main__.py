"""Calls per second of gmprpc and its peers in five shapes of load, in one run, as ratios.

Every server is a process of its own and starts anew for each measurement; a closed-loop load generator in C checks each
answer. Server and load generator share one core unless told otherwise, since waking another core costs more than a
call. Put `taskset -c N` in front to choose the core.

Servers have echoed one message of 300 kB before they are measured, as one in use will have: before that, glibc makes
some of them take up to twice as long for every small call, by luck. `--fresh` shows it.

"floor" is no server but what gevent, msgpack and the kernel cost by themselves. Ratios pair measurements of one round.
The exit status is 0 whatever the ratios are, 1 if a measurement failed, an answer was wrong or gmprpc lost a call, and
2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .processes import C_ECHO, FLOOR, GMPRPC, PEER, SERVERS, BenchmarkError, Server, Shape, Workshop
from .report import Run, conditions, heading, self_check, table

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(1, 1, bar=1.6),
        Shape(1, 64, bar=5),
        Shape(50, 1),
        Shape(50, 16, bar=4),
        Shape(4, 1, payload_size=64 * 1024),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=_positive(int), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=_positive(float), default=1.0, metavar="S", help="of each; default: 1")
    parser.add_argument("--cores", type=int, choices=(1, 2), default=1, help="1: shared (default); 2: a core each")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help=" ".join(SHAPES)
    )
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=SERVERS,
        default=[FLOOR.name, GMPRPC.name, PEER.name],
        metavar="SERVER",
        help="%(choices)s; default: all but c-echo",
    )
    parser.add_argument("--fresh", action="store_true", help="measure processes that have never had a large message")
    parser.add_argument("--self-check", action="store_true", help="show that the load generator outruns the servers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the conditions and every run to FILE")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")

    names = {*options.servers, C_ECHO.name} if options.self_check else {*options.servers}
    chosen = [server for name, server in SERVERS.items() if name in names]
    servers = [server for server in chosen if server.is_installed()]
    missing = [server for server in chosen if server not in servers]
    shapes = [shape for name, shape in SHAPES.items() if name in options.shapes]
    try:
        with Workshop(options.cores) as workshop:
            facts = conditions(workshop, servers)
            print(heading(facts))
            state = "fresh from the start" if options.fresh else "in use: each has had one large message before"
            print(f"processes {state}")
            print(f"{options.rounds} rounds of {options.seconds:g} s; medians; ratios within a round, with min-max")
            for server in missing:
                print(f"{server.name} isn't installed and therefore not measured (`tox -e bench` installs it)")
            print(flush=True)
            runs = measure(workshop, servers, shapes, options.rounds, options.seconds, options.fresh)
    except BenchmarkError as exc:
        print(exc, file=sys.stderr)
        return 2

    if options.json is not None:
        facts |= {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "fresh": options.fresh,
            "not_installed": [server.name for server in missing],
            "runs": [run.as_json() for run in runs],
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(runs, shapes, servers, on_one_core=options.cores == 1))
    if options.cores == 2 and any(shape.bar for shape in shapes):
        print("\nThe bars are meant for one shared core.")
    if options.self_check:
        print(f"\nThe load generator by itself:\n\n{self_check(runs, shapes, servers)}")
    for failure in dict.fromkeys(run.failure for run in runs if run.failure is not None):
        print(f"\n{failure}", file=sys.stderr)
    return 1 if any(run.is_failure for run in runs) else 0


def measure(
    workshop: Workshop,
    servers: Sequence[Server],
    shapes: Sequence[Shape],
    rounds: int,
    seconds: float,
    fresh: bool,
) -> list[Run]:
    """Every server in every shape, in turn, so that what the machine does meanwhile strikes all of them."""
    workshop.load_generator  # noqa: B018  It is built now: without it there is nothing to do.
    runs = []
    for number in range(1, rounds + 1):
        first = number % len(servers)  # Nobody always comes first.
        for shape in shapes:
            for server in [*servers[first:], *servers[:first]]:
                _say(f"round {number} of {rounds}: {shape.name} {server.name}")
                try:
                    run = Run(server, shape, number, workshop.measure(server, shape, seconds, fresh=fresh))
                except BenchmarkError as exc:
                    run = Run(server, shape, number, failure=str(exc))
                runs.append(run)
    _say("")
    return runs


def _say(text: str) -> None:
    """Show how far it is, to whoever watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _positive(number: type[int] | type[float]) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise ValueError
        return value

    positive.__name__ = f"positive {number.__name__}"
    return positive


if __name__ == "__main__":
    sys.exit(main())
