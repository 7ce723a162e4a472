"""What a real HAProxy tells of its clients, in either version of the PROXY protocol, and past TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gevent import socket

import gmprpc
from tests.certificates import Certificates
from tests.helpers import Peer

from .haproxy import HAProxy

Address = tuple[str, int]

CONFIGURATION = """
global
    log stdout format raw local0
    stats socket /run/haproxy/admin.sock mode 660 level admin

defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m

listen gmprpc
    bind {host}:{port}
    server a {server} {options}
"""


@pytest.fixture
def before(start_haproxy: Callable[[str], HAProxy], reserve: Callable[[], Address]) -> Callable[..., Address]:
    """``before(server, options)``: where an HAProxy listens that passes everything on to ``server``."""

    def before(server: gmprpc.Server, options: str) -> Address:
        host, port = reserve()
        address = "unix@" + server.address.removeprefix("unix:") if isinstance(server.address, str) else None
        start_haproxy(
            CONFIGURATION.format(
                host=host, port=port, server=address or "{}:{}".format(*server.address), options=options
            )
        )
        return host, port

    return before


@pytest.fixture
def service(service: gmprpc.Service) -> gmprpc.Service:
    service.register(lambda: gmprpc.current_call().peer, "who")
    return service


@pytest.mark.parametrize("is_unix", [False, True], ids=["TCP", "unix"])
@pytest.mark.parametrize(
    "options, expected",
    [
        ("send-proxy", "v1"),
        ("send-proxy-v2", "v2"),
        ("send-proxy", "auto"),
        ("send-proxy-v2 proxy-v2-options crc32c,unique-id", "auto"),
    ],
)
def test_the_peer_is_the_client_of_the_balancer(
    service: gmprpc.Service,
    before: Callable[..., Address],
    directory: Path,
    options: str,
    expected: Any,
    is_unix: bool,
) -> None:
    listener: Any = f"unix:{directory}/socket" if is_unix else ("127.0.0.1", 0)
    with gmprpc.Server(listener, service, proxy_protocol=expected) as server:
        address = before(server, options)
        for source in ("127.0.0.2", "127.0.0.3"):
            with socket.create_connection(address, source_address=(source, 0)) as sock:
                assert Peer(sock).call("who") == [1, 0, None, list(sock.getsockname())]
        assert server.statistics()["failed_handshakes"] == 0


def test_a_clients_certificate_comes_through(
    service: gmprpc.Service, before: Callable[..., Address], tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    service.register(lambda: gmprpc.current_call().peer.certificate["subjectAltName"], "names")
    ours = gmprpc.tls.server_context(certificates.server, client_cafile=certificates.authority)
    theirs = gmprpc.tls.client_context(certificates.authority, certfile=certificates.client)
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=ours, proxy_protocol="v2") as server:
        address = before(server, "send-proxy-v2")
        client = gmprpc.Client(address, ssl_context=theirs, server_hostname="localhost", timeout=10)
        with client:
            assert client.call("names") == [["DNS", "client.test"]]
            (connection,) = server.connections
            assert connection.peer.proxy.host == "127.0.0.1"
