"""How long to wait before the next attempt; it knows neither clock nor sleep, nor what is attempted."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable

# 2 ** 63 times any interval is for ever, and it still is a float.
_MAX_DOUBLINGS = 63


class Backoff:
    """Waits that grow with each failure in a row: exponential, with full jitter.

    After the n-th failure a wait is anything from 0 to ``interval * 2**n`` seconds, or to ``max_interval`` where that
    is less, so that many who have failed at one moment don't come back at one moment. ("Exponential Backoff And
    Jitter", AWS Architecture Blog, 2015: full jitter makes the fewest attempts.) ``random()`` gives a float in [0, 1).
    """

    __slots__ = ("_interval", "_max_interval", "_random", "failures")

    def __init__(self, interval: float, max_interval: float, random: Callable[[], float] = randomness.random) -> None:
        self._interval = interval
        self._max_interval = max_interval
        self._random = random
        #: How many attempts in a row have failed.
        self.failures = 0

    def next(self) -> float:
        """An attempt has failed: how many seconds to wait before the next."""
        self.failures += 1
        return self._random() * min(self._max_interval, self._interval * 2.0 ** min(self.failures, _MAX_DOUBLINGS))

    def reset(self) -> None:
        """An attempt has succeeded: the next wait is a short one again."""
        self.failures = 0
