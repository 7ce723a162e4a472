"""What makes the inputs: a seeded source of random numbers, or atheris, which is guided by the coverage."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from .case import Case, Check, Finding, Tally, corpus, minimised
from .generator import Generator

#: The targets by name; each is a module with a function ``check``, imported late so that it can be instrumented.
TARGETS = {"decoder": "tests.fuzz.decoder", "connection": "tests.fuzz.connection"}

# Where so much is wrong, more of it says nothing new.
_MAX_FINDINGS = 10

# Nothing takes so many seconds: picked arbitrarily, and longer than what the target of connections waits.
_DEADLINE = 30.0

# Of longer inputs no more is shown; the seed makes them again.
_SHOWN_SIZE = 4096

# Of how many streams in the corpus atheris gets each with other choices.
_CHOICES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to go on: for ``inputs``, or for ``seconds``, whichever is over first; None is for ever."""

    target: str
    seed: int
    inputs: int | None
    seconds: float | None


class Run:
    """Inputs given to one target, counted, with what was found."""

    def __init__(self, plan: Plan, check: Check) -> None:
        self.plan = plan
        self.check = check
        self.tally = Tally()
        self._ends_at = None if plan.seconds is None else time.monotonic() + plan.seconds

    def is_over(self) -> bool:
        """True when there is nothing more to do."""
        tally, plan = self.tally, self.plan
        return (
            tally.findings >= _MAX_FINDINGS
            or (plan.inputs is not None and tally.inputs >= plan.inputs)
            or (self._ends_at is not None and time.monotonic() >= self._ends_at)
        )

    def take(self, case: Case) -> None:
        """Give the target one more input, and tell what is wrong with it."""
        self.tally.inputs += 1
        try:
            self.check(case, self.tally)
        except Exception as exc:
            self.tally.findings += 1
            self._tell(case, exc)

    def _tell(self, case: Case, exc: Exception) -> None:
        def is_finding(shorter: Case) -> bool:
            try:
                self.check(shorter, Tally())
            except Exception as other:
                return _gist(other) == _gist(exc)
            return False

        what = str(exc) if isinstance(exc, Finding) else "".join(traceback.format_exception(exc))
        shortest = bytes(minimised(case, is_finding)).hex()
        print(
            f"FINDING in input {self.tally.inputs} of seed {self.plan.seed}: {what}\n"
            f"  the input: {_shown(bytes(case))}\n"
            f"  in short:  {shortest}\n"
            f"  to see it: python -m tests.fuzz {self.plan.target} --replay {shortest}",
            flush=True,
        )


def _gist(exc: Exception) -> str:
    """What of ``exc`` is the same for a shorter input."""
    return f"{type(exc).__name__}: {re.sub(r'[0-9]+', '', str(exc))[:20]}"


def _shown(data: bytes) -> str:
    text = data.hex()
    return text if len(text) <= _SHOWN_SIZE else f"{text[:_SHOWN_SIZE]}... ({len(data)} bytes)"


def check_of(target: str) -> Check:
    """What checks the inputs of ``target``."""
    check: Check = importlib.import_module(TARGETS[target]).check
    return check


def in_time(check: Check, seconds: float = _DEADLINE) -> Check:
    """``check``, for which an input that takes longer than ``seconds`` is a finding; for the main thread."""

    def ring(*_: object) -> NoReturn:
        raise Finding(f"it isn't done after {seconds:g} s")

    def check_in_time(case: Case, tally: Tally) -> None:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            check(case, tally)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return check_in_time


def run_random(plan: Plan) -> Tally:
    """Inputs from a seeded source: the same seed, the same inputs."""
    run = Run(plan, in_time(check_of(plan.target)))
    for case in cases(plan.seed):
        if run.is_over():
            break
        run.take(case)
    return run.tally


def cases(seed: int) -> Iterator[Case]:
    """Inputs without end, each made by itself from ``seed`` and its number."""
    streams = list(corpus().values())
    number = 0
    while True:
        number += 1
        random = Random(f"{seed}/{number}")
        yield Case.chosen(random, Generator(random, streams).stream())


def is_atheris_installed() -> bool:
    """Whether there can be inputs that are guided by the coverage."""
    return importlib.util.find_spec("atheris") is not None


def run_atheris(plan: Plan) -> Tally:
    """Inputs that atheris makes, in a process of their own: libFuzzer ends it, not its caller."""
    with tempfile.TemporaryDirectory() as directory:
        seeds, result = Path(directory, "corpus"), Path(directory, "result")
        seeds.mkdir()
        random = Random(plan.seed)
        for name, stream in corpus().items():
            for number in range(_CHOICES):
                (seeds / f"{name}-{number}").write_bytes(bytes(Case.chosen(random, stream)))
        task = json.dumps({**asdict(plan), "result": str(result)})
        command = [sys.executable, "-m", "tests.fuzz.guided", task, str(seeds), f"-artifact_prefix={directory}/fault-"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        if done.returncode == 0:
            return Tally(**json.loads(result.read_text()))
        # The process has died of it, or hung: libFuzzer has kept the input.
        print(f"FINDING: atheris ended with {done.returncode}\n{done.stderr[-4000:]}")
        for fault in Path(directory).glob("fault-*"):
            print(f"  the input: {fault.read_bytes().hex()}", flush=True)
        return Tally(findings=1)
