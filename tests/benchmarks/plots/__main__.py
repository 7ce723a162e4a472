"""Draw the plots that the README shows, from nothing but the JSON that `python -m tests.benchmarks` has written.

Who is missing in a plot is named below it; a plot of which nothing was measured is skipped by name. The same JSON
always makes the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .columns import calls, clients, memory
from .drawing import Drawing
from .growth import growth
from .latency import latency
from .medians import Summary

DIRECTORY = Path(__file__).parent.parent / "figures"

PLOTS: dict[str, Callable[[Summary], Drawing | None]] = {
    "calls-shared-core": partial(calls, cores=1),
    "calls-core-each": partial(calls, cores=2),
    "latency": latency,
    "growth": growth,
    "clients": clients,
    "memory": memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plots", description=__doc__)
    parser.add_argument("json", type=Path, metavar="JSON", help="what `python -m tests.benchmarks` has written")
    parser.add_argument(
        "--to", type=Path, default=DIRECTORY, metavar="DIRECTORY", help="default: tests/benchmarks/figures"
    )
    options = parser.parse_args(arguments)
    try:
        summary = Summary(json.loads(options.json.read_text()))
    except (OSError, ValueError) as exc:
        parser.error(f"can't read {options.json}: {exc}")
    except (AttributeError, KeyError, TypeError) as exc:
        parser.error(f"{options.json} isn't what `python -m tests.benchmarks` writes: {exc!r}")
    try:
        options.to.mkdir(exist_ok=True)
        for name, draw in PLOTS.items():
            path = options.to / f"{name}.svg"
            if (drawing := draw(summary)) is None:
                stays = "; the older one stays" if path.exists() else ""
                print(f"{path} isn't drawn: nothing was measured for it{stays}")
                continue
            path.write_text(drawing.svg(), encoding="utf-8")
            print(path)
    except OSError as exc:
        parser.error(f"--to: {exc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
