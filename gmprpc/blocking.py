"""Reports what blocks the hub: while a handler computes, or waits without gevent, nobody else is served.

A native thread asks the hub now and then for a sign of life, and looks at what runs when there is none: that costs
nothing per message. (gevent's own monitor traces every switch of a greenlet, and knows nothing of requests.)
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from types import FrameType
from typing import Any, Final, NamedTuple

import gevent
from gevent import monkey
from gevent.hub import Hub

from .options import check_timeout
from .requests import RequestGreenlet, fields_of
from .stacks import Stack, formatted, name_of, stack_of

logger = logging.getLogger("gmprpc.hub")

# While it is still blocked a line comes after so many seconds, and then whenever that has doubled. Picked arbitrarily.
_PATIENCE = 1.0

# Of the same method there is one line in so many seconds; of so many methods that is remembered. Picked arbitrarily.
_INTERVAL = 1.0
_MAX_REMEMBERED = 1000

_HUB: Final = Hub.run.__code__
_REQUEST: Final = RequestGreenlet._run.__code__

# Native ones, also where the standard library is monkey-patched.
_start_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")
_allocate_lock: Callable[[], Any] = monkey.get_original("_thread", "allocate_lock")


def report_blocking(seconds: float | None = 0.1) -> None:
    """Log a warning, to ``gmprpc.hub``, when something blocks the hub of this thread for ``seconds`` or longer.

    The line says for how long and, of a request, which one: msgid, method and peer, as text and as fields; the stack is
    that of what has blocked. It comes when that is over, and before if it takes longer than a second; of the same
    method once in a second. It says at least how long: the hub is looked at twice in ``seconds``.

    None, or 0, stops that. In a process that is forked off it has to be called again.

    Raises:
        ValueError: ``seconds`` is no time that can pass.
    """
    check_timeout("seconds", seconds)
    hub = gevent.get_hub()
    if (watch := _watches.pop(hub, None)) is not None:
        watch.stop()
    if seconds:
        _watches[hub] = _Watch(hub, seconds)


class Culprit(NamedTuple):
    """What was seen to run in place of the hub."""

    #: The same object as long as it is the same.
    identity: object
    name: str
    fields: dict[str, Any]
    stack: Stack
    #: When it was seen.
    since: float


class _Watch:
    """Watches one hub, in a thread of its own."""

    def __init__(self, hub: Any, seconds: float) -> None:
        self._hub = weakref.ref(hub)
        self._thread = hub.thread_ident
        self._seconds = seconds
        self._answered_at: float | None = None
        self._culprit: Culprit | None = None
        self._seen_at = 0.0  # Last.
        self._next_line = _PATIENCE
        self._told_at: dict[str, float] = {}
        self._is_over = False
        self._stopped = _allocate_lock()
        self._stopped.acquire()
        _start_thread(self._run, ())

    def stop(self) -> None:
        """Have the thread end, soon."""
        if not self._is_over:
            self._is_over = True
            self._stopped.release()

    # In the thread that watches.

    def _run(self) -> None:
        try:
            while not self._is_over and (hub := self._hub()) is not None and hub.loop is not None:
                # A hub that rests isn't woken up for this.
                if (found := self._seen()) is not None:
                    self._culprit, self._seen_at = found, found.since
                    self._answered_at, self._next_line = None, _PATIENCE
                    hub.loop.run_callback_threadsafe(self._answer)
                    del hub
                    self._pause()
                    while self._answered_at is None and not self._is_over:
                        self._look()
                        self._pause()
                    if self._answered_at is not None:
                        self._conclude(self._answered_at)
                else:
                    del hub
                    self._pause()
        except Exception:
            if not sys.is_finalizing():  # Then anything may be missing.
                traceback.print_exc()

    def _pause(self) -> None:
        if self._stopped.acquire(timeout=self._seconds / 2):
            self._stopped.release()

    def _answer(self) -> None:
        """A sign of life; in the hub."""
        self._answered_at = perf_counter()

    def _look(self) -> None:
        """See what still runs in place of the hub, and say so if that goes on for long."""
        found, now = self._seen(), perf_counter()
        if self._answered_at is not None:  # Meanwhile: what was seen may be anything.
            return
        if found is None or self._culprit is None or found.identity is not self._culprit.identity:
            # The hub has run, but not as far as to give a sign of life.
            self._conclude(self._seen_at)
            self._culprit, self._seen_at, self._next_line = found, now, _PATIENCE
            return
        self._seen_at = now
        if (blocked := now - self._culprit.since) >= self._next_line:
            self._next_line = 2 * blocked
            self._tell(found, blocked, is_over=False)  # Where it is now.

    def _conclude(self, until: float) -> None:
        """What was seen has ended, at that time or later: tell what it was if that took long enough."""
        culprit, self._culprit = self._culprit, None
        if culprit is not None and (blocked := until - culprit.since) >= self._seconds:
            self._tell(culprit, blocked, is_over=True)

    def _seen(self) -> Culprit | None:
        """What runs now in the thread of the hub; None if it is the hub itself, which waits or looks around."""
        frame = sys._current_frames().get(self._thread)
        if frame is None or frame.f_code is _HUB:
            return None
        now = perf_counter()
        first = frame  # The outermost one, but for that of a hub.
        while first.f_back is not None and first.f_back.f_code is not _HUB:
            first = first.f_back
        stack = stack_of(frame)
        if first.f_code is _REQUEST:
            request = _self_of(first)
            if (message := request.message) is None:
                return None
            fields = fields_of(message[2], message[1], request.requests.owner.peer)
            return Culprit(message, name_of(request), fields, stack[1:], now)
        if first.f_back is None:
            return Culprit(first, "a greenlet", {}, stack, now)
        return Culprit(first, "a callback of the loop", {}, stack[1:], now)

    def _tell(self, culprit: Culprit, blocked: float, *, is_over: bool) -> None:
        method = culprit.fields.get("method", culprit.name)
        now = perf_counter()
        if now - self._told_at.get(method, -_INTERVAL) < _INTERVAL:
            return
        if len(self._told_at) >= _MAX_REMEMBERED:
            self._told_at.clear()
        self._told_at[method] = now
        if not is_over:
            # From here: in the thread of the hub nobody could.
            _log("%s blocks the hub, for %.3g s by now", culprit, blocked)
        elif (hub := self._hub()) is not None and hub.loop is not None:
            # There, as all other lines: a log's locks may be gevent's.
            hub.loop.run_callback_threadsafe(gevent.spawn, _log, "%s blocked the hub for %.3g s", culprit, blocked)


def _log(message: str, culprit: Culprit, blocked: float) -> None:
    if not logger.isEnabledFor(logging.WARNING):
        return
    try:
        stack = "\n".join(["Stack (most recent call last):", *formatted(culprit.stack)])
        extra = {**culprit.fields, "duration": blocked}
        args = (culprit.name, blocked)
        # The stack is not that of who calls this.
        record = logger.makeRecord(
            logger.name, logging.WARNING, __file__, 0, message, args, None, "report_blocking", extra, stack
        )
        logger.handle(record)
    except Exception:  # A full disk, perhaps.
        with suppress(Exception):
            traceback.print_exc()


def _self_of(frame: FrameType) -> RequestGreenlet:
    """The greenlet of which ``frame`` is the outermost one."""
    variables = frame.f_locals
    request: RequestGreenlet = variables["self"]
    if sys.version_info < (3, 13):
        variables.clear()  # A copy that the frame would keep, and with it what a request has brought.
    return request


# By the hub that each watches.
_watches: weakref.WeakKeyDictionary[Any, _Watch] = weakref.WeakKeyDictionary()

# The threads aren't there in a process that was forked off.
os.register_at_fork(after_in_child=_watches.clear)
