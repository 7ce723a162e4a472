"""Connects and calls: one client for a whole program, whatever happens to its connections."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from subprocess import Popen
from typing import Any, Protocol, Self

import gevent
from gevent import GreenletExit

from .children import Child, Command
from .connection import Connection
from .dialing import connect
from .exceptions import CallTimeout, ConnectFailed, ConnectionClosed
from .link import Link
from .log import log
from .metrics import Counters, Statistics
from .options import (
    CLIENT_MAX_MESSAGE_SIZE,
    CONNECT_TIMEOUT,
    DEFAULT,
    MAX_CONCURRENCY,
    MAX_PENDING,
    MAX_RETRY_INTERVAL,
    MAX_UNSENT_SIZE,
    READ_TIMEOUT,
    RETRY_INTERVAL,
    WRITE_TIMEOUT,
    ConnectionOptions,
    LinkOptions,
    check_timeout,
)
from .perhub import PerHub
from .reply import PendingCall
from .service import Service
from .streams import PlainStream, Stream, TLSStream
from .transport import UNIX_HOST, UNIX_PREFIX, format_address, parse_address

logger = logging.getLogger("gmprpc.client")

Hook = Callable[..., Any]


class Client:
    """A client of one MessagePack-RPC server, to be held for as long as the program runs.

    ``address`` is ``(host, port)``, ``"host:port"`` or ``"unix:/path"``. Making a client does no I/O: ``connect()``,
    ``with`` or the first call connects, and a call after the connection was lost connects anew. Any number of greenlets
    may call at once; they share the connection, and answers come in any order. Native threads may share the client,
    too: each has a connection of its own, and so has a process that is forked off. ``service`` has the methods that
    the server may call.

    Hooks: ``before_connect(client, socket)``, ``after_connect(client, socket)``, and ``on_error(client, exc)``, called
    whenever no connection could be made or one was lost, but not when it ended in good order. ``on_connect(client,
    connection)`` may call what has to be called on each connection before all else, such as ``connection.call("login",
    token)``: other calls wait for its end, and get what it raises. It is a part of the attempt to connect.

    Time-outs are in seconds, None is no limit. ``timeout`` is for a call, from when it is made until the answer is
    there, whatever has to be done or waited for meanwhile; each call may have its own. ``connect_timeout`` is for one
    attempt to resolve the name, connect to one of its addresses and agree on TLS; and a call without a time-out waits
    no longer than that for a connection. ``cancel_on_timeout`` has the server told, with the notification ``$/cancel``,
    when a caller gives up; servers that don't know it may close the connection.

    While calls wait for a connection attempts are made again and again. After the nth failure in a row the next one
    waits for a random time of up to ``retry_interval`` * 2^n seconds, and of ``max_retry_interval`` at most. With
    ``retry_interval=None`` the first failed attempt fails all calls that wait. A connection that was lost is made again
    when somebody calls, or at once with ``keep_connected``, which is for clients that are called by their servers.

    A server that is about to let a connection go says so with the notification ``$/draining``: nothing more is sent
    there, another connection is made at once, for what is called from then on (with ``retry_interval=None`` only when
    somebody calls), and the old one is closed when all its answers are in. It says so to those on whose connections it
    was ever asked for ``$/health``. With ``draining`` it is asked on each connection, before any call: so no call is
    lost when the server is restarted. Servers that don't know that method may close the connection; any answer will do.

    At most ``max_pending`` calls wait for their answers on one connection; further ones wait their turn, as they do
    while more than ``max_unsent_size`` bytes wait to be sent.

    ``ping_interval`` has the server asked ``$/health`` whenever nothing has happened for so long and no call is under
    way; where no answer comes within the same time the connection is given up. Without it that is left to TCP.

    The other keywords are those of :class:`~gmprpc.Server`; for TLS, ``server_hostname`` is the name to find in the
    certificate where it isn't the address's.
    """

    def __init__(
        self,
        address: Any,
        *,
        service: Service | None = None,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        # Hooks
        before_connect: Hook | None = None,
        after_connect: Hook | None = None,
        on_connect: Hook | None = None,
        on_error: Hook | None = None,
        # Timeouts
        connect_timeout: float | None = CONNECT_TIMEOUT,
        timeout: float | None = None,
        cancel_on_timeout: bool = False,
        read_timeout: float | None = READ_TIMEOUT,
        write_timeout: float | None = WRITE_TIMEOUT,
        idle_timeout: float | None = None,
        ping_interval: float | None = None,
        # Connecting again
        retry_interval: float | None = RETRY_INTERVAL,
        max_retry_interval: float = MAX_RETRY_INTERVAL,
        keep_connected: bool = False,
        draining: bool = False,
        # Limits
        max_pending: int | None = MAX_PENDING,
        max_message_size: int = CLIENT_MAX_MESSAGE_SIZE,
        max_concurrency: int | None = MAX_CONCURRENCY,
        max_unsent_size: int | None = MAX_UNSENT_SIZE,
        # Encoding
        packer_options: Mapping[str, Any] | None = None,
        unpacker_options: Mapping[str, Any] | None = None,
        # Requests of the server
        hide_errors: bool = False,
        reuse_greenlets: bool = True,
    ) -> None:
        check_timeout("timeout", timeout)
        #: Where the server is: ``(host, port)`` or ``"unix:/path"``; what is started, for one made by :meth:`popen`.
        self.address = address if isinstance(address, Command) else parse_address(address)
        if server_hostname is None and isinstance(self.address, tuple):
            server_hostname = self.address[0]
        if ssl_context is not None and ssl_context.check_hostname and not server_hostname:
            raise ValueError("server_hostname: the name to find in the server's certificate has to be given")
        if isinstance(address, Command) and (ssl_context or before_connect or after_connect):
            raise ValueError("there is no socket to a child process: neither hooks that see it nor TLS")
        self._child: Child | None = None
        self._child_hub: Any = None  # Of the thread that speaks with it.
        self._may_start = True
        #: Seconds that one attempt to connect may take.
        self.connect_timeout = connect_timeout
        #: Seconds to wait for an answer, where a call doesn't say.
        self.timeout = timeout
        #: Whether the server is told when a caller gives up, where a call doesn't say.
        self.cancel_on_timeout = cancel_on_timeout
        #: What the server may call.
        self.service = Service() if service is None else service
        self._ssl_context = ssl_context
        self._server_hostname = server_hostname
        self._before_connect = before_connect
        self._after_connect = after_connect
        self._on_connect = on_connect
        self._on_error = on_error
        self._options = LinkOptions(
            connect_timeout=connect_timeout,
            retry_interval=retry_interval,
            max_retry_interval=max_retry_interval,
            keep_connected=keep_connected,
            draining=draining,
            is_greeted=on_connect is not None,
            max_pending=max_pending,
            ping_interval=ping_interval,
            connection=ConnectionOptions(
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
            ),
        )
        self._table = self.service.table(on_draining=self.move_from)
        self._counters = Counters()
        self._links: PerHub[Link] = PerHub(self._new_link)
        #: True from :meth:`close` on until :meth:`connect`.
        self.is_closed = False

    @classmethod
    def popen(cls, command: Any, *, popen_options: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """A client of a child process, which is spoken to over its standard input and output.

        ``command`` and ``popen_options`` (``env``, ``cwd``, ``stderr``) are those of :class:`subprocess.Popen`,
        ``options`` the client's. Its standard error is this process's, unless the options say otherwise.

        The process is started with the first call, or by :meth:`connect`. When it has ended calls raise ConnectFailed,
        and aren't carried out by another one that doesn't know what it knew: :meth:`connect` starts one. :meth:`close`
        ends its standard input, waits two seconds for it, and then sends SIGTERM and at last SIGKILL.

        Raises:
            ValueError: the options would take its standard input or output away, or are for sockets.
        """
        return cls(Command(command, popen_options or {}), **options)

    # Calling.

    def call(
        self,
        method: str,
        *params: Any,
        timeout: float | None = DEFAULT,
        idempotent: bool = False,
        cancel_on_timeout: bool | None = None,
    ) -> Any:
        """Call ``method`` and wait, in this greenlet only, for its result.

        ``timeout`` and ``cancel_on_timeout`` are the client's, unless they are given. A request that has not left when
        the connection is lost goes out on the next one. One that has left may have been carried out, and the call
        fails, unless it is ``idempotent``: then it is sent again, but no more than twice if there is no time-out.

        Raises:
            RemoteError: the server answered an error; MethodNotFound if it has no such method.
            CallTimeout: no answer came in time. ``sent`` tells whether the request had left by then.
            ConnectFailed: no connection could be made within ``connect_timeout``, and the call has no time-out; or
                none can be made: the certificate is not to be trusted, say.
            ConnectionClosed: the connection ended before the answer came, or the client is closed.
            ProtocolError: the answer holds a value that can't be decoded. The connection goes on.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        tell = self.cancel_on_timeout if cancel_on_timeout is None else cancel_on_timeout
        if timeout is not DEFAULT:
            return self._links.get().call(method, params, timeout, idempotent, tell)
        try:
            return self._links.get().call(method, params, self.timeout, idempotent, tell)
        except CallTimeout as exc:
            raise _of_client(exc) from exc.__cause__

    def call_async(
        self,
        method: str,
        *params: Any,
        timeout: float | None = DEFAULT,
        idempotent: bool = False,
        cancel_on_timeout: bool | None = None,
    ) -> PendingCall:
        """Call ``method`` and go on; what it returns has the result once it is there, or the error.

        The keywords are :meth:`call`'s. Where there is no connection yet, or no room on it, the call is sent, in order,
        as soon as there is. Only where ``max_pending`` calls wait for that already this waits until it is its turn.

        Raises:
            ConnectionClosed: the client is closed.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        tell = self.cancel_on_timeout if cancel_on_timeout is None else cancel_on_timeout
        if timeout is not DEFAULT:
            return self._links.get().call_async(method, params, timeout, idempotent, tell, "call")
        call = self._links.get().call_async(method, params, self.timeout, idempotent, tell, "client")
        if call.is_limited:
            call.which = "client"
        return call

    def notify(self, method: str, *params: Any, timeout: float | None = DEFAULT) -> None:
        """Call ``method`` without an answer: whether it arrives and succeeds can't be known.

        Waits for the connection, if there is none yet, and while more than ``max_unsent_size`` bytes wait to be sent;
        raises like :meth:`call`, but for what an answer would bring. It leaves at the latest when this greenlet waits
        for something, when the client is closed, or at exit.
        """
        if timeout is not DEFAULT:
            self._links.get().notify(method, params, timeout)
            return
        try:
            self._links.get().notify(method, params, self.timeout)
        except CallTimeout as exc:
            raise _of_client(exc) from exc.__cause__

    @property
    def proxy(self) -> Proxy:
        """Calls methods as attributes: ``client.proxy.math.pow(2, 10)`` calls ``math.pow``."""
        return Proxy(self)

    # Its life.

    def connect(self) -> Self:
        """Connect, if there is no connection; a client that was closed is open again.

        Raises:
            ConnectFailed: nobody answers, and didn't within ``connect_timeout``.
        """
        self.is_closed = False
        self._may_start = True
        self._links.get().connect()
        return self

    def close(self) -> None:
        """Close the connection: calls that wait end with ConnectionClosed.

        What was sent before, a notification perhaps, still arrives if the peer takes it within two seconds. The
        connections of other threads are closed, too, but not waited for; and in a callback of the loop none is.

        May be called any number of times. Calls from now on raise ConnectionClosed, until :meth:`connect`.
        """
        self.is_closed = True
        own = self._links.get()
        for link in self._links.all():
            if link is not own:
                link.close_from_elsewhere()
        own.close()
        self.let_go()

    @property
    def process(self) -> Popen[Any] | None:
        """The process of a client that was made by :meth:`popen`, once it has been started."""
        return None if self._child is None else self._child.process

    @property
    def is_connected(self) -> bool:
        """True while this thread has a connection on which calls can be sent."""
        return self._links.get().is_connected

    @property
    def connection(self) -> Connection | None:
        """The connection that this thread has, or the last one that it had."""
        return self._links.get().connection

    def statistics(self) -> Statistics:
        """What happened since the client was made, and how much is going on now: one snapshot, which can't be changed.

        What :class:`Counters` counts, and now, in all threads: ``open_connections``, ``pending`` (calls that wait for
        their answers), ``in_flight`` (calls of the server that are at work) and ``unsent_size`` (bytes that wait to be
        sent).
        """
        links = self._links.all()
        connections = [connection for link in links for connection in link.connections]
        return Statistics(
            self._counters.snapshot(),
            open_connections=sum(connection.is_open for connection in connections),
            in_flight=sum(connection.in_flight for connection in connections),
            pending=sum(link.pending for link in links),
            unsent_size=sum(connection.unsent_size for connection in connections),
        )

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    # What its links need.

    def _new_link(self) -> Link:
        return Link(self, self._table, self._options, self._counters)

    @property
    def peer(self) -> Any:
        """What its connections call the server."""
        return self.address

    def open_stream(self, opened: Callable[[Callable[[], Any]], Any]) -> Stream:
        """A new stream to the server; blocks this greenlet.

        Whatever is open by then ``opened`` is told how to let go of, in a process that is forked off meanwhile.

        Raises:
            ConnectFailed: there is none to be had, or not within ``connect_timeout``.
        """
        if isinstance(self.address, Command):
            return self._start(self.address)
        where = format_address(self.address)
        stream: PlainStream | None = None
        late = ConnectFailed(f"can't connect to {where}: no connection within {self.connect_timeout} s")
        try:
            with gevent.Timeout(self.connect_timeout, late):
                before = self._before_connect
                sock = connect(self.address, None if before is None else lambda sock: before(self, sock))
                opened(sock.close)
                try:
                    if self._after_connect is not None:
                        self._after_connect(self, sock)
                    stream = PlainStream(sock, write_timeout=self._options.connection.write_timeout)
                finally:
                    sock.close()  # Unless the stream has taken it over.
                if self._ssl_context is None:
                    return stream
                opened(stream.abandon)
                tls = TLSStream(stream, self._ssl_context, server_side=False, server_hostname=self._server_hostname)
                tls.handshake()
                return tls
        except BaseException as exc:
            if stream is not None:
                stream.close()
            if isinstance(exc, ConnectionClosed) and not isinstance(exc, ConnectFailed):
                raise ConnectFailed(f"can't connect to {where}: {exc}") from (exc.__cause__ or exc)
            raise

    def _start(self, command: Command) -> Stream:
        if not self._may_start:
            assert self._child is not None
            if self._child_hub is not gevent.get_hub():
                raise ConnectFailed(f"{command} is spoken with in another thread")
            self.let_go()  # To know how it ended.
            raise ConnectFailed(f"{command} {self._child.status}; connect() starts it anew")
        try:
            self._child = command.start()
        except OSError as exc:
            raise ConnectFailed(f"can't start {command}: {exc.strerror or exc}") from exc
        self._may_start = False
        self._child_hub = gevent.get_hub()
        return self._child.stream

    def greet(self, connection: Connection) -> None:
        """Say what has to be said before any call is sent on ``connection``, where there is anything."""
        if self._on_connect is not None:
            self._on_connect(self, connection)

    def move_from(self, connection: Connection) -> None:
        """Its server will let go of ``connection``; called in the thread that has it."""
        if not isinstance(self.address, Command):  # There is no other process that knows what that one knows.
            self._links.get().move_from(connection)

    def is_worth_another_try(self, failure: BaseException) -> bool:
        """Whether what :meth:`open_stream` has raised may be otherwise next time: a server may come back."""
        if not isinstance(failure, ConnectFailed) or isinstance(self.address, Command):
            return False  # What a hook has raised, or a program that there isn't.
        cause = failure.__cause__
        # What TLS doesn't agree on it won't next time; unless a server broke off because it was stopped just then.
        was_cut = isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        return was_cut or not isinstance(cause, (ssl.SSLError, PermissionError))

    def let_go(self) -> None:
        """See to it that a child process has ended, when its stream is closed."""
        if self._child is not None:
            self._child.end()

    def report(self, exc: Exception) -> None:
        """Tell the hook that no connection could be made, or that one was lost."""
        if self._on_error is not None:
            try:
                self._on_error(self, exc)
            except GreenletExit:
                raise
            except BaseException as failure:  # Also SystemExit, which would end the program.
                peer = format_address(self.address)
                log(logger, logging.ERROR, "the hook %r failed", self._on_error, exc_info=failure, peer=peer)


def _of_client(late: CallTimeout) -> CallTimeout:
    """The same, where the time-out was the client's."""
    return CallTimeout(late.method, late.timeout, which="client", sent=late.sent, cause=late.__cause__)


class _Caller(Protocol):
    """What a proxy needs of a client, or of a balancer."""

    def call(self, method: str, /, *params: Any) -> Any:
        """The result of a call."""


class Proxy:
    """A method by its name, built up from attributes; calling it calls the method."""

    __slots__ = ("_client", "_name")

    def __init__(self, client: _Caller, name: str = "") -> None:
        self._client = client
        self._name = name

    def __getattr__(self, name: str) -> Proxy:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # Python asks for these itself: to copy, to pickle, to show.
        return Proxy(self._client, f"{self._name}.{name}" if self._name else name)

    def __call__(self, *params: Any) -> Any:
        if not self._name:
            raise TypeError("name a method: proxy.name(...)")
        return self._client.call(self._name, *params)

    def __repr__(self) -> str:
        return f"<Proxy {self._name or 'of a client'}>"


def mprpc_client(host: str, port: int | str, **options: Any) -> Client:
    """A client of the server at ``host`` and ``port``, in the manner of AnyEvent::MPRPC.

    With ``"unix/"`` for the host, ``port`` is the path of a unix socket. ``options`` are :class:`Client`'s.
    """
    return Client(f"{UNIX_PREFIX}{port}" if host == UNIX_HOST else (host, int(port)), **options)
