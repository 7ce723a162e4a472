"""A worker for gunicorn: ``gunicorn -k gmprpc.gunicorn.Worker module:service``.

Gunicorn starts and ends the processes, opens what they listen at, and hears the signals; what is here runs a server in
each of them. It needs the extra ``gmprpc[gunicorn]``.
"""

from __future__ import annotations

import logging
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import gevent
from gevent import hub, monkey, socket
from gevent.event import Event
from gunicorn.errors import AppImportError
from gunicorn.glogging import Logger
from gunicorn.workers import base

from . import workermetrics
from .accesslog import AccessLog
from .accesslog import logger as access_logger
from .connection import Call, Connection
from .exceptions import ErrorResponse
from .methods import RESERVED_PREFIX
from .observing import Observer
from .protocol import Message
from .proxyprotocol import UNIX
from .server import Server
from .service import Service
from .stacks import dump
from .succession import Succession
from .tls import server_context

#: How long before gunicorn kills a worker that has been told to stop it cuts what it still has, in seconds: then its
#: callers and its log hear of it. A server gives those that it cuts a second to end.
KILL_MARGIN = 1.0

# A sign of life is due every half of gunicorn's `timeout`; this is how often its own gevent worker gives one.
_HEARTBEAT = 1.0

# A worker waits for another one to serve in its place, but only for this part of the time that it is given to stop, and
# looks so often whether one does. Picked arbitrarily.
_HEIRS_SHARE = 0.5
_HEIRS_INTERVAL = 0.05

# That of gunicorn's other lines.
_FORMAT = Logger.error_fmt, Logger.datefmt

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Worker(base.Worker):  # type: ignore[misc]  # gunicorn has no type hints
    """Serves a :class:`gmprpc.Service`, or a :class:`gmprpc.Server`, in one of gunicorn's processes.

    A server's keywords count for each worker; where it listens is what gunicorn says. So do of gunicorn's settings:

    * ``graceful_timeout``: what a worker is given to stop, in place of ``stop_timeout``: the ``drain_delay`` is part of
      it, and what is in flight is cut a second before;
    * ``worker_connections``: the most connections in each worker, unless ``max_connections`` is lower;
    * ``certfile``, ``keyfile``, ``ca_certs``, ``cert_reqs``, ``ciphers``, ``ssl_context``: TLS, in place of the
      server's own ``ssl_context``;
    * ``proxy_protocol``, ``proxy_allow_ips``: for a service; a server has keywords of its own for that;
    * ``accesslog``: a line for each call, in the form of :class:`gmprpc.AccessLog`;
    * ``max_requests``, ``max_requests_jitter``: how many calls a worker carries out before another takes its place;
    * ``timeout``: a worker whose hub is blocked for that long, by a handler that computes, is killed.

    Where the environment variable ``GMPRPC_METRICS_BIND`` names an address, ``/metrics``, ``/livez`` and ``/readyz``
    are answered there over HTTP, for all workers together.

    What is about HTTP doesn't count. The standard library is monkey-patched before the application is imported, unless
    a subclass sets ``patches`` to False.
    """

    #: Whether to monkey-patch the standard library.
    patches = True

    # Gunicorn's own.
    sockets: list[Any]
    alive: bool
    aborted: bool

    # Of all workers of this process; made when there is the first one.
    _succession: ClassVar[Succession | None] = None

    # Before it serves.

    def __init__(self, age: int, *args: Any) -> None:
        super().__init__(age, *args)
        Worker._succession = Worker._succession or Succession()
        Worker._succession.announce(age)

    @classmethod
    def setup(cls) -> None:
        """Prepare for the metrics of all workers; called by gunicorn's master, before anything is forked or loaded."""
        workermetrics.prepare_as_told()

    def init_process(self) -> None:
        """Begin to be a process of its own; called by gunicorn, and doesn't return before its end."""
        self._is_starting, self._is_told = True, False
        try:
            self._take_signals_that_were_early()
            self._init_process()
        except BaseException:
            if self._is_told and self._is_starting:  # Whatever has been made of it.
                sys.exit(0)
            raise
        finally:
            self._settle()

    def _init_process(self) -> None:
        workermetrics.hand_over(self.cfg.uid, self.cfg.gid)
        if self.patches:
            monkey.patch_all()
        hub.reinit()
        # Gevent's, as the server needs them; the descriptors go on being gunicorn's, which knows them by other objects.
        self.sockets = [socket.socket(s.FAMILY, socket.SOCK_STREAM, fileno=s.sock.detach()) for s in self.sockets]
        os.register_at_fork(after_in_child=self._let_go)
        self._woken = Event()
        self._is_urgent = False
        self._is_retired = False
        super().init_process()

    def _take_signals_that_were_early(self) -> None:
        """End if it has been told so before gunicorn's own handlers of a worker are there.

        Until then its master's are: what they get they put into a queue that nobody reads in this process, and its
        master would wait for the whole of `graceful_timeout`.
        """
        master: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self.handle_exit)
        with suppress(AttributeError, Empty):
            while True:
                if master.SIG_QUEUE.get_nowait() in _STOP_SIGNALS:
                    self._be_told()

    def _let_go(self) -> None:
        """Hold no listener open in a process that a method forks off: it may live longer than all of gunicorn."""
        for listener in self.sockets:
            listener.close()

    def load_wsgi(self) -> None:
        """Have the application loaded, and make it ready to serve; called by gunicorn."""
        try:
            app = self.app.wsgi()
        except SyntaxError as exc:
            if not self.cfg.reload:
                raise
            # As gunicorn does: whoever is at work on it sees what is wrong, and the worker waits to be reloaded.
            self.log.exception(exc)
            if exc.filename is not None:
                self.reloader.add_extra_file(exc.filename)
            app = _failing(f"{type(exc).__name__}: {exc}")
        self.server = self._server_of(app)
        _log_as_gunicorn_does()
        if workermetrics.listener() is not None:
            import_module(f"{__package__}.prometheus")  # Now, and not when nothing should block the hub any more.

    def _server_of(self, app: Any) -> Server:
        if isinstance(app, Service):
            app = Server(None, app, **_proxies_of(self.cfg))
        if not isinstance(app, Server):
            kind = getattr(app, "__name__", type(app).__name__)
            raise AppImportError(
                f"{kind} is no gmprpc.Service or gmprpc.Server, and gmprpc.gunicorn.Worker serves nothing else. "
                "Is it a WSGI application? That is for another worker class: gunicorn -k gevent."
            )
        app.listener = self.sockets
        app.max_connections = min(filter(None, (app.max_connections, self.cfg.worker_connections)), default=None)
        if self.cfg.workers > 1:
            app.max_accept = 1  # Connections live long: no worker should be quicker and take all that come together.
        if self.cfg.is_ssl:
            app.ssl_context = _ssl_context_of(self.cfg)
        if self.cfg.accesslog is not None:
            app.add_observer(AccessLog())
        if self.cfg.max_requests:
            app.add_observer(_CallLimit(self))
        return app

    # While it serves.

    def run(self) -> None:
        """Serve until gunicorn says stop, then answer what is in flight; called by gunicorn."""
        with _told_of(self.server):
            self._serve()

    def _serve(self) -> None:
        heartbeat = gevent.spawn(self._beat)
        # Python calls the handlers of signals when it has something to do next: let the hub have something.
        watcher = gevent.get_hub().loop.io(self.PIPE[0], 1)
        watcher.start(self._wake)
        if self.alive:
            self.server.start()
        self._settle()
        while self.alive:
            self._woken.wait()
            self._woken.clear()
        if self.aborted:
            sys.exit(1)
        self._stop()
        watcher.close()
        heartbeat.kill()

    def _stop(self) -> None:
        timeout = self.cfg.graceful_timeout - KILL_MARGIN
        # For those who have to learn that nobody serves here any more.
        delay = 0.0 if self._is_retired else self.server.drain_delay
        if heirs := self._heirs():
            delay = 0.0
            timeout -= self._wait_for(heirs)
        if not self._is_urgent:
            self.server.stop(max(timeout - delay, 0), delay)
        if self._is_urgent:  # From the beginning, or by now.
            self.server.stop(0, drain_delay=0)

    def _settle(self) -> None:
        self._is_starting = False
        assert self._succession is not None
        self._succession.settle(self.age)

    def _heirs(self) -> list[int]:
        """Those that gunicorn has just started in place of this one."""
        assert self._succession is not None
        return self._succession.heirs(self.age, self.cfg.workers)

    def _wait_for(self, heirs: list[int]) -> float:
        """Go on until one of them serves; returns how many seconds that took.

        Gunicorn stops the old ones as soon as it has forked the new ones, which have yet to load the application.
        """
        assert self._succession is not None
        began_at = monotonic()
        until = began_at + self.cfg.graceful_timeout * _HEIRS_SHARE
        while not self._succession.has_settled(heirs) and not self._is_urgent and monotonic() < until:
            gevent.sleep(_HEIRS_INTERVAL)
        return monotonic() - began_at

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.PIPE[0], 4096)
        self._woken.set()

    def _beat(self) -> None:
        """Show gunicorn again and again that the hub isn't blocked, also while it stops."""
        interval = min(_HEARTBEAT, self.timeout or _HEARTBEAT)
        while True:
            self.notify()
            if self.alive and self.ppid != os.getppid():
                self.log.info("Parent changed, shutting down: %s", self)
                self.alive = False
            self._woken.set()  # What else makes it not `alive`, a reloader say, needn't know how to wake it.
            gevent.sleep(interval)

    def retire(self) -> None:
        """Stop, and answer what is in flight; gunicorn has another worker in its place."""
        self._is_retired = True
        self.alive = False
        self._woken.set()

    # Signals. Python calls these in whatever greenlet is at work: they mustn't block.

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: stop, and answer what is in flight."""
        self._be_told()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT and SIGQUIT: stop at once."""
        if self._is_starting:
            self.cfg.worker_int(self)
        else:
            gevent.spawn(self._quit)
        self._be_told()

    def _be_told(self) -> None:
        self.alive, self._is_told = False, True
        if self._is_starting:  # It has nothing to end yet, and may be long in getting it.
            raise _ToldToStop

    def _quit(self) -> None:
        self._is_urgent = True
        self.cfg.worker_int(self)
        self.server.stop(0, drain_delay=0)  # Cuts short one that waits.

    def handle_usr1(self, sig: int, frame: Any) -> None:
        """SIGUSR1: open the files of the log anew, and show on standard error what every greenlet is doing."""
        dump()
        gevent.spawn(self.log.reopen_files)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """SIGABRT: gunicorn has waited for a sign of life for too long. What blocks the hub gets SystemExit."""
        self.aborted = True
        super().handle_abort(sig, frame)


class _ToldToStop(KeyboardInterrupt):
    """Ends a worker that doesn't serve yet, wherever it is: what loads applications takes a SystemExit for theirs.

    Gevent raises a KeyboardInterrupt in the main greenlet, also when it strikes while the hub runs.
    """


class _CallLimit(Observer):
    """Retires a worker that has begun as many calls as gunicorn allows it; those of built-in methods don't count."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._begun = 0

    def call_started(self, call: Call) -> None:
        if call.method.startswith(RESERVED_PREFIX):
            return
        self._begun += 1
        if self._begun == self._worker.max_requests:
            self._worker.log.info("Autorestarting worker after %d calls.", self._begun)
            self._worker.retire()


@contextmanager
def _told_of(server: Server) -> Iterator[None]:
    """Meanwhile tell of ``server``, which hasn't started yet, who asks for metrics, if anybody may."""
    if (listener := workermetrics.listener()) is not None:
        from .prometheus import admin_server  # It may not be there where nobody asks.

        with admin_server(listener, server):
            yield
    elif (prometheus := sys.modules.get(f"{__package__}.prometheus")) is not None:
        # The application has it observed, and shows that in a way of its own.
        with prometheus.relaying():
            yield
    else:
        yield


def _failing(reason: str) -> Server:
    """A server that answers every call with an error, and isn't well."""

    def fail(_connection: Connection, message: Message) -> None:
        if not message[2].startswith(RESERVED_PREFIX):
            raise ErrorResponse(f"the application can't be loaded: {reason}")

    server = Server(None, on_dispatch=fail)
    server.is_healthy = False
    return server


def _ssl_context_of(cfg: Any) -> ssl.SSLContext:
    """What gunicorn's settings say, with the safe defaults of ours."""

    def make() -> ssl.SSLContext:
        context = server_context(cfg.certfile, cfg.keyfile, client_cafile=cfg.ca_certs)
        context.verify_mode = cfg.cert_reqs
        if cfg.ciphers:
            context.set_ciphers(cfg.ciphers)
        return context

    context: ssl.SSLContext = cfg.ssl_context(cfg, make)
    return context


def _proxies_of(cfg: Any) -> dict[str, Any]:
    """The keywords of a server that say who is believed about its clients."""
    allowed = ["0.0.0.0/0", "::/0"] if "*" in cfg.proxy_allow_ips else cfg.proxy_allow_ips
    # Whoever may connect to a unix socket has been allowed to by the rights of its file.
    return {"proxy_protocol": cfg.proxy_protocol, "proxy_allow_from": [*allowed, UNIX]}


def _log_as_gunicorn_does() -> None:
    """Have gmprpc log where gunicorn does, unless the application has said where."""
    ours, theirs = logging.getLogger("gmprpc"), logging.getLogger("gunicorn.error")
    if ours.hasHandlers():
        return
    ours.handlers = [*theirs.handlers]
    ours.setLevel(theirs.level)
    accesses = logging.getLogger("gunicorn.access").handlers
    if accesses:
        access_logger.handlers = [*accesses]
        access_logger.setLevel(logging.INFO)
        access_logger.propagate = False
        for handler in accesses:  # A line of gunicorn's own would have the time in it.
            handler.setFormatter(logging.Formatter(*_FORMAT))
