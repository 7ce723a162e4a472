"""Who may connect to what `gmprpc serve` serves, and who it is: a balancer in front."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import pytest

import gmprpc

from .certificates import Certificates
from .commands import Served, assert_misused, run, serving
from .helpers import Peer

V1 = b"PROXY TCP4 192.0.2.7 127.0.0.1 5000 4423\r\n"

APP = """
import gmprpc

service = gmprpc.Service()
server = gmprpc.Server(None, service, authenticate=lambda connection, message: message[2] == "who")


def allow(connection, message):
    if message[2] == "$/list":
        raise gmprpc.ErrorResponse("not for you")


choosy = gmprpc.Server(
    None,
    service,
    on_accept=lambda socket, address: print("accepted", flush=True),
    on_dispatch=allow,
    on_eof=lambda connection: print("over", flush=True),
    ssl_context=gmprpc.tls.server_context("{certificate}", client_cafile="{authority}"),
)


@service.method
def who():
    return [gmprpc.current_call().peer, gmprpc.current_call().peer.proxy is not None]
"""


@pytest.fixture(scope="session")
def app_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module `app` is."""
    directory = tmp_path_factory.mktemp("app")
    certificates = Certificates(directory)
    text = APP.format(certificate=certificates.server, authority=certificates.authority)
    (directory / "app.py").write_text(text, encoding="utf-8")
    return directory


def connected(served: Served) -> Peer:
    host, _, port = served.addresses[0].rpartition(":")
    return Peer.connect((host, int(port)))


@pytest.mark.parametrize("by_option", [True, False])
def test_a_balancer_tells_who_has_connected(app_dir: Path, by_option: bool) -> None:
    settings = {"proxy-protocol": "v1", "proxy-allow-from": "10.0.0.0/8, 127.0.0.0/8"}
    options = [f"--{name}={value}" for name, value in settings.items()] if by_option else []
    env = {} if by_option else {f"GMPRPC_{name.upper().replace('-', '_')}": value for name, value in settings.items()}
    with serving("--app-dir", app_dir, *options, "app:service", env=env) as served, connected(served) as peer:
        peer.send_bytes(V1 + msgpack.packb([0, 1, "who", []]))
        assert peer.receive() == [1, 1, None, [["192.0.2.7", 5000], True]]


def test_others_are_refused_and_nobody_is_waited_for_long() -> None:
    with serving("--proxy-protocol=v2", "--handshake-timeout=0.05") as served:
        with connected(served) as peer:
            assert peer.receive_rest() == []
        served.expect(r"no PROXY header within 0\.05 s")
    with serving("--proxy-protocol=v2", "--proxy-allow-from=unix") as served:
        with connected(served) as peer:
            assert peer.receive_rest() == []
        served.expect("proxy_allow_from doesn't have it")


def test_a_server_lets_in_whom_it_wants_to_let_in_here_too(app_dir: Path) -> None:
    with serving("--app-dir", app_dir, "app:server") as served:
        with connected(served) as peer:
            assert peer.call("who")[2] is None
            assert peer.call("$/list")[2] is None
        with connected(served) as peer:
            assert peer.call("$/health") == [1, 0, None, "SERVING"]
            peer.send([0, 1, "$/list", []])
            assert peer.receive_rest() == [[1, 1, "not authenticated", None]]


def test_the_hooks_of_a_server_and_its_tls_count_here_too(app_dir: Path) -> None:
    known = gmprpc.tls.client_context(app_dir / "authority.pem", certfile=app_dir / "client.pem")
    stranger = gmprpc.tls.client_context(app_dir / "authority.pem")
    with serving("--app-dir", app_dir, "app:choosy") as served:
        address = served.addresses[0].replace("127.0.0.1", "localhost")
        with gmprpc.Client(address, ssl_context=known) as client:
            assert client.call("who")[1] is False
            with pytest.raises(gmprpc.RemoteError, match="not for you"):
                client.call("$/list")
        assert [served.expect("^(accepted|over)$") for _ in range(2)] == ["accepted", "over"]
        with pytest.raises(gmprpc.ConnectionClosed):  # It shows no certificate.
            gmprpc.Client(address, ssl_context=stranger, retry_interval=None).call("who")


def test_one_peer_may_have_so_many_connections() -> None:
    with serving(env={"GMPRPC_MAX_CONNECTIONS_PER_PEER": "1"}) as served, connected(served) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        with connected(served) as other:
            assert other.receive_rest() == []
        served.expect(r"refused: it has max_connections_per_peer \(1\)")


@pytest.mark.parametrize(
    "option, reason",
    [
        ("--proxy-protocol=v3", "'v3' is not one of 'off', 'v1', 'v2', 'auto'"),
        ("--proxy-allow-from=nowhere", "'nowhere' does not appear to be an IPv4 or IPv6 network: give networks, as in"),
        ("--proxy-allow-from=", "give networks"),
        ("--max-connections-per-peer=0", "0 is not in the range"),
    ],
)
def test_what_makes_no_sense_is_misuse(option: str, reason: str) -> None:
    assert_misused(run("serve", option), option.partition("=")[0], reason)


def test_what_the_environment_says_is_checked_too() -> None:
    assert_misused(run("serve", env={**os.environ, "GMPRPC_PROXY_ALLOW_FROM": "10.0.0.0/99"}), "10.0.0.0/99")
