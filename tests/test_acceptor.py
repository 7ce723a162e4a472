"""Accepting has a limit, and goes on when the system has run out of something."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

import gmprpc
from gmprpc import acceptor

from .helpers import Peer, wait_until


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The process may open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def unconnected() -> Peer:
    return Peer(socket.socket())


# max_connections.


@pytest.mark.parametrize("limit", [1, 3])
def test_beyond_max_connections_a_new_one_is_closed_and_taken_again_when_there_is_room(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, max_connections=limit) as server, ExitStack() as stack:
        peers = [stack.enter_context(Peer.connect(server.address)) for _ in range(limit)]
        for peer in peers:
            assert peer.call("echo", 1) == [1, 0, None, 1]
        for _ in range(3):
            with Peer.connect(server.address) as refused:
                assert refused.receive_rest() == []
        for peer in peers:
            assert peer.call("echo", 2) == [1, 0, None, 2]
        peers[0].close()
        wait_until(lambda: len(server.connections) < limit)
        with Peer.connect(server.address) as peer:
            assert peer.call("echo", 3) == [1, 0, None, 3]
        assert server.statistics()["refused_connections"] == 3
    # Once in a while is enough: who floods a server with connections must not fill its disk.
    (record,) = caplog.records
    assert f"refused: there are max_connections ({limit})" in record.getMessage()
    assert record.levelname == "WARNING"


def test_who_on_accept_refuses_takes_no_place(
    service: gmprpc.Service,
) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, max_connections=1, on_accept=lambda *_: False) as server:
        for _ in range(3):
            with Peer.connect(server.address) as peer:
                assert peer.receive_rest() == []
            wait_until(lambda: not server._greenlets)
        assert server.statistics()["refused_connections"] == 0


def test_there_may_be_no_limit(service: gmprpc.Service) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, max_connections=None) as server, Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]


# Out of descriptors.


def test_without_descriptors_accepting_pauses_and_resumes_by_itself(
    server: gmprpc.Server, bystander: Peer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with unconnected() as first, unconnected() as second:
        with no_descriptors():
            first.socket.connect(server.address)
            second.socket.connect(server.address)
            first.send([0, 1, "echo", ["waited"]])
            wait_until(lambda: caplog.records)
            assert server._acceptors[0]._pause is not None, "it tries all the time"
        assert first.receive() == [1, 1, None, "waited"]
        assert second.call("echo", 2) == [1, 0, None, 2]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"can't accept connections at 127.0.0.1:{server.server_port}: Too many open")
    assert capfd.readouterr().err == ""


def test_a_connection_that_ends_makes_room_at_once(
    server: gmprpc.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "_PAUSE", 1000.0)
    with unconnected() as peer, unconnected() as waiting:
        peer.socket.connect(server.address)
        assert peer.call("echo", 1) == [1, 0, None, 1]
        with no_descriptors():
            waiting.socket.connect(server.address)
            wait_until(lambda: caplog.records)
            peer.shutdown()  # Closing it would make room by itself, in this process.
            assert waiting.call("echo", 2) == [1, 0, None, 2]
        assert len(caplog.records) == 1


def test_a_server_may_be_stopped_while_it_pauses(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    server.start()
    with unconnected() as peer:
        with no_descriptors():
            peer.socket.connect(server.address)
            wait_until(lambda: caplog.records)
        server.stop()
        assert not server._acceptors
        with pytest.raises((ConnectionError, EOFError)):
            peer.receive()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_whatever_the_system_runs_out_of_is_waited_for(
    server: gmprpc.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(acceptor, "_PAUSE", 0.0)
    fail_first(monkeypatch, OSError(number, os.strerror(number)), times=3)
    with Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
    (record,) = caplog.records
    assert os.strerror(number) in record.getMessage()


def test_a_connection_that_is_gone_before_its_turn_is_no_matter(
    server: gmprpc.Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fail_first(monkeypatch, ConnectionAbortedError(errno.ECONNABORTED, "gone"), times=2)
    with Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_any_other_error_is_gevents_to_deal_with(
    server: gmprpc.Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_first(monkeypatch, OSError(errno.EPERM, "no such luck"), times=1)
    with Peer.connect(server.address) as peer:
        assert peer.call("echo", 1) == [1, 0, None, 1]
    assert "no such luck" in capfd.readouterr().err


def fail_first(monkeypatch: pytest.MonkeyPatch, exc: OSError, times: int) -> None:
    """Let the next attempts to accept fail with ``exc``."""
    failures = [exc] * times
    accept = StreamServer.do_read

    def do_read(self: StreamServer) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(StreamServer, "do_read", do_read)


def test_the_stack_that_accepted_is_not_kept(server: gmprpc.Server, peer: Peer) -> None:
    peer.call("echo", 1)
    greenlet: Any
    (greenlet,) = server._greenlets
    assert not greenlet.spawning_stack
    assert gevent.spawn(int).spawning_stack, "others keep it"
