"""Have clients call through every fault there is, and say whether anything is lost or left behind.

A process of clients, greenlets and two threads that share one client, calls servers that are processes of their own,
through a proxy that cuts, resets, half-closes, stalls, delays and garbles at random; now and then a server is killed,
or restarted. Each call's end and each execution is counted. The exit status is 0 if all bars are kept to, 1 if one is
missed, and 2 if the soak couldn't be carried through.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not sys.platform.startswith("linux"):
    print("the soak needs Linux: what it measures is read from /proc")
    sys.exit(0)

import gevent

from tests.benchmarks.machine import machine, machine_line, own_versions, versions_line
from tests.counting import CountingServer, Ledger
from tests.helpers import wait_until
from tests.programs import Program
from tests.proxy import Proxy
from tests.siege import report
from tests.siege.report import MIB, Row, at_most, exactly, reported

from .programs.client import COUNTED, QUARTERS
from .verdict import verdict
from .weather import Weather

_CLIENT = Path(__file__).parent / "programs" / "client.py"

_CALLS = 2_000_000
_CALLS_OF_SHORT = 60_000
_CALLS_TO_SET_UP = 200_000  # Beyond them no more is set up.

# The name of each soak, over how many servers it goes, and which share of the calls it makes.
_SOAKS = (("client", 1, 0.7), ("balancer", 2, 0.3))

# Seconds in which some call ends, whatever happens: more than any call has.
_PATIENCE = 60.0

# Seconds in which everything is quiet when nobody calls any more.
_QUIET = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, metavar="N", help=f"how many calls; default: {_CALLS:,}")
    parser.add_argument("--short", action="store_true", help=f"make {_CALLS_OF_SHORT:,} calls")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same faults again, as far as time allows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the conditions and every figure to FILE")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")
    calls = options.calls or (_CALLS_OF_SHORT if options.short else _CALLS)
    seed = random.randrange(2**32) if options.seed is None else options.seed

    facts = {"machine": machine(), "versions": own_versions(), "calls": calls, "seed": seed}
    print(f"{machine_line(machine())}\n{versions_line(own_versions())}\nseed {seed}")
    print(f"\n{report.heading()}", flush=True)
    rows = []
    try:
        for name, servers, share in _SOAKS:
            for row in _timed(soak(servers, int(calls * share), seed)):
                rows.append(row.as_json(name))
                print(row.line(name), flush=True)
    except (SoakError, AssertionError) as exc:  # The latter is of a program that doesn't do what it should.
        print(exc, file=sys.stderr)
        return 2
    missed = [row for row in rows if not row["is_passed"]]
    print(f"\n{len(missed)} bars missed" if missed else "\nall bars kept to")
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 1 if missed else 0


class SoakError(Exception):
    """The soak couldn't be carried through."""


def _timed(rows: Iterator[Row]) -> Iterator[Row]:
    begin = time.monotonic()
    yield from rows
    yield reported("the soak took", time.monotonic() - begin, "s")


def soak(servers_number: int, calls: int, seed: int) -> Iterator[Row]:
    """The rows of one soak."""
    source = random.Random(seed)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gmprpc-soak-")))
        ends = stack.enter_context(Ledger(directory / "ends", calls))
        servers = []
        for number in range(servers_number):
            (directory / str(number)).mkdir()
            servers.append(stack.enter_context(CountingServer(directory / str(number), calls)))
        proxies = [stack.enter_context(Proxy(server.address)) for server in servers]
        weather = Weather(servers, proxies, source)
        ports = [str(proxy.address[1]) for proxy in proxies]
        log = directory / "log"
        options = ["--calls", str(calls), "--seed", str(seed), "--log", str(log)]
        client = stack.enter_context(Program(sys.executable, _CLIENT, str(ends.path), *ports, *options))
        found = []
        for quarter in range(QUARTERS):
            with weather.storm():
                said = _said_by(client)
            os.kill(client.pid, signal.SIGUSR1)
            found.append(_said_by(client))
            size, blocks = found[-1]["census"]["resident"], found[-1]["census"]["blocks"]
            yield reported(f"resident at the end of quarter {quarter + 1}", size, "MiB", blocks=blocks, **said)
            yield exactly("calls pending then", found[-1]["statistics"]["pending"], 0)
            yield exactly("calls at work in servers then", _at_work(servers), 0)
            os.kill(client.pid, signal.SIGUSR1)
        last = _said_by(client)
        if status := client.wait():
            raise SoakError(f"the client ended with status {status}")
        yield from verdict(ends.snapshot(), [server.ledger.snapshot() for server in servers], last["first_fault"])
        for who, text in [("the clients", log.read_text()), *(("a server", server.log()) for server in servers)]:
            yield exactly(f"tracebacks in the log of {who}", text.count("Traceback"), 0, log=text[-2000:])
        yield exactly("pending calls that were given a second outcome", last["second_ends"], 0)
        yield from _what_is_held(found, calls, len(proxies))
        yield exactly("calls pending when the client is closed", last["statistics"]["pending"], 0)
        yield exactly("greenlets when the client is closed", last["census"]["greenlets"], 0)
        for name, times in sorted(weather.counts.items()):
            yield reported(f"fault: {name}", times)
        yield reported("connections", sum(proxy.count for proxy in proxies))


def _what_is_held(found: list[dict[str, Any]], calls: int, servers: int) -> Iterator[Row]:
    """Rows about what the process of the clients holds at the end of each quarter."""
    for name in COUNTED:
        counts = [each["census"][name] for each in found]
        # Each server may be connected at one moment and not at another: a descriptor and a greenlet.
        bar = counts[0] if name == "threads" else counts[0] + servers
        yield at_most(f"{name} at the end of a quarter, at most, the first having {counts[0]}", max(counts), bar)
    # The first half is for what is set up once; with few calls that takes longer. Of what is free the allocator keeps
    # now more, now less, by a MiB.
    size_bar = MIB if calls >= _CALLS_TO_SET_UP else 4 * MIB
    for name, what, bar, unit in (
        ("resident", "resident memory", size_bar, "KiB"),
        ("blocks", "blocks of memory", 2000, ""),
    ):
        values = [each["census"][name] for each in found]
        growth = values[-1] - max(values[:2])
        yield at_most(
            f"growth in {what} from the first half's most to the last quarter's end", growth, bar, unit, values=values
        )


def _at_work(servers: list[CountingServer]) -> int:
    """How many calls the servers still have, at the latest after a while."""
    with gevent.Timeout(_QUIET, False):  # type: ignore[arg-type]  # The stubs don't know of False.
        wait_until(lambda: sum(server.statistics()["in_flight"] for server in servers) == 0)
    return sum(server.statistics()["in_flight"] for server in servers)


def _said_by(client: Program) -> dict[str, Any]:
    """What the process of the clients says next, but for how far it is."""
    so_far, since = -1, time.monotonic()
    while True:
        line = client.line()
        if not line.startswith("{"):
            raise SoakError("\n".join(["the client failed:", line, *client.lines()]))
        said: dict[str, Any] = json.loads(line)
        if "so far" not in said:
            return said
        if said["so far"] > so_far:
            so_far, since = said["so far"], time.monotonic()
        elif time.monotonic() > since + _PATIENCE:
            raise SoakError(f"no call has ended for {_PATIENCE:g} s")


if __name__ == "__main__":
    sys.exit(main())
