"""How long calls take, and how much longer the slowest of them."""

from __future__ import annotations

from operator import itemgetter

from tests.benchmarks.bars import GMPRPC

from .drawing import MARGIN, WIDTH, Drawing, LogScale
from .medians import Cell, Figure, Summary, fault
from .rows import CORES, LABELS, weight, write_rows
from .words import microseconds

# Key -> (name, how many of the calls are faster, mark).
_PERCENTILES = {
    "p50_us": ("p50", "half", "circle"),
    "p99_us": ("p99", "99 %", "diamond"),
    "p999_us": ("p99.9", "99.9 %", "stroke"),
}


def latency(summary: Summary) -> Drawing | None:
    """How long half of the calls take, and how long the slowest."""
    runs = summary.runs_of_participants("server", shape="50x1")
    panels: dict[int, dict[str, list[Cell]]] = {}
    for cores in sorted({run["cores"] for run in runs}):
        of_cores = [run for run in runs if run["cores"] == cores]
        tables = [summary.cells(of_cores, itemgetter(key)) for key in _PERCENTILES]
        panels[cores] = {name: [table[name] for table in tables] for name in summary.measured(of_cores)}
    cells = [cell for panel in panels.values() for row in panel.values() for cell in row]
    medians = [cell.median for cell in cells if isinstance(cell, Figure)]
    if not medians:
        return None
    drawing = Drawing(
        "Latency of 50 connections with 1 call in flight each",
        "Further left is better, on a logarithmic scale. A long line: some calls wait while others are served again.",
    )
    x = MARGIN + LABELS + 6
    for label, share, mark in _PERCENTILES.values():
        drawing.mark(x, drawing.y + 8, mark, "ink")
        drawing.text(x + 10, drawing.y + 12, f"{label}: {share} of the calls are faster", "quiet small")
        x += 206
    rows = write_rows(summary, drawing, summary.measured(runs), drawing.y + 76)
    width = (WIDTH - 2 * MARGIN - LABELS) / len(panels)
    for number, (cores, panel) in enumerate(panels.items()):
        left = MARGIN + LABELS + number * width
        scale = LogScale.over(medians, left + 26, left + width - 68, steps=(1,))
        _latency_panel(drawing, CORES[cores][1], scale, rows, panel)
    drawing.remark(summary.remarks(runs))
    return drawing


def _latency_panel(
    drawing: Drawing, heading: str, x: LogScale, rows: dict[str, float], panel: dict[str, list[Cell]]
) -> None:
    top, right = min(rows.values()) - 34, x.end + 64
    drawing.text(x.start, top - 26, heading, "ink strong")
    drawing.text(right, top - 8, "p99", "quiet small end")
    for tick in x.ticks():
        drawing.line([(x(tick), top), (x(tick), drawing.y)], "grid thin")
        drawing.text(x(tick), top - 8, microseconds(tick, "g"), "quiet small middle")
    drawing.describe(f"{heading}; p50, p99, p99.9")
    for name, cells in panel.items():
        y = rows[name]
        found = [cell.median for cell in cells if isinstance(cell, Figure)]
        if len(found) < len(cells):
            words = next(filter(None, map(fault, cells)))
            drawing.text(x.start, y + 4, words, "warning small")
            drawing.describe(f"{name}: {words}")
            continue
        look = "series0" if name == GMPRPC else "bar"
        drawing.line([(x(found[0]), y), (x(found[-1]), y)], f"{look} thick")
        for value, (_, _, mark) in zip(found, _PERCENTILES.values(), strict=True):
            drawing.mark(x(value), y, mark, look)
        drawing.text(right, y + 4, microseconds(found[1]), f"{weight(name)} end")
        drawing.describe(f"{name}: {', '.join(map(microseconds, found))}")
