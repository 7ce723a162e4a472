"""Accepts connections and serves them: the listeners, and the set of live connections."""

from __future__ import annotations

import logging
import os
import signal
import ssl
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, Self

import gevent
from gevent import GreenletExit

from .acceptor import Acceptor, ConnectionGreenlets
from .authentication import Authentication
from .connection import Connection, current_call
from .draining import Farewells, Stopping
from .entrance import Entrance
from .expiry import expiring
from .log import log
from .methods import Handler, MethodTable, Wrapper
from .metrics import Counters, Statistics
from .observing import Observer, Observing
from .options import (
    HANDSHAKE_TIMEOUT,
    MAX_CONCURRENCY,
    MAX_CONNECTIONS,
    MAX_UNSENT_SIZE,
    READ_TIMEOUT,
    SERVER_MAX_MESSAGE_SIZE,
    WRITE_TIMEOUT,
    ConnectionOptions,
    check_limit,
    check_timeout,
)
from .proxyprotocol import ProxyProtocol
from .service import Registry, Service, refuse_http
from .streams import CountingStream, Stream
from .transport import (
    UNIX_HOST,
    UNIX_PREFIX,
    SocketFile,
    format_address,
    makes_file,
    open_listener,
)

logger = logging.getLogger("gmprpc.server")

# How long the end of a stream waits for observers, who may be the last to hear of it in this process. Picked
# arbitrarily, as for the end of a server.
_CATCH_UP_TIMEOUT = 1.0

Hook = Callable[..., Any]


class Server(Registry):
    """A MessagePack-RPC server.

    ``listener`` is what :class:`gevent.server.StreamServer` takes (``(host, port)``, ``"host:port"``, a port, a
    listening socket), ``"unix:/path"``, or ``"fd://3"`` for a listening descriptor; or a list of these, to listen at
    each. ``service`` has the methods; without one the server makes its own, and the server's own registration methods
    go to it either way.

    With ``proxy_protocol`` ``"v1"`` or ``"v2"`` each connection begins with a header of the PROXY protocol, in that
    version, in which a balancer tells for whom it has connected: the ``peer`` then. With ``"auto"`` there may be either
    or none. ``proxy_allow_from`` has the addresses and networks of those that are believed, ``"unix"`` for all at unix
    sockets; by default ``127.0.0.0/8``, ``::1`` and ``"unix"``. Others are refused, with "auto" if they have a header.

    ``socket_mode``, ``socket_user`` and ``socket_group`` are those of the file of ``"unix:/path"``: who may write to it
    may connect. It is theirs before anybody can.

    Hooks run in the greenlet of the connection, ``on_dispatch`` in that of the request:

    * ``on_accept(socket, address)``: before anything is read; False refuses the connection. ``address`` may be that of
      a balancer.
    * ``on_dispatch(connection, message)``: for every request and notification, of unknown methods too; ``message`` is
      the decoded array. What it raises is the answer.
    * ``authenticate(connection, message)``: for the first request or notification of each connection, in its greenlet,
      before anything is carried out; those behind it wait. With True, and nothing else, the connection is let in, and
      this message carried out like any other: what only logs in is a method of its own. Otherwise the answer is ``not
      authenticated``, or an ErrorResponse's own error, and the connection is closed. Only ``$/health`` can be called
      before. ``connection.user`` is a place for what it finds out.
    * ``on_error(connection, exc)``, ``on_eof(connection)``: each connection ends with exactly one of them.

    Limits (None is no limit): ``max_message_size`` bytes in one message (always limited); ``max_concurrency`` requests
    and notifications in flight on one connection, until their answers have been sent, and ``max_unsent_size`` bytes
    that wait to be sent, beyond either of which it isn't read; ``max_connections``, beyond which a new one is closed;
    ``max_connections_per_peer``, the same for those of one IP address or, at unix sockets, of one user.

    Timeouts, in seconds (None is no limit), each of which ends its connection: ``handshake_timeout`` for TLS, and for
    the PROXY protocol's header, ``read_timeout`` for the rest of a message from its last part on, ``write_timeout`` for
    a peer that takes no answers, ``idle_timeout`` for a connection on which nothing happens and nothing is at work.
    ``reply_timeout`` ends no connection: it is what a request may take before it is answered with an error, and
    :exc:`CallCancelled` raised in its handler. ``stop_timeout`` and ``drain_delay`` are for :meth:`stop`.

    ``max_connection_age``, 10 % more or less, lets connections move to servers that have come later. Clients that ask
    for it (``draining=True``, and every Balancer) are told and lose no call; others are let go when nothing is in
    flight, or after ``stop_timeout``, and lose what they send at that moment.

    ``observers`` are told of every request and notification when it starts and how it has ended; see
    :class:`~gmprpc.Observer`.

    ``packer_options`` and ``unpacker_options`` go to msgpack's Packer and Unpacker; their hooks must not block.
    ``hide_errors`` answers ``internal error (id)`` in place of what a handler raised; the log has the id too.
    ``reuse_greenlets=False`` gives each request a fresh greenlet, for code that depends on pristine greenlet-locals.
    ``introspection=False`` leaves the built-in methods out that tell callers what can be called: ``$/list`` and
    ``$/describe``.
    """

    #: How many connections it accepts in a row before others have their turn, as :class:`gevent.server.StreamServer`
    #: has it; a process that shares its listener with others should take one at a time.
    max_accept = 100

    def __init__(
        self,
        listener: Any,
        service: Service | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        # The balancer in front
        proxy_protocol: ProxyProtocol = "off",
        proxy_allow_from: Iterable[str] | None = None,
        # The file of a unix socket
        socket_mode: int | None = None,
        socket_user: str | int | None = None,
        socket_group: str | int | None = None,
        # Hooks
        on_accept: Hook | None = None,
        on_dispatch: Hook | None = None,
        authenticate: Hook | None = None,
        on_error: Hook | None = None,
        on_eof: Hook | None = None,
        observers: Iterable[Observer] = (),
        # Limits
        max_message_size: int = SERVER_MAX_MESSAGE_SIZE,
        max_concurrency: int | None = MAX_CONCURRENCY,
        max_unsent_size: int | None = MAX_UNSENT_SIZE,
        max_connections: int | None = MAX_CONNECTIONS,
        max_connections_per_peer: int | None = None,
        # Timeouts
        handshake_timeout: float | None = HANDSHAKE_TIMEOUT,
        read_timeout: float | None = READ_TIMEOUT,
        write_timeout: float | None = WRITE_TIMEOUT,
        idle_timeout: float | None = None,
        reply_timeout: float | None = None,
        stop_timeout: float | None = 10.0,
        drain_delay: float = 0.0,
        max_connection_age: float | None = None,
        # Encoding
        packer_options: Mapping[str, Any] | None = None,
        unpacker_options: Mapping[str, Any] | None = None,
        # Requests
        hide_errors: bool = False,
        reuse_greenlets: bool = True,
        # Built-in methods
        introspection: bool = True,
    ) -> None:
        if ssl_context is not None and ssl_context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("ssl_context is that of a client: make it with gmprpc.tls.server_context()")
        if listener == []:
            raise ValueError("the list of listeners is empty")
        has_file = any(map(makes_file, _listeners_of(listener)))
        if not has_file and (socket_mode, socket_user, socket_group) != (None, None, None):
            raise ValueError("socket_mode, socket_user and socket_group are for unix:PATH, which makes a file")
        check_limit("max_connections", max_connections)
        check_limit("max_connections_per_peer", max_connections_per_peer)
        check_timeout("handshake_timeout", handshake_timeout)
        check_timeout("reply_timeout", reply_timeout)
        check_timeout("stop_timeout", stop_timeout)
        check_timeout("drain_delay", drain_delay)
        check_timeout("max_connection_age", max_connection_age)
        if drain_delay is None or max_connection_age == 0:
            raise ValueError("drain_delay has to be a number of seconds, and max_connection_age None or more than 0 s")
        #: What can be called.
        self.service = Service() if service is None else service
        super().__init__(self.service._methods)
        #: As they were given; a program that runs the server of another may change them before it starts.
        self.listener = listener
        self.ssl_context = ssl_context
        self.max_connections = max_connections
        #: Seconds that :meth:`stop` gives what is in flight.
        self.stop_timeout = stop_timeout
        #: Seconds for which :meth:`stop` first has everything go on, so that others may hear of it.
        self.drain_delay = drain_delay
        #: What ``$/health`` tells, unless the server is stopping: for the program to set. Calls are served either way.
        self.is_healthy = True
        #: Whether :meth:`statistics` counts the bytes of connections that begin from now on; for the program to set.
        self.counts_bytes = False
        self._file_wanted = SocketFile(socket_mode, socket_user, socket_group)
        self._on_accept = on_accept
        self._on_error = on_error
        self._on_eof = on_eof
        self._options = ConnectionOptions(
            max_message_size=max_message_size,
            max_concurrency=max_concurrency,
            max_unsent_size=max_unsent_size,
            read_timeout=read_timeout,
            write_timeout=write_timeout,
            idle_timeout=idle_timeout,
            reuse_greenlets=reuse_greenlets,
            hide_errors=hide_errors,
            packer_options=packer_options or {},
            unpacker_options=unpacker_options or {},
        )
        self._on_dispatch = on_dispatch
        self._reply_timeout = reply_timeout
        self._introspection = introspection
        self._farewells = Farewells(max_connection_age, stop_timeout)
        self._observing = Observing()
        self._table = self._new_table()
        for observer in observers:
            self.add_observer(observer)
        self._counters = Counters()
        #: The hooks as they were given, each by its keyword; None where there is none.
        self.hooks: Mapping[str, Hook | None] = MappingProxyType(
            {
                "on_accept": on_accept,
                "on_dispatch": on_dispatch,
                "authenticate": authenticate,
                "on_error": on_error,
                "on_eof": on_eof,
            }
        )
        self._authentication = None if authenticate is None else Authentication(authenticate, self._counters)
        self._acceptors: list[Acceptor] = []  # One for each listener, while they are open.
        self._connections: dict[Any, Connection] = {}  # Each with the greenlet that is its life.
        self._greenlets = ConnectionGreenlets()
        self._arrivals: dict[Any, Callable[[], Any]] = {}  # What has no connection yet, with what closes it.
        self._entrance = Entrance(
            proxy_protocol=proxy_protocol,
            proxy_allow_from=proxy_allow_from,
            max_connections_per_peer=max_connections_per_peer,
            handshake_timeout=handshake_timeout,
            write_timeout=write_timeout,
            arrivals=self._arrivals,
            counters=self._counters,
        )
        self._stopping = self._new_stopping()
        self._hub: Any = None  # Of the thread that starts it; a program may fork before.

    # Where it listens.

    @property
    def address(self) -> Any:
        """Where the server listens: ``(host, port, ...)`` or ``"unix:/path"``; the listener as given until it does.

        Of several places it is the first.
        """
        return self.addresses[0]

    @property
    def addresses(self) -> list[Any]:
        """Every place where the server listens, each as :attr:`address` has it."""
        return [acceptor.place for acceptor in self._acceptors] or _listeners_of(self.listener)

    @property
    def server_host(self) -> str | None:
        """The IP address that the server is bound to; None for a unix socket."""
        return self.address[0] if isinstance(self.address, tuple) else None

    @property
    def server_port(self) -> int | None:
        """The port that the server is bound to, chosen by the system if it was given as 0; None for a unix socket."""
        return self.address[1] if isinstance(self.address, tuple) else None

    @property
    def started(self) -> bool:
        """True while the server accepts connections."""
        return bool(self._acceptors)

    @property
    def is_serving(self) -> bool:
        """True while calls are welcome, as far as the server knows: it is healthy, and nobody has called :meth:`stop`.

        It is what ``$/health`` tells.
        """
        return self.is_healthy and not self._stopping.is_begun

    @property
    def connections(self) -> frozenset[Connection]:
        """The connections that are live now; with ``authenticate`` those that were let in."""
        connections = frozenset(self._connections.values())
        return connections if self._authentication is None else connections - self._authentication.strangers

    def statistics(self) -> Statistics:
        """What happened since the server was made, and how much is going on now: one snapshot, which can't be changed.

        What :class:`Counters` counts, and of the connections that are open now: ``open_connections``, ``in_flight``
        (calls at work, or answered and the answer not sent yet), ``pending`` (calls to the clients that wait for their
        answers) and ``unsent_size`` (bytes that wait to be sent). May be called in any thread.
        """
        connections = [*self._connections.values()]  # A copy, which is made at once.
        return Statistics(
            self._counters.snapshot(),
            open_connections=len(connections),
            in_flight=sum(connection.in_flight for connection in connections),
            pending=sum(connection.pending for connection in connections),
            unsent_size=sum(connection.unsent_size for connection in connections),
        )

    def add_observer(self, observer: Observer) -> None:
        """Have ``observer``, too, told of every call from now on.

        The first one is told of those on connections that are still to come: what is off costs nothing.
        """
        self._observing.add(observer)
        if not self._options.is_observed:
            self._options = replace(self._options, is_observed=True)
            self._table = self._new_table()

    def _new_table(self) -> MethodTable:
        """The table of methods for connections that are to come."""
        # What is off costs nothing: what concerns each request is wrapped around the methods as they enter the table.
        wrappers: list[Wrapper] = []
        if self._on_dispatch is not None:
            wrappers.append(partial(_dispatched, self._on_dispatch))
        if self._options.is_observed:
            wrappers.append(self._observing.observed)
        if self._reply_timeout is not None:
            # Outermost: observers that are far behind hold calls up, which is no reason to answer later than that.
            wrappers.append(partial(expiring, self._reply_timeout))
        return self.service.table(
            *wrappers,
            introspection=self._introspection,
            is_serving=lambda: self.is_serving,
            on_health=self._farewells.hear,
        )

    # Its life.

    def start(self) -> None:
        """Bind, if an address was given, and accept connections from now on; at every place or at none.

        Raises:
            OSError: the address is in use, say, or not ours to use.
            LookupError: there is no such ``socket_user`` or ``socket_group``.
        """
        if self._acceptors:
            if self._stopping.is_begun:
                self._stopping.revoke()
                self._stopping = self._new_stopping()
            return
        self._stopping = self._new_stopping()  # An earlier one may still be waiting for its connections.
        self._hub = gevent.get_hub()
        acceptors: list[Acceptor] = []
        try:
            for listener in _listeners_of(self.listener):
                acceptors.append(self._acceptor_of(listener))
        except BaseException:
            for acceptor in acceptors:
                acceptor.finish()
            raise
        for acceptor in acceptors:
            acceptor.start()
        self._acceptors = acceptors
        _servers.add(self)

    def _acceptor_of(self, listener: Any) -> Acceptor:
        acceptor = Acceptor(
            open_listener(listener, self._file_wanted),
            self._serve,
            self._greenlets,
            self._arrivals,
            max_connections=self.max_connections,
            counters=self._counters,
            owns_file=makes_file(listener),
            is_borrowed=hasattr(listener, "accept"),
        )
        acceptor.max_accept = self.max_accept
        return acceptor

    def serve_forever(self, stop_timeout: float | None = None) -> None:
        """Serve until :meth:`stop` is called, or SIGTERM or SIGINT comes.

        The signals stop gracefully, with ``stop_timeout`` in place of the server's own if it is given; SIGINT, behind
        which a person is waiting, without ``drain_delay``, and a second one at once. In a thread other than the main
        one no signal is handled.
        """
        timeout = self.stop_timeout if stop_timeout is None else stop_timeout
        self.start()
        with ExitStack() as stack:
            if gevent.get_hub().main_hub:  # Also where monkey-patching has made a thread of each greenlet.
                for signum in (signal.SIGTERM, signal.SIGINT):
                    _handle_signal(stack, signum, partial(self._on_signal, signum, timeout))
            while True:
                stopping = self._stopping
                stopping.over.wait()
                if not stopping.is_revoked:
                    return

    def _on_signal(self, signum: int, timeout: float | None) -> None:
        if signum != signal.SIGINT:
            self.stop(timeout)
        else:
            self.stop(0 if self._stopping.is_begun else timeout, drain_delay=0)

    def serve_stream(self, stream: Stream, peer: Any = None) -> Exception | None:
        """Serve ``stream``, which is connected already, until its peer is done and everything is answered.

        Blocks this greenlet; :meth:`stop` ends it. The server need not be started, so its listener may be None, and
        doesn't call ``on_accept``. ``peer`` says who is at the other end. Returns what was wrong with the end, None
        where it was in good order.
        """
        self._hub = gevent.get_hub()
        _servers.add(self)
        life = self._greenlets.spawn(lambda: self._live(self._connection_on(stream, peer)))
        error: Exception | None = life.get()
        self._observing.catch_up(_CATCH_UP_TIMEOUT)
        return error

    def __call__(self, socket: Any, address: Any) -> None:
        """Serve ``socket``, which a plain :class:`gevent.server.StreamServer` has accepted, as one of its own.

        Blocks this greenlet until its peer is done and everything is answered; :meth:`stop` ends it.

        Raises:
            TypeError: this is called as a WSGI application.
        """
        refuse_http(address)
        self._hub = gevent.get_hub()
        _servers.add(self)
        self._greenlets.spawn(self._serve, socket, address).get()

    def close(self) -> None:
        """Close the listener: no new connections. Those that are there live on."""
        acceptors, self._acceptors = self._acceptors, []
        for acceptor in acceptors:
            acceptor.finish()

    def stop(self, timeout: float | None = None, drain_delay: float | None = None) -> int:
        """Stop gracefully; returns how many requests were cut.

        For ``drain_delay`` seconds (by default the server's) everything goes on, while :attr:`is_serving` and
        ``$/health`` tell whoever distributes calls. Then accepting ends, everything that has been received is answered,
        and each connection is closed. On one on which ``$/health`` was ever called the peer is told first, by the
        notification ``$/draining``, and what it sends is served until it closes, or has been quiet for 5 s.

        What is still at work ``timeout`` seconds (by default ``stop_timeout``) after the delay is cut. May be called
        any number of times and from anywhere; a call with a shorter delay or timeout cuts short one that waits, and
        :meth:`start` takes back a stop that is in its delay.

        Where it can't wait it returns 0 at once and goes on by itself: called by a handler or a hook, which are among
        those that have to be waited for; by a callback of the loop, as a handler of signals may be; in another thread.
        """
        if timeout is None:
            timeout = self.stop_timeout
        if drain_delay is None:
            drain_delay = self.drain_delay
        # Where nobody can come there is nobody to hear of it.
        return self._stopping.stop(self._hub, timeout, drain_delay if self._acceptors else 0)

    def _new_stopping(self) -> Stopping:
        return Stopping(
            self.close,
            self._greenlets,
            self._connections,
            self._entrance.under_way,
            self._farewells,
            self._observing.catch_up,
        )

    def _abandon(self) -> None:
        """Leave everything to the process that this one was just forked off from: here nothing is started."""
        acceptors, self._acceptors = self._acceptors, []
        for acceptor in acceptors:
            acceptor.abandon()
        for let_go in self._arrivals.values():
            let_go()
        self._arrivals.clear()
        self._connections.clear()
        self._observing.forget()
        self._greenlets.kill(block=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # The life of a connection, in its own greenlet.

    def _serve(self, socket: Any, address: Any) -> None:
        if (
            self._on_accept is not None
            and self._run_hook(address, self._on_accept, socket, address, failed=False) is False
        ):
            return
        if (taken_in := self._entrance.take_in(socket, address, self.ssl_context)) is None:
            return
        stream, peer = taken_in
        try:
            connection = self._connection_on(stream, peer)
            del self._arrivals[socket], taken_in, stream
            self._farewells.limit_age(connection)
            self._live(connection)
        finally:
            self._entrance.let_out(peer)

    def _connection_on(self, stream: Stream, peer: Any) -> Connection:
        if self.counts_bytes:
            stream = CountingStream(stream, self._counters)
        connection = Connection(stream, self._table, self._options, counters=self._counters, peer=peer)
        self._connections[gevent.getcurrent()] = connection
        if self._authentication is not None:
            self._authentication.begin(connection, self._table, self._options.max_concurrency)
        return connection

    def _live(self, connection: Connection) -> Exception | None:
        """Carry the connection of this greenlet through to its end; returns what was wrong with that."""
        if self._stopping.is_parting:
            connection.finish()
        try:
            error = connection.run()
        finally:
            # In a process that was forked off it isn't there any more.
            self._connections.pop(gevent.getcurrent(), None)
            self._farewells.forget(connection)
            if self._authentication is not None:
                self._authentication.forget(connection)
        if error is not None and self._on_error is not None:
            self._run_hook(connection.peer, self._on_error, connection, error)
        elif error is None and self._on_eof is not None:
            self._run_hook(connection.peer, self._on_eof, connection)
        return error

    def _run_hook(self, peer: Any, hook: Hook, *args: Any, failed: Any = None) -> Any:
        """What ``hook`` returns; what it raises is logged, and it is as if it had returned ``failed``."""
        try:
            return hook(*args)
        except GreenletExit:  # The greenlet of the connection is killed.
            raise
        except BaseException as exc:  # Also SystemExit, which would go to the main greenlet and end the program.
            log(logger, logging.ERROR, "the hook %r failed", hook, exc_info=exc, peer=format_address(peer))
            return failed


# Those that have been started.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _abandon_all() -> None:
    # A child that accepts would take connections away from its parent, one that only holds the listener keeps it open.
    for server in list(_servers):
        server._abandon()


os.register_at_fork(after_in_child=_abandon_all)


def mprpc_server(address: str | None, port: int | str, **options: Any) -> Server:
    """A server on ``address`` and ``port``, in the manner of AnyEvent::MPRPC; ``options`` are :class:`Server`'s.

    With ``"unix/"`` for the address, ``port`` is the path of a unix socket. None binds every IPv4 address.
    """
    if address == UNIX_HOST:
        return Server(f"{UNIX_PREFIX}{port}", **options)
    return Server((address or "0.0.0.0", int(port)), **options)


def _listeners_of(listener: Any) -> list[Any]:
    match listener:
        case [str(), int(), *_]:  # What JSON makes of (host, port).
            return [listener]
        case list():
            return listener
        case _:
            return [listener]


def _dispatched(on_dispatch: Hook, function: Handler) -> Handler:
    @wraps(function)
    def dispatch(*params: Any) -> Any:
        call = current_call()
        on_dispatch(call.connection, call.message)
        return function(*params)

    return dispatch


def _handle_signal(stack: ExitStack, signum: int, handler: Callable[[], Any]) -> None:
    """Have ``handler`` called, in a greenlet, for each ``signum``, until ``stack`` is closed."""
    before = signal.getsignal(signum)
    watcher = gevent.signal_handler(signum, handler)

    def restore() -> None:
        watcher.cancel()
        # The loop leaves the system's own disposition behind, which would end the process.
        signal.signal(signum, before)

    stack.callback(restore)
