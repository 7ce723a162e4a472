"""What plots with a row for each participant have in common."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.bars import GMPRPC

from .drawing import MARGIN, WIDTH, Drawing
from .medians import Summary

# Cores -> (how a sentence says it, how a heading does).
CORES = {
    1: ("server and load generator share one core", "one shared core"),
    2: ("server and load generator have a core each", "a core each"),
}

# Pixels: for names, and for the height of a row.
LABELS = 152
ROW = 22


def write_rows(summary: Summary, drawing: Drawing, names: Sequence[str], top: float) -> dict[str, float]:
    """Write ``names`` to the left, in groups, and say where the middle of each row is."""
    rows = {}
    drawing.y = top
    group = None
    for name in names:
        if group != (group := "MessagePack-RPC" if summary.speaks_msgpack_rpc(name) else "other protocols"):
            drawing.text(MARGIN, drawing.y + 15, group, "quiet small")
            drawing.y += ROW
        if name == GMPRPC:
            drawing.bar(MARGIN - 8, drawing.y, WIDTH - 2 * MARGIN + 16, ROW, "band")
        rows[name] = drawing.y + ROW / 2
        drawing.text(MARGIN, rows[name] + 4, name, weight(name))
        drawing.y += ROW
    return rows


def weight(name: str) -> str:
    """How what belongs to ``name`` is written."""
    return "ink strong" if name == GMPRPC else "ink"
