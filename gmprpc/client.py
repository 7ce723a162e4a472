"""Connects and calls: one connection, made when it is needed, shared by any number of greenlets."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Self

import gevent
from gevent import Greenlet, GreenletExit
from gevent.event import AsyncResult

from .connection import Connection
from .exceptions import CallTimeout, ConnectFailed, ConnectionClosed, text_of
from .log import log
from .metrics import Counters
from .options import (
    CLIENT_MAX_MESSAGE_SIZE,
    MAX_CONCURRENCY,
    MAX_UNSENT_SIZE,
    READ_TIMEOUT,
    WRITE_TIMEOUT,
    ConnectionOptions,
    check_timeout,
)
from .reply import PendingCall
from .service import Service
from .streams import PlainStream, Stream, TLSStream
from .transport import UNIX_HOST, UNIX_PREFIX, connect, format_address, parse_address

logger = logging.getLogger("gmprpc.client")

Hook = Callable[..., Any]


class _Default:
    """Says that a parameter wasn't given, where None means something."""

    def __repr__(self) -> str:
        return "<the client's own>"


_DEFAULT: Any = _Default()


class Client:
    """A client of one MessagePack-RPC server.

    ``address`` is ``(host, port)``, ``"host:port"`` or ``"unix:/path"``. Making a client does no I/O: ``connect()``,
    ``with`` or the first call connects, and a call after the connection was lost connects anew. Any number of greenlets
    may call at once; they share the connection, and answers come in any order. ``service`` has the methods that the
    server may call.

    Hooks: ``before_connect(client, socket)``, ``after_connect(client, socket)``, and ``on_error(client, exc)``, called
    when no connection could be made or one was lost, but not when it ended in good order.

    Timeouts are in seconds, None is no limit: ``timeout`` for a call, which each may override, and ``connect_timeout``
    to resolve the name, connect and agree on TLS. The other keywords are those of :class:`~gmprpc.Server`; for TLS,
    ``server_hostname`` is the name to find in the certificate where it isn't the address's.
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
        on_error: Hook | None = None,
        # Timeouts
        connect_timeout: float | None = 10.0,
        timeout: float | None = None,
        read_timeout: float | None = READ_TIMEOUT,
        write_timeout: float | None = WRITE_TIMEOUT,
        idle_timeout: float | None = None,
        # Limits
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
        check_timeout("connect_timeout", connect_timeout)
        check_timeout("timeout", timeout)
        #: Where the server is: ``(host, port)`` or ``"unix:/path"``.
        self.address = parse_address(address)
        if server_hostname is None and isinstance(self.address, tuple):
            server_hostname = self.address[0]
        if ssl_context is not None and ssl_context.check_hostname and not server_hostname:
            raise ValueError("server_hostname: the name to find in the server's certificate has to be given")
        #: Seconds to wait for a connection.
        self.connect_timeout = connect_timeout
        #: Seconds to wait for an answer, where a call doesn't say.
        self.timeout = timeout
        #: What the server may call.
        self.service = Service() if service is None else service
        self._ssl_context = ssl_context
        self._server_hostname = server_hostname
        self._before_connect = before_connect
        self._after_connect = after_connect
        self._on_error = on_error
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
        self._table = self.service.table()
        self._counters = Counters()
        self._connection: Connection | None = None
        # The greenlets of this connection and of those before that still answer something.
        self._lives: dict[Greenlet[..., None], Connection] = {}
        # The attempt to connect that is under way, for all who wait for it, and the calls to send when it succeeds.
        self._attempt: AsyncResult[Connection] | None = None
        self._connecting: Any = None
        self._queue: list[_QueuedCall] = []
        self._is_closed = False

    # Calling.

    def call(self, method: str, *params: Any, timeout: float | None = _DEFAULT) -> Any:
        """Call ``method`` and wait, in this greenlet only, for its result.

        ``timeout`` covers connecting too, where that has to be done first.

        Raises:
            RemoteError: the server answered an error; MethodNotFound if it has no such method.
            CallTimeout: no answer came in time.
            ConnectFailed: there is no connection, and none could be made.
            ConnectionClosed: the connection ended before the answer came, or the client is closed.
            ProtocolError: the answer holds a value that can't be decoded. The connection goes on.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        if timeout is _DEFAULT:
            timeout = self.timeout
        connection = self._connection
        if connection is None or not connection.is_open:
            begun = perf_counter()
            with gevent.Timeout(timeout, CallTimeout(method, timeout or 0)):
                connection = self._connected()
            if timeout is not None:
                left = timeout - (perf_counter() - begun)
                try:
                    return connection.call(method, *params, timeout=max(0.0, left))
                except CallTimeout:
                    raise CallTimeout(method, timeout) from None  # What the caller said, not what was left of it.
        return connection.call(method, *params, timeout=timeout)

    def call_async(self, method: str, *params: Any, timeout: float | None = _DEFAULT) -> PendingCall:
        """Call ``method`` and go on; what it returns has the result once it is there, or the error.

        Where there is no connection yet the call is sent, in order, as soon as there is one.

        Raises:
            ConnectionClosed: the client is closed.
            TypeError, ValueError, OverflowError: the params can't be packed (``get`` raises it, where there is no
                connection yet). Nothing was sent.
        """
        if timeout is _DEFAULT:
            timeout = self.timeout
        connection = self._connection
        if connection is not None and connection.is_open:
            return connection.call_async(method, *params, timeout=timeout)
        check_timeout("timeout", timeout)
        self._begin_to_connect()
        queued = _QueuedCall(PendingCall(method), params, timeout)
        queued.pending._forget = queued.give_up
        self._queue.append(queued)
        return queued.pending

    def notify(self, method: str, *params: Any) -> None:
        """Call ``method`` without an answer: whether it arrives and succeeds can't be known.

        Waits for the connection, if there is none yet; raises like :meth:`call`, but for what an answer would bring. It
        leaves at the latest when this greenlet waits for something, when the client is closed, or at exit.
        """
        connection = self._connection
        if connection is None or not connection.is_open:
            connection = self._connected()
        connection.notify(method, *params)

    @property
    def proxy(self) -> Proxy:
        """Calls methods as attributes: ``client.proxy.math.pow(2, 10)`` calls ``math.pow``."""
        return Proxy(self)

    # Connecting.

    def connect(self) -> Self:
        """Connect, if there is no connection; a client that was closed is open again.

        Raises:
            ConnectFailed: nobody answers, or not in time.
        """
        self._is_closed = False
        self._connected()
        return self

    def close(self) -> None:
        """Close the connection: calls that wait end with ConnectionClosed.

        What was sent before, a notification perhaps, still arrives if the peer takes it within two seconds.

        May be called any number of times. Calls from now on raise ConnectionClosed, until :meth:`connect`.
        """
        self._is_closed = True
        closed = ConnectionClosed("the client was closed")
        if self._attempt is not None:
            self._attempt.set_exception(closed)
            self._attempt = None
            self._connecting.kill(block=False)
        self._fail_queue(closed)
        for connection in self._lives.values():
            connection.close()
        current: Any = gevent.getcurrent()
        gevent.joinall([life for life in self._lives if life is not current])

    @property
    def is_connected(self) -> bool:
        """True while there is a connection on which calls can be sent."""
        return self._connection is not None and self._connection.is_open

    @property
    def connection(self) -> Connection | None:
        """The connection there is, or the last one there was."""
        return self._connection

    def statistics(self) -> dict[str, int]:
        """What happened since the client was made, and how much is going on now; see :class:`Counters`."""
        connection = self._connection
        return {
            **self._counters.snapshot(),
            "open_connections": int(self.is_connected),
            "in_flight": connection.in_flight if connection is not None else 0,
            "pending": len(self._queue) + (connection.pending if connection is not None else 0),
        }

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connected(self) -> Connection:
        """The connection, made first if there is none; blocks this greenlet."""
        if self._connection is not None and self._connection.is_open:
            return self._connection
        attempt: Any = self._begin_to_connect()
        return attempt.get()  # type: ignore[no-any-return]

    def _begin_to_connect(self) -> AsyncResult[Connection]:
        if self._is_closed:
            raise ConnectionClosed("the client is closed")
        if self._attempt is None:
            # In a greenlet of its own: the caller who came first may lose patience, the others still wait.
            self._attempt = AsyncResult()
            self._connecting = gevent.spawn(self._connect, self._attempt)
        elif gevent.getcurrent() is self._connecting:
            raise RuntimeError("a hook can't call: there is no connection yet")
        return self._attempt

    def _connect(self, attempt: AsyncResult[Connection]) -> None:
        try:
            stream = self._open_stream()
        except BaseException as exc:
            if self._attempt is not attempt:
                return  # Closed meanwhile: nobody waits any more.
            self._attempt = None
            if not isinstance(exc, Exception):  # A hook's, or this greenlet was killed.
                exc = ConnectFailed(f"can't connect to {format_address(self.address)}: {text_of(exc)}")
            self._fail_queue(exc)
            attempt.set_exception(exc)
            self._run_on_error(exc)
            return
        if self._attempt is not attempt:
            stream.close()
            return
        self._attempt = None
        connection = Connection(stream, self._table, self._options, counters=self._counters, peer=self.address)
        self._connection = connection
        life = gevent.spawn(self._live, connection)
        self._lives[life] = connection
        life.rawlink(self._lives.pop)
        queue, self._queue = self._queue, []
        for queued in queue:
            queued.send(connection)
        attempt.set(connection)

    def _open_stream(self) -> Stream:
        where = format_address(self.address)
        stream: PlainStream | None = None
        late = ConnectFailed(f"can't connect to {where}: no connection within {self.connect_timeout} s")
        try:
            with gevent.Timeout(self.connect_timeout, late):
                before = self._before_connect
                sock = connect(self.address, None if before is None else lambda sock: before(self, sock))
                try:
                    if self._after_connect is not None:
                        self._after_connect(self, sock)
                    stream = PlainStream(sock)
                finally:
                    sock.close()  # Unless the stream has taken it over.
                if self._ssl_context is None:
                    return stream
                tls = TLSStream(stream, self._ssl_context, server_side=False, server_hostname=self._server_hostname)
                tls.handshake()
                return tls
        except BaseException as exc:
            if stream is not None:
                stream.close()
            if isinstance(exc, ConnectionClosed) and not isinstance(exc, ConnectFailed):
                raise ConnectFailed(f"can't connect to {where}: {exc}") from (exc.__cause__ or exc)
            raise

    def _live(self, connection: Connection) -> None:
        error = connection.run()
        if error is not None:
            self._run_on_error(error)

    def _run_on_error(self, exc: Exception) -> None:
        if self._on_error is not None:
            try:
                self._on_error(self, exc)
            except GreenletExit:
                raise
            except BaseException as failure:  # Also SystemExit, which would end the program.
                log(logger, logging.ERROR, "the hook %r failed", self._on_error, exc_info=failure)

    def _fail_queue(self, exc: Exception) -> None:
        queue, self._queue = self._queue, []
        for queued in queue:
            queued.fail(exc)


class Proxy:
    """A method by its name, built up from attributes; calling it calls the method."""

    __slots__ = ("_client", "_name")

    def __init__(self, client: Client, name: str = "") -> None:
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


class _QueuedCall:
    """A call that was made before there was a connection."""

    def __init__(self, pending: PendingCall, params: tuple[Any, ...], timeout: float | None) -> None:
        self.pending = pending
        self._params = params
        self._timeout = timeout
        self._begun = perf_counter()
        self._timer: Any = None
        if timeout is not None:
            self._timer = gevent.get_hub().loop.timer(timeout)
            self._timer.start(self.fail, CallTimeout(pending.method, timeout), update=True)

    def send(self, connection: Connection) -> None:
        if self.pending.ready():
            return
        timeout = self._timeout
        if timeout is not None:
            timeout = max(0.0, timeout - (perf_counter() - self._begun))
        self.give_up()
        try:
            connection.send_call(self.pending, self._params, timeout)
        except Exception as exc:
            self.fail(exc)

    def fail(self, exc: Exception) -> None:
        self.give_up()
        if not self.pending.ready():
            self.pending.set_exception(exc)

    def give_up(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None


def mprpc_client(host: str, port: int | str, **options: Any) -> Client:
    """A client of the server at ``host`` and ``port``, in the manner of AnyEvent::MPRPC.

    With ``"unix/"`` for the host, ``port`` is the path of a unix socket. ``options`` are :class:`Client`'s.
    """
    return Client(f"{UNIX_PREFIX}{port}" if host == UNIX_HOST else (host, int(port)), **options)
