"""Counts the instructions of the driver's cases: runs it under valgrind, and reads what that has written.

It knows nothing of baselines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any

DRIVER = Path(__file__).with_name("driver.py")

# Seconds; a case takes about three. Beyond them something is wrong.
_PATIENCE = 600.0

# What the driver calls between measurements: callgrind writes what it has counted since the last time.
_MARK = "getppid"


class MeterError(Exception):
    """Instructions can't be counted; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """What was counted, and with what."""

    #: Where gmprpc was found.
    subject: str
    #: The versions of everything that isn't gmprpc.
    fingerprint: dict[str, str]
    #: Instructions for each call, by case: the median over several layouts of what lies in memory.
    instructions: dict[str, float]


def is_installed() -> bool:
    """Whether instructions can be counted here."""
    return shutil.which("valgrind") is not None


def play(
    directory: Path, cases: Sequence[str], *, driver: Path = DRIVER, tool: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run ``cases``, with ``tool`` in front; returns what the driver says about itself, and about each.

    Raises:
        MeterError: it fails.
    """
    # Without the directories of the driver and of the caller on sys.path: what is installed is measured, or what
    # PYTHONPATH leads to.
    command = [*tool, sys.executable, "-P", str(driver), str(directory), *cases]
    # In a session of its own, that nothing may outlive it which it has forked off.
    with subprocess.Popen(
        command, env=_environment(directory), stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=_PATIENCE)
        except BaseException as exc:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(exc, subprocess.TimeoutExpired):
                raise MeterError(f"no end after {_PATIENCE:g} s: {cases}") from None
            raise
    if process.returncode:
        raise MeterError(f"{driver.name} ended with {process.returncode}:\n{output}{errors}")
    heading, *runs = map(json.loads, output.splitlines())
    return heading, runs


def _environment(directory: Path) -> dict[str, str]:
    """Nothing that varies: all that Python is told has its place in memory, and moves what comes after it."""
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return inherited | {
        # `rep movsb` counts as an instruction for each byte, and not every processor's C library uses it.
        "GLIBC_TUNABLES": ":".join(f"glibc.cpu.x86_rep_{name}_threshold={2**62}" for name in ("movsb", "stosb")),
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "PYTHONPYCACHEPREFIX": str(directory / "bytecode"),
    }


def measure(cases: Sequence[str]) -> Measurement:
    """Count the instructions for each call in ``cases``.

    Raises:
        MeterError: valgrind isn't there, or the driver fails.
    """
    if not is_installed():
        raise MeterError("valgrind isn't installed")
    with tempfile.TemporaryDirectory(prefix="gmprpc-") as name:
        directory = Path(name)
        play(directory, ())  # Writes the bytecode: under valgrind compiling would take longer than all the rest.
        counts = directory / "counts"
        tool = ["valgrind", "-q", "--tool=callgrind", f"--dump-before={_MARK}", f"--callgrind-out-file={counts}.%p"]
        heading, runs = play(directory, cases, tool=tool)
        layouts: dict[str, list[float]] = {}
        for run in runs:
            few, many = (_total(Path(f"{counts}.{run['pid']}.{part}")) for part in (2, 3))
            layouts.setdefault(run["case"], []).append((many - few) / (run["many"] - run["few"]))
        instructions = {case: round(median(each), 1) for case, each in layouts.items()}
        return Measurement(heading["gmprpc"], {**heading["fingerprint"], "valgrind": _version()}, instructions)


def _version() -> str:
    output = subprocess.run(["valgrind", "--version"], capture_output=True, check=True, text=True).stdout
    return output.strip().removeprefix("valgrind-")


def _total(path: Path) -> int:
    """How many instructions callgrind has counted in the part of a run that ``path`` tells of."""
    for line in path.read_text().splitlines():
        name, _, number = line.partition(":")
        if name == "totals":
            return int(number)
    raise MeterError(f"{path.name} has no total")
