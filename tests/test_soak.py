"""The soak runs, and would notice if a call were lost, or carried out twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what the soak measures is read from /proc"
)

if sys.platform.startswith("linux"):
    from .soak.programs.client import (
        ANSWERED,
        ERROR,
        IDEMPOTENT,
        LATE,
        LATE_UNSENT,
        LOST,
        LOST_UNSENT,
        NOTIFIED,
        TWICE,
        UNCONNECTED,
        WRONG,
    )
    from .soak.verdict import verdict

AGAIN = IDEMPOTENT


def missed(end: int, *executions: int) -> list[str]:
    """The bars that are missed with one call that ended like this and was carried out so often by each server."""
    rows = list(verdict(bytes([end]), [bytes([times]) for times in executions]))
    return [row.what.partition(": ")[2] for row in rows if not row.is_passed]


def test_every_documented_end_passes() -> None:
    for end, times in [
        *((ANSWERED, 1), (ANSWERED + AGAIN, 1), (ANSWERED + AGAIN, 2), (ERROR, 1), (LATE, 0), (LATE, 1)),
        *((LATE_UNSENT, 0), (LOST, 0), (LOST, 1), (LOST + AGAIN, 2), (LOST_UNSENT, 0), (UNCONNECTED, 0)),
        *((NOTIFIED, 0), (NOTIFIED, 1)),
    ]:
        assert missed(end, times) == [], (end, times)


def test_every_other_end_is_found() -> None:
    assert missed(0, 1) == ["never ended"]
    assert missed(TWICE, 1) == ["ended twice"]
    assert missed(WRONG, 1) == ["ended as they shouldn't"]
    assert missed(WRONG + AGAIN, 1) == ["ended as they shouldn't"]
    for end in (ANSWERED, ERROR, LATE, LOST, NOTIFIED):
        assert missed(end, 2) == ["carried out twice, and not idempotent"]
        # Also where it was once by each of two servers.
        assert missed(end, 1, 1) == ["carried out twice, and not idempotent"]
    for end in (ANSWERED, ERROR, ANSWERED + AGAIN):
        assert missed(end, 0) == ["answered, and not carried out"]
    for end in (LATE_UNSENT, LOST_UNSENT, UNCONNECTED, LATE_UNSENT + AGAIN):
        assert missed(end, 1) == ["said not to have left, and carried out"]


def soak(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.soak", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_makes_so_many_calls_and_reports_on_them(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = soak("--calls", 4000, "--seed", 1, "--json", path)
    # It may miss a bar for memory: with so few calls, what is set up once isn't set up by the second quarter's end.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    figures = json.loads(path.read_text())
    assert (figures["calls"], figures["seed"]) == (4000, 1)
    ended = [row for row in figures["rows"] if row["what"].endswith("never ended")]
    assert sum(int(row["what"].split()[1].replace(",", "")) for row in ended) == 4000
    for row in figures["rows"]:
        assert row["is_passed"] or row["what"].startswith("growth in"), row
        assert f"{row['what']} " in done.stdout


def test_where_it_cant_write_its_figures_it_doesnt_begin(tmp_path: Path) -> None:
    done = soak("--json", tmp_path / "nowhere" / "figures.json")
    assert done.returncode == 2
    assert "there is no directory" in done.stderr
