"""What a trial has found, as a row: a figure, the bar that it has to keep to, and whether it does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 1024 * 1024
KIB = 1024

_WIDTHS = (10, 88, 36, 20)


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    figure: str
    #: Empty where a figure is only reported.
    bar: str = ""
    is_passed: bool = True
    #: The numbers behind the figure, for ``--json``.
    details: dict[str, Any] = field(default_factory=dict)

    def line(self, trial: str) -> str:
        """The row as text."""
        verdict = ("passed" if self.is_passed else "FAILED") if self.bar else "reported"
        cells = (trial, self.what, self.figure, self.bar)
        return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), verdict])

    def as_json(self, trial: str) -> dict[str, Any]:
        """Everything about the row."""
        return {"trial": trial, **asdict(self)}


def below(what: str, value: float, bar: float, unit: str = "", **details: Any) -> Row:
    """A figure that has to be less than ``bar``."""
    return Row(what, _shown(value, unit), f"< {_shown(bar, unit)}", value < bar, {"value": value, **details})


def at_most(what: str, value: float, bar: float, unit: str = "", **details: Any) -> Row:
    """A figure that may be ``bar``, and not more."""
    return Row(what, _shown(value, unit), f"<= {_shown(bar, unit)}", value <= bar, {"value": value, **details})


def exactly(what: str, value: object, expected: object, **details: Any) -> Row:
    """What has to be just as it is ``expected``."""
    return Row(what, str(value), f"= {expected}", value == expected, {"value": value, **details})


def reported(what: str, value: float, unit: str = "", **details: Any) -> Row:
    """A figure without a bar."""
    return Row(what, _shown(value, unit), details={"value": value, **details})


def failure(what: str, reason: str) -> Row:
    """A trial that didn't come to its figure."""
    return Row(what, reason, "a figure", is_passed=False)


def heading() -> str:
    """The head of the table."""
    titles = ("trial", "what", "figure", "bar")
    return "  ".join([*(title.ljust(width) for title, width in zip(titles, _WIDTHS, strict=True)), "verdict"])


def _shown(value: float, unit: str) -> str:
    scale = {"KiB": KIB, "MiB": MIB, "ms": 0.001}.get(unit, 1)
    scaled = value / scale
    digits = 0 if isinstance(value, int) and scale == 1 else 3 if unit == "s" else 1
    return f"{scaled:,.{digits}f} {unit}".rstrip()
