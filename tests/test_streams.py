"""Streams, plain and TLS, against real peers."""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.ssl
import pytest
import trustme
from gevent import socket
from gevent.event import Event
from gevent.socket import wait_read, wait_write

from gmprpc import streams
from gmprpc.exceptions import ConnectionClosed
from gmprpc.metrics import Counters
from gmprpc.streams import CountingStream, PlainStream, TLSStream, send_all

from .helpers import fill, is_closed, receive
from .tls_peers import HANDSHAKE, Forger, RecordPeer, client_hello

# Both ends of a stream.


@pytest.fixture
def ours(sockets: tuple[Any, Any]) -> Iterator[PlainStream]:
    """Our end."""
    stream = PlainStream(sockets[0])
    yield stream
    stream.close()


@pytest.fixture
def peers(sockets: tuple[Any, Any]) -> Any:
    """The other end: a socket that blocks its greenlet only."""
    return sockets[1]


def read_all(sock: Any) -> bytes:
    """All that comes out of a socket that blocks."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


# A plain stream.


def test_a_plain_stream_takes_the_descriptor_over(sockets: tuple[Any, Any]) -> None:
    fd = sockets[0].fileno()
    stream = PlainStream(sockets[0])
    assert sockets[0].fileno() == -1
    assert stream.fileno() == fd
    sockets[0].close()
    assert not is_closed(fd)
    assert not os.get_blocking(fd)
    stream.close()
    assert is_closed(fd)
    assert stream.fileno() == -1
    stream.close()


def test_closing_tells_the_peer_though_another_process_has_the_socket_too(ours: PlainStream, peers: Any) -> None:
    held = os.dup(ours.fileno())  # As by a process that was forked off.
    try:
        ours.send(b"bye")
        ours.close()
        assert read_all(peers) == b"bye"
    finally:
        os.close(held)


@contextmanager
def same_socket(stream: PlainStream) -> Iterator[stdlib_socket.socket]:
    """The socket of ``stream``, for a look at its options."""
    with stdlib_socket.socket(fileno=os.dup(stream.fileno())) as same:
        yield same


TCP = stdlib_socket.IPPROTO_TCP
on_linux = pytest.mark.skipif(not hasattr(stdlib_socket, "TCP_USER_TIMEOUT"), reason="a system without these options")


def test_a_tcp_stream_sends_at_once_and_notices_when_the_peer_is_gone(tcp_sockets: tuple[Any, Any]) -> None:
    stream = PlainStream(tcp_sockets[0])
    with same_socket(stream) as same:
        assert same.getsockopt(TCP, stdlib_socket.TCP_NODELAY)
        assert same.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE)
    stream.close()


@on_linux
def test_the_peer_is_asked_for_after_half_a_minute_of_silence(tcp_sockets: tuple[Any, Any]) -> None:
    stream = PlainStream(tcp_sockets[0])
    with same_socket(stream) as same:
        assert same.getsockopt(TCP, stdlib_socket.TCP_KEEPIDLE) == 30
        assert same.getsockopt(TCP, stdlib_socket.TCP_KEEPINTVL) == 10
        assert same.getsockopt(TCP, stdlib_socket.TCP_KEEPCNT) == 6
    stream.close()


@on_linux
@pytest.mark.parametrize(
    "write_timeout, milliseconds",
    [(60.0, 60_000), (3600, 3_600_000), (0.05, 3_000), (float("inf"), 2**31 - 1), (None, 0)],
)
def test_what_is_sent_has_to_be_acknowledged_within_the_write_timeout(
    tcp_sockets: tuple[Any, Any], write_timeout: float | None, milliseconds: int
) -> None:
    stream = PlainStream(tcp_sockets[0], write_timeout=write_timeout)
    with same_socket(stream) as same:
        assert same.getsockopt(TCP, stdlib_socket.TCP_USER_TIMEOUT) == milliseconds
    stream.close()


@on_linux
def test_times_that_the_owner_of_the_socket_has_chosen_stay(tcp_sockets: tuple[Any, Any]) -> None:
    sock = tcp_sockets[0]
    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
    sock.setsockopt(TCP, stdlib_socket.TCP_KEEPIDLE, 7)
    sock.setsockopt(TCP, stdlib_socket.TCP_USER_TIMEOUT, 4_321)
    stream = PlainStream(sock)
    with same_socket(stream) as same:
        assert same.getsockopt(TCP, stdlib_socket.TCP_KEEPIDLE) == 7
        assert same.getsockopt(TCP, stdlib_socket.TCP_USER_TIMEOUT) == 4_321
        assert same.getsockopt(TCP, stdlib_socket.TCP_NODELAY)
    stream.close()


def test_a_system_without_these_options_does_without(
    tcp_sockets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(stdlib_socket, name, raising=False)
    stream = PlainStream(tcp_sockets[0])
    with same_socket(stream) as same:
        assert same.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE)
    stream.close()


def test_a_socket_that_refuses_its_options_is_a_stream_still(
    tcp_sockets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(stdlib_socket.socket):
        def setsockopt(self, *_: Any) -> None:  # As on macOS, when the peer is gone.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(streams, "RawSocket", Broken)
    stream = PlainStream(tcp_sockets[0])
    tcp_sockets[1].sendall(b"hello")
    assert receive(stream) == b"hello"
    stream.close()


def test_a_standard_socket_is_as_good_as_gevents() -> None:
    first, second = stdlib_socket.socketpair()
    with first, second:
        stream = PlainStream(first)
        second.sendall(b"hello")
        assert receive(stream) == b"hello"
        stream.close()


@pytest.mark.parametrize("module", [ssl, gevent.ssl], ids=["ssl", "gevent.ssl"])
def test_a_plain_stream_refuses_a_socket_that_does_tls(module: Any, sockets: tuple[Any, Any]) -> None:
    context = module.SSLContext(module.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    plain = sockets[0] if module is gevent.ssl else stdlib_socket.socket(fileno=sockets[0].detach())
    with context.wrap_socket(plain, do_handshake_on_connect=False) as tls:
        fd = tls.fileno()
        with pytest.raises(TypeError, match="give a plain socket and an ssl_context"):
            PlainStream(tls)
        # And leaves it to its owner.
        assert tls.fileno() == fd
        assert not is_closed(fd)


def test_receiving_never_waits(ours: PlainStream, peers: Any) -> None:
    with pytest.raises(BlockingIOError):
        ours.recv()
    peers.sendall(b"hello")
    assert ours.recv() == b"hello"
    with pytest.raises(BlockingIOError):
        ours.recv()
    peers.shutdown(socket.SHUT_WR)
    assert ours.recv() == b""
    assert ours.recv() == b""


def test_a_lot_is_received_in_several_pieces(ours: PlainStream, peers: Any) -> None:
    data = bytes(range(256)) * 4096
    sending = gevent.spawn(peers.sendall, data)
    received = b""
    while len(received) < len(data):
        piece = receive(ours)
        assert 0 < len(piece) <= 256 * 1024
        received += piece
    sending.get()
    assert received == data


def test_what_was_received_stays_what_it_is(tcp_sockets: tuple[Any, Any], ours: PlainStream, peers: Any) -> None:
    other = PlainStream(tcp_sockets[0])
    peers.sendall(b"first")
    tcp_sockets[1].sendall(b"other")
    first, second = receive(ours), receive(other)
    peers.sendall(b"later")
    assert (receive(ours), first, second) == (b"later", b"first", b"other")
    other.close()


def test_a_reset_is_an_error(tcp_sockets: tuple[Any, Any]) -> None:
    stream = PlainStream(tcp_sockets[0])
    tcp_sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tcp_sockets[1].close()
    with pytest.raises(ConnectionResetError):
        receive(stream)
    stream.close()


def test_sending_never_waits(ours: PlainStream, peers: Any) -> None:
    assert ours.send(b"hello") == 5
    assert ours.send(memoryview(b"hello")[3:]) == 2
    total = fill(ours)
    with pytest.raises(BlockingIOError):
        ours.send(b"x")
    received = 0
    while received < total:
        received += len(peers.recv(65536))
    assert ours.send(b"x") == 1
    peers.close()
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")


def test_send_all_waits_as_long_as_it_takes(ours: PlainStream, peers: Any) -> None:
    data = os.urandom(2_000_000)
    sending = gevent.spawn(send_all, ours, data)
    received = b""
    while len(received) < len(data):
        received += peers.recv(10_000)
    sending.get()
    assert received == data


def test_what_is_not_read_any_more_ends_the_stream(ours: PlainStream, peers: Any) -> None:
    ours.shutdown_read()
    assert ours.recv() == b""
    assert ours.send(b"still") == 5
    assert peers.recv(5) == b"still"
    ours.close()
    ours.shutdown_read()


def test_threads_with_hubs_of_their_own_do_not_share_what_they_read_into() -> None:
    buffers: list[Any] = []

    def run() -> None:
        first, second = stdlib_socket.socketpair()
        with second:
            stream = PlainStream(first)
            buffers.append(stream._buffer)
            stream.close()
        gevent.get_hub().destroy(destroy_loop=True)

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert buffers[0] is not buffers[1]


# The farewell.


def test_the_last_words_arrive_and_then_the_end(ours: PlainStream, peers: Any) -> None:
    data = os.urandom(2_000_000)
    reading = gevent.spawn(read_all, peers)
    ours.finish(data, linger=False)
    assert reading.get() == data
    assert ours.fileno() == -1


def test_without_lingering_the_peer_need_not_say_goodbye(ours: PlainStream, peers: Any) -> None:
    ours.finish(b"bye", linger=False)
    assert ours.fileno() == -1
    assert read_all(peers) == b"bye"


def test_lingering_waits_until_the_peer_says_goodbye(ours: PlainStream, peers: Any) -> None:
    finishing = gevent.spawn(ours.finish, b"bye", linger=True)
    assert peers.recv(10) == b"bye"
    assert peers.recv(10) == b""
    peers.sendall(b"what you won't hear")
    gevent.idle()
    assert not finishing.ready()
    peers.close()
    finishing.get()
    assert ours.fileno() == -1


@pytest.mark.parametrize("linger", [False, True])
def test_unread_input_does_not_destroy_the_last_words(tcp_sockets: tuple[Any, Any], linger: bool) -> None:
    stream, peer = PlainStream(tcp_sockets[0]), tcp_sockets[1]
    peer.sendall(b"unread" * 10_000)
    data = os.urandom(1_000_000)
    finishing = gevent.spawn(stream.finish, data, linger=linger)
    assert read_all(peer) == data  # And no reset.
    peer.close()
    finishing.get()
    assert stream.fileno() == -1


@pytest.mark.parametrize("linger", [False, True])
def test_a_farewell_takes_a_moment_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, ours: PlainStream, linger: bool
) -> None:
    monkeypatch.setattr(streams, "_FAREWELL_TIMEOUT", 0.02)
    fill(ours)  # The peer reads nothing, and never closes.
    ours.finish(b"bye", linger=linger)
    assert ours.fileno() == -1


def test_lingering_takes_a_moment_and_no_longer(monkeypatch: pytest.MonkeyPatch, ours: PlainStream) -> None:
    monkeypatch.setattr(streams, "_FAREWELL_TIMEOUT", 0.02)
    ours.finish(b"bye", linger=True)
    assert ours.fileno() == -1


@pytest.mark.parametrize("linger", [False, True])
def test_a_farewell_to_who_is_gone_raises_nothing(ours: PlainStream, peers: Any, linger: bool) -> None:
    peers.close()
    ours.finish(b"bye", linger=linger)
    assert ours.fileno() == -1


def test_a_farewell_that_is_killed_closes_all_the_same(ours: PlainStream) -> None:
    finishing = gevent.spawn(ours.finish, b"bye", linger=True)
    gevent.idle()
    finishing.kill()
    assert ours.fileno() == -1
    assert isinstance(finishing.value, gevent.GreenletExit)  # Not swallowed.


def test_the_callers_own_timeout_is_not_the_farewells(ours: PlainStream) -> None:
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        ours.finish(b"bye", linger=True)
    assert ours.fileno() == -1


def test_a_peer_that_never_stops_talking_does_not_keep_the_hub(ours: PlainStream, peers: Any) -> None:
    peers.sendall(b"more")  # Always readable.
    left = iter(range(100_000))
    ours.recv = lambda: b"more" if next(left, None) is not None else b""  # type: ignore[method-assign]
    finishing = gevent.spawn(ours.finish, b"", linger=True)
    ticked = Event()
    timer = gevent.spawn_later(0, ticked.set)
    ticked.wait()
    assert not finishing.ready()
    finishing.kill()
    timer.join()


# A stream whose bytes are counted.


def test_what_is_received_and_sent_is_counted(ours: PlainStream, peers: Any) -> None:
    counters = Counters()
    stream = CountingStream(ours, counters)
    assert (stream.fileno(), stream.write_fileno(), stream.is_amid_record) == (ours.fileno(), ours.fileno(), False)
    with pytest.raises(BlockingIOError):
        stream.recv()
    peers.sendall(b"hello")
    assert receive(stream) == b"hello"
    assert stream.send(b"hi") == 2
    stream.finish(b"bye", linger=False)
    assert peers.recv(10) == b"hibye"
    assert (counters.received_bytes, counters.sent_bytes) == (5, 5)
    assert stream.fileno() == -1


def test_what_does_not_go_is_not_counted(ours: PlainStream, peers: Any) -> None:
    counters = Counters()
    stream = CountingStream(ours, counters)
    assert fill(stream) == counters.sent_bytes > 0


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_a_counting_stream_ends_as_the_one_in_it(ours: PlainStream, end: str) -> None:
    getattr(CountingStream(ours, Counters()), end)()
    assert ours.fileno() == -1


# TLS.

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Contexts(NamedTuple):
    """The contexts of the two sides, which trust each other."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    def of(self, server_side: bool) -> ssl.SSLContext:
        """The context of that side."""
        return self.server if server_side else self.client


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("gmprpc.test")


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def contexts(request: pytest.FixtureRequest, authority: trustme.CA, certificate: trustme.LeafCert) -> Contexts:
    """Contexts for one version of TLS."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    certificate.configure_cert(server)
    authority.configure_trust(client)
    for context in (server, client):
        context.minimum_version = context.maximum_version = request.param
    return Contexts(server, client)


def tls_stream(stream: PlainStream, contexts: Contexts, *, server_side: bool) -> TLSStream:
    """One side of TLS, before its handshake."""
    hostname = None if server_side else "gmprpc.test"
    return TLSStream(stream, contexts.of(server_side), server_side=server_side, server_hostname=hostname)


@pytest.fixture
def tls_pair(sockets: tuple[Any, Any], contexts: Contexts) -> Iterator[tuple[TLSStream, TLSStream]]:
    """A server and a client that have shaken hands."""
    server = tls_stream(PlainStream(sockets[0]), contexts, server_side=True)
    client = tls_stream(PlainStream(sockets[1]), contexts, server_side=False)
    shaking = gevent.spawn(server.handshake)
    client.handshake()
    shaking.get()
    yield server, client
    server.close()
    client.close()


def record_peer(sock: Any, contexts: Contexts, *, server_side: bool) -> RecordPeer:
    """A peer on that side of TLS, before its handshake."""
    hostname = None if server_side else "gmprpc.test"
    return RecordPeer(sock, contexts.of(server_side), server_side=server_side, server_hostname=hostname)


@pytest.fixture(params=[True, False], ids=["server", "client"])
def shaken(
    request: pytest.FixtureRequest, ours: PlainStream, peers: Any, contexts: Contexts
) -> tuple[TLSStream, RecordPeer]:
    """A TLS stream on that side, and its peer; both have shaken hands."""
    stream = tls_stream(ours, contexts, server_side=request.param)
    peer = record_peer(peers, contexts, server_side=not request.param)
    shaking = gevent.spawn(stream.handshake)
    peer.handshake()
    peer.flush()
    shaking.get()
    # TLS 1.3's tickets are nothing to receive.
    with pytest.raises(BlockingIOError):
        stream.recv()
    return stream, peer


def test_data_goes_both_ways(tls_pair: tuple[TLSStream, TLSStream]) -> None:
    for one, other in (tls_pair, reversed(tls_pair)):
        with pytest.raises(BlockingIOError):
            one.recv()
        assert other.send(b"hello") == 5
        assert receive(one) == b"hello"
        assert other.send(memoryview(b"hello")[3:]) == 2
        assert receive(one) == b"lo"


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
def test_the_standard_library_is_a_peer(server_side: bool, contexts: Contexts) -> None:
    first, second = stdlib_socket.socketpair()
    stream = tls_stream(PlainStream(first), contexts, server_side=server_side)
    data = os.urandom(1_000_000)

    def echo() -> int:
        """Say everything again, in a thread, where waiting is all right."""
        hostname = "gmprpc.test" if server_side else None
        context = contexts.of(not server_side)
        with context.wrap_socket(
            second, server_side=not server_side, server_hostname=hostname, suppress_ragged_eofs=False
        ) as peer:
            count = 0
            while piece := peer.recv(100_000):
                count += len(piece)
                peer.sendall(piece)
            peer.unwrap().close()
            return count

    echoing = gevent.get_hub().threadpool.spawn(echo)
    stream.handshake()
    sending = gevent.spawn(send_all, stream, data)
    received = b""
    while len(received) < len(data):
        received += receive(stream)
    sending.get()
    assert received == data
    stream.finish(b"last words", linger=True)
    assert echoing.get() == len(data) + len(b"last words")
    assert stream.fileno() == -1


def test_all_that_has_arrived_comes_out_at_once(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    # Several records: the watcher of the descriptor would tell of none but the first.
    for i in range(5):
        peer.tls.write(b"%d" % i * 1000)
    peer.flush()
    assert stream.recv() == b"".join(b"%d" % i * 1000 for i in range(5))
    with pytest.raises(BlockingIOError):
        stream.recv()


def test_a_part_of_a_record_is_nothing_yet(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.tls.write(b"hello")
    for byte in peer.outgoing.read()[:-1]:
        peer.socket.sendall(bytes([byte]))
        with pytest.raises(BlockingIOError):
            stream.recv()


def test_a_record_that_comes_byte_by_byte_is_the_same(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.tls.write(b"hello")
    *bytes_before, last = peer.outgoing.read()
    for byte in bytes_before:
        peer.socket.sendall(bytes([byte]))
        with pytest.raises(BlockingIOError):
            stream.recv()
    peer.socket.sendall(bytes([last]))
    assert stream.recv() == b"hello"


# What comes together with the end of the handshake: of TLS 1.2 the server ends it, of TLS 1.3 the client.


@pytest.fixture
def hasty(ours: PlainStream, peers: Any, contexts: Contexts) -> tuple[Callable[[], TLSStream], RecordPeer]:
    """A stream, once it has shaken hands, and its peer, which holds the last piece of its handshake back."""
    server_side = contexts.server.maximum_version == ssl.TLSVersion.TLSv1_3
    stream = tls_stream(ours, contexts, server_side=server_side)
    peer = record_peer(peers, contexts, server_side=not server_side)
    shaking = gevent.spawn(stream.handshake)
    peer.handshake()

    def shake() -> TLSStream:
        shaking.get()
        return stream

    return shake, peer


def test_data_that_arrives_with_the_handshakes_end_is_there(
    hasty: tuple[Callable[[], TLSStream], RecordPeer],
) -> None:
    shake, peer = hasty
    peer.tls.write(b"early")
    peer.tls.write(b"bird")
    peer.flush()
    stream = shake()
    # Nobody would say that there is something to read.
    assert stream.recv() == b"earlybird"
    with pytest.raises(BlockingIOError):
        stream.recv()
    peer.tls.write(b"later")
    peer.flush()
    assert stream.recv() == b"later"


class Measured:
    """What OpenSSL reads from, with the largest size that it ever had."""

    def __init__(self, bio: Any) -> None:
        self._bio = bio
        self.largest = 0

    @property
    def pending(self) -> int:
        return int(self._bio.pending)

    def write(self, data: Any) -> None:
        self._bio.write(data)
        self.largest = max(self.largest, self.pending)


def test_of_a_lot_that_arrives_with_the_handshakes_end_and_later_openssl_is_given_little_at_once(
    monkeypatch: pytest.MonkeyPatch, ours: PlainStream, peers: Any, contexts: Contexts
) -> None:
    server_side = contexts.server.maximum_version == ssl.TLSVersion.TLSv1_3
    stream = tls_stream(ours, contexts, server_side=server_side)
    measured = Measured(stream._incoming)
    monkeypatch.setattr(stream, "_incoming", measured)
    peer = record_peer(peers, contexts, server_side=not server_side)
    shaking = gevent.spawn(stream.handshake)
    peer.handshake()
    data = os.urandom(150_000)
    for _ in range(2):
        for start in range(0, len(data), 10_000):
            peer.tls.write(data[start : start + 10_000])
        sending = gevent.spawn(peer.flush)
        shaking.get()
        received = b""
        while len(received) < len(data):
            received += receive(stream)
        assert received == data
        sending.get()
    assert 10_000 < measured.largest < 2 * 17_000


def test_a_part_of_a_record_may_arrive_with_the_handshakes_end(
    hasty: tuple[Callable[[], TLSStream], RecordPeer],
) -> None:
    shake, peer = hasty
    peer.tls.write(b"early")
    peer.flush(peer.outgoing.pending - 3)
    stream = shake()
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            stream.recv()
    peer.flush()
    assert stream.recv() == b"early"


def test_the_end_may_arrive_with_the_handshakes_end(hasty: tuple[Callable[[], TLSStream], RecordPeer]) -> None:
    shake, peer = hasty
    peer.tls.write(b"early")
    peer.unwrap()
    peer.flush()
    stream = shake()
    assert stream.recv() == b"early"
    assert receive(stream) == b""


def test_a_truncation_may_arrive_with_the_handshakes_end(hasty: tuple[Callable[[], TLSStream], RecordPeer]) -> None:
    shake, peer = hasty
    peer.tls.write(b"early")
    peer.flush()
    peer.socket.shutdown(socket.SHUT_WR)
    stream = shake()
    assert stream.recv() == b"early"
    with pytest.raises(EOFError):
        receive(stream)


# Writes that block.


def test_a_write_that_blocks_resumes_with_the_same_bytes_first(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    data = os.urandom(3_000_000)
    reading = gevent.spawn(lambda: b"".join(iter(peer.read, b"")))
    left = data
    blocked = 0
    while left:
        try:
            sent = stream.send(left)
        except BlockingIOError:
            blocked += 1
            wait_write(stream.fileno())
            continue
        assert 0 <= sent <= len(left)
        # From another buffer each time, and with more behind: what has gathered meanwhile.
        left = bytes(left[sent:])
        if len(data) < 3_000_500:
            left += b"more"
            data += b"more"
    assert blocked
    stream.finish(b"", linger=False)
    assert reading.get() == data


def test_what_is_blocked_counts_as_sent_once_it_has_left(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    total = fill(stream)
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            stream.send(b"f" * 50_000)
    received = b""
    while len(received) < total:
        received += peer.read()
    # The record that was encrypted but blocked goes out now, and once only.
    rest = b"f" * 50_000
    while rest:
        rest = rest[stream.send(rest) :]
    while len(received) < total + 50_000:
        received += peer.read()
    assert received == b"f" * (total + 50_000)
    stream.send(b"end")
    assert peer.read() == b"end"


def test_receiving_goes_on_while_a_write_is_blocked(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    total = fill(stream)
    peer.tls.write(b"hello")
    peer.flush()
    assert stream.recv() == b"hello"
    sending = gevent.spawn(send_all, stream, b"f" * 50_000)
    received = b""
    while len(received) < total + 50_000:
        received += peer.read()
    sending.get()
    assert received == b"f" * (total + 50_000)


def test_what_had_left_before_the_stream_broke_counts_as_sent(
    monkeypatch: pytest.MonkeyPatch, ours: PlainStream, shaken: tuple[TLSStream, RecordPeer]
) -> None:
    stream, peer = shaken
    send, sends = ours.send, iter(range(2))

    def send_twice(data: Any) -> int:
        if next(sends, None) is None:
            raise BrokenPipeError
        return send(data)

    monkeypatch.setattr(ours, "send", send_twice)
    data = os.urandom(100_000)
    sent = stream.send(data)
    assert 0 < sent < len(data)
    received = b""
    while len(received) < sent:
        received += peer.read()
    assert received == data[:sent]
    with pytest.raises(BrokenPipeError):
        stream.send(data[sent:])


def test_sending_to_who_is_gone_is_an_error(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.socket.close()
    with pytest.raises(BrokenPipeError):
        stream.send(b"hello")


# The end.


@pytest.mark.parametrize("words", [b"", b"last words", b"w" * 40_000], ids=len)
@pytest.mark.parametrize("is_joined", [True, False], ids=["in one piece", "apart"])
def test_close_notify_is_the_proper_end(shaken: tuple[TLSStream, RecordPeer], words: bytes, is_joined: bool) -> None:
    stream, peer = shaken
    for i in range(0, len(words), 10_000):
        peer.tls.write(words[i : i + 10_000])
    if not is_joined:
        peer.flush()
        if words:
            assert stream.recv() == words
    peer.unwrap()
    peer.flush()
    if is_joined and words:
        assert stream.recv() == words
    # The watcher of the descriptor has to see that there is something: the end.
    if words:
        wait_read(stream.fileno())
    assert stream.recv() == b""


def test_after_the_peers_close_notify_there_are_still_answers(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.tls.write(b"question")
    peer.unwrap()
    peer.flush()
    assert stream.recv() == b"question"
    assert receive(stream) == b""
    assert stream.send(b"answer") == 6
    assert peer.read() == b"answer"
    stream.finish(b"and more", linger=False)
    assert peer.read() == b"and more"
    with pytest.raises(ssl.SSLZeroReturnError):  # Both have said goodbye.
        peer.read()


@pytest.mark.parametrize("words", [b"", b"last words"], ids=len)
def test_an_end_without_close_notify_is_an_error_but_answers_may_go(
    shaken: tuple[TLSStream, RecordPeer], words: bytes
) -> None:
    stream, peer = shaken
    if words:
        peer.tls.write(words)
    peer.flush()
    peer.socket.shutdown(socket.SHUT_WR)
    if words:
        assert stream.recv() == words
    for _ in range(2):
        wait_read(stream.fileno())
        with pytest.raises(EOFError):
            stream.recv()
    assert stream.send(b"answer") == 6
    assert peer.read() == b"answer"
    stream.finish(b"and more", linger=True)
    assert peer.read() == b"and more"
    assert peer.read() == b""


def test_a_stream_cut_amid_a_record_is_an_error(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.tls.write(b"hello")
    peer.flush(peer.outgoing.pending - 1)
    peer.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        receive(stream)


def test_a_record_that_was_tampered_with_is_an_error_and_the_peer_is_told(
    shaken: tuple[TLSStream, RecordPeer],
) -> None:
    stream, peer = shaken
    peer.tls.write(b"hello")
    *record, last = peer.outgoing.read()
    peer.socket.sendall(bytes([*record, last ^ 1]))
    with pytest.raises(ssl.SSLError):
        receive(stream)
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        peer.read()


def test_what_came_in_good_order_is_received_before_the_error_behind_it(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.tls.write(b"hello")
    peer.flush()
    peer.tls.write(b"tampered with")
    *record, last = peer.outgoing.read()
    peer.socket.sendall(bytes([*record, last ^ 1]))
    assert stream.recv() == b"hello"
    wait_read(stream.fileno())  # The watcher of the descriptor has to see that there is something: the error.
    for attempt in (stream.recv, lambda: stream.send(b"answer")):
        with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac"):
            attempt()


def test_bytes_that_are_no_tls_are_an_error(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        receive(stream)


@pytest.mark.parametrize("size", [0, 10, 2_000_000])
@pytest.mark.parametrize("linger", [False, True])
def test_tls_says_its_last_words_and_goodbye(shaken: tuple[TLSStream, RecordPeer], size: int, linger: bool) -> None:
    stream, peer = shaken
    data = os.urandom(size)
    finishing = gevent.spawn(stream.finish, data, linger=linger)
    received = b""
    while piece := peer.read():
        received += piece
    assert received == data
    if linger:
        assert not finishing.ready()
    peer.socket.close()
    finishing.get()
    assert stream.fileno() == -1


def test_the_last_words_may_be_what_was_blocked(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    total = fill(stream)
    finishing = gevent.spawn(stream.finish, b"f" * 50_000, linger=False)
    received = b""
    while piece := peer.read():
        received += piece
    finishing.get()
    assert received == b"f" * (total + 50_000)


@pytest.mark.parametrize("linger", [False, True])
def test_a_tls_farewell_takes_a_moment_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, shaken: tuple[TLSStream, RecordPeer], linger: bool
) -> None:
    monkeypatch.setattr(streams, "_FAREWELL_TIMEOUT", 0.02)
    stream, _ = shaken
    fill(stream)
    stream.finish(b"f" * 50_000, linger=linger)
    assert stream.fileno() == -1


@pytest.mark.parametrize("words", [b"bye", b"b" * 10_000_000], ids=len)
def test_a_tls_farewell_that_is_killed_closes_all_the_same(shaken: tuple[TLSStream, RecordPeer], words: bytes) -> None:
    stream, _ = shaken
    finishing = gevent.spawn(stream.finish, words, linger=True)
    gevent.idle()
    finishing.kill()
    assert stream.fileno() == -1
    assert isinstance(finishing.value, gevent.GreenletExit)  # Not swallowed.


def test_a_tls_farewell_to_who_is_gone_raises_nothing(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    peer.socket.close()
    stream.finish(b"bye", linger=True)
    assert stream.fileno() == -1


def test_a_tls_stream_can_be_closed_at_once(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    fd = stream.fileno()
    stream.close()
    assert is_closed(fd)
    assert stream.fileno() == -1
    with pytest.raises(ssl.SSLEOFError):
        peer.read()


def test_what_tls_itself_has_still_to_say_goes_before_the_goodbye(shaken: tuple[TLSStream, RecordPeer]) -> None:
    stream, peer = shaken
    # As after `recv`, when the protocol's own answer found the socket full.
    stream._tls.write(b"stands for an alert")
    stream._encrypted = stream._outgoing.read()
    finishing = gevent.spawn(stream.finish, b"", linger=False)
    assert peer.read() == b"stands for an alert"
    assert peer.read() == b""
    finishing.get()


# What only one who writes his own TLS would say.


@pytest.fixture
def forger(ours: PlainStream, peers: Any, contexts: Contexts, tmp_path: Path) -> tuple[TLSStream, RecordPeer, Forger]:
    """A server's stream, its peer, and who speaks for the peer."""
    contexts.client.keylog_filename = str(tmp_path / "keys")
    stream = tls_stream(ours, contexts, server_side=True)
    peer = record_peer(peers, contexts, server_side=False)
    shaking = gevent.spawn(stream.handshake)
    peer.handshake()
    peer.flush()
    shaking.get()
    return stream, peer, Forger(peer, tmp_path / "keys")


only_old = pytest.mark.parametrize("contexts", [ssl.TLSVersion.TLSv1_2], indirect=True, ids=["TLSv1_2"])
only_new = pytest.mark.parametrize("contexts", [ssl.TLSVersion.TLSv1_3], indirect=True, ids=["TLSv1_3"])


@only_new
def test_new_keys_are_taken_and_given(forger: tuple[TLSStream, RecordPeer, Forger]) -> None:
    stream, peer, forged = forger
    for i in range(3):
        peer.socket.sendall(forged.key_update(is_requested=True) + forged.record(b"%d" % i))
        assert receive(stream) == b"%d" % i
        stream.send(b"answer %d" % i)
        assert peer.read() == b"answer %d" % i


@only_old
def test_a_peer_is_not_renegotiated_with(forger: tuple[TLSStream, RecordPeer, Forger]) -> None:
    stream, peer, forged = forger
    peer.socket.sendall(forged.record(b"before") + forged.record(client_hello(), HANDSHAKE) + forged.record(b"after"))
    received = b""
    while received != b"beforeafter":
        received += receive(stream)
    with pytest.raises(ssl.SSLError, match="no renegotiation"):
        peer.read()


@only_old
def test_a_peer_that_does_not_read_what_it_makes_tls_say_is_broken_with(
    forger: tuple[TLSStream, RecordPeer, Forger],
) -> None:
    stream, peer, forged = forger
    fill(stream)
    hello = client_hello()
    peer.socket.setblocking(False)

    def ask() -> None:
        while True:
            data = memoryview(forged.record(hello, HANDSHAKE))
            while data:
                wait_write(peer.socket.fileno())
                data = data[peer.socket.send(data) :]

    asking = gevent.spawn(ask)
    with pytest.raises(ConnectionAbortedError, match="what it makes TLS say"):
        receive(stream)
    assert len(stream._encrypted) < 200_000
    asking.kill()


@only_old
def test_what_was_received_is_good_where_tls_can_not_say_its_own(
    monkeypatch: pytest.MonkeyPatch, ours: PlainStream, forger: tuple[TLSStream, RecordPeer, Forger]
) -> None:
    stream, peer, forged = forger

    def send(data: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(ours, "send", send)
    peer.socket.sendall(forged.record(b"hello") + forged.record(client_hello(), HANDSHAKE))
    assert receive(stream) == b"hello"


# A handshake that fails.


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("words", [b"\x94", b"\x94\x00\x01\xa4echo\x91\x01", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000])
def test_a_handshake_with_plain_bytes_fails_at_the_first_one(
    ours: PlainStream, peers: Any, contexts: Contexts, server_side: bool, words: bytes
) -> None:
    stream = tls_stream(ours, contexts, server_side=server_side)
    peers.sendall(words)
    with pytest.raises(ConnectionClosed, match="TLS handshake failed: the peer doesn't speak TLS") as caught:
        stream.handshake()
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert not is_closed(ours.fileno())  # Closing is up to the owner.


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
def test_a_handshake_with_who_says_nothing_and_goes_fails(
    ours: PlainStream, peers: Any, contexts: Contexts, server_side: bool
) -> None:
    peers.close()
    with pytest.raises(ConnectionClosed) as caught:
        tls_stream(ours, contexts, server_side=server_side).handshake()
    assert isinstance(caught.value.__cause__, OSError)


def test_a_handshake_that_is_cut_short_fails(ours: PlainStream, peers: Any, contexts: Contexts) -> None:
    peer = record_peer(peers, contexts, server_side=False)
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.do_handshake()
    peer.flush(50)
    peers.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionClosed) as caught:
        tls_stream(ours, contexts, server_side=True).handshake()
    assert isinstance(caught.value.__cause__, ssl.SSLEOFError)


@pytest.mark.parametrize("reason", ["a stranger's certificate", "another name"])
def test_who_does_not_trust_the_certificate_says_so_and_the_server_hears_it(
    ours: PlainStream, peers: Any, contexts: Contexts, reason: str
) -> None:
    client_context = contexts.client
    if reason == "a stranger's certificate":
        client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trustme.CA().configure_trust(client_context)
    name = "other.test" if reason == "another name" else "gmprpc.test"
    server = tls_stream(ours, contexts, server_side=True)
    client = TLSStream(PlainStream(peers), client_context, server_side=False, server_hostname=name)
    shaking = gevent.spawn(_exception_of, server.handshake)
    with pytest.raises(ConnectionClosed, match=r"(?i)certificate") as caught:
        client.handshake()
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    heard = shaking.get()
    assert isinstance(heard, ConnectionClosed)
    assert "alert" in str(heard).lower()
    client.close()


@pytest.mark.parametrize("name", [None, ""])
def test_a_name_that_is_to_be_checked_has_to_be_given(ours: PlainStream, contexts: Contexts, name: str | None) -> None:
    with pytest.raises(ValueError, match="server_hostname"):
        TLSStream(ours, contexts.client, server_side=False, server_hostname=name)
    assert not is_closed(ours.fileno())
    contexts.client.check_hostname = False
    TLSStream(ours, contexts.client, server_side=False)


def _exception_of(function: Callable[[], Any]) -> BaseException | None:
    try:
        function()
    except Exception as exc:
        return exc
    return None


def test_a_handshake_that_stalls_can_be_ended_from_outside(ours: PlainStream, contexts: Contexts) -> None:
    stream = tls_stream(ours, contexts, server_side=True)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        stream.handshake()
    shaking = gevent.spawn(stream.handshake)
    gevent.idle()
    shaking.kill()
    assert not is_closed(ours.fileno())
