"""What calls took when the baselines were written, and whether they have grown since.

It measures nothing, and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

#: Where the baselines are, by the version of Python: ``"3.11"``.
FILE = Path(__file__).with_name("baselines.json")

#: So much may a call grow by, or shrink by without a word. What lies where in memory makes up to 1 %.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Baseline:
    """What was counted with one version of Python."""

    #: The versions of everything that isn't gmprpc.
    fingerprint: dict[str, str]
    #: Instructions for each call, by case; the references are among them.
    instructions: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What a call takes now, and what it was to take."""

    case: str
    instructions: float
    #: The baseline, times what the reference has changed by; None if there is none.
    expected: float | None

    @property
    def change(self) -> float | None:
        """0.01 is 1 % more."""
        return None if self.expected is None else self.instructions / self.expected - 1

    @property
    def has_grown(self) -> bool:
        """By more than is tolerated."""
        return self.change is not None and self.change > TOLERANCE

    @property
    def has_shrunk(self) -> bool:
        """By so much that a later growth could hide in it: the baseline should be renewed."""
        return self.change is not None and self.change < -TOLERANCE


def compare(
    instructions: Mapping[str, float], baseline: Baseline | None, references: Mapping[str, str]
) -> list[Comparison]:
    """Each case with what was expected of it; ``references`` has the reference for each, and isn't judged itself."""

    def expected(case: str) -> float | None:
        if baseline is None or case not in baseline.instructions:
            return None
        reference = references[case]
        return baseline.instructions[case] * instructions[reference] / baseline.instructions[reference]

    return [Comparison(case, instructions[case], expected(case)) for case in instructions if case in references]


def load(path: Path | None = None) -> dict[str, Baseline]:
    """Every baseline that is written in ``path``, in the repository's by default."""
    path = path or FILE
    return {python: Baseline(**fields) for python, fields in json.loads(path.read_text()).items()}


def write(python: str, baseline: Baseline, path: Path | None = None) -> None:
    """Let ``baseline`` be the one for ``python`` in ``path``; the others stay."""
    path = path or FILE
    baselines = load(path) if path.exists() else {}
    baselines[python] = baseline
    fields = {python: asdict(baselines[python]) for python in sorted(baselines)}
    path.write_text(json.dumps(fields, indent=2) + "\n")
