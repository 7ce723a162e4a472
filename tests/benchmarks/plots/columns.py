"""Bars, longer ones for larger figures: calls per second of servers and of clients, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from tests.benchmarks.bars import GMPRPC, kib_for_each
from tests.benchmarks.results import Run

from .drawing import MARGIN, WIDTH, Drawing
from .medians import Cell, Figure, Summary, is_measured
from .rows import CORES, LABELS, ROW, weight, write_rows
from .words import in_bytes, plural, short

# How each way to call is named over its column.
_CLIENTS = {"blocking": "{} caller", "greenlets": "{} greenlets", "async": "{} in flight"}

# Pixels for the figure behind a bar.
_FIGURE = 58


@dataclass(frozen=True)
class Column:
    """One bar for each participant."""

    heading: str
    details: str
    cells: dict[str, Cell]


def calls(summary: Summary, cores: int) -> Drawing | None:
    """Calls per second of every server in every shape."""
    runs = summary.runs_of_participants("server", cores=cores)
    columns = []
    for shape in dict.fromkeys(run["shape"] for run in runs):
        of_shape = [run for run in runs if run["shape"] == shape]
        connections, in_flight, size = itemgetter("connections", "in_flight", "payload_bytes")(of_shape[0])
        details = f"{in_flight} of {in_bytes(size)}" if size >= 1024 else f"{in_flight} in flight"
        details += " each" if connections > 1 else ""
        cells = summary.cells(of_shape, itemgetter("calls_per_second"))
        columns.append(Column(plural(connections, "connection"), details, cells))
    return _bars(
        summary,
        runs,
        columns,
        f"Calls per second where {CORES[cores][0]}",
        "Longer is better; each column has a scale of its own. Thin lines span the rounds. A server that leaves calls "
        "unanswered has no bar: it has less to do.",
    )


def clients(summary: Summary) -> Drawing | None:
    """Calls per second of every client in every way to call."""
    runs = summary.runs_of_participants("client")
    way_of = itemgetter("cores", "mode", "callers")
    columns = []
    for way in sorted(dict.fromkeys(map(way_of, runs)), key=itemgetter(0)):
        cores, mode, callers = way
        columns.append(
            Column(
                _CLIENTS.get(mode, f"{{}} {mode}").format(callers),
                CORES[cores][1],
                summary.cells([run for run in runs if way_of(run) == way], itemgetter("calls_per_second")),
            )
        )
    return _bars(
        summary,
        runs,
        columns,
        "Calls per second of clients on one connection",
        "Longer is better; each column has a scale of its own. Thin lines span the rounds.",
    )


def memory(summary: Summary) -> Drawing | None:
    """Resident memory for each idle connection."""
    runs = summary.runs_of_participants("idle")
    columns = []
    for count in sorted({run["connections"] for run in runs}):
        of_count = [run for run in runs if run["connections"] == count]
        columns.append(Column(plural(count, "connection"), "KiB for each", summary.cells(of_count, kib_for_each)))
    return _bars(
        summary,
        runs,
        columns,
        "Resident memory for each idle connection",
        "Shorter is better. Each connection has made a call before; what the kernel holds for it isn't counted.",
    )


def _bars(
    summary: Summary, runs: Sequence[Run], columns: Sequence[Column], title: str, explanation: str
) -> Drawing | None:
    """A row for each participant, a bar in each column, and its figure behind it."""
    if not any(is_measured(column.cells.values()) for column in columns):
        return None
    drawing = Drawing(title, explanation)
    top = drawing.y
    rows = write_rows(summary, drawing, summary.measured(runs), top + 40)
    width = (WIDTH - 2 * MARGIN - LABELS) / len(columns)
    for number, column in enumerate(columns):
        left = MARGIN + LABELS + number * width
        drawing.text(left, top + 12, column.heading, "ink strong")
        drawing.text(left, top + 28, column.details, "quiet small")
        _bars_in_column(drawing, column, rows, left, width)
    drawing.remark(summary.remarks(runs))
    return drawing


def _bars_in_column(drawing: Drawing, column: Column, rows: dict[str, float], left: float, width: float) -> None:
    longest = max((cell.high for cell in column.cells.values() if isinstance(cell, Figure)), default=0)
    scale = (width - _FIGURE) / longest if longest > 0 else 0
    for name, y in rows.items():
        cell = column.cells.get(name, "not measured")
        if isinstance(cell, Figure):
            low, middle, high = (left + max(0, value) * scale for value in (cell.low, cell.median, cell.high))
            drawing.bar(left, y - 6, middle - left, 12, "series0" if name == GMPRPC else "bar")
            drawing.line([(low, y), (high, y)], "ink thin")
            drawing.text(high + 5, y + 4, short(cell.median), weight(name))
        else:
            drawing.text(left + 5, y + 4, cell, "quiet small" if cell.startswith("not ") else "warning small")
    drawing.line([(left, min(rows.values()) - ROW / 2), (left, max(rows.values()) + ROW / 2)], "quiet thin")
    told = ", ".join(f"{name} {cell}" for name, cell in column.cells.items())
    drawing.describe(f"{column.heading}, {column.details}: {told}")
