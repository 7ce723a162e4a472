"""What a client says on each connection before all else, such as who it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from gevent.event import Event

import gmprpc

from .helpers import Scripted, wait_until


def authenticate(connection: gmprpc.Connection, message: Any) -> bool:
    return message[2] == "login" and list(message[3]) == ["right"]


@pytest.fixture
def logins() -> list[Any]:
    """How often somebody has logged in."""
    return []


@pytest.fixture
def server(service: gmprpc.Service, logins: list[Any]) -> Iterator[gmprpc.Server]:
    """A server that wants to know who calls."""
    service.register(lambda token: logins.append(token), "login")
    with gmprpc.Server(("127.0.0.1", 0), service, authenticate=authenticate) as server:
        yield server


def log_in(client: gmprpc.Client, connection: gmprpc.Connection) -> None:
    connection.call("login", "right")


@contextmanager
def client_of(address: Any, **options: Any) -> Iterator[gmprpc.Client]:
    client = gmprpc.Client(address, **{"on_connect": log_in, "timeout": 10, **options})
    yield client
    client.close()


@pytest.mark.parametrize("draining", [False, True])
def test_it_comes_before_any_call_on_each_connection(server: gmprpc.Server, logins: list[Any], draining: bool) -> None:
    with client_of(server.address, draining=draining) as client:
        pending = [client.call_async("echo", number) for number in range(20)]
        client.notify("echo", 1)
        assert [call.get() for call in pending] == list(range(20))
        assert logins == ["right"]
        for connection in server.connections:
            connection.abort()
        wait_until(lambda: not client.is_connected)
        assert client.call("echo", 1) == 1
        assert logins == ["right", "right"]


def test_a_balancer_says_it_to_each_endpoint(server: gmprpc.Server, logins: list[Any]) -> None:
    balancer = gmprpc.Balancer([server.address], timeout=10, on_connect=log_in)
    assert balancer.call("echo", 1) == 1
    assert logins == ["right"]
    balancer.close()


def test_what_it_raises_is_everybodys(server: gmprpc.Server) -> None:
    def log_in_wrongly(client: gmprpc.Client, connection: gmprpc.Connection) -> None:
        connection.call("login", "wrong")

    with client_of(server.address, on_connect=log_in_wrongly) as client:
        pending = [client.call_async("echo", number) for number in range(3)]
        for call in pending:
            with pytest.raises(gmprpc.RemoteError, match="not authenticated"):
                call.get()
        with pytest.raises(gmprpc.RemoteError, match="not authenticated"):
            client.connect()
        assert not client.is_connected
    wait_until(lambda: not server._greenlets)


def test_it_has_no_more_time_than_the_attempt_to_connect(scripted: Scripted) -> None:
    options: dict[str, Any] = {"connect_timeout": 0.05, "retry_interval": None}
    with client_of(scripted.address, **options) as client:
        with pytest.raises(gmprpc.ConnectFailed, match=r"on_connect didn't come to its end within 0\.05 s"):
            client.call("echo", 1)
        peer = scripted.accept()
        assert peer.receive_rest() == [[0, 0, "login", ["right"]]]


def test_a_connection_that_is_lost_meanwhile_is_made_again(scripted: Scripted) -> None:
    errors: list[Exception] = []
    with client_of(scripted.address, on_error=lambda _, exc: errors.append(exc)) as client:
        call = client.call_async("echo", 1)
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "login", ["right"]]
        peer.close()
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "login", ["right"]]
        peer.send([1, 0, None, None])
        assert peer.receive()[2:] == ["echo", [1]]
        peer.send([1, 1, None, 1])
        assert call.get() == 1
        wait_until(lambda: errors)
        (error,) = errors  # Told once.
        assert isinstance(error, gmprpc.ConnectFailed)


def test_a_connection_that_ends_while_it_says_nothing_is_not_used(scripted: Scripted) -> None:
    is_over = Event()

    def wait(client: gmprpc.Client, connection: gmprpc.Connection) -> None:
        if not is_over.is_set():
            connection.wait()
            is_over.set()

    with client_of(scripted.address, on_connect=wait) as client:
        call = client.call_async("echo", 1)
        scripted.accept().close()
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "echo", [1]]
        peer.send([1, 0, None, 1])
        assert call.get() == 1


def test_a_client_may_be_closed_meanwhile(scripted: Scripted) -> None:
    with client_of(scripted.address) as client:
        call = client.call_async("echo", 1)
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "login", ["right"]]
        client.close()
        with pytest.raises(gmprpc.ConnectionClosed):
            call.get()
        assert peer.receive_rest() == []
        wait_until(lambda: not client._links.get()._lives)


def test_a_hook_that_is_killed_leaves_nothing_behind(scripted: Scripted) -> None:
    greenlets: list[Any] = []

    def wait(client: gmprpc.Client, connection: gmprpc.Connection) -> None:
        greenlets.append(gevent.getcurrent())
        gevent.sleep(100)

    with client_of(scripted.address, on_connect=wait) as client:
        call = client.call_async("echo", 1)
        peer = scripted.accept()
        wait_until(lambda: greenlets)
        gevent.kill(greenlets[0])
        with pytest.raises(gmprpc.ConnectFailed):
            call.get()
        assert peer.receive_rest() == []
