"""What the figures must not be, in words that are typed: ``p99>50ms``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import ge, gt, le, lt

from .figures import Figures

_FORM = re.compile(r"\s*([a-z]+)([\d.]*)\s*(>=|<=|>|<)\s*(\d+(?:\.\d*)?)\s*(%|us|µs|ms|s|)\s*")
_COMPARISONS = {">": gt, ">=": ge, "<": lt, "<=": le}
_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATIONS = ("min", "mean", "max")


@dataclass(frozen=True)
class Condition:
    """A comparison of a figure with a number."""

    text: str
    _name: str
    _percent: float
    _comparison: str
    _limit: float
    _unit: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition that ``text`` says; ValueError, with the reason, if it says none."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError("give a figure, > or <, and a number, as in p99>50ms, errors>0 or rate<10000")
        name, percent, comparison, limit, unit = match.groups()
        if name == "p":
            if not re.fullmatch(r"\d+(\.\d+)?", percent) or not 0 < float(percent) <= 100:
                raise ValueError("give a percentile of up to 100, as in p99.9>50ms")
        elif percent or name not in (*_DURATIONS, "errors", "rate", "calls"):
            raise ValueError(f"{name}{percent} is none of p50, p99.9 and so on, min, mean, max, errors, rate and calls")
        is_duration = name == "p" or name in _DURATIONS
        if is_duration and unit not in _UNITS:
            raise ValueError(f"say of which unit {limit} is: us, ms or s")
        if not is_duration and unit and not (name == "errors" and unit == "%"):
            raise ValueError(f"{name} has no unit {unit}")
        return cls(text.strip(), name, float(percent or 0), comparison, float(limit) * _UNITS.get(unit, 1.0), unit)

    @property
    def is_duration(self) -> bool:
        """Whether the figure is a duration."""
        return self._unit in _UNITS

    @property
    def is_percent(self) -> bool:
        """Whether the figure is a percentage."""
        return self._unit == "%"

    def value(self, figures: Figures) -> float | None:
        """The figure that is compared; seconds, if it is a duration. None if there is none."""
        match self._name:
            case "p":
                return figures.latencies.percentile(self._percent)
            case "min" | "mean" | "max":
                duration: float | None = getattr(figures.latencies, self._name)
                return duration
            case "errors" if self._unit == "%":
                total = figures.calls + figures.error_count
                return 100 * figures.error_count / total if total else None
            case "errors":
                return figures.error_count
            case "rate":
                return figures.rate
        return figures.calls

    def is_met(self, figures: Figures) -> bool:
        """Whether it is so; also where the figure doesn't exist, since nothing came of it."""
        value = self.value(figures)
        return value is None or bool(_COMPARISONS[self._comparison](value, self._limit))
