"""The calls that one connection has made and that wait for their answers, each with whoever waits for it.

It knows no socket: a request is handed to the connection, and the connection says what came for which msgid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container
from functools import partial
from typing import Any, Protocol

import gevent
from gevent import getcurrent
from greenlet import greenlet

from .exceptions import CallTimeout, ConnectionClosed, RemoteError
from .options import check_timeout
from .protocol import Encoder, next_msgid, result_of
from .reply import PendingCall

# What is called, in the hub, with the outcome of a call: the response, or the exception that stands for it.
Waiter = Callable[[Any], Any]

# gevent's `hub.switch` looks for a `switch_out` of the current greenlet first; greenlet's own is all that is needed.
switch = greenlet.switch


class Owner(Protocol):
    """What calls need of the connection that they go out on."""

    def check_open(self) -> None:
        """Raise ConnectionClosed unless calls can be sent and answered."""

    def post(self, data: bytes) -> None:
        """Send ``data``."""

    def settle_soon(self) -> None:
        """Look soon whether it changes anything that no call is pending any more."""


class Calls:
    """The calls of one connection; any number of greenlets may call at once."""

    __slots__ = ("_encoder", "_hub", "_msgid", "_owner", "pending")

    def __init__(self, owner: Owner, encoder: Encoder) -> None:
        self._owner = owner
        self._encoder = encoder
        self._hub = gevent.get_hub()
        self._msgid = -1
        #: Who waits for the answer to which msgid. Whoever has the outcome takes the msgid off the books first.
        self.pending: dict[int, Waiter] = {}

    def call(self, method: str, params: tuple[Any, ...], timeout: float | None) -> Any:
        """The result of a call, once it is there; see :meth:`gmprpc.Connection.call`."""
        caller = getcurrent()
        if caller is self._hub:
            raise RuntimeError("call() would block the hub: use call_async() in callbacks of the loop")
        check_timeout("timeout", timeout)
        msgid = self._send(method, params, caller.switch)
        timer: Any = None
        outcome: Any = None
        try:
            if timeout is not None:
                timer = self._start_timer(msgid, method, timeout)
            # The hub switches straight into the caller, with the outcome. Any other switch is a stray.
            while msgid in self.pending:
                outcome = switch(self._hub)
        except BaseException:
            self._forget(msgid)
            raise
        finally:
            if timer is not None:
                timer.close()
        if isinstance(outcome, BaseException):
            raise outcome
        return result_of(outcome, method)

    def send(self, call: PendingCall, params: tuple[Any, ...], timeout: float | None) -> None:
        """Send the request for ``call``, which gets the outcome; see :meth:`gmprpc.Connection.call_async`."""
        check_timeout("timeout", timeout)
        msgid = self._send(call.method, params, partial(_complete, call))
        call._forget = partial(self._forget, msgid)
        if timeout is not None:
            timer = self._start_timer(msgid, call.method, timeout)
            call.rawlink(lambda _: timer.close())

    def fail_all(self, cause: Exception | None, unsent: Container[int]) -> None:
        """End every call that waits, because the connection has ended; in the hub."""
        waiters = list(self.pending.items())
        self.pending.clear()
        for msgid, waiter in waiters:
            closed = ConnectionClosed("the connection was closed before the answer came", sent=msgid not in unsent)
            closed.__cause__ = cause
            try:
                waiter(closed)
            except BaseException:  # A caller that is no greenlet of gevent's has died; the others still wait.
                self._hub.handle_error(self, *sys.exc_info())

    def _send(self, method: str, params: tuple[Any, ...], waiter: Waiter) -> int:
        self._owner.check_open()
        msgid = self._msgid = next_msgid(self._msgid, self.pending)
        data = self._encoder.request(msgid, method, params)
        self._owner.check_open()  # A hook of the packer may have waited.
        self.pending[msgid] = waiter
        try:
            self._owner.post(data)
        except BaseException:  # Ctrl-C: the caller goes elsewhere, and must not be switched into there.
            self.pending.pop(msgid, None)
            raise
        return msgid

    def _start_timer(self, msgid: int, method: str, timeout: float) -> Any:
        timer = self._hub.loop.timer(timeout)
        # From now on, and not from when the loop last looked at the clock.
        timer.start(self._expire, msgid, method, timeout, update=True)
        return timer

    def _expire(self, msgid: int, method: str, timeout: float) -> None:
        waiter = self._forget(msgid)
        if waiter is not None:
            waiter(CallTimeout(method, timeout))

    def _forget(self, msgid: int) -> Waiter | None:
        """Take a call off the books: nobody waits for its answer any more."""
        waiter = self.pending.pop(msgid, None)
        if not self.pending:
            self._owner.settle_soon()  # Reading may have gone on for its sake alone.
        return waiter


def _complete(call: PendingCall, outcome: Any) -> None:
    """Pass the outcome of a call on to who waits for it."""
    if call.ready():  # Cancelled at the last moment.
        return
    if isinstance(outcome, Exception):
        call.set_exception(outcome)
        return
    try:
        result = result_of(outcome, call.method)
    except RemoteError as exc:
        call.set_exception(exc)
    else:
        call.set(result)
