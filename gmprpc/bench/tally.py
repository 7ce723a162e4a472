"""What has been counted: calls, how long they took, and what went wrong; knows no sockets and no clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

# Durations are kept to so many binary digits: to 0.2 %, and any number of them in little memory.
_DIGITS = 10

# So many different errors are told apart. Picked arbitrarily.
_MAX_REASONS = 20
#: What all further ones are called.
OTHER: Final = "other errors"


class Ending(StrEnum):
    """Why the load has ended; of several, the last one of these counts."""

    #: All calls were made, or the time was over.
    DONE = "done"
    #: Somebody has broken it off.
    INTERRUPTED = "interrupted"
    #: Calls were left without an answer.
    STALLED = "stalled"
    #: The server has closed every connection.
    LOST = "lost"
    #: The server has no such method.
    UNKNOWN_METHOD = "unknown method"


@dataclass
class Tally:
    """Counts of measured calls. Durations are nanoseconds, and how often each was seen."""

    #: How many were answered with a result.
    answered: int = 0
    #: How long these took.
    latencies: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    #: With a rate: how much later than they should calls were sent, for no other reason than this program.
    lateness: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    #: Calls that have failed, and answers to nothing, by what was wrong.
    errors: Counter[str] = field(default_factory=Counter)
    #: Connections that were lost, by the reason.
    lost: Counter[str] = field(default_factory=Counter)
    #: Bytes, without what TLS adds.
    sent: int = 0
    received: int = 0

    def record(self, duration: int, count: int) -> None:
        """So many calls were answered after so long."""
        # As `_rounded`, without a call for each call.
        if (excess := duration.bit_length() - _DIGITS) > 0:
            duration = duration >> excess << excess
        self.latencies[duration] += count
        self.answered += count

    def record_late(self, duration: int, count: int) -> None:
        """So many calls were sent so late."""
        self.lateness[_rounded(duration)] += count

    def fail(self, reason: str, count: int = 1) -> None:
        """So many calls have failed."""
        # An error may have a number of its own in its text, each time.
        is_known = reason in self.errors or len(self.errors) < _MAX_REASONS
        self.errors[reason if is_known else OTHER] += count

    def add(self, other: Tally) -> None:
        """Count what ``other`` has counted, too."""
        self.answered += other.answered
        for mine, others in ((self.latencies, other.latencies), (self.lateness, other.lateness)):
            for duration, count in others.items():
                mine[duration] += count
        for reason, count in other.errors.items():
            self.fail(reason, count)
        self.lost.update(other.lost)
        self.sent += other.sent
        self.received += other.received


def _rounded(duration: int) -> int:
    excess = duration.bit_length() - _DIGITS
    return duration >> excess << excess if excess > 0 else duration


def percentiles_of(durations: dict[int, int], *percents: float) -> list[int]:
    """Below which of ``durations`` so many percent of them are, for each of ``percents``, in order; 0 of none."""
    total = sum(durations.values())
    found: list[int] = []
    counted, duration = 0, 0
    ascending = iter(sorted(durations.items()))
    for percent in percents:
        while counted < total * percent / 100:
            duration, count = next(ascending)
            counted += count
        found.append(duration)
    return found
