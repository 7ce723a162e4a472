"""What was measured, put into words: the conditions, the table, what went wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .processes import C_ECHO, GMPRPC, PEER, Server, Shape, Workshop


@dataclass(frozen=True)
class Run:
    """One measurement of one server in one shape."""

    server: Server
    shape: Shape
    round: int
    #: What the load generator found.
    result: dict[str, Any] = field(default_factory=dict)
    #: Why there is no result.
    failure: str | None = None

    @property
    def rate(self) -> float:
        """Calls per second."""
        return float(self.result["calls_per_second"])

    @property
    def fault(self) -> str | None:
        """Why this run can't be compared with others."""
        if self.failure is not None:
            return self.failure
        counts = {
            "wrong answers": self.result["errors"],
            "calls unanswered": self.result["unanswered"],
            "connections lost": self.result["lost_connections"],
            "connections without any answer": self.result["silent_connections"],
        }
        faults = [f"{count} {what}" for what, count in counts.items() if count]
        if not faults and self.result["is_complete"]:
            return None
        first = self.result["first_error"]
        return ", ".join(faults or ["not measured to the end"]) + (f"; first {first}" if first else "")

    @property
    def is_failure(self) -> bool:
        """Whether the benchmark as a whole has failed: a peer that loses calls is only named."""
        if self.failure is not None or self.result["errors"]:
            return True
        return not self.server.is_peer and self.fault is not None

    def as_json(self) -> dict[str, Any]:
        """Everything about this run."""
        conditions = {
            "server": self.server.name,
            "shape": self.shape.name,
            "connections": self.shape.connections,
            "in_flight": self.shape.in_flight,
            "payload_bytes": self.shape.payload_size,
            "round": self.round,
        }
        return conditions | ({"failure": self.failure} if self.failure is not None else self.result)


def machine() -> dict[str, Any]:
    """Where this runs."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def versions(servers: Iterable[Server]) -> dict[str, str]:
    """What was measured, and what it runs on."""
    found = {platform.python_implementation(): platform.python_version()}
    for server in servers:
        if version := server.version():
            found[server.name] = version
    return found | {package: importlib.metadata.version(package) for package in ("gevent", "greenlet", "msgpack")}


def conditions(workshop: Workshop, servers: Sequence[Server]) -> dict[str, Any]:
    """The machine, the versions, and who had which core."""
    return {
        "machine": machine(),
        "versions": versions(servers),
        "cores": {"server": workshop.server_core, "load_generator": workshop.load_core},
    }


def heading(facts: dict[str, Any]) -> str:
    """``conditions`` in three lines."""
    where, cores = facts["machine"], facts["cores"]
    pinned = (
        f"server and load generator share core {cores['server']}"
        if cores["server"] == cores["load_generator"]
        else f"server on core {cores['server']}, load generator on core {cores['load_generator']}"
    )
    return "\n".join(
        (
            ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            f"{where['processor']}, {where['cores']} cores, {where['system']}",
            f"{pinned}; load average before: {where['load_average_before']}",
        )
    )


def ratios(runs: Sequence[Run], shape: Shape, server: Server, other: Server) -> list[float]:
    """``server``'s rate by ``other``'s, each pair from one round; empty if any run of the two is at fault."""
    ours, theirs = _of(runs, shape, server), _of(runs, shape, other)
    if not ours or not theirs or any(run.fault for run in (*ours, *theirs)):
        return []
    return [one.rate / another.rate for one, another in zip(ours, theirs, strict=True)]


def table(runs: Sequence[Run], shapes: Sequence[Shape], servers: Sequence[Server], *, on_one_core: bool) -> str:
    """Medians for each server in each shape, and how they compare with the peer."""
    head = ["shape", "server", "calls/s", "p50 µs", "p99 µs", f"x {PEER.name}", "remarks"]
    rows = []
    for shape in shapes:
        for server in servers:
            taken = _of(runs, shape, server)
            row = [shape.name, server.name]
            if fault := next((run.fault for run in taken if run.fault), None):
                # Its rate says nothing: who leaves calls lying has less to do.
                rows.append([*row, "", "", "", "", f"not compared: {fault.splitlines()[0]}"])
                continue
            row.append(f"{median(run.rate for run in taken):,.0f}")
            row += [f"{median(run.result[key] for run in taken):,.1f}" for key in ("p50_us", "p99_us")]
            against_peer = ratios(runs, shape, server, PEER) if server != PEER else []
            row.append(_spread(against_peer) if against_peer else "")
            if server == GMPRPC and shape.bar is not None and against_peer and on_one_core:
                reached = "reached" if median(against_peer) >= shape.bar else "not reached"
                row.append(f"bar {shape.bar:g} {reached}")
            rows.append(row)
    return lines(head, rows)


def self_check(runs: Sequence[Run], shapes: Sequence[Shape], servers: Sequence[Server]) -> str:
    """How the load generator at a server that does nothing compares with the fastest of the others."""
    others = [server for server in servers if server != C_ECHO]
    rows = []
    for shape in shapes:
        taken = _of(runs, shape, C_ECHO)
        if any(run.fault for run in taken):
            continue
        rate = median(run.rate for run in taken)
        own = median(run.result["generator_cpu"] / run.rate * 1e6 for run in taken)
        row = [shape.name, f"{rate:,.0f}", f"{own:.2f}"]
        rates = {
            server.name: median(run.rate for run in _of(runs, shape, server))
            for server in others
            if not any(run.fault for run in _of(runs, shape, server))
        }
        if rates:
            fastest = max(rates, key=rates.__getitem__)
            row.append(f"{rate / rates[fastest]:.2f} x {fastest}")
        rows.append(row)
    return lines(["shape", "calls/s at c-echo", "generator's µs per call", "the fastest server"], rows)


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: columns of figures, which name a unit, to the right, others to the left."""
    widths = [max(len(row[column]) for row in [head, *rows] if column < len(row)) for column in range(len(head))]
    is_figure = [any(unit in title for unit in ("/s", "µs", "KiB")) for title in head]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, is_figure, strict=False)  # A row may end early.
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    rule = ["-" * (width if right else min(width, 20)) for width, right in zip(widths, is_figure, strict=True)]
    return "\n".join(map(line, [head, rule, *rows]))


def _of(runs: Sequence[Run], shape: Shape, server: Server) -> list[Run]:
    return [run for run in runs if run.shape == shape and run.server == server]


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
