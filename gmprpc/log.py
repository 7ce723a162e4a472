"""Writes lines to the log where nothing may fail because of it: a full disk costs no answer and no connection."""

from __future__ import annotations

import sys
from contextlib import suppress
from logging import Logger
from typing import Any

import gevent


def log(logger: Logger, level: int, message: str, *args: Any, exc_info: BaseException | None = None) -> None:
    """Like ``logger.log``, but what goes wrong in it is shown where gevent shows what it can't raise."""
    try:
        logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
    except Exception:
        with suppress(Exception):  # Standard error may be on the same disk.
            gevent.get_hub().handle_error(None, *sys.exc_info())


def log_soon(logger: Logger, level: int, message: str, *args: Any) -> None:
    """For callbacks of the loop: a log's lock may be held by a greenlet, and the hub can't wait."""
    gevent.spawn(log, logger, level, message, *args)
