"""A drawing as SVG: how words, bars and marks look, in light and in dark. It knows nothing of what was measured.

It is written by hand, not by a plotting library: those fix their colours and draw letters as outlines, and here one
file follows the reader's colour scheme, its text can be read aloud, and another measurement changes few lines of it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 860
MARGIN = 24

# Light and dark, both with enough contrast on their paper. Whoever can't tell them apart has names, shapes and dashes.
COLOURS = {
    "ink": ("#1f2328", "#f0f6fc"),
    "quiet": ("#59636e", "#9198a1"),
    "grid": ("#d8dee4", "#2f353d"),
    "band": ("#eef5fd", "#13233a"),
    "bar": ("#9aa4af", "#6b7480"),
    "warning": ("#a40e26", "#ff8a80"),
    "series0": ("#0969da", "#4493f8"),
    "series1": ("#bc4c00", "#f0883e"),
    "series2": ("#1a7f37", "#3fb950"),
    "series3": ("#8250df", "#b78bfb"),
    "series4": ("#946200", "#d9a520"),
    "series5": ("#bf3989", "#ee75b4"),
    "series6": ("#1b7c83", "#39c5cf"),
    "series7": ("#59636e", "#9198a1"),
}
PAPER = ("#ffffff", "#0d1117")

# Around their middle, 8 wide. Those that enclose nothing are drawn as lines.
MARKS = {
    "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "m-3.5-3.5h7v7h-7z",
    "triangle": "m0-4.5l4.5 8h-9z",
    "diamond": "m0-5l4.5 5l-4.5 5l-4.5-5z",
    "wedge": "m0 4.5l4.5-8h-9z",
    "cross": "m-3.5-3.5l7 7m0-7l-7 7",
    "plus": "m-4.5 0h9m-4.5-4.5v9",
    "stroke": "m0-6v12",
    "dot": "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z",
}
_OPEN_MARKS = ("cross", "plus", "stroke")

_STYLE = """\
text, rect, path {{ fill: currentColor }}
text {{ font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums }}
.title {{ font-size: 17px; font-weight: 600 }}
.strong {{ font-weight: 600 }}
.small {{ font-size: 11px }}
.middle {{ text-anchor: middle }}
.end {{ text-anchor: end }}
.line {{ fill: none; stroke: currentColor; stroke-width: 1.5 }}
.thin {{ stroke-width: 1 }}
.thick {{ stroke-width: 2.5 }}
{light}
@media (prefers-color-scheme: dark) {{
{dark}
}}
"""


class Drawing:
    """Elements from top to bottom: ``y`` is where the next one goes, and where the drawing ends in the end."""

    def __init__(self, title: str, explanation: str) -> None:
        self.title = title
        self.y = 34.0
        self._description = [explanation]
        self._elements: list[str] = []
        self.text(MARGIN, self.y, title, "ink title")
        self.paragraph(explanation, "quiet")
        self.y += 14

    def describe(self, line: str) -> None:
        """Say something to those who don't see the drawing."""
        self._description.append(line)

    def paragraph(self, text: str, style: str) -> None:
        """Words over the whole width, below everything so far, in as many lines as they need."""
        # No font is asked, and the reader's is unknown: so much is enough for a character of a wide one.
        pixels = 6.2 if "small" in style else 6.8
        for line in textwrap.wrap(text, int((WIDTH - 2 * MARGIN) / pixels)):
            self.y += 17
            self.text(MARGIN, self.y, line, style)

    def text(self, x: float, y: float, text: str, style: str = "ink") -> None:
        """Words on the base line ``y``, from ``x`` on unless ``style`` has "middle" or "end"."""
        self._elements.append(f'<text class="{style}" x="{_number(x)}" y="{_number(y)}">{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, style: str) -> None:
        """A filled rectangle."""
        box = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        self._elements.append(f'<rect class="{style}" {box}/>')

    def line(self, points: Sequence[tuple[float, float]], style: str, dashes: str = "") -> None:
        """A line through ``points``."""
        path = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        attribute = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._elements.append(f'<path class="line {style}" d="M{path}"{attribute}/>')

    def mark(self, x: float, y: float, shape: str, style: str) -> None:
        """One of ``MARKS``."""
        style = f"line {style}" if shape in _OPEN_MARKS else style
        self._elements.append(f'<path class="{style}" d="M{_number(x)} {_number(y)}{MARKS[shape]}"/>')

    def remark(self, remarks: Sequence[str]) -> None:
        """Small print below everything so far."""
        self.y += 8
        for text in remarks:
            self.paragraph(text, "quiet small")

    def svg(self) -> str:
        """All of it; the same drawing is always the same text."""
        height = math.ceil(self.y + 20)
        style = _STYLE.format(light=_rules(0, ""), dark=_rules(1, "  "))
        size = f'width="{WIDTH}" height="{height}"'
        names = 'role="img" aria-labelledby="title description"'
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {height}" {names}>',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="description">{escape(chr(10).join(self._description))}</desc>',
                f"<style>\n{style}</style>",
                # Paper of its own: where a page is dark and its reader's system isn't, the words stay readable.
                f'<rect class="paper" {size} rx="8"/>',
                *self._elements,
                "</svg>\n",
            )
        )


@dataclass(frozen=True)
class LogScale:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``, each decade as long as any other."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, steps: Sequence[int] = (1, 2, 5)) -> LogScale:
        """From the step below the lowest value to the one above the highest, and a decade at least."""
        low, high = min(values), max(values)
        low = min(low, high / 10)
        below = [value for value in _steps(low / 10, low, steps) if value <= low]
        above = [value for value in _steps(high, high * 10, steps) if value >= high]
        return cls(below[-1], above[0], start, end)

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Where a line of the grid is worth it: the decades, and steps between them where there are few."""
        steps = (1,) if self.high / self.low >= 1000 else (1, 2, 5)
        return [value for value in _steps(self.low, self.high, steps) if self.low <= value <= self.high]


def _steps(low: float, high: float, steps: Sequence[int]) -> Iterator[float]:
    """``steps`` in each decade from that of ``low`` to that of ``high``."""
    for exponent in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2):
        for step in steps:
            yield step * 10.0**exponent


def _rules(scheme: int, indentation: str) -> str:
    colours = [f"{indentation}.paper {{ fill: {PAPER[scheme]} }}"]
    colours += [f"{indentation}.{name} {{ color: {pair[scheme]} }}" for name, pair in COLOURS.items()]
    return "\n".join(colours)


def _number(value: float) -> str:
    """A coordinate to a tenth of a pixel: short, and the same wherever it is computed."""
    return f"{value:.1f}".removesuffix(".0")
