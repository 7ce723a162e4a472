"""A call that may go to several endpoints, one after the other: how long that may take, and what is raised then."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from .exceptions import CallTimeout, ConnectFailed, ConnectionClosed


class Errand:
    """A call, over all endpoints to which it goes."""

    __slots__ = (
        "_connect_timeout",
        "_idempotent",
        "_unsent_since",
        "_which",
        "begun",
        "cancel_on_timeout",
        "has_left",
        "method",
        "params",
        "timeout",
    )

    def __init__(
        self,
        method: str,
        params: tuple[Any, ...],
        *,
        timeout: float | None,
        which: str,
        connect_timeout: float | None,
        idempotent: bool = False,
        cancel_on_timeout: bool | None = None,
    ) -> None:
        self.method = method
        self.params = params
        #: Seconds for everything; None if there is no hurry.
        self.timeout = timeout
        #: Whether the endpoint is told when time is up; None leaves that to its client.
        self.cancel_on_timeout = cancel_on_timeout
        #: True once it has left, to whatever endpoint: it may have been carried out.
        self.has_left = False
        #: When the call was made.
        self.begun = self._unsent_since = perf_counter()
        self._which = which
        self._connect_timeout = connect_timeout
        self._idempotent = idempotent

    def time_left(self) -> float | None:
        """Seconds until it has to be answered; None if there is no hurry."""
        return None if self.timeout is None else max(0.0, self.timeout - (perf_counter() - self.begun))

    def patience(self) -> float | None:
        """Seconds to wait for an endpoint."""
        if self.timeout is not None:
            return self.time_left()
        if self._connect_timeout is None:
            return None
        return max(0.0, self._connect_timeout - (perf_counter() - self._unsent_since))

    def may_go_on_after(self, closed: ConnectionClosed) -> bool:
        """Whether it may be sent to another endpoint, now that a connection has failed; else raise ``closed``."""
        was_sent, closed.sent = closed.sent, closed.sent or self.has_left
        if not was_sent:
            return True
        self.has_left = True
        self._unsent_since = perf_counter()
        return self._idempotent

    def timed_out(self, late: CallTimeout) -> CallTimeout:
        """What to raise in place of ``late``: it says what the caller said, not what was left of that."""
        assert self.timeout is not None  # Or else nothing was given a time.
        timeout = CallTimeout(self.method, self.timeout, which=self._which, sent=late.sent or self.has_left)
        timeout.__cause__ = late.__cause__
        return timeout

    def found_none(self, cause: Exception | None) -> Exception:
        """What to raise when there was no endpoint in time."""
        error: CallTimeout | ConnectFailed
        if self.timeout is not None:
            error = CallTimeout(self.method, self.timeout, which=self._which, sent=self.has_left)
        else:
            why = "" if cause is None else f": {cause}"
            error = ConnectFailed(f"no endpoint was usable within {self._connect_timeout:g} s{why}", sent=self.has_left)
        error.__cause__ = cause
        return error
