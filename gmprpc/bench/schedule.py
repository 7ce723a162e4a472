"""When each call of an open loop should be sent; numbers only."""

from __future__ import annotations

import sys
from math import ceil

from .plan import Plan

_SECOND = 1_000_000_000


class Schedule:
    """The calls of one process of an open loop, numbered from 0 on; times are nanoseconds of one clock."""

    def __init__(self, plan: Plan, start: int) -> None:
        """The first process's first call is at ``start``, and the processes take turns."""
        assert plan.rate is not None
        self._interval = _SECOND * plan.processes / plan.rate
        self._start = start
        self._offset = self._interval * plan.place / plan.processes
        #: From when on calls count.
        self.begin = start + round(plan.warm_up * _SECOND)
        #: The first call that counts.
        self.first = self._number(self.begin)
        #: How many calls there are, those of the warm-up too.
        self.calls = sys.maxsize
        #: When no more calls begin; None if that is when all have been made.
        self.end: int | None = None
        if plan.calls is not None:
            self.calls = self.first + plan.calls
        elif plan.duration is not None:
            self.end = self.begin + round(plan.duration * _SECOND)
            self.calls = self._number(self.end)

    def time(self, number: int) -> int:
        """When the call ``number`` should be sent."""
        return self._start + round(self._offset + number * self._interval)

    def due(self, now: int) -> int:
        """How many calls should have been sent by ``now``."""
        return min(self.calls, self._number(now + 1))

    def _number(self, time: int) -> int:
        """The first call that isn't before ``time``."""
        number = max(0, ceil((time - self._start - self._offset) / self._interval))
        # The quotient may be off by as much as floating point is.
        if number and self.time(number - 1) >= time:
            return number - 1
        return number if self.time(number) >= time else number + 1
