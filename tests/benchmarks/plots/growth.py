"""How the rate changes as the same work grows: lines over connections, methods, payload, and handlers that block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from tests.benchmarks.bars import GMPRPC
from tests.benchmarks.results import Run

from .drawing import MARGIN, WIDTH, Drawing, LogScale
from .medians import Cell, Figure, Summary, fault, is_measured
from .rows import CORES
from .words import in_bytes, plural, short

# Axis -> (title, what its values count).
_AXES = {
    "connections": ("Calls per second over connections", "connections"),
    "payload": ("MiB of payload per second, each way, over its size", "payload of a call"),
    "methods": ("Calls per second over registered methods", "methods"),
    "blocking": ("Calls per second of handlers that block 1 ms", "calls in flight"),
}

# What isn't a server, but shows how far one could get -> (its name in a plot, what it is).
_LIMITS = {
    "floor": ("gevent alone", "a loop without greenlets and checks"),
    "bare-sleep": ("sleep alone", "greenlets that only sleep"),
}

# Pixels between two panels, and from the top of one to that of the next.
_GAP = 24
_PANEL = 256

#: Colour, mark, dashes.
Look = tuple[str, str, str]

#: Name -> value of the axis -> figure.
Lines = dict[str, dict[int, Cell]]


def growth(summary: Summary) -> Drawing | None:
    """A panel for each axis, two beside each other."""
    cores = min((run["cores"] for run in summary.runs_of_participants("growth")), default=1)
    drawn: list[Run] = []
    panels: dict[str, Lines] = {}
    for axis in _AXES:
        runs = summary.runs_of_participants("growth", limits=[*_LIMITS], cores=cores, axis=axis)
        lines = _lines(summary, axis, runs)
        if any(is_measured(line.values()) for line in lines.values()):
            panels[axis] = lines
            drawn += runs
    if not panels:
        return None
    names = summary.measured(drawn)
    limits = [f" {title.capitalize()}: {what}." for name, (title, what) in _LIMITS.items() if name in names]
    drawing = Drawing(
        f"The same work, and more of it, where {CORES[cores][0]}",
        f"Higher is better, on logarithmic scales; vertical lines span the rounds.{''.join(limits)}",
    )
    top = drawing.y
    width = (WIDTH - 2 * MARGIN - _GAP) / 2
    looks = _looks(names)
    for number, (axis, lines) in enumerate(panels.items()):
        drawing.y = top + number // 2 * _PANEL
        _panel(drawing, axis, lines, looks, MARGIN + number % 2 * (width + _GAP), width)
    drawing.y = top + (len(panels) + 1) // 2 * _PANEL
    drawing.remark([*_other_loads(drawn), *summary.remarks(drawn)])
    return drawing


def _lines(summary: Summary, axis: str, runs: Sequence[Run]) -> Lines:
    figure = _mebibytes_per_second if axis == "payload" else itemgetter("calls_per_second")
    lines: Lines = {name: {} for name in summary.measured(runs)}
    for value in sorted({run["value"] for run in runs}):
        for name, cell in summary.cells([run for run in runs if run["value"] == value], figure).items():
            lines[name][value] = cell
    return lines


def _mebibytes_per_second(run: Run) -> float:
    return float(run["calls_per_second"]) * float(run["value"]) / 1024**2


def _panel(drawing: Drawing, axis: str, lines: Lines, looks: dict[str, Look], left: float, width: float) -> None:
    title, unit = _AXES[axis]
    in_words = in_bytes if axis == "payload" else "{:,}".format
    values = sorted({value for line in lines.values() for value in line})
    figures = [cell for line in lines.values() for cell in line.values() if isinstance(cell, Figure)]
    top, bottom = drawing.y + 30, drawing.y + 190
    x = LogScale(values[0], max(values[-1], values[0] * 2), left + 48, left + width - 136)
    y = LogScale.over([edge for figure in figures for edge in (figure.low, figure.high)], bottom, top)

    drawing.text(left, drawing.y + 12, title, "ink strong")
    for tick in y.ticks():
        drawing.line([(x.start - 8, y(tick)), (x.end + 8, y(tick))], "grid thin")
        drawing.text(x.start - 14, y(tick) + 4, short(tick, "g"), "quiet small end")
    free = x.start
    for value in values:
        if x(value) >= free:  # Else its label would run into the one before.
            drawing.text(x(value), bottom + 18, in_words(value), "quiet small middle")
            free = x(value) + 44
    drawing.text((x.start + x.end) / 2, bottom + 35, unit, "quiet small middle")

    ends = {}
    for name in reversed(lines):  # gmprpc comes last: on top of the others, where lines meet.
        for end in _pieces(drawing, name, lines[name], looks[name], x, y):
            ends[name] = end
    free = min(top, bottom - 15 * (len(ends) - 1))
    for name in sorted(ends, key=ends.__getitem__):
        free = max(free, ends[name])  # Where lines end together, their names are pushed apart.
        colour, mark, _ = looks[name]
        drawing.mark(x.end + 22, free, mark, colour)
        words, _ = _LIMITS.get(name, (name, ""))
        drawing.text(x.end + 31, free + 4, words, f"{colour} small strong" if name == GMPRPC else f"{colour} small")
        free += 15

    faults = []
    drawing.describe(f"{title}:")
    for name, line in lines.items():
        drawing.describe(f"{name}: {', '.join(f'{in_words(value)} {cell}' for value, cell in line.items())}")
        if name in _LIMITS:
            continue  # Where it can't be had, nothing is wrong.
        for words in dict.fromkeys(filter(None, map(fault, line.values()))):
            where = [in_words(value) for value, cell in line.items() if cell == words]
            faults.append(f"{name}: {words}" if len(where) == len(line) else f"{name}: {words} at {', '.join(where)}")
    if faults:
        drawing.text(left, bottom + 53, "; ".join(faults), "warning small")


def _pieces(
    drawing: Drawing, name: str, line: dict[int, Cell], look: Look, x: LogScale, y: LogScale
) -> Iterator[float]:
    """Draw ``line``, without a bridge over what is missing in it, and say where each piece ends."""
    colour, mark, dashes = look
    for words, values in groupby(line, key=lambda value: fault(line[value])):
        if words is not None:
            continue
        figures = {x(value): cell for value in values if isinstance(cell := line[value], Figure)}
        points = [(left, y(figure.median)) for left, figure in figures.items()]
        drawing.line(points, f"{colour} thick" if name == GMPRPC else colour, dashes)
        for left, figure in figures.items():
            drawing.line([(left, y(figure.low)), (left, y(figure.high))], f"{colour} thin")
        for point in points:
            drawing.mark(*point, mark, colour)
        yield points[-1][1]


def _looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour, a mark and dashes for everybody; no two participants share all three."""
    marks = ("circle", "square", "triangle", "diamond", "wedge", "cross", "plus")
    dashes = ("", "7 3", "2 3")
    looks = {name: (f"series{number % 8}", marks[number % 7], dashes[number % 3]) for number, name in enumerate(names)}
    return looks | dict.fromkeys(_LIMITS, ("quiet", "dot", "1 3"))


def _other_loads(runs: Sequence[Run]) -> Iterator[str]:
    """Who was under another load than gmprpc at the same value of an axis."""

    def load(run: Run) -> tuple[int, int]:
        return run["connections"], run["in_flight"]

    ours = {(run["axis"], run["value"]): load(run) for run in runs if run["subject"] == GMPRPC}
    loads = {(run["subject"], run["axis"], run["value"]): load(run) for run in runs if "failure" not in run}
    for (name, axis, value), theirs in loads.items():
        if theirs != ours.get((axis, value), theirs):
            connections, in_flight = theirs
            what = f"{plural(connections, 'connection')} with {in_flight} in flight each"
            yield f"At {value:,} {_AXES[axis][1]} {name} has {what}."
