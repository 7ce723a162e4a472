"""Has a method carried out by a native thread, so that what can't do without blocking doesn't block the hub.

It is wrapped around a method as that is registered. The request's greenlet waits meanwhile, as it would for anything
else, so hooks, time-outs and answers are those of every request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial, wraps
from typing import Any

from gevent.threadpool import ThreadPool

from .exceptions import CallCancelled
from .methods import Handler
from .requests import call_in_thread, current_request

# The result, and what was raised instead.
_Result = tuple[Any, BaseException | None]


def threaded(function: Handler, pool: ThreadPool | bool = True) -> Handler:
    """What calls ``function`` in a thread of ``pool``, the hub's own if True, and waits for it in the greenlet.

    The thread sees a copy of the greenlet's context variables. Nothing can interrupt it: a request that is cancelled
    when it has begun ends when it is done, as cancelled; one that waits for a thread ends at once.
    """

    @wraps(function)
    def call(*params: Any) -> Any:
        request = current_request()
        assert request.message is not None
        context = copy_context()
        context.run(call_in_thread.set, (request.requests.owner, request.message))
        work = _Work(partial(context.run, function, *params))
        result, failure = _done(work, pool if isinstance(pool, ThreadPool) else request.requests.hub.threadpool)
        if failure is None:
            return result
        try:
            raise failure
        finally:
            del failure  # It holds this frame, which would hold it in turn, and the params.

    return call


def _done(work: _Work, pool: ThreadPool) -> _Result:
    """What ``work`` has come to, done by a thread of ``pool``; it is waited for."""
    # Waits for a thread, or nearly: one more than there are threads is taken.
    done = pool.spawn(work.carry_out)
    cancelled: CallCancelled | None = None
    while not done.ready():
        try:
            done.wait()
        except CallCancelled as exc:
            cancelled = exc.with_traceback(None)  # It would hold this frame.
            if work.withdraw():
                break
        except BaseException:  # Whoever kills this doesn't want to wait.
            work.withdraw()
            raise
    if cancelled is not None:
        return None, cancelled
    outcome = done.get()
    assert outcome is not None  # As gevent's type hints would have it.
    return outcome


class _Work:
    """What a thread is to do, unless that is withdrawn before."""

    __slots__ = ("_function", "_right_to_decide")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        # Whoever pops the one item says whether it is done: popping is atomic among threads.
        self._right_to_decide = [True]

    def withdraw(self) -> bool:
        """Have it not done; False if it has begun."""
        try:
            return self._right_to_decide.pop()
        except IndexError:
            return False

    def carry_out(self) -> _Result:
        """What it comes to: gevent would print what comes out of a thread."""
        try:
            self._right_to_decide.pop()
        except IndexError:
            return None, None
        try:
            return self._function(), None
        except BaseException as exc:
            return None, exc
