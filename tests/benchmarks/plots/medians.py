"""A benchmark's JSON, summed up over its rounds: for each participant a figure, or what kept it from having one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.benchmarks.bars import GMPRPC
from tests.benchmarks.results import Results, Run

from .words import short

# In the order in which they are worth telling. Who leaves calls lying has less to do: its rate can't be compared.
_FAULTS = {
    "errors": "wrong answers",
    "unanswered": "loses calls",
    "lost_connections": "drops connections",
    "silent_connections": "starves connections",
}


@dataclass(frozen=True)
class Figure:
    """What several rounds have measured."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return short(self.median)


#: A figure, or words in its place.
Cell = Figure | str


class Summary(Results):
    """A benchmark's JSON, and what plots want to know of it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(document)
        names = [GMPRPC, *self.peers] if GMPRPC in self.subjects else self.peers
        #: gmprpc, who speaks its protocol, and the others.
        self.participants = sorted(names, key=lambda name: (name != GMPRPC, not self.speaks_msgpack_rpc(name)))

    def speaks_msgpack_rpc(self, name: str) -> bool:
        """Whether ``name`` does what gmprpc does, and not something like it."""
        return bool(self.subjects[name]["dialect"] == "msgpack-rpc")

    def runs_of_participants(self, kind: str, limits: Sequence[str] = (), **conditions: Any) -> list[Run]:
        """The runs of all participants under ``conditions``, those that failed too, and of ``limits``, who are none."""
        subjects = {*self.participants, *limits}
        return [run for run in self.runs(kind, **conditions) if run["subject"] in subjects]

    def measured(self, runs: Sequence[Run]) -> list[str]:
        """Who appears in ``runs``: participants, then others."""
        subjects = dict.fromkeys(run["subject"] for run in runs)
        others = [name for name in subjects if name not in self.participants]
        return [*(name for name in self.participants if name in subjects), *sorted(others)]

    def cells(self, runs: Sequence[Run], figure: Callable[[Run], float]) -> dict[str, Cell]:
        """What ``runs`` say of everybody in them."""
        return {name: _cell([run for run in runs if run["subject"] == name], figure) for name in self.measured(runs)}

    def remarks(self, runs: Sequence[Run]) -> list[str]:
        """What has to be said below a plot of ``runs``: who isn't in it, and where its figures come from."""
        names = self.measured(runs)
        remarks = []
        if self.options.get("is_short"):
            remarks.append("It was a short run, to see that everything works: it says nothing about speed.")
        if missing := [name for name in self.participants if name not in names]:
            remarks.append(f"Not measured here: {', '.join(missing)}.")
        pythons = {name: self._versions(name).get("CPython") for name in self.participants}
        remarks += [
            f"{name} runs on CPython {pythons[name]}."
            for name in names
            if pythons.get(name) and pythons[name] != pythons.get(GMPRPC)
        ]
        rounds = len({run["round"] for run in runs if "round" in run})
        facts = [f"Medians of {rounds} rounds" if rounds > 1 else "A single round"]
        facts += [str(self.machine[key]) for key in ("processor", "system") if self.machine.get(key)]
        facts += [f"{package} {version}" for package, version in self._versions(GMPRPC).items()]
        return [*remarks, f"{', '.join(facts)}."]

    def _versions(self, name: str) -> dict[str, str]:
        return self.subjects.get(name, {}).get("versions") or {}


def is_measured(cells: Iterable[Cell]) -> bool:
    """Whether there is a figure among ``cells``."""
    return any(isinstance(cell, Figure) for cell in cells)


def fault(cell: Cell) -> str | None:
    """The words that stand in the place of a figure, if there are any."""
    return cell if isinstance(cell, str) else None


def _cell(runs: Sequence[Run], figure: Callable[[Run], float]) -> Cell:
    """``figure`` over all rounds, or what went wrong in any of them."""
    failures = [run["failure"] for run in runs if "failure" in run]
    if failures:
        return "not supported" if failures[0].startswith("not supported") else "failed"
    for key, words in _FAULTS.items():
        if any(run.get(key) for run in runs):
            return words
    if not all(run.get("is_complete", True) for run in runs):
        return "cut short"
    if not all(run.get("calls", True) for run in runs):
        return "answers too late"
    values = [figure(run) for run in runs]
    return Figure(median(values), min(values), max(values))
