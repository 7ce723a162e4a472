"""TLS as a running server does it, with peers that know nothing of gmprpc but its protocol."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import trustme
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, wait_until


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_server(service: gmprpc.Service, authority: trustme.CA) -> Iterator[gmprpc.Server]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context) as server:
        yield server


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_tls_carries_calls_of_every_size_both_ways(
    service: gmprpc.Service, tls_server: gmprpc.Server, client_context: ssl.SSLContext
) -> None:
    service.register(lambda size: gmprpc.current_call().connection.call("give", size), "ask")
    own = gmprpc.Service()
    own.register(lambda size: b"x" * size, "give")
    options: dict[str, Any] = {"ssl_context": client_context, "server_hostname": "localhost", "service": own}
    with gmprpc.Client(tls_server.address, **options) as client:
        for size in (0, 1, 1000, 16_384, 100_000, 900_000):
            assert client.call("echo", b"x" * size) == b"x" * size
            assert client.call("ask", size) == b"x" * size
        assert [call.get() for call in [client.call_async("echo", n) for n in range(500)]] == list(range(500))
    wait_until(lambda: not tls_server.connections)
    assert tls_server.statistics()["failed_connections"] == 0


def test_a_standard_tls_client_is_served_and_its_goodbye_understood(
    tls_server: gmprpc.Server, client_context: ssl.SSLContext
) -> None:
    def talk(port: int) -> bytes:
        import socket as plain_socket

        with (
            plain_socket.create_connection(("127.0.0.1", port)) as sock,
            client_context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.sendall(b"\x94\x00\x01\xa4echo\x91\x05")
            answer = tls.recv(100)
            tls.unwrap()
            return answer

    pool = ThreadPool(1)
    assert pool.apply(talk, (tls_server.server_port,)) == b"\x94\x01\x01\xc0\x05"
    pool.kill()
    wait_until(lambda: not tls_server.connections)
    assert tls_server.statistics()["failed_connections"] == 0


def test_plain_bytes_to_a_tls_port_cost_one_log_line(
    tls_server: gmprpc.Server, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with Peer.connect(tls_server.address) as peer:
        peer.send_bytes(b"GET / HTTP/1.1\r\n\r\n")
        wait_until(lambda: caplog.records)
    (record,) = caplog.records
    assert "TLS handshake failed" in record.getMessage()
    with gmprpc.Client(tls_server.address, ssl_context=client_context, server_hostname="localhost") as client:
        assert client.call("echo", 1) == 1


def test_a_handshake_that_stalls_is_ended_and_delays_nobody(
    service: gmprpc.Service, authority: trustme.CA, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with (
        gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context, handshake_timeout=0.2) as server,
        Peer.connect(server.address) as silent,
    ):
        with gmprpc.Client(server.address, ssl_context=client_context, server_hostname="localhost") as client:
            assert client.call("echo", 1) == 1
        assert silent.receive_rest() == []
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["no TLS handshake within 0.2 s"]


def test_stop_waits_for_no_handshake(service: gmprpc.Service, tls_server: gmprpc.Server) -> None:
    with Peer.connect(tls_server.address) as silent:
        wait_until(lambda: tls_server._greenlets)
        stopping = gevent.spawn(tls_server.stop)
        assert silent.receive_rest() == []
        assert stopping.get() == 0
