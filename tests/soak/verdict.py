"""What the two ledgers of a soak say: how each call ended for its caller, and how often it was carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tests.siege.report import Row, exactly, reported

from .programs.client import ANSWERED, ENDS, ERROR, IDEMPOTENT, LATE_UNSENT, LOST_UNSENT, TWICE, UNCONNECTED, WRONG


def verdict(ends: bytes, executions: Sequence[bytes], first_fault: str = "") -> Iterator[Row]:
    """Rows about calls of which ``ends`` has one byte each, and so has each server's ledger."""
    pairs = Counter(zip(ends, map(sum, zip(*executions, strict=True)), strict=True))

    def calls(condition: Callable[[int, int, bool], bool]) -> int:
        return sum(
            number
            for (end, times), number in pairs.items()
            if condition(end % IDEMPOTENT, times, bool(end & IDEMPOTENT))
        )

    what = f"of {len(ends):,} calls:"
    yield exactly(f"{what} never ended", calls(lambda end, *_: end == 0), 0)
    yield exactly(f"{what} ended twice", calls(lambda end, *_: end == TWICE), 0)
    yield exactly(f"{what} ended as they shouldn't", calls(lambda end, *_: end == WRONG), 0, first_fault=first_fault)
    yield exactly(
        f"{what} carried out twice, and not idempotent", calls(lambda _, times, again: times > 1 and not again), 0
    )
    yield exactly(
        f"{what} answered, and not carried out", calls(lambda end, times, _: end in (ANSWERED, ERROR) and not times), 0
    )
    unsent = (LATE_UNSENT, LOST_UNSENT, UNCONNECTED)
    yield exactly(
        f"{what} said not to have left, and carried out",
        calls(lambda end, times, _: end in unsent and times > 0),
        0,
        of_these_idempotent=calls(lambda end, times, again: end in unsent and times > 0 and again),
    )
    for number, name in enumerate(ENDS, 1):
        yield reported(f"{what} {name}", calls(lambda end, *_: end == number))  # noqa: B023 - called at once
    yield reported(
        f"{what} carried out more than once, and idempotent", calls(lambda _, times, again: times > 1 and again)
    )
