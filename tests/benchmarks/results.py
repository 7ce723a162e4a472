"""The JSON of a benchmark, asked for figures: each of them over its rounds, with what kept it from being compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One figure over the rounds."""

    #: Round -> figure.
    values: Mapping[int, float]
    #: Why it can't be compared with others, if there is a reason.
    fault: str | None = None

    @property
    def is_comparable(self) -> bool:
        """Whether there is a figure, and all of its calls were answered."""
        return bool(self.values) and self.fault is None

    @property
    def median(self) -> float:
        """The middle of all rounds."""
        return median(self.values.values())


@dataclass(frozen=True)
class Ratio:
    """How two series compare: the ratio of their medians, and how far it goes in single rounds."""

    value: float
    low: float
    high: float


def ratio(ours: Series, theirs: Series) -> Ratio | None:
    """How ``ours`` compares with ``theirs``; None if either can't be compared, or they have no round in common."""
    rounds = sorted(ours.values.keys() & theirs.values.keys())
    if not ours.is_comparable or not theirs.is_comparable or not rounds or not all(theirs.values.values()):
        return None
    within = [ours.values[number] / theirs.values[number] for number in rounds]
    return Ratio(ours.median / theirs.median, min(within), max(within))


class Results:
    """A benchmark's JSON."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.machine: Mapping[str, Any] = document["machine"]
        self.options: Mapping[str, Any] = document["options"]
        self.subjects: Mapping[str, Mapping[str, Any]] = document["subjects"]
        self._runs: Sequence[Run] = document["runs"]

    def runs(self, kind: str, **conditions: Any) -> list[Run]:
        """The runs of a kind under ``conditions``, in the order of the JSON."""
        wanted = {"kind": kind, **conditions}.items()
        return [run for run in self._runs if all(run.get(key) == value for key, value in wanted)]

    def values(self, key: str, kind: str, **conditions: Any) -> list[Any]:
        """What ``key`` is in these runs, each value once."""
        return list(dict.fromkeys(run[key] for run in self.runs(kind, **conditions)))

    def series(self, figure: str | Callable[[Run], float], kind: str, **conditions: Any) -> Series:
        """A figure, a key or what is computed of a run, over the rounds; a run that failed has none."""
        runs = self.runs(kind, **conditions)
        values = {
            run.get("round", 1): run[figure] if isinstance(figure, str) else figure(run)
            for run in runs
            if "failure" not in run
        }
        # A server that answered nothing at all has no CPU time for each call.
        values = {number: value for number, value in values.items() if value is not None}
        return Series(values, next(filter(None, map(fault, runs)), None))

    @property
    def peers(self) -> list[str]:
        """Who isn't of this project."""
        return [name for name, subject in self.subjects.items() if subject["is_peer"]]


def fault(run: Run) -> str | None:
    """Why a run can't be compared with others: who leaves calls lying has less to do."""
    if "failure" in run:
        return str(run["failure"])
    counts = {
        "wrong answers": run.get("errors"),
        "calls unanswered": run.get("unanswered"),
        "connections lost": run.get("lost_connections"),
        "connections without any answer": run.get("silent_connections"),
    }
    faults = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not faults and run.get("is_complete", True):
        return None
    first = run.get("first_error")
    return ", ".join(faults or ["not measured to the end"]) + (f"; first {first}" if first else "")
