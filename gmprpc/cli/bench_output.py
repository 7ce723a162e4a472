"""What ``bench`` shows: a line while it runs, and the figures; needs rich."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gmprpc.bench.conditions import Condition
from gmprpc.bench.crew import OnProgress
from gmprpc.bench.figures import Figures
from gmprpc.bench.plan import Plan
from gmprpc.bench.tally import Ending, Tally, percentiles_of

from .exits import printable

_SECOND = 1_000_000_000

#: The percentiles that are shown.
PERCENTS = (50.0, 90.0, 99.0, 99.9)

# How often the line is drawn anew, in seconds, at most: each process tells something twice as often.
_DRAWING_INTERVAL = 0.5

_UNITS = (("µs", 1e6), ("ms", 1e3), ("s", 1.0))

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"


# While it runs.


@contextmanager
def progress(plan: Plan) -> Iterator[OnProgress | None]:
    """Shows on standard error how far it is, if that is a terminal; otherwise None, and nothing is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        yield _Line(plan, bar).take


class _Line:
    """The line that is drawn."""

    def __init__(self, plan: Plan, bar: Progress) -> None:
        self._plan = plan
        self._bar = bar
        self._task = bar.add_task("connecting", total=None, state="")
        self._recent = Tally()
        self._calls = self._errors = 0
        self._begun_at = self._drawn_at = 0.0
        bar.refresh()

    def take(self, tally: Tally | None) -> None:
        """Count what is new, and draw it when it is time to; None while calls don't count yet."""
        now = monotonic()
        if tally is None:
            self._bar.update(self._task, description="warming up", refresh=True)
            return
        if not self._begun_at:
            self._begun_at = self._drawn_at = now - _DRAWING_INTERVAL
        self._recent.add(tally)
        if (seconds := now - self._drawn_at) < 0.9 * _DRAWING_INTERVAL:
            return
        recent, self._recent, self._drawn_at = self._recent, Tally(), now
        self._calls += recent.answered
        self._errors += sum(recent.errors.values())
        state = f"{_number(recent.answered / seconds)} calls/s"
        if recent.latencies:
            half, most = (shown_duration(each / _SECOND) for each in percentiles_of(recent.latencies, 50, 99))
            state += f"  p50 {half}  p99 {most}"
        if self._errors:
            state += f"  [red]{_number(self._errors)} errors[/red]"
        total = self._plan.duration or self._plan.calls
        done = now - self._begun_at if self._plan.duration else self._calls + self._errors
        self._bar.update(self._task, description="measuring", total=total, completed=done, state=state, refresh=True)


# The figures.


def text_of(address: str, plan: Plan, processes: int, figures: Figures, failed: Sequence[Condition]) -> str:
    """The figures for a person; in colours, if that is who reads it."""
    is_terminal = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(), force_terminal=is_terminal, highlight=False, width=None if is_terminal else 100
    )
    with console.capture() as capture:
        console.print(Group(*_parts(address, plan, processes, figures)))
    lines = (line.rstrip() for line in capture.get().splitlines())
    return "\n".join(lines)


def _parts(address: str, plan: Plan, processes: int, figures: Figures) -> Iterator[RenderableType]:
    loop = f"{_number(plan.rate)} calls a second" if plan.rate else f"{plan.depth} in flight on each"
    yield Text(
        f"{printable(plan.method, but='')} at {address}: {_count(processes, 'process', 'processes')}, "
        f"{_count(plan.connections, 'connection', 'connections')}, {loop}, {figures.seconds:.1f} s"
    )
    if figures.ending is Ending.INTERRUPTED:
        yield Text(
            "interrupted: " + ("what follows is of the time before" if figures.seconds else "nothing counted yet")
        )
    yield Text("")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("calls", _number(figures.calls), Text(f"{_number(figures.rate)} a second", "bold"))
    table.add_row("errors", Text(_number(figures.error_count), "bold red" if figures.error_count else ""))
    for name, size in (("sent", figures.sent), ("received", figures.received)):
        table.add_row(name, _size(size), f"{_size(size / figures.seconds if figures.seconds else 0)} a second")
    yield Padding.indent(table, 2)
    for title, counts in (("errors", figures.errors), ("connections lost", figures.lost)):
        if counts:
            yield from _reasons(title, counts)
    if figures.latencies.count:
        yield from _latencies(figures)
    yield from _causes(figures)


def _reasons(title: str, counts: dict[str, int]) -> Iterator[RenderableType]:
    yield Text(f"\n  {title}")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for reason, count in counts.items():
        table.add_row(_number(count), Text(printable(reason, but=""), "red"))
    yield Padding.indent(table, 4)


def _latencies(figures: Figures) -> Iterator[RenderableType]:
    latencies = figures.latencies
    yield Text("\n  latency")
    table = Table.grid(padding=(0, 3))
    names = ["mean", *(f"{percent:g} %" for percent in PERCENTS), "max"]
    values = [latencies.mean, *map(latencies.percentile, PERCENTS), latencies.max]
    for _ in names:
        table.add_column(justify="right")
    table.add_row(*names)
    table.add_row(*(Text(shown_duration(value), "bold") for value in values))
    yield Padding.indent(table, 4)
    yield Text("")

    bars = latencies.bars()
    most = max(count for _, _, count in bars)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right")
    for low, _, count in bars:
        share = count / latencies.count
        table.add_row(f"from {shown_duration(low)}", Text(_bar(count / most), "blue"), f"{share:.2%}" if count else "")
    yield Padding.indent(table, 4)


def _causes(figures: Figures) -> Iterator[RenderableType]:
    shares = ", ".join(f"{process.busy:.0%}" for process in figures.processes)
    yield Text(f"\n  load generator: {shares} of a core")
    if figures.lateness:
        half, most, longest = map(shown_duration, figures.lateness)
        yield Text(f"  it sent calls {half} late at the median, {most} at the 99th percentile, {longest} at most")
    for notice in figures.notices():
        yield Text(f"\n{notice}", "yellow")


def json_of(address: str, plan: Plan, processes: int, figures: Figures, failed: Sequence[Condition]) -> str:
    """The figures for a program; all times are seconds."""
    latencies = figures.latencies
    content: dict[str, Any] = {
        "address": address,
        "method": printable(plan.method, but=""),
        "connections": plan.connections,
        "depth": plan.depth,
        "processes": processes,
        "target_rate": plan.rate,
        "warm_up": plan.warm_up,
        "ending": figures.ending,
        "seconds": figures.seconds,
        "calls": figures.calls,
        "rate": figures.rate,
        "error_count": figures.error_count,
        "errors": figures.errors,
        "connections_lost": figures.lost,
        "bytes_sent": figures.sent,
        "bytes_received": figures.received,
        "latency": {
            "min": latencies.min,
            "mean": latencies.mean,
            **{f"p{percent:g}": latencies.percentile(percent) for percent in PERCENTS},
            "max": latencies.max,
        },
        "histogram": [{"from": low, "to": high, "calls": count} for low, high, count in latencies.bars()],
        "hdr_histogram": latencies.encoded(),
        "lateness": dict(zip(("p50", "p99", "max"), figures.lateness, strict=True)) if figures.lateness else None,
        "load_generator": [{"busy": process.busy, "waited": process.waited} for process in figures.processes],
        "notices": figures.notices(),
        "failed": [condition.text for condition in failed],
    }
    return json.dumps(content, indent=2 if sys.stdout.isatty() else None)


def shown_value(condition: Condition, figures: Figures) -> str:
    """The figure that ``condition`` is about."""
    value = condition.value(figures)
    if value is None:
        return "nothing was measured"
    if condition.is_duration:
        return f"it is {shown_duration(value)}"
    return f"it is {value:.4g} %" if condition.is_percent else f"it is {_number(value)}"


# In words.


def shown_duration(seconds: float | None) -> str:
    """``seconds`` with three digits and a fitting unit."""
    if seconds is None:
        return "-"
    # What would be rounded to 1,000 of a unit is 1 of the next.
    unit, factor = next((unit for unit in _UNITS if seconds * unit[1] < 999.5), ("s", 1.0))
    number = seconds * factor
    return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.3g}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8) or (1 if share else 0)
    return _FULL * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
