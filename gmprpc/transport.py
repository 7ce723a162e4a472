"""Addresses, and the sockets that they name: listening, connecting, TLS; foreign errors become ours here.

A :class:`Stream` is what a connection reads and writes: it never blocks, but for its last words.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket as stdlib_socket
import ssl
import stat
import struct
import termios
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import gevent
from gevent import monkey, socket
from gevent.baseserver import parse_address as parse_listener  # type: ignore[attr-defined]  # The stubs forgot it.
from gevent.socket import wait_read, wait_write

from .exceptions import ConnectFailed, ConnectionClosed

#: What `gmprpc.Client` and `gmprpc.Server` take to say where: ``("host", port)``, ``"host:port"``, ``"unix:/path"``.
Address = tuple[str, int] | tuple[str, int, int, int] | str | int

UNIX_PREFIX = "unix:"
FD_PREFIX = "fd://"
#: How AnyEvent says that a port is the path of a unix socket.
UNIX_HOST = "unix/"

# How many connections may wait to be accepted: gunicorn's number.
_BACKLOG = 2048

# How much is read at once: a message of 64 KiB shall come in one piece.
_READ_SIZE = 256 * 1024

# How much of TLS is read at once: it is deciphered in one go, and records of one byte, or that ask for new keys, take
# up to 0.4 µs a byte. Here too a message of 64 KiB shall come in one piece.
_TLS_READ_SIZE = 80 * 1024

# What a TLS record can hold.
_RECORD_SIZE = 16 * 1024
# How much OpenSSL is given at once: its buffer keeps the largest size that it ever had. Room for a whole record.
_PIECE_SIZE = _RECORD_SIZE + 512
# What each side's first record can be, by its first byte: an alert, a part of the handshake.
_FIRST_RECORDS = b"\x15\x16"
# How much of TLS's own talk may wait for the peer beside a record: a request to renegotiate, which costs the peer as
# little, is answered with 31 bytes. Picked arbitrarily; a peer that reads at all leaves nothing.
_TALK_SIZE = 64 * 1024
# How long a stream that is being closed waits for the peer to take the last bytes and to close its side. Some kernels
# keep a closed socket's data for a minute, nginx lingers for 5 s; picked between haste and leaks.
_FAREWELL_TIMEOUT = 2.0
# How often it looks meanwhile whether the peer's system has got them. Picked arbitrarily.
_POLL_INTERVAL = 0.01

# The class that gevent's and the standard library's sockets wrap: here nothing may wait behind our back.
_RawSocket: type[stdlib_socket.socket] = monkey.get_original("socket", "socket")


class Stream(Protocol):
    """A connected, non-blocking stream of bytes, which owns its descriptor."""

    @property
    def is_amid_record(self) -> bool:
        """True when a part of something has come that gives no bytes until the rest of it is there."""

    def fileno(self) -> int:
        """The descriptor to watch, the same one for reading and writing."""

    def recv(self) -> bytes:
        """The bytes that are there, at least one and not too many at once; ``b""`` at the end of the stream.

        Raises BlockingIOError when there are none yet, another OSError when the stream is broken, EOFError when it ends
        as it shouldn't: nothing more will come, but something may still be sent.
        """

    def send(self, data: Any, /) -> int:
        """Take what goes without waiting, and return how much that was; what is left has to be given again first.

        Raises BlockingIOError when nothing goes, another OSError when the stream is broken.
        """

    def finish(self, data: bytes, *, linger: bool) -> None:
        """Send ``data``, say goodbye and close, within a moment; blocks this greenlet, raises nothing.

        ``linger`` waits until the peer has said goodbye too: closing with unread input resets the connection, and a
        reset can destroy what is still on its way to the peer.
        """

    def close(self) -> None:
        """Close at once."""

    def abandon(self) -> None:
        """Close in this process alone: it was forked off from the one that the peer talks with."""


class PlainStream:
    """A TCP or unix socket."""

    is_amid_record = False

    def __init__(self, sock: Any) -> None:
        """Take the descriptor over from ``sock``, which is detached.

        Raises:
            TypeError: ``sock`` does TLS on its own; see :class:`TLSStream`.
        """
        if hasattr(sock, "do_handshake"):
            raise TypeError(f"give a plain socket and an ssl_context, not {sock!r}")
        family, kind, protocol = sock.family, sock.type, sock.proto
        self._socket = _RawSocket(family, kind, protocol, fileno=sock.detach())
        self._socket.setblocking(False)
        self._is_tcp = family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6)
        if self._is_tcp:
            with suppress(OSError):  # It may be gone already: the first read tells.
                self._socket.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
                self._socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
        self._buffer = _buffer_of(gevent.get_hub())
        self._recv_into = self._socket.recv_into
        self.fileno = self._socket.fileno
        self.send = self._socket.send

    def recv(self) -> bytes:
        return bytes(self._buffer[: self._recv_into(self._buffer)])

    def recv_view(self) -> memoryview:
        """As `recv`, but what it returns is only good until anybody receives the next."""
        return self._buffer[: self._recv_into(self._buffer, _TLS_READ_SIZE)]

    def finish(self, data: bytes, *, linger: bool) -> None:
        try:
            with suppress(OSError), _farewell_time():
                send_all(self, data)
                self._socket.shutdown(stdlib_socket.SHUT_WR)
                while linger and _recv_waiting(self):
                    pass
                while self._holds_unsent() and self._recv_within(_POLL_INTERVAL):
                    pass
        finally:
            self.close()

    def _holds_unsent(self) -> bool:
        """Whether the system holds bytes that the peer's hasn't got yet, and that a reset would destroy."""
        if not self._is_tcp:
            return False
        return any(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))

    def _recv_within(self, seconds: float) -> bool:
        """Take in what comes within so many ``seconds``; False at the end of the stream."""
        try:
            wait_read(self.fileno(), timeout=seconds)
            return bool(self.recv())
        except (TimeoutError, BlockingIOError):
            return True

    def shutdown_read(self) -> None:
        """Take nothing more in: from now on `recv` gives the end."""
        with suppress(OSError):
            self._socket.shutdown(stdlib_socket.SHUT_RD)

    def close(self) -> None:
        # A process that was forked off holds the socket, too: closing alone wouldn't tell the peer.
        with suppress(OSError):
            self._socket.shutdown(stdlib_socket.SHUT_RDWR)
        self._socket.close()

    def abandon(self) -> None:
        self._socket.close()


class TLSStream:
    """TLS over a plain stream, with OpenSSL in memory between the two.

    (An SSLSocket hides decrypted bytes from the watcher of its descriptor, and can't go on with a write from another
    buffer.)
    """

    def __init__(
        self, stream: PlainStream, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        """One side of TLS over ``stream``, which stays the caller's until the handshake has succeeded.

        Raises:
            ValueError: ``context`` wants to check the server's name, and there is none to check.
        """
        if not server_side and context.check_hostname and not server_hostname:
            # Python's sockets refuse this; its objects in memory check no name then.
            raise ValueError("server_hostname: the name to find in the server's certificate has to be given")
        self._stream = stream
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname)
        # What is encrypted and hasn't left, and how many plain bytes `send` still has to own up to for it.
        self._encrypted = b""
        self._owned_up = 0
        # What was received with the handshake and OpenSSL hasn't been given yet.
        self._ahead = b""
        # What was wrong behind the last bytes that were received in good order.
        self._failure: Exception | None = None
        # Where in the records the last byte was that came: in a header, or so many bytes before the end of its record.
        self._header = b""
        self._record_left = 0
        self.fileno = stream.fileno

    def handshake(self) -> None:
        """Agree on the keys; blocks this greenlet, has no deadline of its own.

        Raises:
            ConnectionClosed: it failed; ``__cause__`` is OpenSSL's error.
        """
        is_first = True
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    send_all(self._stream, self._outgoing.read())
                    if not self._ahead:
                        self._ahead = _recv_waiting(self._stream)
                        self._frame(self._ahead)
                        if is_first and self._ahead and self._ahead[0] not in _FIRST_RECORDS:
                            # OpenSSL takes the MessagePack of some requests for the beginning of an SSL 2 hello of
                            # 5 KiB, and waits for the rest.
                            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer doesn't speak TLS") from None
                        is_first = False
                    if self._ahead:
                        self._incoming.write(self._ahead[:_PIECE_SIZE])
                        self._ahead = self._ahead[_PIECE_SIZE:]
                    else:
                        self._incoming.write_eof()
                else:
                    send_all(self._stream, self._outgoing.read())
                    return
        except OSError as exc:
            with suppress(OSError):
                self._stream.send(self._outgoing.read())  # The alert that tells the peer why.
            raise ConnectionClosed(f"TLS handshake failed: {exc}") from exc

    def recv(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        data: bytes | memoryview = b""
        is_cut = False
        try:
            data = self._stream.recv_view()
            self._frame(data)
            is_cut = not data  # OpenSSL isn't told: it would take the stream for broken, and answers may still go.
        except BlockingIOError:
            # The handshake may have left something, of which the watcher of the descriptor knows nothing.
            if not self._ahead and not self._incoming.pending:
                raise
        if self._ahead:
            data, self._ahead = self._ahead + bytes(data), b""
        # All that is there has to come out now: nothing would wake us up for the rest.
        plain: list[bytes] = []
        is_over = False
        try:
            is_over = self._decrypt(data, plain)
        except ssl.SSLError as exc:
            self._failure = exc
        if self._outgoing.pending:
            self._talk()
        if plain:
            if is_over or self._failure is not None:
                self._stream.shutdown_read()  # The end has to be read a second time, on its own.
            return b"".join(plain)
        if self._failure is not None:
            raise self._failure
        if is_over:
            return b""
        if is_cut:
            raise EOFError("the peer closed the connection without ending TLS")
        raise BlockingIOError

    @property
    def is_amid_record(self) -> bool:
        return bool(self._header) or self._record_left > 0

    def send(self, data: Any, /) -> int:
        if self._failure is not None:
            raise self._failure  # OpenSSL would raise something that says less.
        if not self._flush():
            raise BlockingIOError
        sent, self._owned_up = self._owned_up, 0
        view = memoryview(data)
        while sent < len(view):
            record = view[sent : sent + _RECORD_SIZE]
            self._tls.write(record)
            self._encrypted = self._outgoing.read()
            try:
                is_gone = self._flush()
            except OSError:
                if sent:
                    return sent  # Some of it has left; the next attempt raises.
                raise
            if not is_gone:
                # It counts as sent once it has left: until then the caller has a reason to come back.
                self._owned_up = len(record)
                break
            sent += len(record)
        return sent

    def finish(self, data: bytes, *, linger: bool) -> None:
        try:
            with suppress(OSError), _farewell_time():
                send_all(self, data)
                send_all(self._stream, self._encrypted)  # What `recv` had to say and couldn't.
                with suppress(ssl.SSLError):
                    self._tls.unwrap()
                send_all(self._stream, self._outgoing.read())
        except BaseException:
            self.close()
            raise
        self._stream.finish(b"", linger=linger)

    def close(self) -> None:
        self._stream.close()

    def abandon(self) -> None:
        self._stream.abandon()

    def _frame(self, data: bytes | memoryview) -> None:
        """Keep in step with the records: each begins with five bytes, the last two of which are its size from there."""
        position = 0
        while position < len(data):
            if self._record_left:
                step = min(self._record_left, len(data) - position)
                self._record_left -= step
            else:
                step = min(5 - len(self._header), len(data) - position)
                self._header += bytes(data[position : position + step])
                if len(self._header) == 5:
                    self._record_left = int.from_bytes(self._header[3:], "big")
                    self._header = b""
            position += step

    def _decrypt(self, data: bytes | memoryview, plain: list[bytes]) -> bool:
        """Append what is in ``data`` to ``plain``; True if it ends with the peer's goodbye."""
        for start in range(0, len(data) or 1, _PIECE_SIZE):
            self._incoming.write(data[start : start + _PIECE_SIZE])
            try:
                while piece := self._tls.read(_RECORD_SIZE):
                    plain.append(piece)
            except ssl.SSLWantReadError:
                pass
            else:
                return True
        return False

    def _talk(self) -> None:
        """Send what TLS itself has to say: an alert, new keys."""
        self._encrypted += self._outgoing.read()
        with suppress(OSError):  # The next to read or to write hears of it; what was received is good.
            self._flush()
        if len(self._encrypted) > _TALK_SIZE:
            self._failure = ConnectionAbortedError("the peer doesn't read what it makes TLS say")

    def _flush(self) -> bool:
        """Send what is encrypted; False if some of it has to wait."""
        try:
            while self._encrypted:
                self._encrypted = self._encrypted[self._stream.send(self._encrypted) :]
        except BlockingIOError:
            return False
        return True


_buffers: weakref.WeakKeyDictionary[Any, memoryview] = weakref.WeakKeyDictionary()


def _buffer_of(hub: Any) -> memoryview:
    """The buffer that everything under ``hub`` reads into.

    (`recv` allocates all that it is ready to take, for each read anew: from 128 KiB on glibc maps and unmaps it, which
    halves the rate of small messages. The copy out of this one costs 0.1 µs for a small message.)
    """
    if (buffer := _buffers.get(hub)) is None:
        buffer = _buffers[hub] = memoryview(bytearray(_READ_SIZE))
    return buffer


def send_all(stream: Stream, data: bytes | memoryview) -> None:
    """Send all of ``data``, waiting as long as it takes; blocks this greenlet."""
    view = memoryview(data)
    while view:
        try:
            view = view[stream.send(view) :]
        except BlockingIOError:
            wait_write(stream.fileno())


def _farewell_time() -> gevent.Timeout:
    """Ends a ``with`` block quietly when the time for last words is over; a time-out of the caller's goes through."""
    return gevent.Timeout(_FAREWELL_TIMEOUT, False)  # type: ignore[arg-type]  # The stubs don't know of False.


def _recv_waiting(stream: Stream) -> bytes:
    while True:
        wait_read(stream.fileno())  # Also where there is something to read: others want a turn.
        with suppress(BlockingIOError):
            return stream.recv()


def parse_address(address: Any) -> tuple[str, int] | str:
    """``(host, port)`` or ``"unix:/path"`` for anything that names one place to connect to.

    Raises:
        ValueError: ``address`` names none; the message says what would.
    """
    if isinstance(address, str):
        if address.startswith(UNIX_PREFIX) and len(address) > len(UNIX_PREFIX):
            return address
        host, colon, port = address.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""  # An IPv6 address needs its brackets: its last group could be a port.
        if colon and port.isascii() and port.isdigit() and int(port) < 2**16 and _is_host(host):
            return host or "127.0.0.1", int(port)
    elif isinstance(address, (tuple, list)) and len(address) >= 2:
        host, port = address[:2]
        if type(port) is int and 0 <= port < 2**16 and isinstance(host, str) and _is_host(host):
            scope = f"%{address[3]}" if len(address) > 3 and address[3] else ""
            return f"{host}{scope}", port
    raise ValueError(f"{address!r} is no address: give HOST:PORT, (host, port) or unix:PATH")


def _is_host(name: str) -> bool:
    try:
        name.encode("idna")  # What the resolver would do, in a thread in which gevent prints that it failed.
    except UnicodeError:
        return False
    return True


def format_address(address: Any) -> str:
    """``address`` as a person would type it: ``127.0.0.1:4423``, ``[::1]:4423`` or ``unix:/path``."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address)


def connect(address: Any, before_connect: Callable[[socket.socket], Any] | None = None) -> socket.socket:
    """A socket connected to ``address``; of a name with several addresses the first that answers.

    ``before_connect(socket)`` is called with each socket before it connects. Blocks this greenlet, with no deadline of
    its own.

    Raises:
        ConnectFailed: nobody answers there; ``__cause__`` is the system's error.
        ValueError: ``address`` names no place.
    """
    place = parse_address(address)
    candidates: list[Any]
    try:
        if isinstance(place, str):
            candidates = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", place.removeprefix(UNIX_PREFIX))]
        else:
            candidates = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ConnectFailed(f"can't resolve {format_address(place)}: {exc.strerror or exc}") from exc
    failure: OSError | None = None
    for family, kind, protocol, _, target in candidates:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as exc:
            failure = exc
            continue
        try:
            if before_connect is not None:
                before_connect(sock)
            sock.connect(target)
        except OSError as exc:
            failure = exc
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    reason = "no address" if failure is None else failure.strerror or str(failure)
    raise ConnectFailed(f"can't connect to {format_address(place)}: {reason}") from failure


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """Who is at the other end of a unix socket, as the kernel saw it when that process connected.

    On systems that don't tell all but ``path`` are None.
    """

    #: The address that it connected to.
    path: str
    #: The number of its process.
    pid: int | None = None
    #: The user and the group that it ran as.
    uid: int | None = None
    gid: int | None = None

    def __str__(self) -> str:
        return self.path if self.pid is None else f"{self.path} (pid {self.pid}, uid {self.uid}, gid {self.gid})"


def peer_of(sock: Any, address: Any) -> Any:
    """Who has connected ``sock``: the ``address`` that the system gave with it, or a :class:`UnixPeer`."""
    if sock.family != stdlib_socket.AF_UNIX:
        return address
    name = sock.getsockname()
    path = UNIX_PREFIX + (name if isinstance(name, str) else name.decode(errors="replace").replace("\0", "@"))
    try:
        credentials = sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_PEERCRED, _CREDENTIALS.size)
    except (AttributeError, OSError):
        return UnixPeer(path)
    return UnixPeer(path, *_CREDENTIALS.unpack(credentials))


# Linux's struct ucred.
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class SocketFile:
    """Whose the file of a unix socket is to be, and what others may do; None leaves it to the system.

    The names and meanings are those of systemd's SocketMode, SocketUser and SocketGroup: writing is connecting.
    """

    mode: int | None = None
    user: str | int | None = None
    group: str | int | None = None

    def apply(self, path: str) -> None:
        """Change the file at ``path``; raises OSError where that isn't allowed, LookupError for an unknown name."""
        if self.user is not None or self.group is not None:
            shutil.chown(path, _number_or_name(self.user), _number_or_name(self.group))  # type: ignore[arg-type]
        if self.mode is not None:
            os.chmod(path, self.mode)


def _number_or_name(owner: str | int | None) -> str | int | None:
    return int(owner) if isinstance(owner, str) and owner.isdecimal() else owner


def open_listener(listener: Any, socket_file: SocketFile | None = None) -> Any:
    """The listening socket that ``listener`` stands for.

    That is every form which :class:`gevent.server.StreamServer` takes, ``"unix:/path"``, and ``"fd://3"``, which takes
    over a listening descriptor, as from systemd. A socket is handed through. ``socket_file`` is for ``"unix:/path"``.

    Raises:
        OSError: it can't be bound, or its file not be changed.
        LookupError: ``socket_file`` names a user or a group that there isn't.
        ValueError: it is no address.
    """
    if hasattr(listener, "accept"):
        listener.setblocking(False)  # StreamServer accepts until there is nothing to accept.
        return listener
    if isinstance(listener, str) and listener.startswith(UNIX_PREFIX):
        path = listener.removeprefix(UNIX_PREFIX)
        if not path:
            raise ValueError(f"{listener!r}: give the path of the socket, as in unix:/run/app.sock")
        remove_stale(path)
        return _listen(socket.AF_UNIX, path, socket_file)
    if isinstance(listener, str) and listener.startswith(FD_PREFIX):
        number = listener.removeprefix(FD_PREFIX)
        if not number.isdigit():
            raise ValueError(f"{listener!r}: give the number of a listening descriptor, as in fd://3")
        sock = socket.socket(fileno=int(number))
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.detach()  # It isn't ours to close.
            raise OSError(errno.EINVAL, "that socket doesn't listen")
        return sock
    family, address = parse_listener(listener)
    return _listen(family, address)


def _listen(family: int, address: Any, socket_file: SocketFile | None = None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # After a restart the port is ours again at once, as with gevent's StreamServer.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if socket_file is not None:
            try:
                socket_file.apply(address)  # Before anybody can connect.
            except BaseException:
                os.unlink(address)
                raise
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_stale(path: str) -> None:
    """Remove the file of a unix socket that nobody listens on any more.

    Raises:
        OSError: (EADDRINUSE) somebody does, or the file is no socket; or it can't be told.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EADDRINUSE, "a file that is no socket is in the way", path)
    except FileNotFoundError:
        return
    # Not gevent's: that would try again and again while the other's queue is full.
    with _RawSocket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(path)
    if answer in (0, errno.EAGAIN):
        raise OSError(errno.EADDRINUSE, "another server listens there", path)
    if answer not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(answer, os.strerror(answer), path)
    with suppress(FileNotFoundError):
        os.unlink(path)


def file_identity(path: str) -> tuple[int, int] | None:
    """Tells the file at ``path`` from one that may stand there later; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
