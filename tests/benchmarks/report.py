"""What was measured, as tables, and whether the bars were reached: from the JSON alone, so that old ones can be read.

``python -m tests.benchmarks.report FILE`` prints what the benchmark printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bars import GMPRPC, RATE, kib_for_each, verdicts
from .machine import machine_line, versions_line
from .results import Results, Series, fault, ratio

C_ECHO, FLOOR = "c-echo", "floor"

ARRANGEMENTS = {1: "one core for both", 2: "a core each"}

# What `lines` writes to the right.
_RATE_TITLES = [">calls/s", ">p50 µs", ">p99 µs", ">p99.9 µs"]
_RATES = {RATE: "{:,.0f}", "p50_us": "{:,.1f}", "p99_us": "{:,.1f}", "p999_us": "{:,.1f}"}
_COST_TITLES = [">CPU ms/1,000", ">MiB before", ">MiB under load"]
_MIB = 1024 * 1024

_AXES = {
    "connections": "connections, one call in flight on each",
    "methods": "registered methods, 64 calls in flight on one connection",
    "payload": "bytes of payload, one call at a time",
    "blocking": "calls in flight whose handlers block for 1 ms",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSON")
    options = parser.parse_args(arguments)
    print(report(json.loads(options.file.read_text())))
    return 0


def report(document: Mapping[str, Any]) -> str:
    """All of it."""
    results = Results(document)
    return "\n\n".join([heading(results), *_sections(results)])


def heading(results: Results) -> str:
    """Where, what and how; and who is missing."""
    options = results.options
    state = "fresh from the start" if options["is_fresh"] else "in use: each has had one large message before"
    pins = "; ".join(
        f"{ARRANGEMENTS[int(cores)]}: server on {of['server']}, the other on {of['other']}"
        for cores, of in options["pinned"].items()
    )
    ours = results.subjects.get(GMPRPC, {}).get("versions")
    parts = [
        machine_line(results.machine),
        f"core numbers: {pins}",
        f"{options['rounds']} rounds of {options['seconds']:g} s, less where that is said; medians",
        "ratios are of medians; in brackets the lowest and the highest within a round",
        f"processes {state}",
        "",
    ]
    for name, subject in results.subjects.items():
        if subject["absence"] is not None:
            parts.append(f"{name} is not measured: {subject['absence']}")
        elif subject["versions"] and (name == GMPRPC or subject["versions"] != ours):
            parts.append(f"{name}: {versions_line(subject['versions'])}")
    return "\n".join(parts)


def _sections(results: Results) -> Iterator[str]:
    for cores, arrangement in ARRANGEMENTS.items():
        if results.runs("server", cores=cores):
            yield f"Servers, {arrangement}\n\n{_servers(results, cores)}"
    if results.runs("server", subject=C_ECHO):
        title = "The load generator at a server that only copies bytes, beside the fastest of the servers above"
        yield f"{title}\n\n{_self_check(results)}"
    for cores, arrangement in ARRANGEMENTS.items():
        if results.runs("client", cores=cores):
            yield f"Clients, {arrangement}\n\n{_clients(results, cores)}"
    for cores, arrangement in ARRANGEMENTS.items():
        for axis in results.values("axis", "growth", cores=cores):
            title = f"Calls/s over {_AXES.get(axis, axis)}, {arrangement}"
            yield f"{title}\n\n{_growth(results, cores, axis)}"
    if results.runs("idle"):
        yield f"Idle connections\n\n{_idle(results)}"
    if found := list(verdicts(results)):
        rows = [[each.what, ARRANGEMENTS[each.cores], each.bar, _first_line(each.figure), each.words] for each in found]
        yield f"The figures to reach\n\n{lines(['what', 'cores', 'bar', 'found', ''], rows)}"


def _servers(results: Results, cores: int) -> str:
    rows = []
    for shape in results.values("shape", "server", cores=cores):
        where = {"cores": cores, "shape": shape}
        for name in _in_order(results, results.values("subject", "server", **where)):
            if name == C_ECHO:
                continue
            runs = {"kind": "server", "subject": name, **where}
            rates = results.series(RATE, **runs)
            row = [shape, name]
            if rates.fault:
                rows.append([*row, *[""] * 8, _excuse(results, name, rates)])
                continue
            row += _medians(results, runs, _RATES)
            cpu = results.series("server_cpu_ms_per_1000_calls", **runs)
            row.append(f"{cpu.median:.1f}" if cpu.values else "")
            for key in ("resident_before", "resident_under_load"):
                row.append(f"{results.series(key, **runs).median / _MIB:.1f}")
            rows.append([*row, _against(results, rates, "server", where, name)])
    return lines(["shape", "server", *_RATE_TITLES, *_COST_TITLES, ">gmprpc is x", "remarks"], rows)


def _self_check(results: Results) -> str:
    rows = []
    for cores, arrangement in ARRANGEMENTS.items():
        for shape in results.values("shape", "server", cores=cores, subject=C_ECHO):
            where = {"cores": cores, "shape": shape}
            rates = {
                name: results.series(RATE, "server", subject=name, **where)
                for name in results.values("subject", "server", **where)
            }
            echo = rates.pop(C_ECHO)
            rates.pop(FLOOR, None)  # It is no server, and next to nothing but the kernel, which both need.
            row = [arrangement, shape]
            if not echo.is_comparable:
                rows.append([*row, "", "", f"not measured: {_first_line(echo.fault or '')}"])
                continue
            own = results.series(lambda run: run["generator_cpu"] / run[RATE] * 1e6, "server", subject=C_ECHO, **where)
            row += [f"{echo.median:,.0f}", f"{own.median:.2f}"]
            comparable = {name: series for name, series in rates.items() if series.is_comparable}
            if comparable:
                fastest = max(comparable, key=lambda name: comparable[name].median)
                by = echo.median / comparable[fastest].median
                row += [f"{by:.2f} x {fastest}", "outruns it" if by > 1 else "does not outrun it"]
            rows.append(row)
    return lines(["cores", "shape", ">calls/s", ">generator's µs per call", "the fastest server", ""], rows)


def _clients(results: Results, cores: int) -> str:
    rows = []
    for mode in results.values("mode", "client", cores=cores):
        where = {"cores": cores, "mode": mode}
        for name in _in_order(results, results.values("subject", "client", **where)):
            runs = {"kind": "client", "subject": name, **where}
            callers = results.values("callers", **runs)[0]
            rates = results.series(RATE, **runs)
            row = [f"{mode}, {callers}", name]
            if rates.fault:
                rows.append([*row, *[""] * 5, f"not compared: {_first_line(rates.fault)}"])
                continue
            row += _medians(results, runs, _RATES)
            rows.append([*row, _against(results, rates, "client", where, name)])
    return lines(["mode, callers", "client", *_RATE_TITLES, ">gmprpc is x", "remarks"], rows)


def _growth(results: Results, cores: int, axis: str) -> str:
    where = {"cores": cores, "axis": axis}
    names = _in_order(results, results.values("subject", "growth", **where))
    rows = []
    remarks: dict[str, list[str]] = {}
    for value in results.values("value", "growth", **where):
        row = [f"{value:,}"]
        for name in names:
            rates = results.series(RATE, "growth", subject=name, value=value, **where)
            row.append(f"{rates.median:,.0f}" if rates.is_comparable else "")
            if rates.fault:
                reason = f"{name} is not compared: {_first_line(rates.fault)}"
                remarks.setdefault(reason, []).append(f"{value:,}")
        rows.append(row)
    table = lines([f">{axis}", *(f">{name}" for name in names)], rows)
    return "\n".join([table, *(f"{reason} (at {', '.join(values)})" for reason, values in remarks.items())])


def _idle(results: Results) -> str:
    rows = []
    for run in results.runs("idle"):
        row = [run["subject"], f"{run['connections']:,}"]
        if reason := fault(run):
            rows.append([*row, *[""] * 4, _first_line(reason)])
            continue
        sizes = [f"{run[key] / 1024:,.0f}" for key in ("resident_before", "resident_quiet")]
        remark = "no more files may be open" if run["connections"] < run["connections_wanted"] else ""
        rows.append([*row, *sizes, f"{kib_for_each(run, 'in_use'):.1f}", f"{kib_for_each(run):.1f}", remark])
    titles = [">connections", ">KiB before", ">KiB with them", ">KiB for each in use", ">KiB for each idle", "remarks"]
    return lines(["server", *titles], rows)


def _medians(results: Results, runs: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
    return [form.format(results.series(key, **runs).median) for key, form in figures.items()]


def _against(results: Results, rates: Series, kind: str, where: Mapping[str, Any], name: str) -> str:
    """How many times as fast as ``name`` gmprpc is."""
    if name == GMPRPC:
        return ""
    found = ratio(results.series(RATE, kind, subject=GMPRPC, **where), rates)
    return "" if found is None else f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"


def _in_order(results: Results, names: Sequence[str]) -> list[str]:
    """``names`` in the order of the subjects: who comes first in a round changes."""
    order = list(results.subjects)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _excuse(results: Results, name: str, rates: Series) -> str:
    """Why a server isn't compared, with what is known of it."""
    known = results.subjects.get(name, {}).get("remark")
    is_known = known is not None and rates.fault is not None and "unanswered" in rates.fault
    return f"not compared: {_first_line(rates.fault or '')}" + (f" ({name} {known})" if is_known else "")


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; columns whose title begins with ``>`` are written to the right."""
    is_right = [title.startswith(">") for title in head]
    titles = [title.removeprefix(">") for title in head]
    widths = [max(len(row[column]) for row in [titles, *rows] if column < len(row)) for column in range(len(titles))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, is_right, strict=False)  # A row may end early.
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    rule = ["-" * (width if right else min(width, 20)) for width, right in zip(widths, is_right, strict=True)]
    return "\n".join(map(line, [titles, rule, *rows]))


if __name__ == "__main__":
    sys.exit(main())
