"""The command: counts, compares with the baseline, prints a table.

The exit status is 1 if a call takes over 5 % more instructions than it was to, or if nothing could be counted. Where
valgrind or a baseline for this Python is missing, that is said and fails nothing, unless CI=true or
GMPRPC_REQUIRE_INTEROP is set.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from . import baselines, meter
from .baselines import Baseline, Comparison, compare
from .driver import CASES
from .meter import Measurement, MeterError

REFERENCES = {name: case.reference for name, case in CASES.items() if case.reference is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.instructions",
        description=__doc__,
        epilog=f"The cases are {', '.join(REFERENCES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--write", action="store_true", help="renew the baseline for this Python")
    only.add_argument(
        "--case", action="append", choices=REFERENCES, dest="cases", metavar="NAME", help="only this one; default: all"
    )
    options = parser.parse_args(arguments)

    if not meter.is_installed():
        return _missing("valgrind isn't installed: no instructions are counted")
    cases = options.cases or list(REFERENCES)
    try:
        measurement = meter.measure([*cases, *dict.fromkeys(REFERENCES[case] for case in cases)])
    except MeterError as exc:
        print(exc, file=sys.stderr)
        return 1
    python = ".".join(measurement.fingerprint["python"].split(".")[:2])
    if options.write:
        baselines.write(python, Baseline(measurement.fingerprint, measurement.instructions))
    baseline = baselines.load().get(python)
    comparisons = compare(measurement.instructions, baseline, REFERENCES)
    print(heading(measurement, baseline))
    print()
    print(table(comparisons, measurement, baseline))
    if baseline is None:
        return _missing(f"Python {python} has no baseline: --write writes one")
    if without := [comparison.case for comparison in comparisons if comparison.expected is None]:
        return _missing(f"no baseline for {', '.join(without)}: --write writes one")
    return 1 if any(comparison.has_grown for comparison in comparisons) else 0


def heading(measurement: Measurement, baseline: Baseline | None) -> str:
    """What was measured, with what, and how that differs from what the baseline was written with."""
    text = f"{measurement.subject}\n{_listing(measurement.fingerprint)}"
    if baseline is not None and baseline.fingerprint != measurement.fingerprint:
        now = measurement.fingerprint.items()
        text += f"\nbut the baseline has {_listing(dict(baseline.fingerprint.items() - now))}"
    return text


def table(comparisons: Sequence[Comparison], measurement: Measurement, baseline: Baseline | None) -> str:
    """Instructions for each call, the baseline (times what the reference has changed by), and the change."""
    rows = [("case", "instructions", "baseline", "change", "")]
    for comparison in comparisons:
        verdict = ""
        if comparison.has_grown:
            verdict = f"has grown by more than {baselines.TOLERANCE:.0%}"
        elif comparison.has_shrunk:
            verdict = "has shrunk: renew the baseline (--write)"
        rows.append(_row(comparison, verdict))
    for reference in dict.fromkeys(REFERENCES[comparison.case] for comparison in comparisons):
        then = None if baseline is None else baseline.instructions.get(reference)
        rows.append(_row(Comparison(reference, measurement.instructions[reference], then), ""))
    width = max(len(row[0]) for row in rows)
    lines = (
        f"{case:<{width}}  {now:>12}  {then:>8}  {change:>7}  {verdict}" for case, now, then, change, verdict in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(comparison: Comparison, verdict: str) -> tuple[str, str, str, str, str]:
    then = "-" if comparison.expected is None else f"{comparison.expected:,.0f}"
    change = "" if comparison.change is None else f"{comparison.change:+.1%}"
    return comparison.case, f"{comparison.instructions:,.0f}", then, change, verdict


def _listing(fingerprint: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {fingerprint[name]}" for name in sorted(fingerprint))


def _missing(what: str) -> int:
    """Say what is missing; the exit status that this makes."""
    is_failure = os.environ.get("CI") == "true" or bool(os.environ.get("GMPRPC_REQUIRE_INTEROP"))
    print(f"\n{'failed' if is_failure else 'skipped'}: {what}", file=sys.stderr)
    return 1 if is_failure else 0


if __name__ == "__main__":
    sys.exit(main())
