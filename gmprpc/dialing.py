"""Connecting: from an address to a connected socket, over whichever way answers first; OSErrors become ours here."""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import zip_longest
from select import POLLOUT
from time import perf_counter
from typing import Any

import gevent
from gevent import monkey, socket
from gevent.select import poll

from .exceptions import ConnectFailed
from .transport import UNIX_PREFIX, format_address, parse_address

_getaddrinfo: Callable[..., list[Any]] = monkey.get_original("socket", "getaddrinfo")

BeforeConnect = Callable[[socket.socket], Any]

# How long an address may keep the next one waiting: the Connection Attempt Delay that RFC 8305, section 5, recommends.
_NEXT_ATTEMPT_DELAY = 0.25
# How often a unix socket is tried whose queue is full: there is nothing to wait for. At first, and at most. Picked
# arbitrarily.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1

_UNDER_WAY = (errno.EINPROGRESS, errno.EALREADY)
# Nothing has left this machine: what another address had to say tells more.
_NO_WAY = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EHOSTUNREACH, errno.ENETUNREACH))


def connect(address: Any, before_connect: BeforeConnect | None = None) -> socket.socket:
    """A socket connected to ``address``; of a name with several addresses the one that answers first.

    The name is resolved anew each time. Its addresses are tried in the system's order, but for IPv6 and IPv4 in turn,
    each a quarter of a second after the one before, or at once when that has failed; when one is connected the others
    are closed (RFC 8305's "happy eyeballs" in their simple form). ``before_connect(socket)`` is called with each
    socket before it connects; with an OSError of it that address has failed, anything else goes through.

    Blocks this greenlet, with no deadline of its own: a gevent.Timeout or a kill leaves nothing behind.

    Raises:
        ConnectFailed: nobody answers there; ``__cause__`` is the system's error: the last one of the other side, else
            the last one.
        ValueError: ``address`` names no place.
    """
    place = parse_address(address)
    if isinstance(place, str):
        sock, failure = _connect_to_file(place.removeprefix(UNIX_PREFIX), before_connect)
    else:
        try:
            candidates = _resolve(*place)
        except OSError as exc:
            raise ConnectFailed(f"can't resolve {format_address(place)}: {exc.strerror or exc}") from exc
        sock, failure = _connect_to_first(_interleaved(candidates), before_connect)
    if sock is None:
        reason = "no address" if failure is None else failure.strerror or str(failure)
        raise ConnectFailed(f"can't connect to {format_address(place)}: {reason}") from failure
    return sock


def _resolve(host: str, port: int) -> list[Any]:
    """The addresses of ``host``, as ``getaddrinfo`` gives them."""
    try:
        # What is an address already needs no thread that looks it up.
        return _getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _interleaved(candidates: Iterable[Any]) -> deque[Any]:
    """``candidates`` with the families in turn, so that one which leads nowhere holds up the other only once."""
    families: dict[int, list[Any]] = {}
    for candidate in candidates:
        families.setdefault(candidate[0], []).append(candidate)
    return deque(candidate for turn in zip_longest(*families.values()) for candidate in turn if candidate is not None)


def _connect_to_first(
    candidates: deque[Any], before_connect: BeforeConnect | None
) -> tuple[socket.socket | None, OSError | None]:
    """The socket of whichever of ``candidates`` answers first, or what to tell of why none did.

    All of it happens in this greenlet, which waits for all sockets at once: whatever ends it closes them.
    """
    attempts: dict[int, _Attempt] = {}
    failure: OSError | None = None
    due = 0.0  # The time for the next one.
    try:
        while candidates or attempts:
            if candidates and (not attempts or perf_counter() >= due):
                due = perf_counter() + _NEXT_ATTEMPT_DELAY
                try:
                    attempt = _Attempt(candidates.popleft(), before_connect)
                except OSError as exc:
                    failure, due = _more_telling(failure, exc), 0.0
                    continue
                attempts[attempt.fileno] = attempt
                ready = [attempt.fileno]
            else:
                waiting = poll()
                for fileno in attempts:
                    waiting.register(fileno, POLLOUT)
                patience = 1000 * max(0.0, due - perf_counter()) if candidates else None
                ready = [fileno for fileno, _ in waiting.poll(patience)]
            for fileno in ready:
                try:
                    if attempts[fileno].is_connected():
                        return attempts.pop(fileno).take(), None
                except OSError as exc:
                    attempts.pop(fileno).close()
                    failure, due = _more_telling(failure, exc), 0.0
        return None, failure
    finally:
        for attempt in attempts.values():
            attempt.close()


def _connect_to_file(path: str, before_connect: BeforeConnect | None) -> tuple[socket.socket | None, OSError | None]:
    """The socket that is connected to the unix socket at ``path``, or what went wrong."""
    pause = _FIRST_PAUSE
    try:
        attempt = _Attempt((socket.AF_UNIX, socket.SOCK_STREAM, 0, "", path), before_connect)
    except OSError as exc:
        return None, exc
    try:
        while not attempt.is_connected():
            # Its queue is full. Such a socket isn't on its way, and always ready: gevent's own would ask all the time.
            gevent.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return attempt.take(), None
    except OSError as exc:
        return None, exc
    finally:
        attempt.close()


def _more_telling(known: OSError | None, new: OSError) -> OSError:
    return known if known is not None and new.errno in _NO_WAY and known.errno not in _NO_WAY else new


# Every attempt that is under way in this process.
_attempts: weakref.WeakSet[_Attempt] = weakref.WeakSet()


class _Attempt:
    """A socket on its way to one address."""

    def __init__(self, candidate: Any, before_connect: BeforeConnect | None) -> None:
        family, kind, protocol, _, self._target = candidate
        self._is_unix = family == socket.AF_UNIX
        self._socket: Any = socket.socket(family, kind, protocol)
        _attempts.add(self)
        try:
            if before_connect is not None:
                before_connect(self._socket)
            self._timeout = self._socket.gettimeout()
            self._socket.setblocking(False)
            self.fileno: int = self._socket.fileno()
        except BaseException:
            self._socket.close()
            raise

    def is_connected(self) -> bool:
        """Begin, or see how far it has come; raises OSError when it has failed."""
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self._socket.connect_ex(self._target)
        if code in _UNDER_WAY or (code == errno.EAGAIN and self._is_unix):
            return False
        if code not in (0, errno.EISCONN):
            raise OSError(code, os.strerror(code))
        if not self._is_unix and self._has_reached_itself():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return True

    def _has_reached_itself(self) -> bool:
        """Where nobody listens on a port that the system may give to this end, TCP may connect it with itself."""
        name = self._socket.getsockname()
        with suppress(OSError):  # It may be gone again.
            return name[1] == self._target[1] and bool(name == self._socket.getpeername())
        return False

    def take(self) -> socket.socket:
        """The socket, as it was before it connected; the caller's from now on."""
        sock, self._socket = self._socket, None
        sock.settimeout(self._timeout)
        return sock  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the socket, unless it was taken."""
        if self._socket is not None:
            self._socket.close()


def _abandon_all() -> None:
    """Leave every attempt to the process that this one was just forked off from."""
    for attempt in list(_attempts):
        attempt.close()


os.register_at_fork(after_in_child=_abandon_all)
