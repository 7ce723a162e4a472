"""A virtual environment for each peer: made when it is first needed, used again while it is what the table asks for.

It knows nothing of servers and of measuring. Who can't be had is an `Absence` that says why, and nobody else's concern.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .participants import Participant

# Written when everything is installed, so that what was broken off isn't taken for an environment.
_STAMP = "installed.json"

# Seconds for a step: building mprpc from source takes half a minute.
_PATIENCE = 900.0

# How many are built at a time; most of it is waiting for packages.
_AT_A_TIME = 4


class Absence(Exception):
    """Why a participant can't take part."""


class Environments:
    """The virtual environments in a directory, each named after its participant."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._pythons: dict[str, Path | Absence] = {}

    def prepare(self, participants: Sequence[Participant], say: Callable[[str], None] = lambda text: None) -> None:
        """Make what is missing, several at a time; `python` then knows the outcome, good or bad."""
        wanted = [participant for participant in participants if participant.name not in self._pythons]
        with ThreadPoolExecutor(_AT_A_TIME) as executor:
            outcomes = executor.map(lambda participant: self._outcome(participant, say), wanted)
            for participant, outcome in zip(wanted, outcomes, strict=True):
                self._pythons[participant.name] = outcome

    def python(self, participant: Participant) -> Path:
        """The interpreter that runs ``participant``.

        Raises:
            Absence: there is none.
        """
        if participant.name not in self._pythons:
            self.prepare([participant])
        outcome = self._pythons[participant.name]
        if isinstance(outcome, Absence):
            raise outcome
        return outcome

    def versions(self, participant: Participant) -> dict[str, str]:
        """The version of that interpreter, and of everything that its environment has.

        Raises:
            Absence: there is none.
        """
        code = "import platform; print(platform.python_implementation(), platform.python_version())"
        implementation, version = _run(self.python(participant), "-c", code).split()
        return {implementation: version} | dict(pin.split("==") for pin in participant.requirements)

    def _outcome(self, participant: Participant, say: Callable[[str], None]) -> Path | Absence:
        if not participant.has_environment:
            return Path(sys.executable)
        try:
            return self._environment(participant, say)
        except Absence as absence:
            return absence

    def _environment(self, participant: Participant, say: Callable[[str], None]) -> Path:
        base = _base_python(participant)
        directory = self._directory / participant.name
        python = directory / "bin" / "python"
        stamp = directory / _STAMP
        wanted = {
            "base": str(base),
            "build_requirements": list(participant.build_requirements),
            "requirements": list(participant.requirements),
        }
        if _read(stamp) == wanted and _version(python) is not None:
            return python
        say(f"installing {participant.name} with Python {_version(base)}")
        shutil.rmtree(directory, ignore_errors=True)
        _run(base, "-m", "venv", directory)
        for requirements, options in (
            (participant.build_requirements, []),
            # The lists are complete, and an author's upper or lower bounds are overruled knowingly. Old packages are
            # built with the tools that are named, not with those of today.
            (participant.requirements, ["--no-build-isolation"] if participant.build_requirements else []),
        ):
            if requirements:
                pip = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps")
                _run(python, *pip, *options, *requirements)
        stamp.write_text(json.dumps(wanted, indent=1) + "\n")
        return python


def _base_python(participant: Participant) -> Path:
    """An interpreter of a version that will do, outside any virtual environment."""
    if not participant.pythons:
        # That of a virtual environment makes others as well, but they would depend on where this one is.
        return Path(sys.executable).resolve()
    for version in participant.pythons:
        for candidate in _candidates(version):
            if _version(candidate) == version:
                return candidate.resolve()
    raise Absence(f"there is no Python {' or '.join(participant.pythons)}")


def _candidates(version: str) -> Iterator[Path]:
    """Where Python ``version`` may be: on PATH, and where pyenv keeps those that aren't active."""
    if found := shutil.which(f"python{version}"):
        yield Path(found)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(root.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)


def _version(python: Path) -> str | None:
    """The version of an interpreter, as "3.8"; None if it doesn't run, as pyenv's shims often don't."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _run(*command: str | Path) -> str:
    """What a command prints.

    Raises:
        Absence: it failed.
    """
    # What is said of Python's modules here isn't meant for another Python.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Absence(str(exc)) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        # pip says the reason first and explains it afterwards.
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise Absence((errors or lines)[-1])
    return done.stdout


def _read(path: Path) -> Any:
    """The JSON in a file; None if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
