"""One thing for each hub, which is one for each native thread: made on demand, told when its thread or process ends.

What belongs to an event loop can only be used in its thread. Whoever wants to be used in any thread has one such thing
per hub. It knows nothing of what these things are.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import gevent
from gevent import get_hub, monkey
from gevent.hub import set_hub  # type: ignore[attr-defined]  # The stubs forgot it.

from .reply import get_thread_ident

# A native thread's own, also where monkey-patching made `threading.local` the greenlet's.
_Local: Callable[[], Any] = monkey.get_original("_thread", "_local")


class Resident(Protocol):
    """What there may be one of for each hub."""

    def leave(self) -> None:
        """The thread ends, or its hub was destroyed (then its ``loop`` is None). Called in that thread.

        May wait for a moment, where there still is a loop.
        """

    def abandon(self) -> None:
        """This is a process that was forked off, and what was going on is its parent's. Called in the child."""


T = TypeVar("T", bound=Resident)


class PerHub(Generic[T]):
    """A ``T`` for each hub in which one is asked for; ``make()`` makes it there, and must not wait.

    May be used in any thread. A hub that is gone is forgotten when its thread ends, or has a new one and asks again.
    """

    __slots__ = ("__weakref__", "_make", "_of_hub")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # Not weakly: what belongs to a hub mostly knows it, and would keep it alive.
        self._of_hub: dict[Any, T] = {}
        _all.add(self)

    def get(self) -> T:
        """That of the calling thread's hub."""
        hub = get_hub()
        try:
            return self._of_hub[hub]
        except KeyError:
            return self._made_for(hub)

    def peek(self) -> T | None:
        """That of the calling thread's hub, if it has one already."""
        return self._of_hub.get(get_hub())

    def all(self) -> list[T]:
        """Those of all hubs, this thread's and others'."""
        return list(self._of_hub.values())

    def clear(self) -> None:
        """Forget them all; nothing is called."""
        self._of_hub.clear()

    def _made_for(self, hub: Any) -> T:
        self._forget_hubs(hub.thread_ident, only_destroyed=True)
        _NativeThread.add_user(self)
        return self._of_hub.setdefault(hub, self._make())

    def _forget_hubs(self, thread_ident: int, *, only_destroyed: bool = False) -> None:
        """Forget the hubs of the calling thread, and tell what is there for them."""
        gone = [
            hub
            for hub in list(self._of_hub)  # A copy, made at once: another thread may add its own.
            if hub.thread_ident == thread_ident and (hub.loop is None or not only_destroyed)
        ]
        _call_each([resident.leave for hub in gone if (resident := self._of_hub.pop(hub, None)) is not None])


class _NativeThread:
    """A thread in which some PerHub was used. It is the thread's own alone, so that its end is the thread's."""

    __slots__ = ("_pid", "_thread_ident", "users")

    def __init__(self) -> None:
        self.users: weakref.WeakSet[PerHub[Any]] = weakref.WeakSet()
        self._thread_ident = get_thread_ident()
        self._pid = os.getpid()

    @staticmethod
    def add_user(user: PerHub[Any]) -> None:
        """Have ``user`` told when the calling thread ends."""
        # In a function that calls nobody else: the traceback of an exception would keep the object alive.
        try:
            thread = _threads.current
        except AttributeError:  # The first time in this thread.
            thread = _threads.current = _NativeThread()
        thread.users.add(user)

    def __del__(
        self,
        # Kept, since at exit modules may be gone before this is.
        is_finalizing: Callable[[], bool] = sys.is_finalizing,
        get_thread_ident: Callable[[], int] = get_thread_ident,
        getpid: Callable[[], int] = os.getpid,
    ) -> None:
        # At exit, and in a child without the threads of its parent, the interpreter drops in one thread what belongs to
        # others. At exit everything ends anyway, and a child's part is `abandon`.
        if not is_finalizing() and get_thread_ident() == self._thread_ident and getpid() == self._pid:
            hubs = {hub for user in self.users for hub in user._of_hub if hub.thread_ident == self._thread_ident}
            # gevent may have let go of the thread's hub before; and nobody else will destroy it, which closes two
            # descriptors. (A thread has one; others were destroyed before, or the number is that of an earlier thread.)
            live = [hub for hub in hubs if hub.loop is not None]
            for hub in live:
                set_hub(hub)
            try:
                _call_each([partial(user._forget_hubs, self._thread_ident) for user in self.users])
            finally:
                for hub in live:
                    hub.destroy(destroy_loop=True)


def _call_each(functions: Iterable[Callable[[], Any]]) -> None:
    """Call all, also where some fail; raises what went wrong."""
    errors: list[BaseException] = []
    for function in functions:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)
    if len(errors) == 1:
        raise errors[0]  # The interpreter, which shows it, doesn't show what is in a group.
    if errors:
        raise BaseExceptionGroup("what was there for a hub couldn't be ended", errors)


_threads = _Local()
_all: weakref.WeakSet[PerHub[Any]] = weakref.WeakSet()


def _abandon_all() -> None:
    global _threads
    # Otherwise what this process asks of gevent's thread pool next, to resolve a name, would get lost, if its parent's
    # has done anything before. gevent's own fork, which is `os.fork` where that is patched, does the same.
    gevent.reinit()
    _threads = _Local()  # This thread's object is that of the parent's thread.
    abandoned: list[Any] = []
    for user in list(_all):
        abandoned += user.all()
        user.clear()
    _call_each([resident.abandon for resident in abandoned])


os.register_at_fork(after_in_child=_abandon_all)
