"""The calls that one connection has made and that wait for their answers, each with whoever waits for it.

It knows no socket: a request is handed to the connection, and the connection says what came for which msgid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

import gevent
from gevent import getcurrent
from greenlet import greenlet

from .exceptions import CallTimeout, ConnectionClosed
from .methods import CANCEL
from .options import check_timeout
from .protocol import Encoder, next_msgid, request_of, result_of
from .reply import PendingCall

# What is called, in the hub, with the outcome of a call: the response, or the exception that stands for it.
Waiter = Callable[[Any], Any]

# Takes a call back whose connection has ended, to send it another way; False if that can't be.
TakeBack = Callable[[PendingCall, ConnectionClosed], bool]

#: What a caller is told who must not be kept waiting.
IN_HUB: Final = "call() would block the hub: use call_async() in callbacks of the loop"

# gevent's `hub.switch` looks for a `switch_out` of the current greenlet first; greenlet's own is all that is needed.
switch = greenlet.switch


class Owner(Protocol):
    """What calls need of the connection that they go out on."""

    def check_open(self) -> None:
        """Raise ConnectionClosed unless calls can be sent and answered."""

    def post(self, data: bytes) -> None:
        """Send ``data``."""

    def settle_soon(self) -> None:
        """Look soon whether it changes anything that fewer calls are pending."""


class Calls:
    """The calls of one connection; any number of greenlets may call at once."""

    __slots__ = ("_encoder", "_hub", "_msgid", "_owner", "on_room", "pending")

    def __init__(self, owner: Owner, encoder: Encoder) -> None:
        self._owner = owner
        self._encoder = encoder
        self._hub = gevent.get_hub()
        self._msgid = -1
        #: Who waits for the answer to which msgid. Whoever has the outcome takes the msgid off the books first.
        self.pending: dict[int, Waiter] = {}
        #: Called, in the hub, when fewer calls may be pending, or less be unsent; set while others wait for that.
        self.on_room: Callable[[], None] | None = None

    def call(self, method: str, params: tuple[Any, ...], timeout: float | None, tell: bool = False) -> Any:
        """The result of a call, once it is there; see :meth:`gmprpc.Connection.call`.

        With ``tell`` the peer is told when the caller gives up.
        """
        caller = getcurrent()
        if caller is self._hub:
            raise RuntimeError(IN_HUB)
        check_timeout("timeout", timeout)
        msgid = self._send(method, params, caller.switch)
        timer: Any = None
        outcome: Any = None
        try:
            if timeout is not None:
                timer = self._hub.loop.timer(timeout)
                # From now on, and not from when the loop last looked at the clock.
                timer.start(self._expire, msgid, method, timeout, tell, update=True)
            # The hub switches straight into the caller, with the outcome. Any other switch is a stray.
            while msgid in self.pending:
                outcome = switch(self._hub)
        except BaseException:
            self._give_up(msgid, tell)
            raise
        finally:
            if timer is not None:
                timer.close()
        if isinstance(outcome, BaseException):
            raise outcome
        return result_of(outcome, method)

    def send(
        self,
        call: PendingCall,
        params: tuple[Any, ...],
        timeout: float | None,
        tell: bool = False,
        take_back: TakeBack | None = None,
    ) -> None:
        """Send the request for ``call``, which gets the outcome; see :meth:`gmprpc.Connection.call_async`.

        ``take_back`` is asked first when the connection ends.
        """
        check_timeout("timeout", timeout)
        msgid = self._send(call.method, params, partial(_complete, call, take_back))
        call._forget = partial(self._give_up, msgid)
        if timeout is not None:
            call.limit(self._hub.loop, timeout, tell)

    def send_packed(self, call: PendingCall, body: bytes, take_back: TakeBack | None) -> None:
        """Send the request for ``call``, of which the ``body`` was packed and the time was limited before."""
        self._owner.check_open()
        msgid = self._msgid = next_msgid(self._msgid, self.pending)
        self._post(msgid, request_of(msgid, body), partial(_complete, call, take_back))
        call._forget = partial(self._give_up, msgid)

    def fail_all(self, cause: Exception | None, unsent: Mapping[int, bytes]) -> None:
        """End every call that waits, because the connection has ended; in the hub.

        ``unsent`` has the bodies of the requests that had not left, by their msgids.
        """
        waiters = list(self.pending.items())
        self.pending.clear()
        for msgid, waiter in waiters:
            body = unsent.get(msgid)
            closed = ConnectionClosed("the connection was closed before the answer came", sent=body is None)
            closed.__cause__ = cause
            closed._body = body
            try:
                waiter(closed)
            except BaseException:  # A caller that is no greenlet of gevent's has died; the others still wait.
                self._hub.handle_error(self, *sys.exc_info())

    def _send(self, method: str, params: tuple[Any, ...], waiter: Waiter) -> int:
        self._owner.check_open()
        msgid = self._msgid = next_msgid(self._msgid, self.pending)
        data = self._encoder.request(msgid, method, params)
        self._owner.check_open()  # A hook of the packer may have waited.
        self._post(msgid, data, waiter)
        return msgid

    def _post(self, msgid: int, data: bytes, waiter: Waiter) -> None:
        self.pending[msgid] = waiter
        try:
            self._owner.post(data)
        except BaseException:  # Ctrl-C: the caller goes elsewhere, and must not be switched into there.
            self.pending.pop(msgid, None)
            raise

    def _expire(self, msgid: int, method: str, timeout: float, tell: bool) -> None:
        waiter = self.pending.get(msgid)
        if waiter is not None:
            self._give_up(msgid, tell)
            waiter(CallTimeout(method, timeout))

    def _give_up(self, msgid: int, tell: bool) -> bool:
        """Take a call off the books: nobody waits for its answer any more. True: its request may have left."""
        is_pending = self.pending.pop(msgid, None) is not None
        if not self.pending or self.on_room is not None:
            self._owner.settle_soon()  # Reading may have gone on for its sake alone; and there is room for another.
        if tell and is_pending:
            with suppress(ConnectionClosed):
                self._owner.check_open()
                self._owner.post(self._encoder.notification(CANCEL, [msgid]))
        return True


def _complete(call: PendingCall, take_back: TakeBack | None, outcome: Any) -> None:
    """Pass the outcome of a call on to who waits for it."""
    if call.ready():  # Cancelled at the last moment.
        return
    if isinstance(outcome, Exception):
        if take_back is None or not isinstance(outcome, ConnectionClosed) or not take_back(call, outcome):
            call.set_exception(outcome)
        return
    try:
        result = result_of(outcome, call.method)
    except Exception as exc:  # RemoteError; or what the error object raises, which a hook of the unpacker has made.
        call.set_exception(exc)
    else:
        call.set(result)
