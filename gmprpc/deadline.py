"""A deadline that is put off as long as things happen.

It knows nothing of what it is for, and imports no event loop: it is given one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Deadline:
    """Has ``callback()`` called by the loop when it was put off last ``seconds`` ago; None never has.

    It takes no memory for a timer until it is used.
    """

    __slots__ = ("_callback", "_loop", "_timer", "is_set", "seconds")

    def __init__(self, loop: Any, seconds: float | None, callback: Callable[[], Any]) -> None:
        self.seconds = seconds
        #: True while the time runs.
        self.is_set = False
        self._loop = loop
        self._callback = callback
        self._timer: Any = None

    def put_off(self, seconds: float | None = None) -> None:
        """Let the time run from the beginning, or just ``seconds`` of it."""
        if self.seconds is None:
            return
        self.lift()
        self._timer = self._loop.timer(self.seconds if seconds is None else seconds)
        self._timer.start(self._pass, update=True)  # From now on, not from when the loop last looked at the clock.
        self.is_set = True

    def lift(self) -> None:
        """Let no time run until it is put off again."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self.is_set = False

    def _pass(self) -> None:
        self.lift()
        self._callback()
