"""Measure gmprpc beside its peers and say whether the figures to reach are reached: one command, one JSON, one table.

Every peer gets a virtual environment of its own, made when it is missing. Who can't be installed or started is named
with the reason. Servers are processes of their own and start anew for each measurement; a closed-loop load generator in
C checks each answer. Server and load generator first share one core, since waking another core costs more than a call,
and then have a core each. Participants take turns; put `taskset -c N,M` in front to choose the cores.

Servers have echoed one message of 300 kB before they are measured, as one in use will have: before that, glibc makes
some of them take up to twice as long for every small call, by luck. `--fresh` shows it.

"floor" is no server but what gevent, msgpack and the kernel cost by themselves; "c-echo" only copies bytes, to show
that the load generator outruns every server. The exit status is 0 whatever the ratios are and however peers fail, 1 if
gmprpc failed, answered wrongly or lost a call, and 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import clients, growth, memory, rounds
from .environments import Environments
from .growth import BARE_SLEEP
from .machine import machine
from .participants import C_ECHO, GMPRPC, PARTICIPANTS, Participant
from .processes import ROOT, BenchmarkError, Workshop
from .report import report
from .results import fault
from .rounds import SHAPES, Plan

KINDS = ("server", "client", "growth", "idle")

# With --short: proves that everything works, and says nothing about speed.
_SHORT = Plan(rounds=1, seconds=0.05)

_GROWTH_ROUNDS = 3

_IDLE_COUNTS = (1_000, 10_000)
_IDLE_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")
    available = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else 1
    cores = options.cores or [count for count in (1, 2) if count <= available]
    basis = _SHORT if options.short else Plan()
    plan = Plan(options.rounds or basis.rounds, options.seconds or basis.seconds, tuple(cores), options.fresh)
    try:
        with Workshop(Environments(options.environments)) as workshop:
            document = measure(workshop, [PARTICIPANTS[name] for name in options.subjects], plan, options)
    except BenchmarkError as exc:
        print(exc, file=sys.stderr)
        return 2

    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(report(document))
    own = [run for run in document["runs"] if run["subject"] == GMPRPC.name]
    faults = list(dict.fromkeys(filter(None, map(fault, own))))
    for text in faults:
        print(f"\ngmprpc: {text}", file=sys.stderr)
    if not any("failure" not in run for run in document["runs"]):
        print("\nnothing could be measured", file=sys.stderr)
        return 2
    return 1 if faults or document["subjects"].get(GMPRPC.name, {}).get("absence") else 0


def measure(
    workshop: Workshop, participants: Sequence[Participant], plan: Plan, options: argparse.Namespace
) -> dict[str, Any]:
    """The JSON: everything that ``options`` ask for, under the conditions that it was found."""
    document: dict[str, Any] = {
        "machine": machine(),
        "options": {
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "cores": list(plan.cores),
            "pinned": {
                cores: {"server": workshop.server_core, "other": workshop.other_core(cores)} for cores in plan.cores
            },
            "is_fresh": plan.is_fresh,
            "is_short": options.short,
            "kinds": list(options.kinds),
        },
    }
    workshop.load_generator  # noqa: B018  It is built now: without it there is nothing to do.
    workshop.environments.prepare(participants, lambda text: print(text, file=sys.stderr, flush=True))
    subjects = {participant.name: _subject(workshop, participant) for participant in participants}
    present = [participant for participant in participants if subjects[participant.name]["absence"] is None]
    runs = list(_runs(workshop, present, plan, options)) if present else []
    _say("")
    return {**document, "subjects": subjects, "runs": runs}


def _subject(workshop: Workshop, participant: Participant) -> dict[str, Any]:
    """What the JSON says of a participant, after a rehearsal: who can't start now needn't be tried in every round."""
    subject: dict[str, Any] = {
        "versions": {},
        "is_peer": participant.is_peer,
        "dialect": participant.dialect,
        "remark": participant.loses_pipelined_calls,
        "absence": None,
    }
    try:
        subject["versions"] = workshop.versions(participant)
        workshop.start(participant).end()
    except BenchmarkError as exc:
        subject["absence"] = str(exc)
    return subject


def _runs(
    workshop: Workshop, participants: Sequence[Participant], plan: Plan, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    if "server" in options.kinds:
        yield from rounds.measure(workshop, participants, [SHAPES[name] for name in options.shapes], plan, _say)
    names = {participant.name for participant in participants}
    if "client" in options.kinds and (subjects := [name for name in clients.SUBJECTS if name in names]):
        yield from clients.measure(workshop, subjects, clients.MODES, plan, _say)
    if "growth" in options.kinds and (subjects := [name for name in growth.SUBJECTS if name in {*names, BARE_SLEEP}]):
        # What grows shows in a few rounds, and needs only one arrangement. But there is a bar for handlers that block.
        few = replace(plan, rounds=min(plan.rounds, _GROWTH_ROUNDS), cores=plan.cores[:1])
        for axis in growth.AXES.values():
            rounds_of_axis = plan.rounds if axis.name == "blocking" else few.rounds
            yield from growth.measure(workshop, subjects, [axis], replace(few, rounds=rounds_of_axis), _say)
    if "idle" in options.kinds:
        counts, quiet = ((10,), 0.05) if options.short else (_IDLE_COUNTS, _IDLE_SECONDS)
        # What c-echo has for a connection is large so that it can be quick.
        servers = [participant for participant in participants if participant is not C_ECHO]
        yield from memory.measure(workshop, servers, counts, quiet, _say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="%(choices)s; default: all"
    )
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=PARTICIPANTS,
        default=list(PARTICIPANTS),
        metavar="NAME",
        help="%(choices)s; default: all",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        metavar="SHAPE",
        help="connections x calls in flight on each: %(choices)s; default: all",
    )
    parser.add_argument("--rounds", type=_positive(int), metavar="N", help=f"default: {Plan().rounds}")
    parser.add_argument("--seconds", type=_positive(float), metavar="S", help=f"of each run; default: {Plan().seconds}")
    parser.add_argument(
        "--cores",
        nargs="+",
        type=int,
        choices=(1, 2),
        metavar="N",
        help="1: one core for both; 2: a core each; default: one after the other, where there are two",
    )
    parser.add_argument("--short", action="store_true", help="everything once, for a blink: to see that it works")
    parser.add_argument("--fresh", action="store_true", help="measure processes that have never had a large message")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".tox" / ".peers",
        metavar="DIR",
        help="where the peers' virtual environments are, and stay for next time; default: .tox/.peers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the conditions and every run to FILE")
    return parser


def _say(text: str) -> None:
    """Show how far it is, to whoever watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _positive(number: type[int] | type[float]) -> Callable[[str], Any]:
    def positive(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise ValueError
        return value

    positive.__name__ = f"positive {number.__name__}"
    return positive


if __name__ == "__main__":
    sys.exit(main())
