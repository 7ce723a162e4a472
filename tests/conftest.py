"""Fixtures that any test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

import gmprpc

from .helpers import Peer, Scripted, listening


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """A test that waits for what never happens fails, instead of waiting for ever."""
    with gevent.Timeout(30):
        yield


@pytest.fixture
def service() -> Iterator[gmprpc.Service]:
    """``echo``, ``add``, ``fail``, and ``hold``, which answers with its param when ``release`` is called."""
    service = gmprpc.Service()
    released = Event()

    @service.method
    def echo(value: Any) -> Any:
        return value

    @service.method
    def add(a: Any, b: Any) -> Any:
        return a + b

    @service.method
    def fail(message: str) -> None:
        raise ValueError(message)

    @service.method
    def hold(value: Any) -> Any:
        released.wait()
        return value

    @service.method
    def release() -> None:
        released.set()

    yield service
    # No garbage collector finds a greenlet that waits: those that a test has cut off would be there for ever.
    released.set()
    gevent.idle()


@pytest.fixture
def server(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    """A server of ``service`` on a port of its own."""
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        yield server


@pytest.fixture
def peer(server: gmprpc.Server) -> Iterator[Peer]:
    """A connection to ``server`` that says and hears what the test wants, byte by byte."""
    with Peer.connect(server.address) as peer:
        yield peer


@pytest.fixture
def bystander(server: gmprpc.Server) -> Iterator[Peer]:
    """Another connection, with a call in flight all along; at the end it must still be answered."""
    with Peer.connect(server.address) as bystander:
        bystander.send([0, 77, "hold", ["still here"]])
        yield bystander
        bystander.send([0, 78, "release", []])
        answers = sorted([bystander.receive(), bystander.receive()])
        assert answers == [[1, 77, None, "still here"], [1, 78, None, None]]


@pytest.fixture
def client(server: gmprpc.Server) -> Iterator[gmprpc.Client]:
    """A client of ``server``, connected."""
    with gmprpc.Client(server.address) as client:
        yield client


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A server whose every byte the test decides on."""
    scripted = Scripted()
    yield scripted
    scripted.close()


@pytest.fixture
def sockets() -> Iterator[tuple[Any, Any]]:
    """Two unix sockets that are connected with each other; gevent's."""
    ours, peers = socket.socketpair()
    with ours, peers:
        yield ours, peers


@pytest.fixture
def tcp_sockets() -> Iterator[tuple[Any, Any]]:
    """Two TCP sockets that are connected with each other."""
    with listening(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        peers, _ = listener.accept()
    with ours, peers:
        yield ours, peers


@pytest.fixture
def _each_call_ends_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pending call may be given an outcome when it has one."""
    ended_twice: list[Any] = []

    def watched(end: Callable[..., None]) -> Callable[..., None]:
        def watch(call: Any, *args: Any) -> None:
            if call.ready():
                ended_twice.append((call.method, args))
            end(call, *args)

        return watch

    for name in ("set", "set_exception"):
        monkeypatch.setattr(gmprpc.PendingCall, name, watched(getattr(gmprpc.PendingCall, name)))
    yield
    assert not ended_twice


@pytest.fixture(scope="session")
def require_peer() -> Callable[[str, Any], None]:
    """``require_peer(name, found)`` skips the test unless ``found``; with GMPRPC_REQUIRE_INTEROP set it fails."""

    def require_peer(name: str, found: Any) -> None:
        if not found and os.environ.get("GMPRPC_REQUIRE_INTEROP"):
            pytest.fail(f"{name} isn't installed, and GMPRPC_REQUIRE_INTEROP is set")
        elif not found:
            pytest.skip(f"{name} isn't installed")

    return require_peer
