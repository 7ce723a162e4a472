"""What an operator asks over HTTP, and what is answered to who speaks it badly."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from gmprpc import admin
from gmprpc.admin import AdminServer, Response

from .helpers import is_listening, wait_until
from .http import answer_on, ask, connect, get
from .programs import FORKING_PYTHON, Program


class Readiness:
    """Is what the test says."""

    def __init__(self) -> None:
        self.is_ready = True

    def __call__(self) -> bool:
        return self.is_ready


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def server(readiness: Readiness) -> Iterator[AdminServer]:
    """A server with the pages ``/page`` and ``/broken``."""

    def page(environ: Mapping[str, Any]) -> Response:
        return Response("200 OK", environ["QUERY_STRING"].encode(), [("X-Own", "1")])

    def broken(_: Mapping[str, Any]) -> Response:
        raise LookupError("nothing there")

    pages = {"/page": page, "/broken": broken}
    with AdminServer(("127.0.0.1", 0), is_ready=readiness, pages=pages) as server:
        yield server


def test_a_process_is_alive_and_ready(server: AdminServer) -> None:
    assert get(server.address, "/livez").status == 200
    answer = get(server.address, "/readyz")
    assert (answer.status, answer.body) == (200, b"ready\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_a_process_that_is_not_ready_is_alive(server: AdminServer, readiness: Readiness) -> None:
    readiness.is_ready = False
    answer = get(server.address, "/readyz")
    assert (answer.status, answer.body) == (503, b"not ready\n")
    assert get(server.address, "/livez").status == 200
    readiness.is_ready = True
    assert get(server.address, "/readyz").status == 200


def test_a_page_is_given_the_query_and_gives_headers(server: AdminServer) -> None:
    answer = get(server.address, "/page?a=1")
    assert (answer.status, answer.body, answer.headers["x-own"]) == (200, b"a=1", "1")
    assert answer.headers["content-length"] == "3"


def test_a_head_request_gets_the_headers_only(server: AdminServer) -> None:
    answer = get(server.address, "/page?abc", "HEAD")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "3")


def test_an_unknown_path_is_not_found_and_says_what_is_there(server: AdminServer) -> None:
    answer = get(server.address, "/")
    assert (answer.status, answer.body) == (404, b"there are: /broken /livez /page /readyz\n")


def test_other_methods_are_not_allowed(server: AdminServer) -> None:
    answer = get(server.address, "/livez", "DELETE")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_page_that_fails_is_an_error_and_the_log_has_the_reason(
    server: AdminServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = get(server.address, "/broken")
    assert (answer.status, answer.body) == (500, b"it failed; the log has the reason\n")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("gmprpc.admin", "/broken failed")]
    assert "nothing there" in caplog.text
    assert capfd.readouterr().err == ""


def test_a_connection_is_closed_after_an_answer_also_when_the_client_would_keep_it(server: AdminServer) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: test\r\nConnection: keep-alive\r\n\r\n"
    assert ask(server.address, 2 * request).headers["connection"] == "close"


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"\x94\x00\x01\xa8$/health\x90\n", id="MessagePack-RPC"),
        pytest.param(b"GET /livez SPDY/3\r\n\r\n", id="another protocol"),
        pytest.param(b"GET /livez HTTP/1.1\r\nContent-Length: many\r\n\r\n", id="no length"),
        pytest.param(b"GET /livez HTTP/1.1\r\n" + 101 * b"a: b\r\n" + b"\r\n", id="too many headers"),
        pytest.param(b"GET " + 9000 * b"/" + b" HTTP/1.1\r\n\r\n", id="too long a line"),
    ],
)
def test_what_is_no_request_is_answered_without_noise(
    server: AdminServer, request_: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server.address) as sock:
        sock.sendall(request_)
        data = sock.recv(100)
    assert data[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 414 ")
    assert get(server.address, "/livez").status == 200
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_who_resets_the_connection_makes_no_noise(server: AdminServer, capfd: pytest.CaptureFixture[str]) -> None:
    for request in (b"", b"GET /li", b"GET /livez HTTP/1.1\r\nHo", b"GET /livez HTTP/1.1\r\n\r\n"):
        sock = connect(server.address)
        sock.sendall(request)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    wait_until(lambda: not server._greenlets)
    assert get(server.address, "/livez").status == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /livez HT", id="a part of a request"),
        pytest.param(b"GET /livez HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc", id="a part of a body"),
    ],
)
def test_a_client_that_takes_its_time_is_cut_off(
    server: AdminServer, request_: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "_TIME_LIMIT", 0.05)
    with connect(server.address) as sock:
        sock.sendall(request_)
        while sock.recv(1000):  # What can be answered without the body is.
            pass
    wait_until(lambda: not server._greenlets)
    assert capfd.readouterr().err == ""


def test_a_client_that_does_not_read_is_cut_off(
    readiness: Readiness, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "_TIME_LIMIT", 0.05)
    large = Response("200 OK", bytes(50_000_000))
    server = AdminServer(("127.0.0.1", 0), is_ready=readiness, pages={"/large": lambda _: large})
    with server, connect(server.address) as sock:
        sock.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        wait_until(lambda: server._greenlets)
        wait_until(lambda: not server._greenlets)
    assert capfd.readouterr().err == ""


def test_no_more_than_so_many_are_served_at_a_time(readiness: Readiness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_MAX_CONNECTIONS", 2)
    server = AdminServer(("127.0.0.1", 0), is_ready=readiness)
    with server, connect(server.address) as first, connect(server.address):
        wait_until(lambda: len(server._greenlets) == 2)
        with connect(server.address) as third:
            assert third.recv(1) == b""
        first.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert answer_on(first).status == 200
        wait_until(lambda: len(server._greenlets) == 1)
        assert get(server.address, "/livez").status == 200


def test_a_server_that_has_stopped_listens_no_more_and_may_start_again(readiness: Readiness) -> None:
    server = AdminServer(("127.0.0.1", 0), is_ready=readiness)
    assert server.address == ("127.0.0.1", 0)
    server.start()
    server.start()
    address = server.address
    assert is_listening(address)
    server.stop()
    server.stop()
    assert not is_listening(address)
    with server:
        assert get(server.address, "/livez").status == 200


def test_stop_waits_a_moment_for_what_has_been_asked(readiness: Readiness) -> None:
    going_on = Event()

    def page(_: Mapping[str, Any]) -> Response:
        going_on.wait()
        return Response("200 OK", b"done")

    server = AdminServer(("127.0.0.1", 0), is_ready=readiness, pages={"/page": page})
    server.start()
    asking = gevent.spawn(get, server.address, "/page")
    wait_until(lambda: server._greenlets)
    gevent.spawn_later(0.01, going_on.set)
    server.stop()
    assert asking.get().body == b"done"


def test_stop_does_not_wait_for_ever(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "_STOP_TIMEOUT", 0.01)
    with connect(server.address) as sock:
        wait_until(lambda: server._greenlets)
        server.stop()
        assert sock.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_unix_socket_is_served_and_its_file_removed(tmp_path: Path, readiness: Readiness) -> None:
    path = tmp_path / "admin.sock"
    with AdminServer(f"unix:{path}", is_ready=readiness) as server:
        assert server.address == f"unix:{path}"
        assert get(server.address, "/readyz").status == 200
    assert not path.exists()


def test_the_file_of_another_that_came_after_stays(tmp_path: Path, readiness: Readiness) -> None:
    path = tmp_path / "admin.sock"
    with AdminServer(f"unix:{path}", is_ready=readiness):
        path.unlink()
        path.touch()
    assert path.exists()


def test_a_socket_that_listens_already_is_served(readiness: Readiness) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with AdminServer(listener, is_ready=readiness) as server:
            assert get(server.address, "/livez").status == 200


def test_an_address_in_use_is_an_error(server: AdminServer, readiness: Readiness) -> None:
    with pytest.raises(OSError, match="in use"):
        AdminServer(server.address, is_ready=readiness).start()


FORK = """
    import os
    import sys

    import gevent
    from gevent import socket

    from gmprpc.admin import AdminServer

    server = AdminServer(("127.0.0.1", 0), is_ready=lambda: True)
    server.start()
    address = server.address
    if (pid := os.fork()) == 0:
        assert server.address == ("127.0.0.1", 0), server.address
        sys.stdin.read()
        os._exit(0)
    server.stop()
    try:
        socket.create_connection(address)
    except ConnectionRefusedError:
        print("refused")
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""


def test_a_process_that_is_forked_off_does_not_listen(tmp_path: Path) -> None:
    file = tmp_path / "fork.py"
    file.write_text(textwrap.dedent(FORK))
    with Program(*FORKING_PYTHON, file) as program:
        assert program.lines() == ["refused"]
        assert program.wait() == 0
