"""What all commands that ask a server something have in common."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from gmprpc.client import Client
from gmprpc.exceptions import RPCError, no_such_method
from gmprpc.methods import LIST

from .exits import AnsweredError, call_errors, printable

#: Whatever follows the first argument is one, too: -1 and --x are parameters.
OPTIONS_FIRST: Final = {"allow_interspersed_args": False, "show_default": True}

# How long a hint may take. Picked arbitrarily.
_HINT_TIMEOUT = 2.0


@contextmanager
def asking(address: Any, **options: Any) -> Iterator[Client]:
    """A client of the server at ``address``; what its calls raise ends the program, with one line."""
    client = Client(address, retry_interval=None, **options)  # Whoever sits there wants to know.
    # Have what goes wrong told once: by that line.
    logging.getLogger("gmprpc").addHandler(logging.NullHandler())
    with call_errors():
        yield client
        client.close()


def unknown_method(client: Client, method: str) -> AnsweredError:
    """The error for a ``method`` that the server doesn't know, with the nearest ones that it does, if it tells."""
    connection = client.connection
    assert connection is not None
    try:
        names = connection.call(LIST, timeout=_HINT_TIMEOUT)  # Not over a new one, if it was closed.
    except RPCError:
        names = ()
    nearest = _nearest(method, names) if isinstance(names, (list, tuple)) else []
    hint = f"; did you mean: {', '.join(map(printable, nearest))}?" if nearest else ""
    return AnsweredError(printable(no_such_method(method)) + hint)


def _nearest(method: str, names: Any) -> list[str]:
    """Up to three of ``names`` that somebody may have meant who typed ``method``, the nearest first."""
    by_folded = {name.casefold(): name for name in names if isinstance(name, str)}
    return [by_folded[folded] for folded in difflib.get_close_matches(method.casefold(), by_folded, 3)]
