"""TLS as a running server does it, with peers that know nothing of gmprpc but its protocol; contexts for it."""

from __future__ import annotations

import datetime
import socket as plain_socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, wait_until
from .programs import Program

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
ECHO = msgpack.packb([0, 1, "echo", ["hello"]])
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)

# Certificates.


class Certificates:
    """PEM files, made as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ours = trustme.CA()
        self._strangers = trustme.CA()
        #: The authority that everybody trusts.
        self.authority = directory / "authority.pem"
        self._ours.cert_pem.write_to_path(self.authority)
        self.server = self.issue("server", "localhost")
        self.client = self.issue("client", "client.test")

    def issue(self, name: str, identity: str, *, by_stranger: bool = False, is_expired: bool = False) -> Path:
        """A certificate for ``identity``, with those above it and its key, in one file."""
        path = self.directory / f"{name}.pem"
        dates: Any = {"not_before": LONG_AGO, "not_after": LONG_AGO + datetime.timedelta(days=1)} if is_expired else {}
        authority = self._strangers if by_stranger else self._ours
        authority.issue_cert(identity, **dates).private_key_and_cert_chain_pem.write_to_path(path)
        return path

    def self_signed(self) -> Path:
        """The certificate of an authority that nobody knows, with its key."""
        path = self.directory / "self-signed.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(path)
        authority.private_key_pem.write_to_path(path, append=True)
        return path

    def encrypted(self, password: bytes) -> Path:
        """The key of the server's certificate, encrypted."""
        path = self.directory / "encrypted.pem"
        key = serialization.load_pem_private_key(self.server.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(password)
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
        return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


# Contexts.


@pytest.fixture(params=["server", "client"])
def context(request: pytest.FixtureRequest, certificates: Certificates) -> ssl.SSLContext:
    if request.param == "server":
        return gmprpc.tls.server_context(certificates.server)
    return gmprpc.tls.client_context(certificates.authority)


def test_contexts_are_safe_on_every_version_of_python(
    context: ssl.SSLContext, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert not context.options & getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN


def test_the_environment_can_not_have_secrets_written(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert gmprpc.tls.server_context(certificates.server).keylog_filename is None
    assert gmprpc.tls.client_context().keylog_filename is None


def test_a_system_that_demands_more_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def context_of_a_strict_system(protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    strict = SimpleNamespace(**{**vars(ssl), "SSLContext": context_of_a_strict_system})
    monkeypatch.setattr(gmprpc.tls, "ssl", strict)
    assert gmprpc.tls.client_context().minimum_version == ssl.TLSVersion.TLSv1_3


def test_a_client_verifies_the_certificate_and_its_name(certificates: Certificates) -> None:
    for context in (gmprpc.tls.client_context(), gmprpc.tls.client_context(certificates.authority)):
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert not context.hostname_checks_common_name
    # A private authority is trusted in place of the system's, not beside them.
    assert len(context.get_ca_certs()) == 1


def test_a_server_demands_certificates_only_where_it_is_told_whose(certificates: Certificates) -> None:
    assert gmprpc.tls.server_context(certificates.server).verify_mode == ssl.CERT_NONE
    context = gmprpc.tls.server_context(certificates.server, client_cafile=certificates.authority)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize("password", ["secret", b"secret", lambda: "secret"], ids=["str", "bytes", "function"])
def test_a_key_may_be_encrypted(certificates: Certificates, password: Any) -> None:
    key = certificates.encrypted(b"secret")
    gmprpc.tls.server_context(certificates.server, key, password=password)
    gmprpc.tls.client_context(certfile=certificates.server, keyfile=key, password=password)


def test_nobody_is_asked_for_a_password(certificates: Certificates) -> None:
    key = certificates.encrypted(b"secret")
    with pytest.raises(ValueError, match="the key is encrypted: give its password"):
        gmprpc.tls.server_context(certificates.server, key)
    with pytest.raises(ssl.SSLError, match=r"encrypted\.pem"):
        gmprpc.tls.server_context(certificates.server, key, password="wrong")


def test_errors_name_the_file(certificates: Certificates, tmp_path: Path) -> None:
    strangers = certificates.issue("stranger", "localhost", by_stranger=True)
    empty = tmp_path / "empty.pem"
    empty.touch()
    nothing = tmp_path / "nothing.pem"
    attempts: dict[Callable[[], ssl.SSLContext], tuple[type[Exception], str]] = {
        lambda: gmprpc.tls.server_context(nothing): (FileNotFoundError, "nothing.pem"),
        lambda: gmprpc.tls.server_context(certificates.server, nothing): (FileNotFoundError, "nothing.pem"),
        lambda: gmprpc.tls.server_context(certificates.authority): (ssl.SSLError, "authority.pem"),  # No key.
        lambda: gmprpc.tls.server_context(certificates.server, strangers): (ssl.SSLError, "server.pem and .*stranger"),
        lambda: gmprpc.tls.server_context(certificates.server, client_cafile=empty): (ssl.SSLError, "empty.pem"),
        lambda: gmprpc.tls.client_context(nothing): (FileNotFoundError, "nothing.pem"),
        lambda: gmprpc.tls.client_context(tmp_path): (IsADirectoryError, str(tmp_path)),
        lambda: gmprpc.tls.client_context(certfile=empty): (ssl.SSLError, "empty.pem"),
        lambda: gmprpc.tls.client_context(keyfile=strangers): (ValueError, "a keyfile needs its certfile"),
    }
    for attempt, (error, text) in attempts.items():
        with pytest.raises(error, match=text):
            attempt()


PROGRAM = """
from gevent import monkey
monkey.patch_all()
import sys, gmprpc
certificate, authority = sys.argv[1:]
context = gmprpc.tls.server_context(certificate, client_cafile=authority)
with gmprpc.Server(("127.0.0.1", 0), ssl_context=context) as server:
    server.register(lambda: "hello", "greet")
    context = gmprpc.tls.client_context(authority, certfile=certificate)
    with gmprpc.Client(server.address, ssl_context=context, server_hostname="localhost") as client:
        print(client.call("greet", timeout=10))
"""


def test_contexts_work_in_a_program_that_is_monkey_patched(certificates: Certificates) -> None:
    with Program(sys.executable, "-c", PROGRAM, certificates.server, certificates.authority) as program:
        assert program.lines() == ["hello"]
        assert program.wait() == 0


# Servers and peers.


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
