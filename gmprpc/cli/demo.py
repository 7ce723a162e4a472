"""The service that is served when none is named: something to call, and an example of what a method may be."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import gevent

from gmprpc.reply import Reply
from gmprpc.service import Service

service = Service()


@service.method
def echo(*values: Any) -> Any:
    """What it was given: nil for no value, one as it is, several as an array."""
    return values[0] if len(values) == 1 else values or None


@service.method(name="sum")
def sum_(*numbers: float) -> float:
    """The sum of the numbers."""
    return sum(numbers)


@service.method
def sleep(seconds: float) -> float:
    """Answers after so many seconds; other calls go on meanwhile."""
    gevent.sleep(seconds)
    return seconds


@service.method
def time() -> datetime:
    """The time of day, which travels as a MessagePack timestamp."""
    return datetime.now(UTC)


@service.method(deferred=True)
def later(reply: Reply | None, seconds: float, value: Any = None) -> None:
    """Answers ``value`` after so many seconds, in the style of AnyEvent::MPRPC: no handler waits meanwhile."""
    if reply is not None:
        gevent.spawn_later(seconds, reply.result, value)
