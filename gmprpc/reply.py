"""The result condition variable: an :class:`~gevent.event.AsyncResult` that is set just once, from any thread.

It knows nothing of connections: whoever waits for the answer links to it, as to every AsyncResult.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gevent
from gevent import GreenletExit, monkey
from gevent.event import AsyncResult

from .exceptions import AlreadyAnswered, CallCancelled, CallTimeout, ErrorResponse
from .log import log

logger = logging.getLogger("gmprpc.reply")

if TYPE_CHECKING:
    _AsyncResult = AsyncResult[Any]
else:
    _AsyncResult = AsyncResult  # It is generic in its stubs only.

# The thread's, also where monkey-patching made `threading.get_ident` the greenlet's.
get_thread_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")


class ReplyExpired(ErrorResponse):
    """What a Reply has failed with that wasn't set in time."""


class Reply(_AsyncResult):
    """The answer to one request, to be given now or later, from this greenlet, another one, or a native thread.

    ``result`` and ``error`` are the verbs of AnyEvent::MPRPC, ``set`` and ``set_exception`` those of gevent. It is set
    once; what is set after the caller has gone is dropped. If the last reference to it goes while it is unset, the
    caller gets an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hub = gevent.get_hub()
        # Whoever pops the one item may set the value: popping is atomic among threads.
        self._right_to_answer = [True]
        # Likewise the right to be told nothing about an answer that comes too late; `expire` grants it.
        self._right_to_be_late: list[Callable[[], Any]] = []
        self._is_cancelled = False
        self._cancel_callbacks: list[Callable[[], Any]] = []
        # What the connection wants to have called when this is dropped unanswered.
        self._on_drop: Callable[[], Any] | None = None

    def result(self, *values: Any) -> None:
        """Answer nil for no value, the value itself for one, an array for several.

        Raises:
            AlreadyAnswered: it was set before; that answer stands.
        """
        self.set(values[0] if len(values) == 1 else values or None)

    def error(self, error: Any) -> None:
        """Answer with the error object ``error``, any MessagePack value but nil.

        Raises:
            AlreadyAnswered: it was set before; that answer stands.
            ValueError: ``error`` is None.
        """
        self.set_exception(ErrorResponse(error))

    def set(self, value: Any = None) -> None:
        """Answer with the result ``value``; raises :exc:`AlreadyAnswered` like :meth:`result`."""
        if self._claim():
            self._in_own_thread(super().set, value)

    set_result = set  # As gevent names it once more.

    def set_exception(self, exception: BaseException, exc_info: Any = None) -> None:  # type: ignore[override]
        """Answer with an error, as if the handler had raised ``exception``; raises like :meth:`error`."""
        if not isinstance(exception, BaseException):
            raise TypeError(f"{exception!r} is no exception")
        if self._claim():
            self._in_own_thread(super().set_exception, exception, exc_info)

    def answered(self) -> bool:
        """True once the answer is given, even while it is still on its way from another thread."""
        return not self._right_to_answer

    def cancelled(self) -> bool:  # type: ignore[override]
        """True once nobody waits for the answer any more: the caller has given up, the connection was lost, or it took
        too long.
        """
        return self._is_cancelled

    def on_cancel(self, callback: Callable[[], Any]) -> None:
        """Have ``callback()`` called, in a greenlet of its own, when :meth:`cancelled` turns true, or now if it is.

        The reply still has to be answered, or dropped, then: every request gets an answer, if there is a way.
        """
        self._in_own_thread(self._add_cancel_callback, callback)

    def _add_cancel_callback(self, callback: Callable[[], Any]) -> None:
        if self._is_cancelled:
            gevent.spawn(_call_back, callback)
        else:
            self._cancel_callbacks.append(callback)

    def _cancel(self) -> bool:
        """Called by the connection when nobody waits for this any more; False if that is known, or it was answered."""
        if self._is_cancelled or self.answered():
            return False
        self._is_cancelled = True
        callbacks, self._cancel_callbacks = self._cancel_callbacks, []
        for callback in callbacks:
            gevent.spawn(_call_back, callback)
        return True

    def expire(self, error: Any, on_late: Callable[[], Any]) -> bool:
        """Answer with ``error`` in place of whoever should have; in the hub. False if it was answered before.

        An answer that still comes is dropped, and ``on_late()`` called.
        """
        if self.answered():
            return False
        self._right_to_be_late.append(on_late)  # First: in another thread an answer may be given at this moment.
        self._cancel()
        try:
            self._right_to_answer.pop()
        except IndexError:
            self._right_to_be_late.clear()
            return False
        super().set_exception(ReplyExpired(error))
        return True

    def _claim(self) -> bool:
        """Take the right to answer; False if the answer comes too late to be one."""
        try:
            self._right_to_answer.pop()
        except IndexError:
            try:
                on_late = self._right_to_be_late.pop()
            except IndexError:
                raise AlreadyAnswered("this reply was answered before; the first answer stands") from None
            self._in_own_thread(on_late)
            return False
        return True

    def _in_own_thread(self, function: Callable[..., Any], *args: Any) -> None:
        # AsyncResult calls its links in the thread that sets it.
        if get_thread_ident() == self._hub.thread_ident:
            function(*args)
        elif (loop := self._hub.loop) is not None:  # It goes when its thread ends.
            loop.run_callback_threadsafe(function, *args)

    def __del__(self) -> None:
        # Garbage is collected in any thread and at any moment, and nothing here may fail on a half-made object.
        if getattr(self, "_right_to_answer", None) and self._on_drop is not None:
            loop = self._hub.loop
            if loop is not None:
                loop.run_callback_threadsafe(self._on_drop)


def failure_of(result: Any) -> BaseException | None:
    """What ``result``, an AsyncResult or a Greenlet that has completed, has failed with; None if it hasn't."""
    if result.successful():
        # To gevent a greenlet that was killed is one.
        is_killed = issubclass(type(result), gevent.Greenlet) and issubclass(type(result.value), GreenletExit)
        return result.value if is_killed else None
    exc = result.exception
    # gevent's set_exception takes anything, also what can't be shown.
    return exc if issubclass(type(exc), BaseException) else TypeError(f"{type(exc).__name__} is no exception")


class PendingCall(_AsyncResult):
    """A call that was made and not yet answered; :meth:`get` waits for its result or raises its error.

    A :exc:`gevent.Timeout` out of ``get`` leaves the call pending: ask again, or :meth:`cancel` it.
    """

    #: True if its time is limited, and whose time-out that is; see :class:`CallTimeout`.
    is_limited = False
    which = "call"
    # Takes the call off the books that it is on, tells the peer if that is asked for, and says whether the request
    # may have left. Whoever has the call on the books sets it.
    _forget: Callable[[bool], bool] | None = None
    # Why it couldn't be sent, if it couldn't.
    _obstacle: Exception | None = None

    def __init__(self, method: str) -> None:
        super().__init__()
        #: The method that was called.
        self.method = method

    def cancel(self, tell: bool = True) -> bool:  # type: ignore[override]
        """Give the call up: waiters get :exc:`CallCancelled`, and an answer that still comes is dropped.

        The peer is told with the notification ``$/cancel``, if the request had left; not with ``tell=False``, which is
        for peers that close the connection on a notification they don't know. Returns whether there was anything left
        to give up.
        """
        if self.ready():
            return False
        self.forget(tell)
        self.set_exception(CallCancelled(f"call of {self.method!r} was cancelled"))
        return True

    def forget(self, tell: bool) -> bool:
        """Take it off the books; whoever does that has to set it. Says whether the request may have left."""
        forget, self._forget = self._forget, None
        return forget is not None and forget(tell)

    def limit(self, loop: Any, timeout: float, tell: bool, left: float | None = None) -> None:
        """Let it fail with :exc:`CallTimeout` after ``timeout`` seconds, of which ``left`` are left, wherever it is."""
        self.is_limited = True
        timer = loop.timer(timeout if left is None else left)
        # From now on, and not from when the loop last looked at the clock.
        timer.start(self._expire, timeout, tell, update=True)
        self.rawlink(lambda _: timer.close())

    def _expire(self, timeout: float, tell: bool) -> None:
        if not self.ready():
            is_sent = self.forget(tell)
            late = CallTimeout(self.method, timeout, which=self.which, sent=is_sent, cause=self._obstacle)
            self.set_exception(late)


def _call_back(callback: Callable[[], Any]) -> None:
    """Call a callback of :meth:`Reply.on_cancel`, in a greenlet of its own."""
    try:
        callback()
    except GreenletExit:
        raise
    except BaseException as exc:
        # Not by gevent's hub, which would show what the callback was made with, and end the program for a SystemExit.
        log(logger, logging.ERROR, "a callback of on_cancel failed", exc_info=exc)
