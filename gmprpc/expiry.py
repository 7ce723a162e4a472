"""Lets no request wait for its answer longer than ``reply_timeout``: then its caller gets an error instead.

It is wrapped around a method as that enters the table, so that it costs nothing where it is off.
"""

from __future__ import annotations

import logging
import weakref
from functools import wraps
from typing import Any, cast

import gevent
from gevent.event import AsyncResult
from greenlet import getcurrent

from .exceptions import CallCancelled
from .log import log_soon
from .methods import Handler
from .outcome import Outcome
from .reply import Reply, failure_of
from .requests import AnsweredAlready, RequestGreenlet, fields_of, is_deferred

logger = logging.getLogger("gmprpc.connection")


def expiring(timeout: float, function: Handler) -> Handler:
    """``function``, with an error for an answer when it hasn't given one ``timeout`` seconds after it was called.

    Then :exc:`CallCancelled` is raised in the handler, or the Reply that it has returned is cancelled. What is answered
    after that is dropped. Notifications have no answer to wait for, and all the time that they like.
    """

    @wraps(function)
    def call(*params: Any) -> Any:
        request = cast(RequestGreenlet, getcurrent())
        assert request.message is not None
        if request.message[1] is None:
            return function(*params)
        expiry = _Expiry(request, timeout)
        try:
            result = function(*params)
        except BaseException as exc:
            expiry.lift()
            if expiry.has_passed:
                raise AnsweredAlready from exc
            raise
        if expiry.has_passed:
            raise AnsweredAlready
        if is_deferred(result):
            return expiry.watch(result)
        expiry.lift()
        return result

    return call


class _Expiry:
    """The time that one request has; begins at once."""

    __slots__ = (
        "__weakref__",
        "_method",
        "_msgid",
        "_reply",
        "_request",
        "_requests",
        "_text",
        "_timeout",
        "_timer",
        "has_passed",
    )

    def __init__(self, request: RequestGreenlet, timeout: float) -> None:
        assert request.message is not None
        _, self._msgid, self._method, _ = request.message
        self._requests = request.requests
        self._request = request
        self._timeout = timeout
        self._text = f"no answer within {timeout:g} s"
        self._reply: weakref.ref[Reply] | None = None
        #: True once the request has been answered with an error while its handler was at work.
        self.has_passed = False
        self._timer: Any = request.requests.hub.loop.timer(timeout)
        self._timer.start(self._pass, update=True)  # From now on, not from when the loop last looked at the clock.

    def lift(self) -> None:
        """The request has its answer."""
        self._timer.close()

    def watch(self, result: Any) -> Reply:
        """What to wait for in place of ``result``, which the handler has returned: it completes in time."""
        reply = result if isinstance(result, Reply) else _relayed(result)
        # Weakly: if nobody else has it any more it will never be answered, and the caller shall hear that at once.
        self._reply = weakref.ref(reply)
        reply.rawlink(lambda _: self.lift())
        return reply

    def _pass(self) -> None:
        self.lift()
        if self._reply is None:
            self.has_passed = True
            self._requests.answer_instead(self._request, self._text)
            self._log()
            self._request.throw(CallCancelled(self._text))
        elif (
            not self._requests.owner.is_closed
            and (reply := self._reply()) is not None
            and reply.expire(self._text, self._requests.drop_late)
        ):
            self._requests.count_expired()
            self._log()

    def _log(self) -> None:
        about = fields_of(self._method, self._msgid, self._requests.owner.peer)
        about |= {"outcome": str(Outcome.EXPIRED), "duration": self._timeout}
        message = "request %s of %s from %s: %s"
        log_soon(logger, logging.WARNING, message, self._msgid, about["method"], about["peer"], self._text, **about)


def _relayed(result: AsyncResult[Any] | gevent.Greenlet[..., Any]) -> Reply:
    """A Reply that completes like ``result``, which isn't ours to complete."""
    reply = Reply()

    def relay(result: Any) -> None:
        if (exc := failure_of(result)) is None:
            reply.set(result.value)
        else:
            reply.set_exception(exc)

    result.rawlink(relay)
    return reply
