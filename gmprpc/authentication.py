"""Has the first message of a connection decide whether there are others.

A connection begins with another table of methods than it has once it is let in: no message after the first costs
anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from .connection import Call, Connection, current_call
from .exceptions import ConnectionClosed, ErrorResponse
from .log import log
from .methods import HEALTH, Handler, MethodTable
from .metrics import Counters
from .requests import current_request, fields_of

logger = logging.getLogger("gmprpc.server")

#: What a peer is answered that isn't let in.
NOT_AUTHENTICATED: Final = "not authenticated"


class Authentication:
    """Asks ``authenticate(connection, message)`` once of each connection whether its peer is let in."""

    def __init__(self, authenticate: Callable[[Connection, Any], Any], counters: Counters) -> None:
        self._authenticate = authenticate
        self._counters = counters
        #: Those that haven't been let in, and perhaps never will be.
        self.strangers: set[Connection] = set()

    def begin(self, connection: Connection, table: MethodTable, max_concurrency: int | None) -> None:
        """Let nobody call ``table`` on ``connection``, ``max_concurrency`` at once, who hasn't been let in.

        Until then messages are carried out one after the other: those behind the first wait unread for its decision.
        """
        self.strangers.add(connection)
        connection.carry_out(_Gate(self, table, max_concurrency), 1)

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        self.strangers.discard(connection)

    def ask(self, call: Call) -> None:
        """Raise what is to be answered, unless who makes ``call`` is let in; called by what carries it out."""
        try:
            if self._authenticate(call.connection, call.message) is True:
                self.strangers.discard(call.connection)
                return
        except ErrorResponse:
            self._turn_away(call.connection)
            raise
        except BaseException as exc:
            # Whatever it is, the peer shall not learn it; and an application that can't tell hasn't let anybody in.
            self._turn_away(call.connection)
            current_request().requests.pass_on(exc)
            fields = fields_of(call.method, call.msgid, call.peer)
            log(logger, logging.ERROR, "the hook %r failed", self._authenticate, exc_info=exc, **fields)
        else:
            self._turn_away(call.connection)
        raise ErrorResponse(NOT_AUTHENTICATED)

    def _turn_away(self, connection: Connection) -> None:
        self._counters.denied_connections += 1
        connection.turn_away(ConnectionClosed(NOT_AUTHENTICATED))


class _Gate(dict[str, Handler]):
    """What a stranger can call: whatever he calls first has to get him in; only his question for health is free.

    It has no entries, so that each name is looked up here.
    """

    __slots__ = ("_authentication", "_is_asked", "_is_open", "_max_concurrency", "_table")

    def __init__(self, authentication: Authentication, table: MethodTable, max_concurrency: int | None) -> None:
        super().__init__()
        self._authentication = authentication
        self._table = table
        self._max_concurrency = max_concurrency
        self._is_asked = self._is_open = False

    def __missing__(self, name: str) -> Handler:
        handler = self._table[name]
        if name == HEALTH:
            return handler

        @wraps(handler)
        def admitted(*params: Any) -> Any:
            self._demand()
            return handler(*params)

        return admitted

    def _demand(self) -> None:
        """Raise unless the peer is let in."""
        call = current_call()
        if not self._is_asked:
            self._is_asked = True  # Before: whatever happens meanwhile, there is no second attempt.
            self._authentication.ask(call)
            self._is_open = True
            call.connection.carry_out(self._table, self._max_concurrency)
            current_request().is_retired = True  # This greenlet knows the other table.
        if not self._is_open:
            raise ErrorResponse(NOT_AUTHENTICATED)
