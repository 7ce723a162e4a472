"""The access log: a line for each request and notification when it has ended."""

from __future__ import annotations

import json
import logging
from typing import Final

from .connection import Call
from .log import show_failure
from .observing import Observer
from .outcome import Outcome
from .requests import fields_of

logger = logging.getLogger("gmprpc.access")

_LINE: Final = "%s %s %s %s %.3f ms"


class AccessLog(Observer):
    """An observer for :class:`~gmprpc.Server` that logs each call, at INFO to the logger ``gmprpc.access``.

    A line has the peer, the method, the msgid (``-`` for a notification), the outcome and the duration:
    ``127.0.0.1:36120 add 7 ok 0.041 ms``. The record has them as fields, too; there ``duration`` is in seconds.
    """

    def call_ended(
        self, call: Call, outcome: Outcome, duration: float, token: object, error: BaseException | None
    ) -> None:
        """Write the line."""
        if logger.isEnabledFor(logging.INFO):
            about = fields_of(call.method, call.msgid, call.peer)
            msgid = "-" if call.msgid is None else call.msgid
            words = _word(about["peer"]), _word(about["method"]), msgid, str(outcome)
            about |= {"outcome": str(outcome), "duration": duration}
            # Without looking for who calls this: it would always be the same, and take a fifth of the time.
            args = (*words, duration * 1000)
            record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, _LINE, args, None, extra=about)
            try:
                logger.handle(record)
            except Exception:
                show_failure()


def _word(text: str) -> str:
    """``text`` as one word of a line: a peer's method may have spaces in its name, and nothing but them."""
    return text if text and " " not in text and '"' not in text else json.dumps(text, ensure_ascii=False)
