"""Tells an operator over HTTP how the process does: whether it is alive, whether it is ready, and what else is asked.

It knows no MessagePack-RPC: what it tells it is told by functions.
"""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Self

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

from .acceptor import Acceptor, ConnectionGreenlets
from .log import log, shown
from .metrics import Counters
from .transport import makes_file, open_listener

logger = logging.getLogger("gmprpc.admin")

# What a client may take for its request and for the answer, both together. What Prometheus gives a scrape by default.
_TIME_LIMIT = 10.0
# There are a few who ask, every few seconds; more at a time are a mistake. Picked arbitrarily.
_MAX_CONNECTIONS = 100
# How long the last answers may take when the process ends. Picked arbitrarily.
_STOP_TIMEOUT = 0.5


class Response(NamedTuple):
    """What is answered: a status as in ``"200 OK"``, headers without the length, and the body."""

    status: str
    body: bytes
    headers: Iterable[tuple[str, str]] = (("Content-Type", "text/plain; charset=utf-8"),)


#: Answers a request, given its WSGI environment.
Page = Callable[[Mapping[str, Any]], Response]


class AdminServer:
    """An HTTP server with the pages ``/livez``, ``/readyz``, and ``pages`` by their paths.

    ``listener`` is what :class:`~gmprpc.Server` takes. ``/livez`` answers 200 as long as this process answers anything,
    ``/readyz`` 200 if ``is_ready()`` and 503 if not. Each connection is for one request.
    """

    def __init__(self, listener: Any, *, is_ready: Callable[[], bool], pages: Mapping[str, Page] | None = None) -> None:
        def livez(_: Mapping[str, Any]) -> Response:
            return Response("200 OK", b"alive\n")

        def readyz(_: Mapping[str, Any]) -> Response:
            return Response("200 OK", b"ready\n") if is_ready() else Response("503 Service Unavailable", b"not ready\n")

        self._listener = listener
        self._pages: dict[str, Page] = {"/livez": livez, "/readyz": readyz, **(pages or {})}
        self._acceptor: Acceptor | None = None
        self._greenlets = ConnectionGreenlets()

    @property
    def address(self) -> Any:
        """Where it listens: ``(host, port, ...)`` or ``"unix:/path"``; the listener as given until it does."""
        return self._listener if self._acceptor is None else self._acceptor.place

    def start(self) -> None:
        """Listen, and answer from now on.

        Raises:
            OSError: the address is in use, say, or not ours to use.
        """
        if self._acceptor is not None:
            return
        # It isn't started: of accepting, and of what may go wrong there, the acceptor knows more.
        http = WSGIServer(("", 0), self._answer, log=None, error_log=None, handler_class=_Handler)
        acceptor = Acceptor(
            open_listener(self._listener),
            http.handle,
            self._greenlets,
            {},
            max_connections=_MAX_CONNECTIONS,
            counters=Counters(),
            owns_file=makes_file(self._listener),
            is_borrowed=hasattr(self._listener, "accept"),
        )
        acceptor.start()
        self._acceptor = acceptor
        _servers.add(self)

    def stop(self) -> None:
        """Listen no more; what has been asked is still answered, if that doesn't take long."""
        if self._acceptor is None:
            return
        acceptor, self._acceptor = self._acceptor, None
        acceptor.finish()
        self._greenlets.join(_STOP_TIMEOUT)
        self._greenlets.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """The WSGI application."""
        status, body, headers = self._response(environ)
        close = [("Content-Length", str(len(body))), ("Connection", "close")]
        start_response(status, [*headers, *close])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _response(self, environ: dict[str, Any]) -> Response:
        path = environ["PATH_INFO"]
        page = self._pages.get(path)
        if page is None:
            return Response("404 Not Found", f"there are: {' '.join(sorted(self._pages))}\n".encode())
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Response("405 Method Not Allowed", b"GET and HEAD are allowed\n", [("Allow", "GET, HEAD")])
        try:
            return page(environ)
        except Exception as exc:  # It may ask functions of the application.
            log(logger, logging.ERROR, "%s failed", path, exc_info=exc)
            return Response("500 Internal Server Error", b"it failed; the log has the reason\n")

    def _abandon(self) -> None:
        """Leave everything to the process that this one was just forked off from."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            acceptor.abandon()
        self._greenlets.kill(block=False)


# Those that have been started.
_servers: weakref.WeakSet[AdminServer] = weakref.WeakSet()


def _abandon_all() -> None:
    # A child that accepts would take requests away from its parent, and one that only holds the listener keeps it open.
    for server in list(_servers):
        server._abandon()


os.register_at_fork(after_in_child=_abandon_all)


class _Handler(WSGIHandler):
    """Speaks HTTP with a client, quietly, and not for ever."""

    # EBADF is what those get who wait for a socket that is shut down, as below.
    ignored_socket_errors = (*WSGIHandler.ignored_socket_errors, errno.EBADF, errno.ETIMEDOUT)

    def handle(self) -> None:
        """Answer one request; called by the server."""
        sock = self.socket

        def give_up() -> None:
            with suppress(OSError):  # It has gone, perhaps.
                sock.shutdown(2)

        # Not gevent's Timeout, after which the handler would try to say that it has failed: for ever, to who doesn't
        # read. When the socket is shut down it notices that there is nobody any more.
        timer: Any = gevent.get_hub().loop.timer(_TIME_LIMIT)
        timer.start(give_up, update=True)
        try:
            super().handle()
        except OSError:
            pass  # The client has gone.
        finally:
            timer.close()

    def read_request(self, raw_requestline: str) -> Any:
        """See :class:`WSGIHandler`; false for what is no request, of which it would make noise."""
        try:
            return super().read_request(raw_requestline)
        except Exception as exc:
            logger.debug("invalid HTTP request: %s", shown(str(exc)))
            return False
