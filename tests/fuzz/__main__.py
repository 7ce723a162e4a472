"""Feed a target inputs that are almost MessagePack-RPC, and tell what it does that it shouldn't.

The targets are the decoder, fed in many splits, and a live connection over a pair of sockets. The engine "random" is
seeded: the same seed makes the same inputs. "atheris" is guided by the coverage of gmprpc, where it is installed.
"all" is both in turn, each for as long as is said.

A finding is shown with its bytes, and in short. The exit status is 0 if there was none, 1 if there was one, and 2 if
the engine that was asked for isn't installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .case import Case, Tally
from .engines import TARGETS, Plan, Run, check_of, in_time, is_atheris_installed, run_atheris, run_random

ENGINES = {"random": run_random, "atheris": run_atheris}

_DEFAULT_INPUTS = 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--engine", choices=[*ENGINES, "all"], default="random", help="default: %(default)s")
    parser.add_argument(
        "--inputs", type=int, metavar="N", help=f"default: {_DEFAULT_INPUTS:,}, or any number within --seconds"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="for each engine; default: as long as it takes")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--replay", type=bytes.fromhex, metavar="HEX", help="just this input, as a finding shows it")
    options = parser.parse_args(arguments)
    if options.inputs is None and options.seconds is None:
        options.inputs = _DEFAULT_INPUTS

    plan = Plan(options.target, options.seed, options.inputs, options.seconds)
    if options.replay is not None:
        run = Run(plan, in_time(check_of(plan.target)))
        run.take(Case.of(options.replay))
        return _close(f"{plan.target}, one input", run.tally)

    engines = [*ENGINES] if options.engine == "all" else [options.engine]
    if "atheris" in engines and not is_atheris_installed():
        print(f"{plan.target}: atheris isn't installed here, so its engine doesn't run", flush=True)
        engines.remove("atheris")
        if not engines:
            return 2
    return max(_close(f"{plan.target}, {name}, seed {plan.seed}", ENGINES[name](plan)) for name in engines)


def _close(what: str, tally: Tally) -> int:
    """Say what came of it; returns the exit status for it."""
    print(f"{what}: {tally}", flush=True)
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
