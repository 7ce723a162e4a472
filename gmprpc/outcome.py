"""How a call can end, for whoever observes calls; this module knows no socket and no greenlet."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """How a request or notification has ended on the side that carried it out."""

    #: The handler's result was answered; of a notification: the handler has returned.
    OK = "ok"
    #: The handler answered an error that it chose: :exc:`~gmprpc.ErrorResponse`, ``reply.error``.
    ERROR = "error"
    #: The handler raised, was killed, or gave a result that can't be packed.
    FAILED = "failed"
    #: There is no such method.
    UNKNOWN_METHOD = "unknown_method"
    #: The handler wasn't entered, since it doesn't take such params.
    INVALID_PARAMS = "invalid_params"
    #: The caller had cancelled it before it was answered; however the handler ended after that.
    CANCELLED = "cancelled"
    #: It was answered with an error because it took longer than ``reply_timeout``.
    EXPIRED = "expired"
    #: There was nobody left to answer, since the connection had gone; or the Reply was dropped unanswered.
    DROPPED = "dropped"
