"""HAProxy before gmprpc's servers, with the configuration that examples/haproxy.cfg shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import gevent
import pytest

import gmprpc
from tests.helpers import Peer, wait_until

from .haproxy import HAProxy, configuration

Address = tuple[str, int]


@pytest.fixture
def servers(service: gmprpc.Service) -> Iterator[dict[str, gmprpc.Server]]:
    """Two servers, in this process."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(gmprpc.Server(("127.0.0.1", 0), service, proxy_protocol="v2")) for name in "ab"
        }


@pytest.fixture
def address(reserve: Callable[[], Address]) -> Address:
    """Where HAProxy listens."""
    return reserve()


@pytest.fixture
def haproxy(start_haproxy: Callable[[str], HAProxy], servers: Mapping[str, gmprpc.Server], address: Address) -> HAProxy:
    """HAProxy before those, which it sees up."""
    haproxy = start_haproxy(configuration(address, {name: server.address for name, server in servers.items()}))
    haproxy.wait_for(a="UP", b="UP")
    return haproxy


def test_connections_go_to_the_server_that_has_the_fewest(
    haproxy: HAProxy, servers: Mapping[str, gmprpc.Server], address: Address
) -> None:
    with ExitStack() as clients:
        for number in range(6):
            client = clients.enter_context(gmprpc.Client(address))
            assert client.call("echo", number) == number
        # A check may be connected at the moment, too.
        wait_until(lambda: [len(server.connections) for server in servers.values()] == [3, 3])


def test_the_health_check_is_passed_by_a_server_that_serves_and_by_no_other(
    haproxy: HAProxy, servers: Mapping[str, gmprpc.Server], address: Address
) -> None:
    with gmprpc.Client(address) as early:
        assert early.call("echo", 1) == 1
        servers["a"].is_healthy = False
        haproxy.wait_for(a="DOWN")
        assert haproxy.statuses()["b"] == "UP"
        for _ in range(2):
            with gmprpc.Client(address) as client:
                assert client.call("echo", 2) == 2
        assert early.call("echo", 3) == 3
        servers["a"].is_healthy = True
        haproxy.wait_for(a="UP")


def test_a_server_that_is_about_to_stop_gets_no_new_connection_and_serves_those_that_it_has(
    haproxy: HAProxy, servers: Mapping[str, gmprpc.Server], address: Address
) -> None:
    with gmprpc.Client(address) as one, gmprpc.Client(address) as other:
        wait_until(lambda: [len(server.connections) for server in servers.values()] == [1, 1])
        stopping = gevent.spawn(servers["a"].stop, drain_delay=60)
        haproxy.wait_for(a="DOWN", b="UP")
        for number in range(3):
            with gmprpc.Client(address) as client:
                assert client.call("echo", number) == number
                assert one.call("echo", number) == other.call("echo", number) == number
        assert not stopping.ready()
        servers["a"].stop(drain_delay=0)  # Now.


def test_a_server_knows_who_its_clients_are(haproxy: HAProxy, service: gmprpc.Service, address: Address) -> None:
    @service.method
    def peer() -> list[Any]:
        peer = gmprpc.current_call().peer
        return [peer, peer.proxy.host]

    with Peer.connect(address) as client:
        assert client.call("peer")[3] == [list(client.socket.getsockname()), "127.0.0.1"]


def test_a_health_check_leaves_no_line_in_the_log(
    haproxy: HAProxy, servers: Mapping[str, gmprpc.Server], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="gmprpc"):
        asked = servers["a"].statistics()["connections"]
        wait_until(lambda: servers["a"].statistics()["connections"] >= asked + 2 and not servers["a"].connections)
    assert caplog.records == []


def test_no_call_fails_while_haproxy_is_reloaded_and_its_old_process_goes_when_the_connections_have_moved(
    start_haproxy: Callable[[str], HAProxy], address: Address
) -> None:
    executions: Counter[int] = Counter()
    numbers = count()
    is_over = False

    def do(number: int) -> None:
        gevent.sleep(0.01)
        executions[number] += 1

    def call_on_and_on(client: gmprpc.Client) -> None:
        while not is_over:
            client.call("do", next(numbers))

    with ExitStack() as stack:
        servers = {name: gmprpc.Server(("127.0.0.1", 0), proxy_protocol="v2", max_connection_age=1) for name in "ab"}
        for server in servers.values():
            server.register(do)
            stack.enter_context(server)
        haproxy = start_haproxy(configuration(address, {name: server.address for name, server in servers.items()}))
        old = haproxy.workers()
        clients = [stack.enter_context(gmprpc.Client(address, draining=True)) for _ in range(5)]
        callers = [gevent.spawn(call_on_and_on, client) for client in clients]
        for _ in range(2):
            haproxy.reload()
            wait_until(lambda: haproxy.workers() - old and not haproxy.workers() & old)  # noqa: B023
            old = haproxy.workers()
        is_over = True
        gevent.joinall(callers, raise_error=True)
    assert len(executions) == next(numbers) > 0
    assert set(executions.values()) == {1}
