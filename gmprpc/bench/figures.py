"""What the tallies of all processes amount to: rates, percentiles, and whose limits they show; needs hdrhistogram."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, log10
from typing import Any

from hdrh.histogram import HdrHistogram

from .load import Result
from .tally import Ending, Tally, percentiles_of

_SECOND = 1_000_000_000

# Up to an hour, to three digits.
_LONGEST = 3600 * _SECOND
_DIGITS = 3

# In the order of what has to be told first.
_ENDINGS = (Ending.UNKNOWN_METHOD, Ending.LOST, Ending.STALLED, Ending.INTERRUPTED, Ending.DONE)

# A process that ran for so much of the time could hardly have done more, and one that waited so long for a core might
# have. Picked arbitrarily.
_BUSY = 0.9
_WAITED = 0.1
# The loop needs some 50 µs to wake up; calls that were sent so much later say nothing of the server, in seconds. Picked
# arbitrarily.
_LATE = 0.001

# Where the bars of a histogram may end, in each decade: as fine as leaves no more bars than can be seen at a glance.
_STEPS: Sequence[Sequence[float]] = (
    (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2),
    (1.0, 1.5, 2.2, 3.3, 4.7, 6.8),
    (1.0, 2.0, 5.0),
    (1.0,),
)
_MAX_BARS = 16


class Durations:
    """How long something took, often. All are seconds, None where there was nothing."""

    def __init__(self, counts: Mapping[int, int]) -> None:
        """``counts`` says how often so many nanoseconds were seen."""
        self._counts = {min(duration, _LONGEST): count for duration, count in sorted(counts.items())}
        self._histogram: Any = HdrHistogram(1, _LONGEST, _DIGITS)
        for duration, count in counts.items():
            self._histogram.record_value(min(duration, _LONGEST), count)
        #: How many there were.
        self.count = sum(counts.values())

    @property
    def mean(self) -> float | None:
        """The average."""
        if not self.count:
            return None
        return sum(duration * count for duration, count in self._counts.items()) / self.count / _SECOND

    @property
    def min(self) -> float | None:
        """The shortest."""
        return min(self._counts) / _SECOND if self.count else None

    @property
    def max(self) -> float | None:
        """The longest."""
        return max(self._counts) / _SECOND if self.count else None

    def percentile(self, percent: float) -> float | None:
        """What so many percent of them took no longer than."""
        if not self.count:
            return None
        found: int = self._histogram.get_value_at_percentile(percent)
        return min(found, max(self._counts)) / _SECOND

    def bars(self) -> list[tuple[float, float, int]]:
        """How many lay between which two times, those with none in between too."""
        if not self.count:
            return []
        durations = list(self._counts)
        for steps in _STEPS:
            limits = _limits(durations[0], durations[-1], steps)
            if len(limits) <= _MAX_BARS + 1:
                break
        places = [bisect_left(durations, limit) for limit in limits]
        return [
            (low / _SECOND, high / _SECOND, sum(self._counts[duration] for duration in durations[first:last]))
            for (low, high), (first, last) in zip(pairwise(limits), pairwise(places), strict=True)
        ]

    def encoded(self) -> str:
        """All of it, in HdrHistogram's own form (V2, base64), which its other tools read; in nanoseconds."""
        text: bytes | str = self._histogram.encode()
        return text.decode() if isinstance(text, bytes) else text


def _limits(low: int, high: int, steps: Sequence[float]) -> list[float]:
    """Round numbers, from the last one up to ``low`` to the first one beyond ``high``."""
    limits = [10.0**decade * step for decade in range(floor(log10(low or 1)), 20) for step in steps]
    first = max(index for index, limit in enumerate(limits) if index == 0 or limit <= low)
    last = next(index for index, limit in enumerate(limits) if limit > high)
    return limits[first : last + 1]


@dataclass(frozen=True)
class Process:
    """What one process had of the machine; 1.0 is all of the time."""

    #: For how much of it it ran.
    busy: float
    #: For how much of it it would have run, if it had had a core.
    waited: float


class Figures:
    """What came of it."""

    def __init__(self, results: Iterable[Result]) -> None:
        results = list(results)
        tally = Tally()
        for result in results:
            tally.add(result.tally)
        #: Why it has ended.
        self.ending = min((result.ending for result in results), key=_ENDINGS.index)
        #: For how long calls counted.
        self.seconds = max(result.seconds for result in results)
        #: How many were answered with a result.
        self.calls = tally.answered
        #: How many failed, and answers to nothing, by what was wrong; the most frequent first.
        self.errors: dict[str, int] = dict(tally.errors.most_common())
        self.error_count = sum(self.errors.values())
        #: How many connections were lost, by the reason.
        self.lost: dict[str, int] = dict(tally.lost.most_common())
        #: Bytes, without what TLS adds.
        self.sent, self.received = tally.sent, tally.received
        #: How long calls took that were answered with a result.
        self.latencies = Durations(tally.latencies)
        #: How much later than they should calls were sent that might have been: at the median, at the 99th percentile
        #: and at most; nothing without a rate.
        self.lateness = (
            [late / _SECOND for late in percentiles_of(tally.lateness, 50, 99, 100)] if tally.lateness else []
        )
        self.processes = [Process(result.busy, result.waited) for result in results]

    @property
    def rate(self) -> float:
        """How many calls a second were answered with a result."""
        return self.calls / self.seconds if self.seconds else 0.0

    def notices(self) -> list[str]:
        """What limits these figures beside the server, in sentences."""
        notices = []
        busiest = max(process.busy for process in self.processes)
        longest_waited = max(process.waited for process in self.processes)
        if busiest >= _BUSY:
            notices.append(
                f"The load generator itself was the bottleneck: it kept a core busy for {busiest:.0%} of the time. The "
                "server may be able to do more; --processes gives it more load."
            )
        if longest_waited >= _WAITED:
            notices.append(
                f"The load generator had to wait for a core for {longest_waited:.0%} of the time: others have used it, "
                "maybe the server. That is part of the latencies."
            )
        if self.lateness and self.lateness[1] > _LATE:
            notices.append(
                f"The load generator itself was late: 1 % of the calls left {1000 * self.lateness[1]:.3g} ms or more "
                "after their time. That is part of the latencies."
            )
        return notices
