"""The siege runs and measures what it says it does; whether the server withstands it is for the siege to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what the siege measures is read from /proc"
)


def siege(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.siege", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_trial_reports_figures_bars_and_how_a_bystander_fared(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = siege("--short", "zeros", "names", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all bars kept to\n")
    rows = json.loads(path.read_text())["rows"]
    assert {row["trial"] for row in rows} == {"zeros", "names"}
    for trial in ("zeros", "names"):
        figures = {row["what"]: row for row in rows if row["trial"] == trial}
        (bystander,) = [row for what, row in figures.items() if what.startswith("bystander")]
        assert bystander["details"]["calls"] > 0
        assert sum(bool(row["bar"]) for row in figures.values()) >= 2
    for row in rows:
        assert row["is_passed"]
        assert f"{row['what']} " in done.stdout


def test_a_trial_that_nobody_knows_is_an_error() -> None:
    done = siege("--short", "tickling")
    assert done.returncode == 2
    assert "there is no trial tickling" in done.stderr
