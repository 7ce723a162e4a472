"""A timer that goes off on time: the loop's own may be a millisecond late, for which a quick server isn't to blame."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import Any

# Of Linux's <time.h> and <sys/timerfd.h>. Python has them from 3.13 on.
_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

_SECOND = 1_000_000_000
_READ = 1


class _Time(ctypes.Structure):
    """The system's ``struct itimerspec``."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Alarm:
    """Calls ``callback`` in the hub once the clock has come to a time that was set, as ``perf_counter_ns`` tells it."""

    def __init__(self, loop: Any, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._fd = _timer_fd()
        self._watcher = loop.io(self._fd, _READ) if self._fd >= 0 else None
        if self._watcher is not None:
            self._watcher.start(self._on_expired)

    def set(self, at: int) -> None:
        """Go off at ``at``, and not when it was set before; at once if that has passed."""
        if self._fd >= 0:
            time = _Time(0, 0, *divmod(at, _SECOND))
            _libc.timerfd_settime(self._fd, _TIMER_ABSTIME, ctypes.byref(time), None)
            return
        if self._watcher is not None:
            self._watcher.close()
        self._watcher = self._loop.timer(max(0, at - perf_counter_ns()) / _SECOND)
        self._watcher.start(self._callback, update=True)  # The loop's idea of now may be a little old.

    def close(self) -> None:
        """Never go off again."""
        if self._watcher is not None:
            self._watcher.close()
        if self._fd >= 0:
            os.close(self._fd)
        self._watcher, self._fd = None, -1

    def _on_expired(self) -> None:
        with suppress(BlockingIOError):  # It was set again meanwhile.
            os.read(self._fd, 8)
            self._callback()


_libc: Any = ctypes.CDLL(None, use_errno=True)


def _timer_fd() -> int:
    """A descriptor that is readable from a certain time on, or -1 where the system doesn't have such a thing."""
    # What the system calls "monotonic" has to be the clock that Python's counter reads.
    if not sys.platform.startswith("linux") or not hasattr(_libc, "timerfd_create"):
        return -1
    return int(_libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS))
