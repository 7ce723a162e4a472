"""Lay siege to a server and say how it fares: each trial prints figures, and the bars that they have to keep to.

Server and besiegers have a core each, where there are two. In every trial but "signals" a bystander, a process of its
own, keeps calling: all its answers have to be right, and 99 of 100 have to come within 50 ms. The exit status is 0 if
all bars are kept to, 1 if one is missed, and 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not sys.platform.startswith("linux"):
    print("the siege needs Linux: what it measures is read from /proc")
    sys.exit(0)

import gevent

from tests.benchmarks.machine import machine, machine_line, own_versions, versions_line
from tests.benchmarks.memory import connections_allowed
from tests.benchmarks.processes import BenchmarkError, Workshop, on_core

from . import report
from .field import Field
from .trials import TRIALS

# Seconds for a trial: the soak's million calls take the longest.
_DEADLINE = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.siege", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"trials; default: all of {' '.join(TRIALS)}")
    parser.add_argument("--short", action="store_true", help="with smaller numbers where they take long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the conditions and every figure to FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(TRIALS):
        parser.error(f"there is no trial {', '.join(sorted(unknown))}; there are {' '.join(TRIALS)}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")

    connections_allowed(10_000)  # Raises the limit on open files for servers, too.
    rows = []
    try:
        with (
            Workshop() as workshop,
            tempfile.TemporaryDirectory(prefix="gmprpc-siege-") as directory,
            on_core(workshop.other_core(min(2, len(workshop.cores)))),
        ):
            facts = {
                "machine": machine(),
                "versions": own_versions(),
                "cores": {"server": workshop.server_core, "besiegers": workshop.cores[:2][-1]},
            }
            print(f"{machine_line(facts['machine'])}\n{versions_line(facts['versions'])}")
            print(f"\n{report.heading()}", flush=True)
            field = Field(workshop, Path(directory), is_short=options.short)
            for name in options.names or TRIALS:
                for row in _outcome(name, field):
                    rows.append(row.as_json(name))
                    print(row.line(name), flush=True)
    except BenchmarkError as exc:
        print(exc, file=sys.stderr)
        return 2

    missed = [row for row in rows if not row["is_passed"]]
    print(f"\n{len(missed)} bars missed" if missed else "\nall bars kept to")
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "is_short": options.short, "rows": rows}, indent=1) + "\n")
    return 1 if missed else 0


def _outcome(name: str, field: Field) -> list[report.Row]:
    """The rows of a trial, up to where it failed."""
    rows = []
    begin = time.monotonic()
    try:
        with gevent.Timeout(_DEADLINE):
            rows += TRIALS[name](field)
    except (Exception, gevent.Timeout) as exc:
        rows.append(report.failure("the trial", f"{type(exc).__name__}: {exc}"))
    return [*rows, report.reported("the trial took", time.monotonic() - begin, "s")]


if __name__ == "__main__":
    sys.exit(main())
