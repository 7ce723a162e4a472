"""How figures are written, where there is little room."""

from __future__ import annotations

from collections.abc import Sequence


def short(value: float, form: str = "#.3g") -> str:
    """Three digits, as much as a measurement is worth: 1.28M, 57.2k, 950, 14.1."""
    return _scaled(value, ((1e6, "M"), (1e3, "k"), (1, "")), form)


def microseconds(value: float, form: str = "#.3g") -> str:
    """Three digits of a time."""
    return _scaled(value, ((1e6, " s"), (1e3, " ms"), (1, " µs")), form)


def _scaled(value: float, units: Sequence[tuple[float, str]], form: str) -> str:
    """``value`` in the largest unit of which there is one, once it is rounded; the last of ``units`` is 1."""
    unit, name = next((pair for pair in units if value >= pair[0] * 0.9995), units[-1])
    return format(value / unit, form).rstrip(".") + name


def in_bytes(size: int) -> str:
    """A size in the largest unit that divides it."""
    for unit, name in ((1024**2, "MiB"), (1024, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size:,} B"


def plural(count: int, what: str) -> str:
    """``count`` things called ``what``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
