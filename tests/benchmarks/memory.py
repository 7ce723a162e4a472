"""Resident memory for each idle connection: every one has made a call, then nothing happens for a while.

What the process grows by from its first connection, which is gone by then, to the last is divided by their number. What
the kernel holds for a socket doesn't count.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgpack

from .processes import GMPRPC, PEER, SERVERS, BenchmarkError, RunningServer, Server, Workshop
from .report import conditions, heading, lines

# For what is open besides the connections, here and in a server.
_OTHER_FILES = 100

_TIMEOUT = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--connections", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--quiet", type=float, default=3.0, metavar="S", help="seconds; default: 3")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=[GMPRPC.name, PEER.name], metavar="SERVER", help="%(choices)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the conditions and every figure to FILE")
    options = parser.parse_args(arguments)

    connections = connections_allowed(options.connections)
    if connections < 1:
        parser.error("no connection is wanted, or none can be had: see `ulimit -n`")
    servers = [SERVERS[name] for name in options.servers if SERVERS[name].is_installed()]
    missing = [name for name in options.servers if not SERVERS[name].is_installed()]
    figures = {}
    try:
        with Workshop(cores=1) as workshop:
            facts = conditions(workshop, servers)
            print(heading(facts))
            if connections < options.connections:
                print(f"only {connections} connections: no more files may be open (ulimit -n)")
            for name in missing:
                print(f"{name} isn't installed and therefore not measured (`tox -e bench` installs it)")
            print(flush=True)
            for server in servers:
                figures[server.name] = measure(workshop, server, connections, options.quiet)
    except (BenchmarkError, OSError) as exc:
        print(exc, file=sys.stderr)
        return 2

    if options.json is not None:
        facts |= {"connections": connections, "quiet_seconds": options.quiet, "resident_bytes": figures}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    head = ["server", "KiB before", "KiB in use", "KiB quiet", "KiB for each in use", "KiB for each quiet"]
    rows = [
        [
            name,
            *(f"{size / 1024:,.0f}" for size in (sizes["before"], sizes["in_use"], sizes["quiet"])),
            *(f"{(sizes[state] - sizes['before']) / 1024 / connections:.1f}" for state in ("in_use", "quiet")),
        ]
        for name, sizes in figures.items()
    ]
    print(f"{connections:,} connections; in use: at the end of their calls; quiet: {options.quiet:g} s later\n")
    print(lines(head, rows))
    return 0


def measure(workshop: Workshop, server: Server, connections: int, quiet: float) -> dict[str, int]:
    """The resident size of ``server`` without connections, when all have made their call, and after ``quiet`` s."""
    with workshop.start(server) as running:
        return measure_running(running, connections, quiet)


def measure_running(running: RunningServer, connections: int, quiet: float) -> dict[str, int]:
    """The same of a server that has been started already."""
    with ExitStack() as stack:
        # What is imported and set up once, with the first call, isn't a connection's.
        with _connect(running.port) as first:
            _call(first)
        before = running.resident_size()
        for _ in range(connections):
            # One after the other: then no queue of connections that wait to be accepted is too short.
            _call(stack.enter_context(_connect(running.port)))
        in_use = running.resident_size()
        time.sleep(quiet)
        running.check()
        return {"before": before, "in_use": in_use, "quiet": running.resident_size()}


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)


def _call(sock: socket.socket) -> None:
    sock.sendall(msgpack.packb([0, 1, "echo", ["twelve bytes"]]))
    unpacker = msgpack.Unpacker()
    while (answer := next(unpacker, None)) is None:
        data = sock.recv(4096)
        if not data:
            raise BenchmarkError("the server closed a connection")
        unpacker.feed(data)
    if answer != [1, 1, None, "twelve bytes"]:
        raise BenchmarkError(f"wrong answer: {answer!r}")


def connections_allowed(wanted: int) -> int:
    """How many of ``wanted`` the limit on open files allows, which is raised for this process and its servers."""
    needed = wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed - _OTHER_FILES


if __name__ == "__main__":
    sys.exit(main())
