"""Writes lines to the log where nothing may fail because of it: a full disk costs no answer and no connection.

What a line is about stands in its record as fields, too, for handlers and formatters that want it by itself: of a call
``method``, ``msgid`` and ``peer``, and ``outcome`` and ``duration`` (seconds) once they are known; of a connection
``peer``.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from logging import Logger
from typing import Any

import gevent

# Longer text of a peer's is cut: a name of 1 MiB, sent again and again, must not fill a disk. Picked arbitrarily.
_SHOWN_SIZE = 200


def shown(text: str) -> str:
    """``text`` that a peer has sent, as a part of one line: not too long, and without control characters."""
    cut = text if len(text) <= _SHOWN_SIZE else f"{text[:_SHOWN_SIZE]}..."
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode()


def log(
    logger: Logger, level: int, message: str, *args: Any, exc_info: BaseException | None = None, **fields: Any
) -> None:
    """Like ``logger.log``, but what goes wrong in it is shown where gevent shows what it can't raise."""
    try:
        logger.log(level, message, *args, exc_info=exc_info, stacklevel=2, extra=fields)
    except Exception:
        show_failure()


def show_failure(context: Any = None) -> None:
    """Show the exception that is being handled where gevent shows its own, since the log has failed."""
    with suppress(Exception):  # Standard error may be on the same disk.
        gevent.get_hub().handle_error(context, *sys.exc_info())


def log_soon(logger: Logger, level: int, message: str, *args: Any, **fields: Any) -> None:
    """For callbacks of the loop: a log's lock may be held by a greenlet, and the hub can't wait."""
    gevent.spawn(log, logger, level, message, *args, **fields)
