"""The methods that are there without being registered, under the reserved prefix ``$/``.

They enter a connection's table as every method does, so that hooks and time-outs are wrapped around them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .exceptions import ErrorResponse, no_such_method
from .methods import (
    CANCEL,
    DESCRIBE,
    DRAINING,
    HEALTH,
    LIST,
    Handler,
    Methods,
    UnknownMethod,
    signature_of,
    summary_of,
)
from .requests import current_request

SERVING = "SERVING"
NOT_SERVING = "NOT_SERVING"


def builtins_of(
    methods: Methods,
    *,
    is_serving: Callable[[], bool],
    introspection: bool,
    on_health: Callable[[Any], None] | None = None,
    on_draining: Callable[[Any], None] | None = None,
) -> dict[str, Handler]:
    """What a table of ``methods`` has besides them; only with ``introspection`` what tells about them.

    ``on_health(connection)`` is called before ``$/health`` is answered there, ``on_draining(connection)`` when the peer
    says ``$/draining``, which without it is an unknown method.
    """

    def health() -> str:
        """Whether calls are welcome: "SERVING" or "NOT_SERVING", the words of gRPC's health checks."""
        if on_health is not None:
            on_health(current_request().requests.owner)
        return SERVING if is_serving() else NOT_SERVING

    def draining(*_: Any) -> None:
        """This connection is about to end: nothing more is to be sent on it, and its answers are still to come."""
        assert on_draining is not None
        on_draining(current_request().requests.owner)

    def list_() -> list[str]:
        """The names of the registered methods, sorted."""
        return sorted(methods)

    def describe(name: Any) -> dict[str, str]:
        """A map of the name, the signature and the first line of the docstring of a method."""
        if isinstance(name, bytes):  # As the name of a method may come, too.
            name = name.decode(errors="replace")
        if not isinstance(name, str):
            raise ErrorResponse(f"name has to be a string, not {type(name).__name__}")
        if (function := methods.get(name)) is None:
            raise UnknownMethod(no_such_method(name))
        return {"name": name, "signature": signature_of(function), "doc": summary_of(function)}

    def cancel(msgid: Any) -> None:
        """The caller doesn't want the answers any more to what it called with ``msgid`` on this connection."""
        current_request().requests.cancel(msgid)

    builtins: dict[str, Handler] = {CANCEL: cancel, HEALTH: health}
    if introspection:
        builtins |= {LIST: list_, DESCRIBE: describe}
    if on_draining is not None:
        builtins[DRAINING] = draining
    return builtins
