"""Tells observers, such as an access log or metrics, when each call begins and how it has ended.

It is wrapped around a method as that enters the table, so that it costs nothing where nobody observes.
"""

from __future__ import annotations

import logging
from collections import deque
from contextvars import copy_context
from functools import partial, wraps
from time import perf_counter
from typing import Any, Protocol, cast

import gevent
from gevent import GreenletExit
from gevent.event import Event
from greenlet import getcurrent, greenlet

from .calls import switch
from .connection import Call, Connection
from .log import log
from .methods import Handler
from .outcome import Outcome
from .requests import RequestGreenlet, fields_of, is_deferred

logger = logging.getLogger("gmprpc.observing")

# So many ends may wait to be told; then new calls wait, before they begin. What 10,000 connections may bring in one
# round of the loop, if each calls once: who isn't blocked has told them by the next one.
_MAX_UNTOLD = 10_000


class Observer(Protocol):
    """What sees every call that a server carries out: an interface, and a base class that does nothing.

    Requests and notifications are observed, those of unknown methods and of the built-in ones (``$/health``) too.
    What an observer raises is logged, and changes nothing for the call.
    """

    def call_started(self, call: Call) -> Any:
        """``call`` is about to be carried out; what this returns is handed to :meth:`call_ended` as ``token``.

        Runs in the greenlet of the request, right before the handler, in the same ``contextvars`` context. If it
        raises, this observer isn't told of the end.
        """
        return None

    def call_ended(
        self, call: Call, outcome: Outcome, duration: float, token: Any, error: BaseException | None
    ) -> None:
        """``call`` has ended, ``duration`` seconds after it started; exactly once for each that started.

        A call ends when its answer is given: with the handler, when a deferred reply is set, when its time is over; or
        when that can't be any more. ``error`` is what was raised or answered, None if nothing was.

        Runs a moment later, in a greenlet that tells one end after the other, in the order in which they came: the
        answer doesn't wait for it, but the ends of other calls do. The ``contextvars`` context is a copy of that in
        which all observers had been told of the start.
        """
        return


class Observing:
    """The observers of one server."""

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._untold = _Untold()
        # Not gevent's, which would live, and keep what it has, for as long as its function runs.
        self._teller: greenlet | None = None
        self._hub: Any = None

    def add(self, observer: Observer) -> None:
        """Tell ``observer``, too; raises TypeError if it is none."""
        for name in ("call_started", "call_ended"):
            if not callable(getattr(observer, name, None)):
                raise TypeError(f"an observer has to have the method {name}, and {observer!r} hasn't")
        self.observers += (observer,)

    def observed(self, function: Handler) -> Handler:
        """``function``, with the observers told when it is called; the answer's way tells them of the end."""

        @wraps(function)
        def call(*params: Any) -> Any:
            request = cast(RequestGreenlet, getcurrent())
            if len(self._untold.ends) >= _MAX_UNTOLD:
                self._untold.wait()
            observation = request.observation = Observation(self, request)
            observation.begin()
            result = function(*params)
            if observation.call.msgid is None and not is_deferred(result):
                request.observation = None
                observation.end(Outcome.OK)
            return result

        return call

    def tell(self, *end: Any) -> None:
        """Have the observers told of the end of a call, soon; called in the hub of that call."""
        untold = self._untold
        untold.ends.append(end)
        if untold.is_told:
            hub = gevent.get_hub()
            # Ctrl-C may have struck it; the server may have been started anew in another thread.
            if self._teller is None or self._teller.dead or hub is not self._hub:
                self._hub, self._teller = hub, greenlet(partial(_tell, untold), hub)
            hub.loop.run_callback(self._teller.switch)
            untold.is_told = False  # Last, or Ctrl-C could leave it false with nobody to tell.

    def catch_up(self, timeout: float) -> None:
        """Wait until the observers have been told all, but not longer than ``timeout`` seconds."""
        if not self._untold.is_told:
            self._untold.wait(timeout)

    def forget(self) -> None:
        """Leave what hasn't been told to the process that this one was forked off from."""
        self._untold.ends.clear()


class Observation:
    """What there is to tell of one call."""

    __slots__ = ("_context", "_observing", "_requests", "_started_at", "_tokens", "call", "is_cancelled")

    def __init__(self, observing: Observing, request: RequestGreenlet) -> None:
        assert request.message is not None
        self.call = Call(cast(Connection, request.requests.owner), request.message)
        #: Set when the caller has given it up.
        self.is_cancelled = False
        self._observing = observing
        self._requests = request.requests
        self._tokens: list[tuple[Observer, Any]] = []
        self._context = copy_context()
        self._started_at = perf_counter()

    def begin(self) -> None:
        """Tell the observers, in the greenlet of the request; what strikes that meanwhile isn't theirs."""
        for observer in self._observing.observers:
            try:
                token = observer.call_started(self.call)
            except GreenletExit:  # The request is killed, or cancelled.
                raise
            except BaseException as exc:  # Also SystemExit, which is not to be answered for the handler.
                self._log_failure(observer, exc)
            else:
                self._tokens.append((observer, token))
        self._context = copy_context()
        self._started_at = perf_counter()

    def end(self, outcome: Outcome, error: BaseException | None = None) -> tuple[Outcome, float]:
        """Have the observers told that the answer has been given; in any greenlet, and in the hub.

        Returns what they are told: the outcome and the duration.
        """
        duration = perf_counter() - self._started_at
        if self.call.connection.is_closed and self.call.msgid is not None:
            outcome = Outcome.DROPPED
        elif self.is_cancelled:
            outcome = Outcome.CANCELLED
        if not self.call.connection.is_abandoned:  # That the process tells which this one was forked off from.
            self._observing.tell(self, outcome, duration, error)
        return outcome, duration

    def tell(self, outcome: Outcome, duration: float, error: BaseException | None) -> None:
        """Tell the observers."""
        for observer, token in self._tokens:
            try:
                self._context.run(observer.call_ended, self.call, outcome, duration, token, error)
            except BaseException as exc:
                self._log_failure(observer, exc, outcome=str(outcome), duration=duration)

    def _log_failure(self, observer: Observer, exc: BaseException, **fields: Any) -> None:
        self._requests.pass_on(exc)
        fields |= fields_of(self.call.method, self.call.msgid, self.call.peer)
        log(logger, logging.ERROR, "the observer %r failed", observer, exc_info=exc, **fields)


class _Untold:
    """The ends that are to be told, and whether all are."""

    def __init__(self) -> None:
        self.ends: deque[tuple[Any, ...]] = deque()
        self.is_told = True
        self._told: Event | None = None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all are told."""
        if self._told is None:
            self._told = Event()
        self._told.wait(timeout)

    def rest(self) -> None:
        """All are."""
        self.is_told = True
        if self._told is not None:
            self._told.set()
            self._told = None


def _tell(untold: _Untold) -> None:
    """Tell what there is to tell, over and over.

    It holds nothing else while it rests: it shall end when the server that it is for is forgotten.
    """
    hub = gevent.get_hub()
    try:
        while True:
            while untold.ends:
                observation, *end = untold.ends.popleft()
                observation.tell(*end)
                del observation, end
            untold.rest()
            switch(hub)
    finally:
        untold.rest()
