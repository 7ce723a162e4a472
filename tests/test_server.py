"""The life of a server and its connections: listening, hooks, the graceful stop; what AnyEvent::MPRPC::Server does."""

from __future__ import annotations

import grp
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer

import gmprpc
from gmprpc.streams import PlainStream

from .helpers import Peer, is_listening, listening, wait_until

# Listening.


def serve_once(server: gmprpc.Server) -> None:
    with server, Peer.connect(server.address) as peer:
        assert peer.call("echo", "hello") == [1, 0, None, "hello"]


def test_it_listens_on_a_host_and_port(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    assert not server.started
    assert server.address == ("127.0.0.1", 0)
    server.start()
    assert server.started
    assert (server.server_host, server.server_port) == server.address
    assert server.server_port != 0
    server.start()  # Once more does nothing.
    serve_once(server)
    assert not server.started


@pytest.mark.parametrize("listener", ["127.0.0.1:0", "localhost:0", ("localhost", 0), ["127.0.0.1", 0]])
def test_it_listens_on_every_form_of_address(service: gmprpc.Service, listener: Any) -> None:
    serve_once(gmprpc.Server(tuple(listener) if isinstance(listener, list) else listener, service))


def test_it_listens_on_a_socket(service: gmprpc.Service) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # A blocking one, of the standard library.
    serve_once(gmprpc.Server(listener, service))
    listener.close()


def test_it_listens_on_a_descriptor(service: gmprpc.Service) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    server = gmprpc.Server(f"fd://{os.dup(listener.fileno())}", service)
    listener.close()
    serve_once(server)


def test_it_listens_on_a_unix_socket_and_removes_its_file(service: gmprpc.Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = gmprpc.Server(f"unix:{path}", service)
    with server, Peer.connect(server.address) as peer:
        assert server.address == f"unix:{path}"
        assert server.server_port is None
        assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not path.exists()
    serve_once(server)


def test_it_listens_at_several_places(service: gmprpc.Service, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    listeners: list[Any] = [("127.0.0.1", 0), *(f"unix:{path}" for path in paths)]
    server = gmprpc.Server(listeners, service, socket_mode=0o600)
    assert server.addresses == listeners
    with server:
        assert server.address == ("127.0.0.1", server.server_port)
        assert server.addresses == [server.address, *listeners[1:]]
        assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o600]
        for address in server.addresses:
            with Peer.connect(address) as peer:
                assert peer.call("echo", address) == [1, 0, None, address if isinstance(address, str) else [*address]]
        assert server.statistics()["connections"] == 3
    assert not any(path.exists() for path in paths)
    assert not is_listening(("127.0.0.1", server.server_port))


def test_where_one_of_its_places_is_taken_it_listens_at_none(service: gmprpc.Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with gmprpc.Server(("127.0.0.1", 0)) as other:
        server = gmprpc.Server([f"unix:{path}", other.address], service)
        with pytest.raises(OSError, match="in use"):
            server.start()
        assert not server.started
        assert not path.exists()


def test_there_has_to_be_a_place_in_a_list_of_them() -> None:
    with pytest.raises(ValueError, match="the list of listeners is empty"):
        gmprpc.Server([])


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this system doesn't tell who has connected")
@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_the_peer_at_a_unix_socket_is_known_by_its_process_and_user(
    service: gmprpc.Service, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    name = f"\0gmprpc-{os.getpid()}" if kind == "abstract" else str(path)
    shown = f"unix:{name}".replace("\0", "@")
    peers: list[Any] = []
    service.register(lambda: peers.append(gmprpc.current_call().peer), "who")
    script = (
        "import socket, sys; sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1].replace('@', '\\0'));"
        "sock.sendall(bytes.fromhex('940001a377686f90')); sock.recv(100)"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        with gmprpc.Server(listener, service):
            client = subprocess.Popen([sys.executable, "-c", script, name.replace("\0", "@")])
            wait_until(lambda: client.poll() is not None)
    assert peers == [gmprpc.UnixPeer(shown, client.pid, os.getuid(), os.getgid())]
    assert str(peers[0]) == f"{shown} (pid {client.pid}, uid {os.getuid()}, gid {os.getgid()})"
    assert not caplog.records


def test_the_file_of_a_unix_socket_is_whose_it_is_told_to_be(service: gmprpc.Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    nobody = 65534 if os.getuid() == 0 else os.getuid()
    for mode in (0o600, 0o666):
        with gmprpc.Server(f"unix:{path}", service, socket_mode=mode, socket_user=nobody) as server:
            status = path.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, nobody, os.getgid())
            serve_once(server)
    group = grp.getgrgid(os.getgid()).gr_name
    with gmprpc.Server(f"unix:{path}", service, socket_group=group):
        assert path.stat().st_gid == os.getgid()


@pytest.mark.parametrize("names", [{"socket_user": "no such user"}, {"socket_group": "no such group"}])
def test_a_file_that_cant_be_given_away_is_not_left_behind(
    service: gmprpc.Service, tmp_path: Path, names: dict[str, Any]
) -> None:
    server = gmprpc.Server(f"unix:{tmp_path}/socket", service, **names)
    with pytest.raises(LookupError, match="no such"):
        server.start()
    assert not server.started
    assert not list(tmp_path.iterdir())


def test_only_a_unix_socket_that_is_made_here_has_a_file() -> None:
    with pytest.raises(ValueError, match="socket_mode, socket_user and socket_group are for unix:PATH"):
        gmprpc.Server(("127.0.0.1", 0), socket_mode=0o600)


def test_the_file_of_a_descriptor_that_was_handed_over_stays(service: gmprpc.Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        serve_once(gmprpc.Server(f"fd://{os.dup(listener.fileno())}", service))
        assert path.exists()


def test_a_stale_unix_socket_is_replaced_and_a_live_one_refused(service: gmprpc.Service, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with gmprpc.Server(f"unix:{path}", service) as server:
        with pytest.raises(OSError, match="another server listens there"):
            gmprpc.Server(f"unix:{path}").start()
        with Peer.connect(server.address) as peer:
            assert peer.call("echo", 1)[3] == 1
        # A file that isn't ours any more stays.
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_a_port_in_use_is_an_os_error_and_leaves_the_server_as_it_was(server: gmprpc.Server) -> None:
    other = gmprpc.Server(server.address)
    with pytest.raises(OSError):
        other.start()
    assert not other.started
    other.stop()


def test_a_server_may_be_started_again(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serve_once(server)
    serve_once(server)


def test_a_plain_stream_server_can_run_a_service(service: gmprpc.Service) -> None:
    server = StreamServer(("127.0.0.1", 0), service)
    server.start()
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "hold", ["late"]], [0, 2, "release", []])
        peer.shutdown()
        assert sorted(peer.receive_rest()) == [[1, 1, None, "late"], [1, 2, None, None]]
    server.stop()


def test_a_plain_stream_server_can_accept_for_a_server(service: gmprpc.Service) -> None:
    hooks: list[str] = []
    server = gmprpc.Server(
        None, service, on_accept=lambda *_: hooks.append("accept"), on_eof=lambda *_: hooks.append("eof")
    )
    acceptor = StreamServer(("127.0.0.1", 0), server)
    acceptor.start()
    with Peer.connect(acceptor.address) as peer, Peer.connect(acceptor.address) as waiting:
        peer.send([0, 1, "hold", ["late"]], [0, 2, "release", []])
        peer.shutdown()
        assert sorted(peer.receive_rest()) == [[1, 1, None, "late"], [1, 2, None, None]]
        assert waiting.call("echo", 1) == [1, 0, None, 1]
        assert len(server.connections) == 1
        server.stop()
        assert waiting.receive_rest() == []
    assert hooks == ["accept", "accept", "eof", "eof"]
    acceptor.stop()


def test_two_servers_may_share_a_listener(service: gmprpc.Service) -> None:
    with listening(("127.0.0.1", 0)) as listener:
        one, two = (gmprpc.Server(listener.dup(), service) for _ in range(2))
        one.max_accept = two.max_accept = 1
        with one, two:
            peers = [Peer.connect(one.address) for _ in range(10)]
            assert [peer.call("echo", 1) for peer in peers] == [[1, 0, None, 1]] * len(peers)
            assert one.statistics()["connections"] + two.statistics()["connections"] == len(peers)
            one.stop()  # The listener stays open.
            with Peer.connect(two.address) as peer:
                assert peer.call("echo", 2) == [1, 0, None, 2]
            for peer in peers:
                peer.close()


def test_who_runs_the_server_of_another_may_say_where_and_how(service: gmprpc.Service) -> None:
    server = gmprpc.Server("unix:/not/there", service)
    server.listener = [("127.0.0.1", 0)]
    server.max_connections = 1
    with server, Peer.connect(server.address) as peer, Peer.connect(server.address) as refused:
        assert peer.call("echo", 1) == [1, 0, None, 1]
        assert refused.receive_rest() == []


@pytest.mark.parametrize("kind", ["service", "server"])
def test_what_is_called_as_wsgi_says_what_to_do(service: gmprpc.Service, kind: str) -> None:
    application: Any = service if kind == "service" else gmprpc.Server(None, service)
    with pytest.raises(TypeError, match=r"gmprpc\.gunicorn\.Worker"):
        application({"REQUEST_METHOD": "GET"}, lambda *args: None)


def test_methods_may_be_registered_and_forgotten_while_connections_live(server: gmprpc.Server, peer: Peer) -> None:
    assert peer.call("new")[2] is not None
    server.register(lambda: "first", "new")
    assert peer.call("new") == [1, 0, None, "first"]
    server.method(name="new")(lambda: "second")
    assert peer.call("new") == [1, 0, None, "second"]
    server.unregister("new")
    assert peer.call("new")[2] == 'No such method "new" found'


@pytest.mark.parametrize(
    "options",
    [
        {"max_message_size": 0},
        {"max_message_size": "1"},
        {"max_concurrency": 0},
        {"max_connections": 0},
        {"max_unsent_size": 0},
        {"stop_timeout": -1},
        {"handshake_timeout": -1},
        {"read_timeout": -1},
        {"write_timeout": "1"},
        {"idle_timeout": float("nan")},
        {"unpacker_options": {"max_buffer_size": 1}},
        {"unpacker_options": {"list_hook": tuple}},
        {"packer_options": {"autoreset": False}},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        gmprpc.Server(("127.0.0.1", 0), **options)


def test_packer_and_unpacker_options_reach_msgpack(service: gmprpc.Service) -> None:
    options: dict[str, Any] = {"packer_options": {"use_bin_type": False}, "unpacker_options": {"raw": True}}
    with gmprpc.Server(("127.0.0.1", 0), service, **options) as server, Peer.connect(server.address) as peer:
        # Not UTF-8: what peers send that are older than MessagePack's str and bin.
        peer.send_bytes(b"\x94\x00\x01\xa4echo\x91\xa2\xff\xfe")
        assert peer.socket.recv(100) == b"\x94\x01\x01\xc0\xa2\xff\xfe"


# Hooks.


def test_on_accept_sees_the_socket_and_may_refuse_it(service: gmprpc.Service) -> None:
    seen: list[Any] = []

    def on_accept(sock: socket.socket, address: Any) -> bool:
        seen.append((sock.getpeername(), address))
        return len(seen) > 1

    with gmprpc.Server(("127.0.0.1", 0), service, on_accept=on_accept) as server:
        with Peer.connect(server.address) as refused:
            assert refused.receive_rest() == []
            assert seen == [(refused.socket.getsockname(),) * 2]
        with Peer.connect(server.address) as taken:
            assert taken.call("echo", 1) == [1, 0, None, 1]
        assert server.statistics()["connections"] == 1


def test_bytes_are_counted_where_that_is_asked_for(service: gmprpc.Service) -> None:
    request, answer = msgpack.packb([0, 0, "echo", ["hello"]]), msgpack.packb([1, 0, None, "hello"])
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        serve_once_more(server, "echo", 1)
        server.counts_bytes = True
        with Peer.connect(server.address) as peer:
            peer.call("echo", "hello")
            statistics = server.statistics()
            assert (statistics["received_bytes"], statistics["sent_bytes"]) == (len(request), len(answer))
            peer.send([0, 0, "hold", ["hello"]])
            wait_until(lambda: server.statistics()["in_flight"] == 1)
            peer.shutdown()
            serve_once_more(server, "release")
            assert peer.receive() == [1, 0, None, "hello"]
        wait_until(lambda: not server.connections)
        assert server.statistics()["sent_bytes"] == 2 * len(answer) + len(msgpack.packb([1, 0, None, None]))


def test_statistics_tell_what_waits_to_be_answered_and_to_be_sent(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    @service.method
    def ask() -> None:
        gmprpc.current_call().connection.call_async("what?")

    @service.method
    def large() -> str:
        return "x" * 10_000_000

    peer.send([0, 1, "ask", []])
    assert sorted((peer.receive(), peer.receive())) == [[0, 0, "what?", []], [1, 1, None, None]]
    before = server.statistics()
    assert (before["pending"], before["unsent_size"]) == (1, 0)
    peer.send([0, 2, "large", []])
    wait_until(lambda: server.statistics()["unsent_size"])
    peer.receive()
    peer.send([1, 0, None, "this"])
    wait_until(lambda: server.statistics()["pending"] == 0)
    assert server.statistics()["unsent_size"] == 0
    assert (before["pending"], before["unsent_size"]) == (1, 0)
    with pytest.raises(TypeError):
        before["pending"] = 0


def serve_once_more(server: gmprpc.Server, method: str = "echo", *params: Any) -> None:
    with Peer.connect(server.address) as peer:
        peer.call(method, *params)


def test_an_on_accept_that_fails_refuses_and_is_logged(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_accept=lambda *_: 1 / 0) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.receive_rest() == []
    assert "ZeroDivisionError" in caplog.text


def test_on_dispatch_sees_every_request_and_notification_and_may_answer_an_error(service: gmprpc.Service) -> None:
    seen: list[Any] = []

    def on_dispatch(connection: gmprpc.Connection, message: Any) -> None:
        seen.append(list(message))
        assert connection in server.connections
        if message[2] == "forbidden":
            raise gmprpc.ErrorResponse("not you")

    service.register(lambda: "secret", "forbidden")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("echo", 1, msgid=1) == [1, 1, None, 1]
        assert peer.call("nosuch", 2, msgid=2) == [1, 2, 'No such method "nosuch" found', None]
        peer.send([2, "echo", [3]])
        assert peer.call("forbidden", msgid=4) == [1, 4, "not you", None]
        assert peer.call("add", 1, msgid=5)[2].startswith("wrong params for add(a, b)")
        service.register(lambda: "new", "new")
        assert peer.call("new", msgid=6) == [1, 6, None, "new"]
    assert seen == [
        [0, 1, "echo", [1]],
        [0, 2, "nosuch", [2]],
        [2, None, "echo", [3]],
        [0, 4, "forbidden", []],
        [0, 5, "add", [1]],
        [0, 6, "new", []],
    ]


@pytest.mark.parametrize("data, expected", [(b"", "eof"), (b"\xc1", "ProtocolError"), (b"\x94", "ConnectionClosed")])
def test_each_connection_ends_with_just_one_of_on_eof_and_on_error(
    service: gmprpc.Service, data: bytes, expected: str
) -> None:
    ends: list[str] = []
    with gmprpc.Server(
        ("127.0.0.1", 0),
        service,
        on_eof=lambda connection: ends.append("eof"),
        on_error=lambda connection, exc: ends.append(type(exc).__name__),
    ) as server:
        with Peer.connect(server.address) as peer:
            peer.call("echo", 1)
            peer.send_bytes(data)
            peer.shutdown()
            assert peer.receive_rest() == []
        wait_until(lambda: ends and not server.connections)
    assert ends == [expected]


def test_a_hook_that_fails_is_logged_and_hurts_nobody(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, on_eof=lambda connection: 1 / 0) as server:
        Peer.connect(server.address).close()
        wait_until(lambda: "ZeroDivisionError" in caplog.text)
        with Peer.connect(server.address) as peer:
            assert peer.call("echo", 1)[3] == 1


# The seed.


def test_the_ancestors_shortcut_takes_an_address_and_a_port_or_a_path(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for server in (
        gmprpc.mprpc_server("127.0.0.1", 0),
        gmprpc.mprpc_server(None, 0),
        gmprpc.mprpc_server("unix/", str(path), hide_errors=True),
    ):
        server.reg_cb(
            echo=lambda reply, value: reply.result(value), sum=lambda reply, *values: reply.result(sum(values))
        )
        server.reg_cb(more=lambda reply: reply.result())
        with server:
            address = server.address
            if isinstance(address, str):
                client = gmprpc.mprpc_client("unix/", str(path))
            else:
                client = gmprpc.mprpc_client("127.0.0.1", address[1])
            with client:
                assert client.call("echo", "hello") == "hello"
                assert client.call("sum", 1, 2, 3) == 6
                assert client.call("more") is None


def test_a_callback_answers_no_one_or_several_values_or_an_error(service: gmprpc.Service, peer: Peer) -> None:
    service.reg_cb(
        none=lambda reply: reply.result(),
        one=lambda reply, value: reply.result(value),
        several=lambda reply, *values: reply.result(*values),
        refuse=lambda reply, error: reply.error(error),
    )
    assert peer.call("none") == [1, 0, None, None]
    assert peer.call("one", [1]) == [1, 0, None, [1]]
    assert peer.call("several", 1, 2) == [1, 0, None, [1, 2]]
    assert peer.call("refuse", {"code": 1}) == [1, 0, {"code": 1}, None]
    assert peer.call("one") == [1, 0, "wrong params for one(value): missing a required argument: 'value'", None]


def test_a_callback_may_answer_later_from_another_greenlet(service: gmprpc.Service, peer: Peer) -> None:
    go = Event()

    def later(reply: gmprpc.Reply, value: str) -> None:
        def answer() -> None:
            go.wait()
            reply.result(value)

        gevent.spawn(answer)

    service.reg_cb(later=later)
    peer.send([0, 1, "later", ["late"]])
    assert peer.call("echo", "first", msgid=2) == [1, 2, None, "first"]
    go.set()
    assert peer.receive() == [1, 1, None, "late"]


def test_a_callback_of_a_notification_has_no_reply(service: gmprpc.Service, peer: Peer) -> None:
    replies: list[Any] = []
    service.reg_cb(log=lambda reply, text: replies.append((reply, text)))
    peer.send([2, "log", ["hello"]])
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert replies == [(None, "hello")]


# A stream that is there already.


def test_a_stream_is_served_until_its_peer_is_done(service: gmprpc.Service, sockets: tuple[Any, Any]) -> None:
    ends: list[Any] = []
    server = gmprpc.Server(None, service, on_eof=lambda connection: ends.append(connection.peer))
    serving = gevent.spawn(server.serve_stream, PlainStream(sockets[0]), "somebody")
    peer = Peer(sockets[1])
    assert peer.call("echo", 1) == [1, 0, None, 1]
    peer.send([0, 1, "hold", [1]])
    peer.shutdown()
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    assert not serving.ready()
    service.methods["release"]()
    assert peer.receive_rest() == [[1, 1, None, 1]]
    assert serving.get() is None
    assert ends == ["somebody"]


def test_a_stream_is_served_until_the_server_is_stopped(service: gmprpc.Service, sockets: tuple[Any, Any]) -> None:
    server = gmprpc.Server(None, service)
    serving = gevent.spawn(server.serve_stream, PlainStream(sockets[0]))
    peer = Peer(sockets[1])
    peer.send([0, 1, "hold", [1]])
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    stopping = gevent.spawn(server.stop)
    gevent.sleep(0)
    service.methods["release"]()
    assert peer.receive_rest() == [[1, 1, None, 1]]
    peer.close()
    assert stopping.get() == 0
    assert serving.get() is None


def test_a_stream_that_breaks_says_why(service: gmprpc.Service, sockets: tuple[Any, Any]) -> None:
    errors: list[Any] = []
    server = gmprpc.Server(None, service, on_error=lambda connection, exc: errors.append(exc))
    serving = gevent.spawn(server.serve_stream, PlainStream(sockets[0]))
    with Peer(sockets[1]) as peer:
        peer.send_bytes(b"\xc1")
    assert isinstance(serving.get(), gmprpc.ProtocolError)
    assert errors == [serving.get()]


# Peers that vanish.


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a system without this option")
def test_what_either_side_sends_has_to_be_acknowledged_within_its_write_timeout(service: gmprpc.Service) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, write_timeout=7) as server,
        gmprpc.Client(server.address, write_timeout=8) as client,
    ):
        assert client.call("echo", 1) == 1
        timeouts = []
        for connection in (*server.connections, client.connection):
            assert connection is not None
            with socket.socket(fileno=os.dup(connection._stream.fileno())) as same:
                timeouts.append(same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        assert timeouts == [7_000, 8_000]
