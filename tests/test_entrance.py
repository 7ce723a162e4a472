"""What a connection passes before its first message: the PROXY protocol's header, before TLS and all else."""

from __future__ import annotations

import gc
import logging
import pickle
import socket as plain_socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from gevent.server import StreamServer

import gmprpc
from gmprpc import entrance
from gmprpc.proxyprotocol import ProxyProtocol
from gmprpc.transport import format_address

from .certificates import Certificates
from .helpers import Peer, needs_ipv6, wait_until
from .tls_peers import RecordPeer

V1 = b"PROXY TCP4 192.0.2.7 127.0.0.1 5000 4423\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\7\x7f\0\0\1\x13\x88\x11\x47"
V2_LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
CLIENT = ("192.0.2.7", 5000)
ASK = msgpack.packb([0, 1, "who", []])


@pytest.fixture
def service(service: gmprpc.Service) -> gmprpc.Service:
    @service.method
    def who() -> Any:
        peer = gmprpc.current_call().peer
        proxy = peer.proxy if isinstance(peer, gmprpc.InetPeer) else None
        return [format_address(peer), proxy and format_address(proxy)]

    return service


Start = Callable[..., Any]


@pytest.fixture
def start(service: gmprpc.Service) -> Start:
    """Starts a server that expects so much of the PROXY protocol."""

    def start(expected: ProxyProtocol, listener: Any = ("127.0.0.1", 0), **options: Any) -> gmprpc.Server:
        return gmprpc.Server(listener, service, proxy_protocol=expected, **options)

    return start


def own_address(peer: Peer) -> str:
    return format_address(peer.socket.getsockname())


@contextmanager
def connected(server: gmprpc.Server, data: bytes = b"") -> Iterator[Peer]:
    with Peer.connect(server.address) as peer:
        peer.send_bytes(data)
        yield peer


def rest_of(peer: Peer) -> None:
    """Wait for the end, whatever comes before."""
    with suppress(ConnectionResetError):
        while peer.socket.recv(65536):
            pass


def is_answered(peer: Peer) -> bool:
    """Whether anything comes before the end, which may be a reset where something was left unread."""
    try:
        return bool(peer.receive_rest())
    except ConnectionResetError:
        return False


BOTH = pytest.mark.parametrize("header, version", [(V1, "v1"), (V2, "v2")], ids=["v1", "v2"])


@BOTH
def test_the_peer_is_who_the_balancer_has_connected_for(start: Start, header: bytes, version: ProxyProtocol) -> None:
    for expected in (version, "auto"):
        with start(expected) as server, connected(server, header + ASK) as peer:
            assert peer.receive() == [1, 1, None, ["192.0.2.7:5000", own_address(peer)]]
            assert peer.call("echo", 1) == [1, 0, None, 1]
            (connection,) = server.connections
            assert connection.peer == CLIENT


@BOTH
def test_a_header_may_come_in_any_pieces(start: Start, header: bytes, version: ProxyProtocol) -> None:
    with start(version) as server, connected(server) as peer:
        for byte in header + ASK:
            peer.send_bytes(bytes([byte]))
            gevent.sleep(0)
        assert peer.receive() == [1, 1, None, ["192.0.2.7:5000", own_address(peer)]]


def test_a_header_may_take_longer_than_sockets_may_by_default(start: Start) -> None:
    with start("v1") as server, socket.socket() as sock:
        # gevent's sockets look at it, when they are made.
        plain_socket.setdefaulttimeout(0.01)
        try:
            sock.connect(server.address)
            wait_until(lambda: server._entrance.under_way)
        finally:
            plain_socket.setdefaulttimeout(None)
        gevent.sleep(0.03)
        sock.sendall(V1 + ASK)
        assert Peer(sock).receive()[3][0] == "192.0.2.7:5000"


def test_the_longest_header_is_skipped(start: Start) -> None:
    header = V2[:14] + b"\xff\xff" + V2[16:] + bytes(0xFFFF - 12)
    with start("v2") as server, connected(server, header + ASK) as peer:
        assert peer.receive() == [1, 1, None, ["192.0.2.7:5000", own_address(peer)]]


def test_a_balancer_may_speak_for_itself(start: Start) -> None:
    for expected, header in (("v2", V2_LOCAL), ("v1", b"PROXY UNKNOWN\r\n"), ("auto", V2_LOCAL)):
        with start(expected) as server, connected(server, header + ASK) as peer:
            assert peer.receive() == [1, 1, None, [own_address(peer), None]]


def test_where_there_may_be_no_header_a_client_may_speak_at_once(start: Start) -> None:
    with start("auto") as server, connected(server, ASK) as peer:
        assert peer.receive() == [1, 1, None, [own_address(peer), None]]


def test_where_there_may_be_no_header_a_client_may_wait_for_its_server(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with start("auto", handshake_timeout=0.05) as server, connected(server) as peer:
        wait_until(lambda: server.connections)
        (connection,) = server.connections
        connection.notify("hello")
        assert peer.receive() == [2, "hello", []]
        assert peer.call("echo", 1) == [1, 0, None, 1]
    with start("auto") as server, connected(server) as peer:
        peer.shutdown()
        assert peer.receive_rest() == []
    assert not caplog.records


def test_without_the_option_a_header_is_no_message(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start("off") as server, connected(server, V1 + ASK) as peer:
        assert peer.receive_rest() == []
        assert server.statistics()["protocol_errors"] == 1


@pytest.mark.parametrize(
    "data, level, line",
    [
        (ASK, "WARNING", "no PROXY header v2, but "),
        (V1, "WARNING", "no PROXY header v2, but "),
        (V2[:-1] + b"", "WARNING", "closed amid its PROXY header"),
        (V2[:7], "WARNING", "closed amid its PROXY header"),
        (V2[:13] + b"\x99" + V2[14:], "WARNING", "invalid PROXY header v2: family and protocol 0x99"),
        (b"", "INFO", "closed before its PROXY header"),
    ],
    ids=["none", "other version", "cut", "cut early", "garbage", "nothing"],
)
def test_what_is_no_header_costs_its_own_connection_only(
    start: Start, caplog: pytest.LogCaptureFixture, data: bytes, level: str, line: str
) -> None:
    caplog.set_level(logging.INFO)
    with start("v2") as server, connected(server, V2) as bystander, connected(server, data) as peer:
        peer.shutdown()
        assert not is_answered(peer)
        address = own_address(peer)
        assert bystander.call("echo", 1) == [1, 0, None, 1]
        assert server.statistics()["failed_handshakes"] == 1
        assert len(server._arrivals) == 0
        (record,) = caplog.records
        assert record.levelname == level
        assert record.getMessage().startswith(f"connection with {address}: {line}")


def test_a_connection_that_is_reset_amid_its_header_costs_itself_only(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with start("v2") as server, Peer.connect(server.address) as peer:
        peer.send_bytes(V2[:20])
        wait_until(lambda: server._entrance.under_way)
        peer.reset()
        wait_until(lambda: not server._greenlets)
        assert server.statistics()["failed_handshakes"] == 1
        (record,) = caplog.records
        assert "Connection reset by peer" in record.getMessage()


@pytest.mark.parametrize("expected", ["v1", "auto"])
@pytest.mark.parametrize("start_of_it", [b"", V1[:1], V1[:-1]], ids=["nothing", "a byte", "all but one"])
def test_a_header_that_does_not_come_in_time_ends_its_connection(
    start: Start, caplog: pytest.LogCaptureFixture, expected: ProxyProtocol, start_of_it: bytes
) -> None:
    if expected == "auto" and not start_of_it:
        return  # That is a client that waits.
    with start(expected, handshake_timeout=0.05) as server, connected(server, start_of_it) as peer:
        assert peer.receive_rest() == []
        assert server.statistics()["failed_handshakes"] == 1
        (record,) = caplog.records
        assert "no PROXY header within 0.05 s" in record.getMessage()


def test_a_header_that_drips_has_no_more_time_than_another(start: Start) -> None:
    with start("v1", handshake_timeout=0.1) as server, connected(server) as peer:
        left = list(b"PROXY UNKNOWN " + 90 * b"x")

        def drip() -> None:
            with suppress(OSError):  # Until it is closed.
                while left:
                    peer.send_bytes(bytes([left.pop(0)]))
                    gevent.sleep(0.01)

        dripping = gevent.spawn(drip)
        assert not is_answered(peer)
        assert left
        dripping.kill()


@pytest.mark.parametrize("expected", ["v1", "v2", "auto"])
def test_only_those_who_are_allowed_may_tell_of_others(
    start: Start, caplog: pytest.LogCaptureFixture, expected: ProxyProtocol
) -> None:
    with start(expected, proxy_allow_from=["10.0.0.0/8", "unix"]) as server:
        for _ in range(3):
            with connected(server, (V2 if expected == "v2" else V1) + ASK) as peer:
                assert not is_answered(peer)
        wait_until(lambda: not server._greenlets)
        assert server.statistics()["refused_connections"] == 3
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "refused: proxy_allow_from doesn't have it" in record.getMessage()
        if expected == "auto":  # Who speaks for himself is welcome.
            with connected(server, ASK) as peer:
                assert peer.receive() == [1, 1, None, [own_address(peer), None]]
    header = V2 if expected == "v2" else V1
    with start(expected, proxy_allow_from=["127.0.0.0/8"]) as server, connected(server, header + ASK) as peer:
        assert peer.receive() == [1, 1, None, ["192.0.2.7:5000", own_address(peer)]]


@needs_ipv6
def test_who_comes_over_ipv4_to_a_socket_for_both_is_known_by_his_address(service: gmprpc.Service) -> None:
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    listener.listen()
    with listener, gmprpc.Server(listener, service, proxy_protocol="v1") as server:
        peer = Peer.connect(("127.0.0.1", server.server_port))
        with peer:
            peer.send_bytes(V1 + ASK)
            port = peer.socket.getsockname()[1]
            assert peer.receive() == [1, 1, None, ["192.0.2.7:5000", f"[::ffff:127.0.0.1]:{port}"]]


def test_a_balancer_may_come_over_a_unix_socket(start: Start, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/socket"
    with start("v2", path) as server:
        with connected(server, V2 + ASK) as peer:
            host, proxy = peer.receive()[3]
            assert host == "192.0.2.7:5000"
            assert proxy.startswith(path)
        with connected(server, V2_LOCAL + ASK) as peer:
            assert peer.receive()[3][0].startswith(path)
    with start("v2", path, proxy_allow_from=["127.0.0.1"]) as server, connected(server) as peer:
        assert peer.receive_rest() == []
        assert server.statistics()["refused_connections"] == 1


def test_on_accept_comes_first(start: Start) -> None:
    seen = []

    def on_accept(sock: Any, address: Any) -> bool:
        seen.append(address)
        return len(seen) > 1

    with start("v1", on_accept=on_accept) as server:
        with connected(server) as peer:
            assert peer.receive_rest() == []
        with connected(server, V1 + ASK) as peer:
            assert peer.receive()[3][0] == "192.0.2.7:5000"
            assert seen[1] == peer.socket.getsockname()


def test_the_log_names_the_client(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start("v1") as server, connected(server, V1 + b"\xc1") as peer:
        assert peer.receive_rest() == []
    (record,) = caplog.records
    assert record.getMessage().startswith("connection with 192.0.2.7:5000: ProtocolError")


# How many connections one peer may have.


def has_gone(server: gmprpc.Server, number: int) -> None:
    """Wait until so many connections are left."""
    wait_until(lambda: len(server._greenlets) == number)


def test_one_peer_may_have_so_many_connections(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start("off", max_connections_per_peer=2) as server, ExitStack() as stack:
        peers = [stack.enter_context(Peer.connect(server.address)) for _ in range(2)]
        for peer in peers:
            assert peer.call("echo", 1) == [1, 0, None, 1]
        for _ in range(3):
            with Peer.connect(server.address) as refused:
                assert not is_answered(refused)
        has_gone(server, 2)
        assert server.statistics()["refused_connections"] == 3
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "refused: it has max_connections_per_peer (2)" in record.getMessage()
        peers[0].close()
        has_gone(server, 1)
        with Peer.connect(server.address) as peer:
            assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not server._entrance._crowd


def test_others_have_their_own_places(start: Start) -> None:
    with start("off", max_connections_per_peer=1) as server, Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        with socket.socket() as sock:
            sock.bind(("127.0.0.2", 0))
            sock.connect(server.address)
            assert Peer(sock).call("echo", 1) == [1, 0, None, 1]


def test_behind_a_balancer_it_is_the_client_who_is_counted(start: Start) -> None:
    def header(host: str) -> bytes:
        return f"PROXY TCP4 {host} 127.0.0.1 5000 4423\r\n".encode()

    with start("v1", max_connections_per_peer=1) as server, ExitStack() as stack:
        for number in range(5):
            peer = stack.enter_context(connected(server, header(f"192.0.2.{number}") + ASK))
            assert peer.receive()[3][0] == f"192.0.2.{number}:5000"
        for same in (header("192.0.2.3"), b"PROXY TCP6 ::ffff:192.0.2.3 ::1 5000 4423\r\n"):
            with connected(server, same + ASK) as peer:
                assert not is_answered(peer)
        has_gone(server, 5)
        with connected(server, header("192.0.2.9")[:-1]):  # Nobody knows who this is.
            wait_until(lambda: server._entrance.under_way)
            with connected(server, b"PROXY UNKNOWN\r\n" + ASK) as peer:
                assert peer.receive()[3][1] is None
    assert not server._entrance._crowd


def test_who_can_speak_for_himself_only_is_counted_from_the_first_moment(start: Start) -> None:
    options: dict[str, Any] = {"max_connections_per_peer": 1, "proxy_allow_from": ["unix"]}
    with start("auto", **options) as server, connected(server) as silent:
        wait_until(lambda: server._entrance.under_way)
        with connected(server) as other:
            assert not is_answered(other)
        silent.close()
        has_gone(server, 0)
        with connected(server, V1) as liar:
            assert not is_answered(liar)
        has_gone(server, 0)
        with connected(server, ASK) as peer:
            assert peer.receive()[3] == [own_address(peer), None]
    assert not server._entrance._crowd


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this system doesn't tell who has connected")
def test_at_a_unix_socket_users_are_counted(start: Start, tmp_path: Path) -> None:
    with start("off", f"unix:{tmp_path}/socket", max_connections_per_peer=1) as server, connected(server) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        with connected(server) as other:
            assert not is_answered(other)
    assert not server._entrance._crowd


def test_who_can_not_be_told_from_others_is_not_counted(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"unix:{tmp_path}/socket"
    monkeypatch.setattr(entrance, "peer_of", lambda sock, address: gmprpc.UnixPeer(path))
    with (
        start("off", path, max_connections_per_peer=1) as server,
        connected(server) as peer,
        connected(server) as other,
    ):
        assert peer.call("echo", 1) == other.call("echo", 1) == [1, 0, None, 1]
        assert not server._entrance._crowd


def test_a_place_is_free_again_however_a_connection_ends(
    start: Start, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    with start("off", ssl_context=contexts[0], max_connections_per_peer=1) as server:
        with connected(server, ASK) as peer:  # No TLS.
            rest_of(peer)
        has_gone(server, 0)
        with connected(server) as peer:
            wait_until(lambda: server._entrance.under_way)
            gevent.killall(list(server._entrance.under_way))
        has_gone(server, 0)
        client = gmprpc.Client(server.address, ssl_context=contexts[1], server_hostname="localhost")
        with client:
            assert client.call("echo", 1) == 1
    assert not server._entrance._crowd


# TLS behind it.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def contexts(certificates: Certificates) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and a client's that trusts it and has a certificate."""
    return (
        gmprpc.tls.server_context(certificates.server),
        gmprpc.tls.client_context(certificates.authority, certfile=certificates.client),
    )


@pytest.mark.parametrize("header, expected", [(V1, "v1"), (V2, "v2"), (V2, "auto"), (b"", "auto")])
def test_the_header_comes_before_tls(
    start: Start, contexts: tuple[ssl.SSLContext, ssl.SSLContext], header: bytes, expected: ProxyProtocol
) -> None:
    with start(expected, ssl_context=contexts[0]) as server, socket.create_connection(server.address) as sock:
        tls = RecordPeer(sock, contexts[1], server_side=False, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.tls.do_handshake()
        sock.sendall(header + tls.outgoing.read())  # Not a byte of the client's hello may be lost.
        tls.handshake()
        tls.flush()
        tls.sendall(ASK)
        host = "192.0.2.7:5000" if header else format_address(sock.getsockname())
        assert msgpack.unpackb(tls.read())[3][0] == host


@pytest.mark.parametrize("is_unix", [False, True], ids=["TCP", "unix"])
@pytest.mark.parametrize("is_demanded", [True, False], ids=["mutual", "one-sided"])
def test_handlers_see_the_certificate_of_the_client(
    service: gmprpc.Service,
    certificates: Certificates,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    tmp_path: Path,
    is_unix: bool,
    is_demanded: bool,
) -> None:
    @service.method
    def names() -> Any:
        certificate = gmprpc.current_call().peer.certificate
        return certificate and certificate["subjectAltName"]

    cafile = certificates.authority if is_demanded else None
    context = gmprpc.tls.server_context(certificates.server, client_cafile=cafile)
    listener: Any = f"unix:{tmp_path}/socket" if is_unix else ("127.0.0.1", 0)
    options: Any = {"ssl_context": contexts[1], "server_hostname": "localhost"}
    with gmprpc.Server(listener, service, ssl_context=context) as server:
        client = gmprpc.Client(server.address, **options)
        with client:
            assert client.call("names") == ([["DNS", "client.test"]] if is_demanded else None)
            (connection,) = server.connections
            # It is the same peer, with or without.
            assert hash(connection.peer)
            if is_unix:
                assert connection.peer == replace(connection.peer, certificate=None)
                assert str(connection.peer).startswith(listener)
            else:
                assert isinstance(connection.peer, gmprpc.InetPeer)
                assert connection.peer.proxy is None
                assert pickle.loads(pickle.dumps(connection.peer)).certificate == connection.peer.certificate


def test_the_certificate_is_the_clients_also_behind_a_balancer(
    start: Start, certificates: Certificates, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    context = gmprpc.tls.server_context(certificates.server, client_cafile=certificates.authority)
    with start("v2", ssl_context=context) as server:

        def announce(client: gmprpc.Client, sock: Any) -> None:
            sock.sendall(V2)

        options: Any = {"ssl_context": contexts[1], "server_hostname": "localhost", "after_connect": announce}
        with gmprpc.Client(server.address, **options) as client:
            assert client.call("who")[0] == "192.0.2.7:5000"
            (connection,) = server.connections
            assert connection.peer.certificate["subjectAltName"] == (("DNS", "client.test"),)
            assert connection.peer.proxy.host == "127.0.0.1"


def test_a_handshake_that_fails_names_the_client(
    start: Start, contexts: tuple[ssl.SSLContext, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    with start("v1", ssl_context=contexts[0]) as server, connected(server, V1 + ASK) as peer:
        peer.socket.recv(100)
        wait_until(lambda: not server._greenlets)
        assert server.statistics()["failed_handshakes"] == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "connection with 192.0.2.7:5000: TLS handshake failed: the peer doesn't speak"
    )


# The end.


def test_a_stop_does_not_wait_for_headers(start: Start) -> None:
    with start("v1") as server, connected(server) as silent, connected(server) as late:
        wait_until(lambda: len(server._entrance.under_way) == 2)
        stopping = gevent.spawn(server.stop, 10)
        wait_until(lambda: not server.started)
        late.send_bytes(V1 + ASK)  # It may have been sent before.
        assert late.receive()[3][0] == "192.0.2.7:5000"
        late.close()
        assert silent.receive_rest() == []
        assert stopping.get() == 0
        assert not server._arrivals


def test_a_connection_keeps_nothing_of_its_entrance(start: Start) -> None:
    with start("v1") as server, connected(server, V1 + ASK) as peer:
        peer.receive()
        assert not server._entrance.under_way
        assert not server._arrivals
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "HeaderReader"]


def test_nothing_is_kept_of_a_handshake_that_fails_on_what_another_server_has_accepted(
    service: gmprpc.Service, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server = gmprpc.Server(None, service, ssl_context=contexts[0])
    acceptor = StreamServer(("127.0.0.1", 0), server)
    acceptor.start()
    try:
        with Peer.connect(acceptor.address) as peer:
            peer.send_bytes(ASK)
            rest_of(peer)
        wait_until(lambda: not server._greenlets)
        assert server.statistics()["failed_handshakes"] == 1
        assert not server._arrivals
    finally:
        acceptor.stop()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"proxy_protocol": "v3"}, "proxy_protocol has to be one of off, v1, v2, auto, not 'v3'"),
        ({"proxy_protocol": "v1", "proxy_allow_from": ["nowhere"]}, "'nowhere'"),
        ({"proxy_protocol": "v1", "proxy_allow_from": "127.0.0.1"}, "give a list of networks"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gmprpc.Server(("127.0.0.1", 0), **options)


# Who it is.


def test_a_peer_is_the_tuple_of_its_address() -> None:
    peer: Any = gmprpc.InetPeer(("::1", 5000, 0, 0), proxy=gmprpc.InetPeer(("10.0.0.1", 4000)))
    assert peer == ("::1", 5000, 0, 0)
    assert hash(peer) == hash(("::1", 5000, 0, 0))
    assert (peer.host, peer.port) == ("::1", 5000)
    assert repr(peer) == "('::1', 5000, 0, 0)"
    assert format_address(peer) == "[::1]:5000"
    host, port, *_ = peer
    assert (host, port) == ("::1", 5000)
    assert msgpack.unpackb(msgpack.packb(peer), use_list=False) == peer
    again = pickle.loads(pickle.dumps(peer))
    assert (again, again.proxy, type(again)) == (peer, ("10.0.0.1", 4000), gmprpc.InetPeer)
    assert gmprpc.InetPeer(("10.0.0.1", 4000)).proxy is None
