"""Streams of bytes: plain sockets and TLS, which never block, but for their last words.

It knows no addresses, and no protocol but TLS.
"""

from __future__ import annotations

import fcntl
import socket as stdlib_socket
import ssl
import termios
import weakref
from contextlib import suppress
from typing import Any, Protocol

import gevent
from gevent import monkey
from gevent.socket import wait_read, wait_write

from .exceptions import ConnectionClosed
from .metrics import Counters
from .options import WRITE_TIMEOUT

# How much is read at once: a message of 64 KiB shall come in one piece.
_READ_SIZE = 256 * 1024

# How much is read while only little comes at a time: that the socket makes bytes of this size costs a seventh less than
# to copy them out of the large buffer.
_SMALL_READ_SIZE = 4 * 1024

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

# A peer that vanishes without a word, with its machine or its network, is asked for after so many seconds of silence,
# then so often, and given up after so many questions in vain. Linux's own two hours are of 1989 (RFC 1122); Go's net
# asks every 15 s, and NAT devices may forget a connection after a few silent minutes.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPALIVE": 30,  # macOS's name for it.
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 6,
}
# For how long, at least, what was sent may go unacknowledged. The system sends it again after a second at most, and
# then after two (RFC 6298): one packet that is lost shouldn't be the end, and some systems put an acknowledgement off.
_MIN_USER_TIMEOUT = 3.0

#: The class that gevent's and the standard library's sockets wrap: here nothing may wait behind our back.
RawSocket: type[stdlib_socket.socket] = monkey.get_original("socket", "socket")


#: What a certificate says, as :meth:`ssl.SSLSocket.getpeercert` has it.
Certificate = dict[str, Any]


class Stream(Protocol):
    """A connected, non-blocking stream of bytes, which owns its descriptor."""

    @property
    def is_amid_record(self) -> bool:
        """True when a part of something has come that gives no bytes until the rest of it is there."""

    def fileno(self) -> int:
        """The descriptor to watch for something to read."""

    def write_fileno(self) -> int:
        """The descriptor to watch for room to write, which may be the same one."""

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

    def __init__(self, sock: Any, *, write_timeout: float | None = WRITE_TIMEOUT) -> None:
        """Take the descriptor over from ``sock``, which is detached.

        Over TCP, what the peer's system doesn't acknowledge within ``write_timeout`` seconds, None for as long as the
        system likes, breaks the stream. On a socket whose owner has turned keepalive on, or has set that timeout, they
        stay as they are.

        Raises:
            TypeError: ``sock`` does TLS on its own; see :class:`TLSStream`.
        """
        if hasattr(sock, "do_handshake"):
            raise TypeError(f"give a plain socket and an ssl_context, not {sock!r}")
        family, kind, protocol = sock.family, sock.type, sock.proto
        self._socket = RawSocket(family, kind, protocol, fileno=sock.detach())
        self._socket.setblocking(False)
        self._is_tcp = family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6)
        if self._is_tcp:
            _set_up_tcp(self._socket, write_timeout)
        self._buffer = _buffer_of(gevent.get_hub())
        self._recv, self._recv_into = self._socket.recv, self._socket.recv_into
        self._expects_much = False
        self.fileno = self.write_fileno = self._socket.fileno
        self.send = self._socket.send

    def recv(self) -> bytes:
        if not self._expects_much:
            data = self._recv(_SMALL_READ_SIZE)
            self._expects_much = len(data) == _SMALL_READ_SIZE
            return data
        data = bytes(self._buffer[: self._recv_into(self._buffer)])
        self._expects_much = len(data) >= _SMALL_READ_SIZE
        return data

    def recv_view(self) -> memoryview:
        """As `recv`, but what it returns is only good until anybody receives the next."""
        return self._buffer[: self._recv_into(self._buffer, _TLS_READ_SIZE)]

    def finish(self, data: bytes, *, linger: bool) -> None:
        try:
            with suppress(OSError), farewell_time():
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
        self._buffer = _NO_BUFFER  # Whoever still has this stream needn't keep that one alive.

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
        self.write_fileno = stream.write_fileno

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

    def peer_certificate(self) -> Certificate | None:
        """What the other side's certificate says, if it has shown one and it was verified; after the handshake."""
        return self._tls.getpeercert() or None

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
            with suppress(OSError), farewell_time():
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


class CountingStream:
    """Another stream, whose bytes are counted."""

    def __init__(self, stream: Stream, counters: Counters) -> None:
        self._stream = stream
        self._counters = counters
        self._recv, self._send = stream.recv, stream.send
        self.fileno = stream.fileno
        self.write_fileno = stream.write_fileno
        self.close = stream.close
        self.abandon = stream.abandon

    @property
    def is_amid_record(self) -> bool:
        return self._stream.is_amid_record

    def recv(self) -> bytes:
        data = self._recv()
        self._counters.received_bytes += len(data)
        return data

    def send(self, data: Any, /) -> int:
        sent = self._send(data)
        self._counters.sent_bytes += sent
        return sent

    def finish(self, data: bytes, *, linger: bool) -> None:
        self._counters.sent_bytes += len(data)  # Whether all of it goes nobody learns.
        self._stream.finish(data, linger=linger)


def _set_up_tcp(sock: stdlib_socket.socket, write_timeout: float | None) -> None:
    """Have ``sock`` send at once, and notice when the peer is gone."""
    tcp = stdlib_socket.IPPROTO_TCP
    with suppress(OSError):  # It may be gone already: the first read tells.
        sock.setsockopt(tcp, stdlib_socket.TCP_NODELAY, 1)
        if not sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE):
            for name, value in _KEEPALIVE.items():
                if (option := getattr(stdlib_socket, name, None)) is not None:
                    sock.setsockopt(tcp, option, value)
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
        option = getattr(stdlib_socket, "TCP_USER_TIMEOUT", None)  # Linux has it.
        if option is not None and write_timeout is not None and not sock.getsockopt(tcp, option):
            # It also is for how long Linux goes on asking after a silent peer, in place of a number of questions.
            timeout = max(write_timeout, _MIN_USER_TIMEOUT)
            sock.setsockopt(tcp, option, int(min(timeout * 1000, 2**31 - 1)))


_buffers: weakref.WeakKeyDictionary[Any, memoryview] = weakref.WeakKeyDictionary()
_NO_BUFFER = memoryview(b"")


def _buffer_of(hub: Any) -> memoryview:
    """The buffer that everything under ``hub`` reads into.

    (`recv` allocates all that it is ready to take, for each read anew: from 128 KiB on glibc maps and unmaps it, which
    halves the rate of small messages. The copy out of this one costs 0.1 µs for a small message.)
    """
    if (buffer := _buffers.get(hub)) is None:
        buffer = _buffers[hub] = memoryview(bytearray(_READ_SIZE))
    return buffer


def forget_buffer_of(hub: Any) -> None:
    """The thread of ``hub`` ends."""
    _buffers.pop(hub, None)


def send_all(stream: Stream, data: bytes | memoryview) -> None:
    """Send all of ``data``, waiting as long as it takes; blocks this greenlet."""
    view = memoryview(data)
    while view:
        try:
            view = view[stream.send(view) :]
        except BlockingIOError:
            wait_write(stream.write_fileno())


def farewell_time() -> gevent.Timeout:
    """Ends a ``with`` block quietly when the time for last words is over; a time-out of the caller's goes through."""
    return gevent.Timeout(_FAREWELL_TIMEOUT, False)  # type: ignore[arg-type]  # The stubs don't know of False.


def _recv_waiting(stream: Stream) -> bytes:
    while True:
        wait_read(stream.fileno())  # Also where there is something to read: others want a turn.
        with suppress(BlockingIOError):
            return stream.recv()
