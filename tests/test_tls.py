"""TLS as a running server does it, with peers that know nothing of gmprpc but its protocol; contexts for it."""

from __future__ import annotations

import gc
import logging
import os
import re
import socket as plain_socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from gevent.event import Event
from gevent.threadpool import ThreadPool
from greenlet import getcurrent, greenlet

import gmprpc

from .certificates import Certificates
from .helpers import Peer, collected, wait_until
from .programs import Program
from .tls_peers import ALERT, APPLICATION_DATA, HANDSHAKE, Forger, RecordPeer, client_hello

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
ECHO = msgpack.packb([0, 1, "echo", ["hello"]])


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


@pytest.fixture
def server_options() -> dict[str, Any]:
    """Given by a test's own parameters, where it needs any."""
    return {}


@pytest.fixture
def server_context(certificates: Certificates) -> ssl.SSLContext:
    return gmprpc.tls.server_context(certificates.server)


@pytest.fixture
def server(
    service: gmprpc.Service, server_context: ssl.SSLContext, server_options: dict[str, Any]
) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=server_context, **server_options) as server:
        yield server


@pytest.fixture
def mutual_context(certificates: Certificates) -> ssl.SSLContext:
    """Of a server that demands certificates."""
    return gmprpc.tls.server_context(certificates.server, client_cafile=certificates.authority)


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def client_context(request: pytest.FixtureRequest, certificates: Certificates) -> ssl.SSLContext:
    """For each version of TLS, without a certificate."""
    context = gmprpc.tls.client_context(certificates.authority)
    context.minimum_version = context.maximum_version = request.param
    return context


def connected(server: gmprpc.Server) -> Any:
    """A socket on which what is sent leaves at once."""
    sock = socket.create_connection(server.address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def shaken(server: gmprpc.Server, context: ssl.SSLContext) -> RecordPeer:
    """A peer of ``server`` that has shaken hands."""
    peer = RecordPeer(connected(server), context, server_side=False, server_hostname="localhost")
    peer.handshake()
    peer.flush()
    return peer


def scripted(peer: RecordPeer) -> Peer:
    """A peer that sends and receives messages."""
    sock: Any = peer
    return Peer(sock)


def rest_of(sock: Any) -> bytes:
    """What still comes, up to the end or a reset."""
    data = b""
    with suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def reset(sock: Any) -> None:
    """Close so that the other side gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def options_of(context: ssl.SSLContext) -> dict[str, Any]:
    """For a client of the server here."""
    return {"ssl_context": context, "server_hostname": "localhost", "timeout": 10}


# What a fault costs.


@pytest.fixture
def bystander(server: gmprpc.Server, certificates: Certificates) -> Iterator[Peer]:
    """Another connection, with a call in flight all along; at the end it must still be answered."""
    context = gmprpc.tls.client_context(certificates.authority, certfile=certificates.client)
    with scripted(shaken(server, context)) as bystander:
        bystander.send([0, 77, "hold", ["still here"]])
        yield bystander
        bystander.send([0, 78, "release", []])
        answers = sorted([bystander.receive(), bystander.receive()])
        assert answers == [[1, 77, None, "still here"], [1, 78, None, None]]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What is there before these tests needn't be looked at by each of them, which takes most of their time."""
    collected()
    gc.freeze()
    yield
    gc.unfreeze()


def things_open() -> tuple[int, int]:
    """How many descriptors there are, and greenlets of this thread: those of gevent's pool end when they like to."""
    collected()
    greenlets = [thing for thing in gc.get_objects() if isinstance(thing, greenlet) and not thing.dead]
    ours = root_of(getcurrent())
    return len(os.listdir("/dev/fd")), sum(root_of(thing) is ours for thing in greenlets)


def root_of(thing: Any) -> Any:
    """The greenlet that its thread began with."""
    while thing.parent is not None:
        thing = thing.parent
    return thing


class Costs:
    """The log of a server to which things happen, while a bystander's call is in flight."""

    def __init__(self, server: gmprpc.Server, caplog: pytest.LogCaptureFixture) -> None:
        self._server = server
        self._caplog = caplog
        self.are_known = False

    def lines(self, count: int) -> list[str]:
        """What the log says of ``count`` connections, one line each, when all but the bystander's have ended."""
        wait_until(lambda: len(self._server._greenlets) == 1 and len(self._caplog.records) >= count)
        assert len(self._server.connections) == 1
        lines = [record.getMessage() for record in self._caplog.records]
        assert len(lines) == count, lines
        self.are_known = True
        return [line.partition(": ")[2] for line in lines]

    @property
    def line(self) -> str:
        """The one line for the one connection, without its address."""
        return self.lines(1)[0]


@pytest.fixture
def costs(
    server: gmprpc.Server,
    bystander: Peer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Costs]:
    """To ask for the log's lines; at the end nothing may be left of what happened, nor have come out on stderr."""
    caplog.set_level(logging.INFO)
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    before = things_open()
    costs = Costs(server, caplog)
    yield costs
    assert costs.are_known, "the test has failed, or doesn't ask"
    # What an earlier test has left may have ended meanwhile.
    wait_until(lambda: all(now <= then for now, then in zip(things_open(), before, strict=True)))
    assert capfd.readouterr().err == ""


# Everyday life.


def test_tls_carries_calls_of_every_size_both_ways(
    service: gmprpc.Service, server: gmprpc.Server, client_context: ssl.SSLContext
) -> None:
    service.register(lambda size: gmprpc.current_call().connection.call("give", size), "ask")
    own = gmprpc.Service()
    own.register(lambda size: b"x" * size, "give")
    with gmprpc.Client(server.address, service=own, **options_of(client_context)) as client:
        for size in (0, 1, 1000, 16_384, 100_000, 900_000):
            assert client.call("echo", b"x" * size) == b"x" * size
            assert client.call("ask", size) == b"x" * size
        assert [call.get() for call in [client.call_async("echo", n) for n in range(500)]] == list(range(500))
    wait_until(lambda: not server.connections)
    assert server.statistics()["failed_connections"] == 0


def talk(port: int, context: ssl.SSLContext) -> bytes:
    """What a standard client hears that calls and says goodbye; for a thread."""
    with (
        plain_socket.create_connection(("127.0.0.1", port)) as sock,
        context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as tls,
    ):
        tls.sendall(ECHO)
        answer = tls.recv(100)
        tls.unwrap()
        return answer


@pytest.mark.parametrize("is_mutual", [False, True], ids=["", "mutual"])
def test_a_standard_client_is_served_and_its_goodbye_understood(
    service: gmprpc.Service,
    server_context: ssl.SSLContext,
    mutual_context: ssl.SSLContext,
    certificates: Certificates,
    client_context: ssl.SSLContext,
    is_mutual: bool,
) -> None:
    if is_mutual:
        client_context.load_cert_chain(certificates.client)
    context = mutual_context if is_mutual else server_context
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context) as server:
        pool = ThreadPool(1)
        assert pool.apply(talk, (server.server_port, client_context)) == msgpack.packb([1, 1, None, "hello"])
        pool.kill()
        wait_until(lambda: not server.connections)
        assert server.statistics()["failed_connections"] == 0


def test_mutual_tls_carries_calls_both_ways(
    service: gmprpc.Service, mutual_context: ssl.SSLContext, certificates: Certificates, client_context: ssl.SSLContext
) -> None:
    service.register(lambda: gmprpc.current_call().connection.call("name"), "who")
    own = gmprpc.Service()
    own.register(lambda: "a client", "name")
    client_context.load_cert_chain(certificates.client)
    with (
        gmprpc.Server(("127.0.0.1", 0), service, ssl_context=mutual_context) as server,
        gmprpc.Client(server.address, service=own, **options_of(client_context)) as client,
    ):
        assert client.call("who") == "a client"
        assert client.call("add", 1, 2) == 3


def test_the_certificate_at_a_unix_socket_has_to_be_for_a_name_that_is_given(
    service: gmprpc.Service, server_context: ssl.SSLContext, client_context: ssl.SSLContext, tmp_path: Path
) -> None:
    with gmprpc.Server(f"unix:{tmp_path}/socket", service, ssl_context=server_context) as server:
        with gmprpc.Client(server.address, **options_of(client_context)) as client:
            assert client.call("add", 1, 2) == 3
        with pytest.raises(ValueError, match="server_hostname"):
            gmprpc.Client(server.address, ssl_context=client_context).call("add", 1, 2)
        with pytest.raises(gmprpc.ConnectFailed, match="Hostname mismatch"):
            gmprpc.Client(server.address, ssl_context=client_context, server_hostname="other.test").call("add", 1, 2)


def test_a_client_that_says_something_and_goes_is_heard(
    service: gmprpc.Service, server: gmprpc.Server, client_context: ssl.SSLContext
) -> None:
    heard: list[int] = []
    service.register(heard.append, "say")
    for i in range(10):
        peer = shaken(server, client_context)
        scripted(peer).send([2, "say", [i]])
        peer.unwrap()
        peer.flush()
        peer.close()  # With whatever tickets there are unread, for which the system would reset the connection.
    wait_until(lambda: len(heard) == 10)
    wait_until(lambda: not server.connections)
    assert server.statistics()["failed_connections"] == 0


# Handshakes that fail.


def record_of(content: bytes, kind: int = HANDSHAKE) -> bytes:
    return bytes([kind, 3, 1]) + len(content).to_bytes(2, "big") + content


def old_hello(version: bytes) -> bytes:
    """The first message of a client that knows nothing newer than ``version``."""
    hello = client_hello()
    return hello[:4] + version + hello[6:]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(ECHO * 10, id="MessagePack-RPC"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="HTTP"),
        pytest.param(b"\0" * 65536, id="zeros"),
        pytest.param(record_of(client_hello()) + b"\xff" * 1000, id="garbage after the hello"),
        pytest.param(record_of(client_hello()) * 2, id="two hellos"),
        pytest.param(record_of(b"\x01\xff\xff\xff" + b"h" * 16_000), id="a message of 16 MiB announced"),
        pytest.param(record_of(b"\x01\x01\x00\x00" + b"\0" * 16_000) * 9, id="a hello of 64 KiB"),
        pytest.param(record_of(b"\x0b\x00\x00\x00"), id="a certificate first"),
        pytest.param(record_of(b"\x01\x00\x00\x00"), id="an empty hello"),
        pytest.param(record_of(b"") * 100, id="empty records"),
        pytest.param(b"\x16\x03\x01\xff\xff" + b"h" * 65535, id="a record that is too long"),
        pytest.param(record_of(b"\x02\x28", ALERT), id="an alert"),
        pytest.param(record_of(b"\x01\x5a", ALERT) * 100, id="warnings"),
        pytest.param(record_of(old_hello(b"\x03\x00")), id="SSL 3"),
        pytest.param(record_of(old_hello(b"\x03\x01")), id="TLS 1.0"),
        pytest.param(record_of(old_hello(b"\x03\x02")), id="TLS 1.1"),
    ],
)
def test_what_is_no_handshake_costs_one_line(server: gmprpc.Server, costs: Costs, words: bytes) -> None:
    with connected(server) as sock:
        with suppress(ConnectionError):  # It may be refused before all is said.
            sock.sendall(words)
        rest_of(sock)
        assert costs.line.startswith("TLS handshake failed: ")


@pytest.mark.parametrize("version", [b"\x03\x01", b"\x03\x02"], ids=["TLS 1.0", "TLS 1.1"])
def test_who_is_too_old_is_told_so(server: gmprpc.Server, costs: Costs, version: bytes) -> None:
    with connected(server) as sock:
        sock.sendall(record_of(old_hello(version)))
        alert = rest_of(sock)
        assert (alert[0], alert[-2:]) == (21, b"\x02\x46")  # RFC 8446, section 6: fatal, protocol_version.
        assert "unsupported protocol" in costs.line


@pytest.mark.parametrize("size", [0, 1, 4, 5, 9, 100])
def test_who_goes_amid_the_hello_costs_one_line(server: gmprpc.Server, costs: Costs, size: int) -> None:
    with connected(server) as sock:
        sock.sendall(record_of(client_hello())[:size])
        sock.shutdown(socket.SHUT_WR)
        rest_of(sock)
        assert costs.line.startswith("TLS handshake failed: ")


@pytest.mark.parametrize("server_options", [{"handshake_timeout": 0.4}])
@pytest.mark.parametrize(
    "words", [b"", record_of(client_hello())[:3], record_of(client_hello())[:-1], record_of(client_hello())], ids=len
)
def test_a_handshake_that_stalls_is_ended_and_delays_nobody(
    server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext, words: bytes
) -> None:
    with connected(server) as silent:
        silent.sendall(words)
        with scripted(shaken(server, client_context)) as peer:
            assert peer.call("echo", 1) == [1, 0, None, 1]
            peer.shutdown()
            assert peer.receive_rest() == []
        rest_of(silent)
        assert costs.line == "no TLS handshake within 0.4 s"


@pytest.mark.parametrize("server_options", [{"handshake_timeout": 0.4}])
def test_a_handshake_that_goes_on_for_ever_is_ended_all_the_same(server: gmprpc.Server, costs: Costs) -> None:
    hello = record_of(client_hello())
    sent = 0
    with connected(server) as slow:
        listening = gevent.spawn(rest_of, slow)
        # Never silent for a tenth of the time that a handshake may take in all.
        while not listening.ready() and sent < len(hello) - 1:
            with suppress(ConnectionError):
                slow.sendall(hello[sent : sent + 1])
            sent += 1
            gevent.sleep(0.01)
        assert listening.ready()
        assert costs.line == "no TLS handshake within 0.4 s"


@pytest.mark.parametrize("server_options", [{"handshake_timeout": None}])
def test_a_new_client_is_served_while_200_others_stall(
    server: gmprpc.Server, client_context: ssl.SSLContext, capfd: pytest.CaptureFixture[str]
) -> None:
    stalled = [connected(server) for _ in range(200)]
    for i, sock in enumerate(stalled):
        sock.sendall(record_of(client_hello())[: i * 2])
    wait_until(lambda: len(server._entrance.under_way) == 200)
    with gmprpc.Client(server.address, **options_of(client_context)) as client:
        assert client.call("echo", 1) == 1
        assert len(server._entrance.under_way) == 200
    for sock in stalled:
        sock.close()
    wait_until(lambda: not server._greenlets)
    assert capfd.readouterr().err == ""


# Certificates that aren't good.


def tls_error_of(exc: BaseException) -> ssl.SSLError:
    """The error of TLS that is the cause of ``exc``."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__
    assert cause is not None, f"{exc!r} doesn't say that TLS is the cause"
    return cause


@pytest.mark.parametrize(
    "certificate, complaint",
    [
        ({"identity": "localhost", "by_stranger": True}, "unable to get local issuer certificate"),
        ({"identity": "localhost", "is_expired": True}, "certificate has expired"),
        ({"identity": "other.test"}, "Hostname mismatch"),
    ],
    ids=["a stranger's", "expired", "another name's"],
)
def test_a_server_with_a_certificate_that_is_not_good_is_not_called(
    service: gmprpc.Service,
    certificates: Certificates,
    client_context: ssl.SSLContext,
    certificate: dict[str, Any],
    complaint: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    context = gmprpc.tls.server_context(certificates.issue("bad", **certificate))
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context) as server:
        client = gmprpc.Client(server.address, **options_of(client_context))
        with pytest.raises(gmprpc.ConnectFailed, match="certificate verify failed: " + complaint) as caught:
            client.call("echo", 1)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert not caught.value.sent
        wait_until(lambda: not server._greenlets)
    (record,) = caplog.records
    assert "TLS handshake failed: " in record.getMessage()
    assert "alert" in record.getMessage().lower()
    assert capfd.readouterr().err == ""


@pytest.fixture(params=["none", "a stranger's", "self-signed", "expired"])
def bad_client_context(
    request: pytest.FixtureRequest, certificates: Certificates, client_context: ssl.SSLContext
) -> ssl.SSLContext:
    """Of a client that a server with mutual TLS must not serve."""
    if request.param == "self-signed":
        client_context.load_cert_chain(certificates.self_signed())
    elif request.param != "none":
        options = {"by_stranger": request.param == "a stranger's", "is_expired": request.param == "expired"}
        client_context.load_cert_chain(certificates.issue("bad client", "client.test", **options))
    return client_context


class TestMutual:
    """Against a server that demands certificates."""

    @pytest.fixture
    def server_context(self, mutual_context: ssl.SSLContext) -> ssl.SSLContext:
        return mutual_context

    # With TLS 1.3 the client's handshake succeeds before the server has seen the certificate.
    @pytest.mark.parametrize("size", [0, 1_000_000])
    def test_a_client_without_a_good_certificate_is_told(
        self, server: gmprpc.Server, bad_client_context: ssl.SSLContext, size: int
    ) -> None:
        client = gmprpc.Client(server.address, **options_of(bad_client_context))
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            client.call("echo", b"x" * size)
        assert "alert" in str(tls_error_of(caught.value)).lower()
        client.close()
        wait_until(lambda: not server._greenlets)
        assert server.statistics()["connections"] == 0

    @pytest.mark.parametrize("size", [1, 20_000])
    def test_a_client_without_a_good_certificate_costs_one_line(
        self, server: gmprpc.Server, costs: Costs, bad_client_context: ssl.SSLContext, size: int
    ) -> None:
        with RecordPeer(connected(server), bad_client_context, server_side=False, server_hostname="localhost") as peer:
            with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
                peer.handshake()
                # With the end of the handshake, which the server refuses, come more calls than it reads at once.
                for _ in range(size):
                    peer.tls.write(ECHO)
                with suppress(ConnectionError):
                    peer.flush()
                peer.read()
            peer.close()
            assert costs.line.startswith("TLS handshake failed: [SSL: ")


# Streams that break.


@pytest.mark.parametrize("is_in_flight", [False, True], ids=["quiet", "in flight"])
def test_who_goes_without_a_goodbye_costs_one_line(
    server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext, is_in_flight: bool
) -> None:
    with shaken(server, client_context) as peer:
        assert scripted(peer).call("echo", 1) == [1, 0, None, 1]
        if is_in_flight:
            scripted(peer).send([0, 1, "hold", ["held"]])
            wait_until(lambda: server.statistics()["in_flight"] == 2)
        peer.close()
        if is_in_flight:
            server.service.methods["release"]()
        assert "without ending TLS" in costs.line


def test_what_came_before_a_truncation_is_answered(
    service: gmprpc.Service, server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext
) -> None:
    go = Event()

    def wait() -> str:
        go.wait()
        return "late"

    service.register(wait, "wait")
    with shaken(server, client_context) as peer:
        talking = scripted(peer)
        talking.send([0, 1, "wait", []], [0, 2, "echo", ["at once"]])
        peer.socket.shutdown(socket.SHUT_WR)  # Without a goodbye: TCP alone may say it, or an attacker.
        assert talking.receive() == [1, 2, None, "at once"]
        go.set()
        assert talking.receive() == [1, 1, None, "late"]
        assert peer.recv(1) == b"", "it is told the end in good order"
        assert "without ending TLS" in costs.line


def test_half_a_record_and_the_end_cost_one_line(
    server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext
) -> None:
    with shaken(server, client_context) as peer:
        peer.tls.write(ECHO)
        peer.flush(peer.outgoing.pending // 2)
        peer.socket.shutdown(socket.SHUT_WR)
        rest_of(peer.socket)
        assert "without ending TLS" in costs.line


@pytest.mark.parametrize("server_options", [{"read_timeout": 0.2}])
@pytest.mark.parametrize("words", [b"", ECHO], ids=["at once", "after a message"])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_half_a_record_and_silence_cost_one_line(
    server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext, words: bytes, size: int
) -> None:
    with shaken(server, client_context) as peer:
        if words:
            peer.sendall(words)
            peer.recv(100)
        peer.tls.write(ECHO)
        peer.flush(size)
        rest_of(peer.socket)
        assert "the rest of a message didn't come within 0.2 s" in costs.line


@pytest.mark.parametrize("server_options", [{"read_timeout": 0.2}])
def test_half_a_message_and_silence_cost_one_line(
    server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext
) -> None:
    with shaken(server, client_context) as peer:
        peer.sendall(ECHO[:5])
        peer.tls.write(ECHO[5:])
        peer.flush(peer.outgoing.pending // 2)
        rest_of(peer.socket)
        assert "the rest of a message didn't come within 0.2 s" in costs.line


def tampered(record: bytes) -> bytes:
    return record[:-1] + bytes([record[-1] ^ 1])


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(tampered, id="tampered with"),
        pytest.param(lambda record: b"\xff" * 100, id="no TLS"),
        pytest.param(lambda record: ECHO, id="plain"),
        pytest.param(lambda record: record[:3] + b"\xff\xff" + b"r" * 65535, id="too long"),
        pytest.param(lambda record: record * 2, id="twice"),
        pytest.param(lambda record: b"\x15\x03\x03\x00\x02\x02\x28", id="a plain alert"),
        pytest.param(lambda record: record_of(client_hello()), id="a plain hello"),
    ],
)
def test_a_record_that_is_not_good_costs_one_line(
    server: gmprpc.Server,
    costs: Costs,
    client_context: ssl.SSLContext,
    words: Callable[[bytes], bytes],
) -> None:
    with shaken(server, client_context) as peer:
        assert scripted(peer).call("echo", 1) == [1, 0, None, 1]
        peer.tls.write(ECHO)
        with suppress(ConnectionError):
            peer.socket.sendall(words(peer.outgoing.read()))
        rest_of(peer.socket)
        assert "[SSL" in costs.line


class Forged:
    """Peers that shake hands and then write their records themselves."""

    def __init__(self, server: gmprpc.Server, certificates: Certificates, directory: Path) -> None:
        self._server = server
        self._authority = certificates.authority
        self._keylog = directory / "keys"

    def connect(self, version: ssl.TLSVersion) -> tuple[RecordPeer, Forger]:
        context = gmprpc.tls.client_context(self._authority)
        context.minimum_version = context.maximum_version = version
        context.keylog_filename = str(self._keylog)
        peer = shaken(self._server, context)
        return peer, Forger(peer, self._keylog)


@pytest.fixture
def forged(server: gmprpc.Server, certificates: Certificates, tmp_path: Path) -> Forged:
    return Forged(server, certificates, tmp_path)


def test_who_asks_to_renegotiate_is_refused_and_heard_on(service: gmprpc.Service, forged: Forged, costs: Costs) -> None:
    heard: list[int] = []
    service.register(heard.append, "say")
    peer, forger = forged.connect(ssl.TLSVersion.TLSv1_2)
    with peer:
        peer.socket.sendall(forger.record(client_hello(), HANDSHAKE) + forger.record(msgpack.packb([2, "say", [1]])))
        with pytest.raises(ssl.SSLError, match="no renegotiation"):
            peer.read()
        wait_until(lambda: heard == [1])
        peer.socket.sendall(forger.record(b"\x01\x00", ALERT))  # The goodbye.
    assert costs.lines(0) == []


def test_who_asks_to_renegotiate_without_end_is_broken_with(forged: Forged, costs: Costs) -> None:
    peer, forger = forged.connect(ssl.TLSVersion.TLSv1_2)
    hello = client_hello()
    with peer:
        with pytest.raises(ConnectionError):  # It doesn't read what is answered.
            while True:
                peer.socket.sendall(b"".join(forger.record(hello, HANDSHAKE) for _ in range(1000)))
        assert costs.line.endswith("the peer doesn't read what it makes TLS say")


def test_new_keys_are_taken_and_given(forged: Forged, costs: Costs) -> None:
    peer, forger = forged.connect(ssl.TLSVersion.TLSv1_3)
    with peer:
        for _ in range(3):
            peer.socket.sendall(forger.key_update(is_requested=True) + forger.record(ECHO))
            assert msgpack.unpackb(peer.read()) == [1, 1, None, "hello"]
        # As many as there may be, unanswered, are nothing to keep.
        for _ in range(20):
            peer.socket.sendall(b"".join(forger.key_update(is_requested=True) for _ in range(1000)))
        peer.socket.sendall(forger.record(ECHO))
        assert msgpack.unpackb(peer.read()) == [1, 1, None, "hello"]
        peer.socket.sendall(forger.record(b"\x01\x00", ALERT))
    assert costs.lines(0) == []


@pytest.mark.parametrize(
    "content, kind",
    [
        pytest.param(client_hello(), HANDSHAKE, id="a hello"),
        pytest.param(b"\x0b\x00\x00\x04\x00\x00\x00\x00", HANDSHAKE, id="a certificate"),
        pytest.param(b"\x14\x00\x00\x30" + b"f" * 48, HANDSHAKE, id="the end of a handshake"),
        pytest.param(b"\x18\x00\x00\x01\x02", HANDSHAKE, id="new keys of no kind"),
        pytest.param(b"\x18\x00\x01\x00" + b"k" * 256, HANDSHAKE, id="new keys that are too long"),
        pytest.param(b"\x04\xff\xff\xff" + b"t" * 1000, HANDSHAKE, id="a ticket of 16 MiB announced"),
        pytest.param(b"\xff\x00\x00\x00", HANDSHAKE, id="a message of no kind"),
        pytest.param(b"\x02\x28", ALERT, id="an alert"),
        pytest.param(b"\xff\xff", ALERT, id="an alert of no kind"),
        pytest.param(b"\x01", 20, id="a change of ciphers"),
        pytest.param(b"x", 99, id="a record of no kind"),
        pytest.param(b"x" * 16_385, APPLICATION_DATA, id="a record that is too long"),
    ],
)
def test_a_record_that_should_not_be_there_costs_one_line(
    forged: Forged, costs: Costs, content: bytes, kind: int
) -> None:
    peer, forger = forged.connect(ssl.TLSVersion.TLSv1_3)
    with peer:
        peer.socket.sendall(forger.record(ECHO))
        assert msgpack.unpackb(peer.read()) == [1, 1, None, "hello"]
        peer.socket.sendall(forger.record(content, kind))
        rest_of(peer.socket)
        assert "[SSL" in costs.line


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize(
    "content, kind", [(b"", APPLICATION_DATA), (b"\x01\x5a", ALERT)], ids=["empty records", "warnings"]
)
def test_records_that_say_nothing_are_not_heard_for_ever(
    forged: Forged, costs: Costs, version: ssl.TLSVersion, content: bytes, kind: int
) -> None:
    peer, forger = forged.connect(version)
    with peer:
        with suppress(ConnectionError):
            peer.socket.sendall(b"".join(forger.record(content, kind) for _ in range(100)))
        rest_of(peer.socket)
        assert "[SSL" in costs.line


class Mortal:
    """A socket that resets the connection after so many bytes, sent and received."""

    def __init__(self, sock: Any, lifetime: int) -> None:
        self._socket = sock
        self.left = lifetime

    def sendall(self, data: bytes) -> None:
        self._socket.sendall(data[: self.left])
        self._live(len(data))

    def recv(self, size: int) -> bytes:
        data: bytes = self._socket.recv(min(size, self.left))
        self._live(len(data))
        return data

    def close(self) -> None:
        self._socket.close()

    def _live(self, size: int) -> None:
        self.left -= size
        if self.left <= 0:
            reset(self._socket)
            raise ConnectionResetError


def test_a_reset_anywhere_costs_one_line(server: gmprpc.Server, costs: Costs, client_context: ssl.SSLContext) -> None:
    def talk_for(lifetime: int) -> int:
        sock = Mortal(connected(server), lifetime)
        peer = RecordPeer(sock, client_context, server_side=False, server_hostname="localhost")
        with peer:
            peer.handshake()
            peer.flush()
            assert scripted(peer).call("echo", 1) == [1, 0, None, 1]
            peer.unwrap()
            peer.flush()
        return lifetime - sock.left

    size = talk_for(1_000_000)
    lifetimes = range(1, size - 10, 7)  # Signatures differ by a few bytes.
    for lifetime in lifetimes:
        with pytest.raises(ConnectionResetError):
            talk_for(lifetime)
    for line in costs.lines(len(lifetimes)):
        assert line.startswith(("TLS handshake failed: ", "ConnectionClosed: connection lost: "))


# Servers that break off.


@pytest.fixture
def listener() -> Iterator[Any]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def without_a_goodbye(peer: RecordPeer) -> None:
    peer.socket.shutdown(socket.SHUT_WR)


def amid_a_record(peer: RecordPeer) -> None:
    peer.tls.write(msgpack.packb([1, 0, None, "an answer"]))
    peer.flush(20)
    peer.socket.shutdown(socket.SHUT_WR)


def with_a_bad_record(peer: RecordPeer) -> None:
    peer.tls.write(msgpack.packb([1, 0, None, "an answer"]))
    peer.socket.sendall(tampered(peer.outgoing.read()))


def in_good_order(peer: RecordPeer) -> None:
    peer.unwrap()
    peer.flush()


@pytest.mark.parametrize(
    "end, cause",
    [
        (without_a_goodbye, "without ending TLS"),
        (amid_a_record, "without ending TLS"),
        (with_a_bad_record, "(?i)bad record mac"),
        (in_good_order, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_end_with_a_server_that_ends(
    listener: Any,
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    end: Callable[[RecordPeer], None],
    cause: str,
) -> None:
    client = gmprpc.Client(listener.getsockname(), **options_of(client_context))
    calls = [client.call_async("anything", number) for number in range(3)]
    accepted, _ = listener.accept()
    with RecordPeer(accepted, server_context, server_side=True) as peer:
        peer.handshake()
        peer.flush()
        heard = scripted(peer)
        assert [heard.receive()[3] for _ in range(3)] == [[0], [1], [2]]
        end(peer)
        for call in calls:
            with pytest.raises(gmprpc.ConnectionClosed) as caught:
                call.get()
            assert caught.value.sent
            assert re.search(cause, str(caught.value.__cause__))
    client.close()


def test_a_server_that_goes_amid_the_handshake_is_no_server(listener: Any, client_context: ssl.SSLContext) -> None:
    client = gmprpc.Client(listener.getsockname(), retry_interval=None, **options_of(client_context))
    calling = client.call_async("echo", 1)
    accepted, _ = listener.accept()
    with accepted:
        assert accepted.recv(1)
        accepted.shutdown(socket.SHUT_WR)
        with pytest.raises(gmprpc.ConnectFailed, match="TLS handshake failed: ") as caught:
            calling.get()
        tls_error_of(caught.value)


# TLS where there is none.


@pytest.fixture
def plain_server(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        yield server


def test_a_tls_client_at_a_plain_port_is_told_and_costs_one_line(
    plain_server: gmprpc.Server,
    client_context: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    client = gmprpc.Client(plain_server.address, retry_interval=None, **options_of(client_context))
    with pytest.raises(gmprpc.ConnectFailed, match="TLS handshake failed: ") as caught:
        client.call("echo", 1)
    tls_error_of(caught.value)
    wait_until(lambda: not plain_server._greenlets)
    (record,) = caplog.records
    assert "ProtocolError" in record.getMessage()
    assert capfd.readouterr().err == ""


def test_a_server_that_speaks_no_tls_is_no_server(listener: Any, client_context: ssl.SSLContext) -> None:
    client = gmprpc.Client(listener.getsockname(), **options_of(client_context))
    calling = client.call_async("echo", 1)
    accepted, _ = listener.accept()
    with accepted:
        accepted.sendall(ECHO)
        with pytest.raises(gmprpc.ConnectFailed, match="the peer doesn't speak TLS"):
            calling.get()


# Stopping.


def test_stop_waits_for_no_handshake_and_for_every_answer(
    service: gmprpc.Service,
    server: gmprpc.Server,
    client_context: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    hello = record_of(client_hello())
    stalled = [connected(server) for _ in range(10)]
    for i, sock in enumerate(stalled):
        sock.sendall(hello[: i * 20])
    peers = [scripted(shaken(server, client_context)) for _ in range(10)]
    for peer in peers:
        peer.send([0, 1, "hold", ["held"]])
    wait_until(lambda: server.statistics()["in_flight"] == 10 and len(server._entrance.under_way) == 10)
    for peer in peers:
        peer.send([0, 2, "echo", ["unread"]])
    stopping = gevent.spawn(server.stop)
    for sock in stalled:
        rest_of(sock)
        sock.close()
    assert not stopping.ready()
    service.methods["release"]()
    for peer in peers:
        assert sorted(peer.receive_rest()) == [[1, 1, None, "held"], [1, 2, None, "unread"]]
        peer.close()
    assert stopping.get() == 0
    assert not server._greenlets
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_stop_cuts_what_is_still_at_work_at_the_deadline(
    server: gmprpc.Server, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with scripted(shaken(server, client_context)) as peer:
        peer.send([0, 1, "hold", ["never"]])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        assert server.stop(0.05) == 1
        with pytest.raises(ssl.SSLEOFError):
            peer.receive_rest()
    assert [record.getMessage() for record in caplog.records] == ["1 requests were cut after 0.05 s"]


# Contexts for the wrong side.


def test_the_context_of_a_client_is_no_servers(client_context: ssl.SSLContext) -> None:
    with pytest.raises(ValueError, match=r"gmprpc\.tls\.server_context"):
        gmprpc.Server(("127.0.0.1", 0), ssl_context=client_context)


def test_a_client_that_would_check_no_name_is_refused_at_once(client_context: ssl.SSLContext) -> None:
    with pytest.raises(ValueError, match="server_hostname"):
        gmprpc.Client("unix:/nowhere", ssl_context=client_context)
    gmprpc.Client("unix:/nowhere", ssl_context=client_context, server_hostname="localhost")


# Stopping.


def test_a_request_right_behind_its_handshake_is_answered_though_a_stop_has_begun(
    server: gmprpc.Server, client_context: ssl.SSLContext
) -> None:
    # Before this version the server has the last word.
    client_context.maximum_version = client_context.minimum_version = ssl.TLSVersion.TLSv1_3
    with RecordPeer(connected(server), client_context, server_side=False, server_hostname="localhost") as peer:
        peer.handshake()  # The last piece is held back.
        peer.tls.write(ECHO)
        stopping = gevent.spawn(server.stop)
        wait_until(lambda: not server.started)
        peer.flush()
        assert scripted(peer).receive()[0] == 1
        peer.close()
        assert stopping.get() == 0
