"""The process in which atheris fuzzes one target: `engines.run_atheris` starts it, with what to do as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import atheris

from .case import Case, corpus
from .engines import Plan, Run, check_of
from .generator import Generator

# What libFuzzer is to make of it: an input that takes longer than so many seconds, or more memory than so many MiB, is
# a fault; inputs may be as large as the largest that the generator makes.
_SETTINGS = ("-timeout=60", "-rss_limit_mb=2048", "-max_len=65536", "-verbosity=0")


def main(task: str, *arguments: str) -> None:
    """Fuzz until the plan in ``task`` is carried out; does not return."""
    facts = json.loads(task)
    result = Path(facts.pop("result"))
    plan = Plan(**facts)
    with atheris.instrument_imports(include=["gmprpc"]):
        check = check_of(plan.target)
    run = Run(plan, check)
    streams = list(corpus().values())

    def test_one_input(data: bytes) -> None:
        if run.is_over():
            # Nothing else ends libFuzzer without its taking the input for a fault.
            result.write_text(json.dumps(asdict(run.tally)))
            os._exit(0)
        run.take(Case.of(data))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            mutated: bytes = atheris.Mutate(data, max_size)
            return mutated
        case = Case.of(data)
        generator = Generator(random, streams)
        stream = generator.stream() if random.random() < 0.05 else generator.mutated(case.stream)
        if random.random() < 0.2:
            return bytes(Case.chosen(random, stream))[:max_size]
        return bytes(Case(case.options, case.limits, case.cuts, stream))[:max_size]

    settings = [*_SETTINGS, f"-seed={plan.seed}"]
    atheris.Setup([sys.argv[0], *arguments, *settings], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
