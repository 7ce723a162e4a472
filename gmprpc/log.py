"""Writes lines to the log where nothing may fail because of it: a full disk costs no answer and no connection.

What a line is about stands in its record as fields, too, for handlers and formatters that want it by itself: of a call
``method``, ``msgid`` and ``peer``, and ``outcome`` and ``duration`` (seconds) once they are known; of a connection
``peer``.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import UTC, datetime
from logging import Formatter, Logger, LogRecord, makeLogRecord
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


def show_failure(context: object = "the log") -> None:
    """Show the exception that is being handled where gevent shows its own, since the log has failed.

    ``context`` is what it has happened in, and not None, by which gevent would be told to end the main greenlet.
    """
    with suppress(Exception):  # Standard error may be on the same disk.
        gevent.get_hub().handle_error(context, *sys.exc_info())


def log_soon(logger: Logger, level: int, message: str, *args: Any, **fields: Any) -> None:
    """For callbacks of the loop: a log's lock may be held by a greenlet, and the hub can't wait."""
    gevent.spawn(log, logger, level, message, *args, **fields)


class JSONFormatter(Formatter):
    """Makes a JSON object of each record, on one line of ASCII, whatever is in it.

    It has ``time`` (ISO 8601, UTC), ``level``, ``logger`` and ``message``, then the fields of the record: those of
    gmprpc, and whatever else came as ``extra``. Of an exception, ``exception`` is the traceback as text.
    """

    def format(self, record: LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        told: dict[str, Any] = {
            "time": f"{time.isoformat(timespec='milliseconds')}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in told}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = self.formatStack(record.stack_info)
        try:
            return json.dumps(told, default=_text_of, allow_nan=False)
        except (TypeError, ValueError, RecursionError):  # A field isn't for JSON: no number, a key, a circle.
            return json.dumps({name: _text_of(value) for name, value in told.items()})


# What every record has; `message` and `asctime` come from other formatters, `taskName` with Python 3.12.
_OWN = frozenset(vars(makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _text_of(value: Any) -> str:
    """What stands in JSON for what it has no word for."""
    try:
        return str(value)
    except Exception:
        return type(value).__name__
