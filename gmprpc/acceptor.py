"""Accepts connections for a server: no more than it wants, and past what the system has run out of.

It knows no protocol: what it accepts is handed on, each connection in a greenlet of its own.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gevent import Greenlet
from gevent.pool import Group
from gevent.server import StreamServer

from .log import log_soon
from .metrics import Counters
from .transport import UNIX_PREFIX, file_identity, format_address

logger = logging.getLogger("gmprpc.server")

# Descriptors, or memory for a socket: the connection waits in the queue, and accepting is worth another try later.
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# How long accepting pauses then: a server shall be back within a second of the first free descriptor, and one failed
# system call every half second is nothing. (A descriptor of a connection that ends here ends the pause at once.)
_PAUSE = 0.5

# What may happen for every connection that comes is logged once in so many seconds. Picked arbitrarily.
_EXHAUSTED_INTERVAL = 60.0
#: The same for those that are refused.
REFUSED_INTERVAL = 1.0

if TYPE_CHECKING:
    _Greenlet = Greenlet[Any, Any]
else:
    _Greenlet = Greenlet  # It is generic in its stubs only.


class ConnectionGreenlet(_Greenlet):
    """The life of a connection."""

    # Where it was made says nothing, and takes half a KiB to remember.
    spawning_stack_limit = 0


class ConnectionGreenlets(Group):
    """The greenlets of connections: from the moment they are accepted until their sockets are closed."""

    greenlet_class = ConnectionGreenlet


class Acceptor(StreamServer):
    """Accepts what comes to ``listener``, and has ``handle(socket, address)`` called in one of ``greenlets``.

    While ``max_connections`` of these live (None is no limit), who comes is closed at once. ``arrivals`` gets each
    socket with what closes it, until somebody else answers for it. With ``owns_file`` the file of a unix socket goes
    when it is closed; with ``is_borrowed`` the listener is only closed by :meth:`close`, not by :meth:`abandon`.
    """

    def __init__(
        self,
        listener: Any,
        handle: Callable[[Any, Any], Any],
        greenlets: ConnectionGreenlets,
        arrivals: dict[Any, Callable[[], Any]],
        *,
        max_connections: int | None,
        counters: Counters,
        owns_file: bool = False,
        is_borrowed: bool = False,
    ) -> None:
        self._greenlets = greenlets
        self._arrivals = arrivals
        self._max_connections = max_connections
        self._counters = counters
        self._pause: Any = None  # The timer that ends it.
        self._exhausted = Notice(_EXHAUSTED_INTERVAL)
        self._refused = Notice(REFUSED_INTERVAL)
        spawn: Any = greenlets.spawn  # Not the group: then `stop` would kill it, and its fullness be asked for.
        super().__init__(listener, handle, spawn=spawn)
        self._is_borrowed = is_borrowed
        self._path = str(self.address) if owns_file else None
        # Tells its file from another one that may stand there later.
        self._file = file_identity(self._path) if self._path is not None else None

    @property
    def place(self) -> Any:
        """Where it listens: ``(host, port, ...)`` or ``"unix:/path"``."""
        return UNIX_PREFIX + self.address if isinstance(self.address, str) else self.address

    def do_read(self) -> Any:
        """The next connection as ``(socket, address)``, None if there is none to take; called by gevent, in the hub."""
        for _ in range(self.max_accept):
            try:
                accepted = super().do_read()
            except ConnectionAbortedError:
                continue  # It was gone before its turn.
            except OSError as exc:
                if exc.errno not in _EXHAUSTED:
                    raise
                self._pause_accepting(exc)
                return None
            if accepted is None:
                return None
            sock, address = accepted
            if self._max_connections is None or len(self._greenlets) < self._max_connections:
                self._arrivals[sock] = sock.close
                return accepted
            sock.close()
            self._counters.refused_connections += 1
            peer = format_address(address or self.address)
            message = "connection with %s refused: there are max_connections (%d)"
            self._refused.log(message, peer, self._max_connections, peer=peer)
        return None

    def do_close(self, sock: Any, *args: Any) -> None:
        """Close what was accepted, when its life is over; called by gevent."""
        super().do_close(sock, *args)
        self._arrivals.pop(sock, None)
        if self._pause is not None:
            self._resume()

    def stop_accepting(self) -> None:
        """Accept nothing more, whatever waits."""
        super().stop_accepting()
        self._end_pause()

    def finish(self) -> None:
        """Accept what waits already, then close: closing the listener would reset whoever is in its queue."""
        self.stop_accepting()
        with suppress(OSError):
            while accepted := self.do_read():
                self.do_handle(*accepted)
        self.close()
        path, self._path = self._path, None
        if path is not None and self._file is not None and file_identity(path) == self._file:
            with suppress(OSError):
                os.unlink(path)

    def abandon(self) -> None:
        """Leave it to the process that this one was just forked off from."""
        self.stop_accepting()
        if not self._is_borrowed:  # A socket that was handed in is not ours to close.
            self.close()

    def _pause_accepting(self, exc: OSError) -> None:
        self.stop_accepting()
        self._pause = self.loop.timer(_PAUSE)
        self._pause.start(self._resume)
        self._exhausted.log(
            "can't accept connections at %s: %s; they wait until that is over",
            format_address(self.address),
            exc.strerror,
        )

    def _resume(self) -> None:
        self._end_pause()
        self.start_accepting()

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.close()
            self._pause = None


class Notice:
    """Something to log that may happen again and again: once in ``interval`` seconds is enough."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._logged_at = -interval

    def log(self, message: str, *args: Any, **fields: Any) -> None:
        """Log it as a warning, unless that was done just now; in any greenlet, and in the hub."""
        if (now := perf_counter()) - self._logged_at >= self._interval:
            self._logged_at = now
            log_soon(logger, logging.WARNING, message, *args, **fields)
