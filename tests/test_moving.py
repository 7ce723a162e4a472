"""How clients move from a server that lets them go to the next one, and lose no call."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest

import gmprpc
from gmprpc.link import Link

from .certificates import Certificates
from .counting import CountingServer, outcome
from .helpers import Peer, Scripted, wait_until
from .programs import FORKING_PYTHON, Program

DRAINING = [2, "$/draining", []]

pytestmark = pytest.mark.usefixtures("_each_call_ends_once")


def link_of(client: gmprpc.Client) -> Link:
    return client._links.get()


def answer(peer: Peer) -> Any:
    """Answer the next request with its method; returns the request."""
    request = peer.receive()
    peer.send([1, request[1], None, request[2]])
    return request


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def make_client(scripted: Scripted, errors: list[Exception]) -> Iterator[Callable[..., gmprpc.Client]]:
    """Makes clients of ``scripted`` that lose no time between attempts."""
    clients: list[gmprpc.Client] = []

    def make_client(**options: Any) -> gmprpc.Client:
        settings = {"retry_interval": 0.001, "max_retry_interval": 0.01} | options
        client = gmprpc.Client(scripted.address, on_error=lambda client, exc: errors.append(exc), **settings)
        clients.append(client)
        return client

    yield make_client
    scripted.close()  # Nobody has to wait for its last word.
    for client in clients:
        link = link_of(client)
        client.close()
        assert client.statistics()["pending"] == client.statistics()["open_connections"] == 0
        assert not link._lives
        assert not link._on_probation


@pytest.fixture
def client(make_client: Callable[..., gmprpc.Client]) -> gmprpc.Client:
    """A client that doesn't announce itself."""
    return make_client()


@pytest.fixture
def draining(make_client: Callable[..., gmprpc.Client]) -> gmprpc.Client:
    """A client that does."""
    return make_client(draining=True)


# Moving.


def test_who_is_told_calls_over_another_connection_and_hears_the_old_one_out(
    client: gmprpc.Client, scripted: Scripted, errors: list[Exception]
) -> None:
    first = client.call_async("first")
    old = scripted.accept()
    msgid = old.receive()[1]
    old_connection = client.connection
    old.send(DRAINING)
    new = scripted.accept()  # At once, though nobody calls.
    second = client.call_async("second")
    assert answer(new)[2] == "second"
    assert second.get() == "second"
    assert client.connection is not old_connection
    assert client.statistics()["pending"] == 1
    assert client.statistics()["open_connections"] == 2
    old.send([1, msgid, None, "late"])
    assert first.get() == "late"
    assert old.receive_rest() == []  # Nothing more was sent, and it is closed.
    old.close()
    wait_until(lambda: len(link_of(client)._lives) == 1)
    assert not errors


def test_nothing_leaves_on_the_old_connection_while_there_is_no_other(
    client: gmprpc.Client, scripted: Scripted
) -> None:
    client.call_async("first")
    old = scripted.accept()
    old.receive()
    connection = client.connection
    scripted.go()
    old.send(DRAINING)
    wait_until(lambda: not client.is_connected)
    calls = [client.call_async("call", number) for number in range(3)]
    blocked = gevent.spawn(outcome, client.call, "blocked")
    notifying = gevent.spawn(client.notify, "news")
    gevent.sleep(0.01)
    assert client.connection is connection  # The last one that there was.
    scripted.come_back()
    new = scripted.accept()
    assert [message[-2] for message in [new.receive() for _ in range(5)]] == 3 * ["call"] + ["blocked", "news"]
    notifying.get()
    client.close()
    assert old.receive_rest() == []
    for call in calls:
        assert isinstance(call.exception, gmprpc.ConnectionClosed)
    assert isinstance(blocked.get(), gmprpc.ConnectionClosed)


def test_what_waits_for_room_on_the_old_connection_waits_for_the_new_one(
    make_client: Callable[..., gmprpc.Client], scripted: Scripted
) -> None:
    client = make_client(max_pending=1)
    first = client.call_async("first")
    old = scripted.accept()
    msgid = old.receive()[1]
    calls = [first, client.call_async("second")]
    old.send(DRAINING)
    assert answer(scripted.accept())[2] == "second"
    old.send([1, msgid, None, "first"])
    assert [call.get() for call in calls] == ["first", "second"]


def test_who_is_told_answers_what_the_server_calls(scripted: Scripted, service: gmprpc.Service) -> None:
    with gmprpc.Client(scripted.address, service=service) as client:
        call = client.call_async("call back")
        old = scripted.accept()
        msgid = old.receive()[1]
        old.send([0, 1, "hold", ["held"]], DRAINING, [0, 2, "echo", ["echoed"]])
        assert old.receive() == [1, 2, None, "echoed"]
        new = scripted.accept()
        old.send([1, msgid, None, "called back"])
        assert call.get() == "called back"
        service.methods["release"]()
        assert old.receive_rest() == [[1, 1, None, "held"]]
        old.close()
        new.close()


def test_a_call_on_the_old_connection_is_cancelled_there(client: gmprpc.Client, scripted: Scripted) -> None:
    call = client.call_async("call")
    old = scripted.accept()
    msgid = old.receive()[1]
    old.send(DRAINING)
    new = scripted.accept()
    call.cancel()
    assert old.receive_rest() == [[2, "$/cancel", [msgid]]]
    client.call_async("other")
    assert answer(new)[2] == "other"


def test_a_call_on_the_old_connection_may_time_out_or_be_killed(client: gmprpc.Client, scripted: Scripted) -> None:
    late = gevent.spawn(outcome, client.call, "late", timeout=0.05)
    killed = gevent.spawn(client.call, "killed")
    old = scripted.accept()
    old.receive()
    old.receive()
    old.send(DRAINING)
    scripted.accept()
    killed.kill()
    assert isinstance(late.get(), gmprpc.CallTimeout)
    assert old.receive_rest() == []


def test_when_the_old_connection_is_lost_only_what_is_idempotent_is_sent_again(
    client: gmprpc.Client, scripted: Scripted, errors: list[Exception]
) -> None:
    call, idempotent = client.call_async("call"), client.call_async("idempotent", idempotent=True)
    old = scripted.accept()
    old.receive()
    old.receive()
    old.send(DRAINING)
    new = scripted.accept()
    wait_until(lambda: client.is_connected)
    old.reset()
    assert answer(new)[2] == "idempotent"
    assert idempotent.get() == "idempotent"
    with pytest.raises(gmprpc.ConnectionClosed) as closed:
        call.get()
    assert closed.value.sent
    assert len(errors) == 1


def test_to_be_told_again_changes_nothing(client: gmprpc.Client, scripted: Scripted) -> None:
    call = client.call_async("call")
    old = scripted.accept()
    msgid = old.receive()[1]
    old.send(DRAINING)
    new = scripted.accept()
    old.send(DRAINING, [2, "$/draining", ["in", "some", "years"]])
    client.call_async("other")
    assert answer(new)[2] == "other"
    old.send([1, msgid, None, None])
    call.get()
    assert old.receive_rest() == []
    assert client.statistics()["connections"] == 2


def test_a_server_that_sends_everybody_away_is_tried_after_ever_longer_times(
    make_client: Callable[..., gmprpc.Client], scripted: Scripted
) -> None:
    client = make_client(retry_interval=1000, max_retry_interval=1000)
    client.connect()
    scripted.accept().send(DRAINING)
    wait_until(lambda: not client.is_connected)
    assert link_of(client)._backoff.failures == 1


def test_where_nothing_makes_attempts_rarer_only_a_call_makes_one(
    make_client: Callable[..., gmprpc.Client], scripted: Scripted
) -> None:
    client = make_client(retry_interval=None)
    for number in range(3):
        call = client.call_async("call", number)
        with scripted.accept() as peer:
            answer(peer)
            call.get()
            peer.send(DRAINING)
            wait_until(lambda: not client.is_connected)
            assert peer.receive_rest() == []
        wait_until(lambda: link_of(client)._connecting is None)
    assert client.statistics()["connections"] == 3


def test_who_doesnt_call_gives_up_after_a_while(make_client: Callable[..., gmprpc.Client], scripted: Scripted) -> None:
    client = make_client(connect_timeout=0.05)
    client.connect()
    old = scripted.accept()
    scripted.go()
    old.send(DRAINING)
    wait_until(lambda: link_of(client)._connecting is not None)
    wait_until(lambda: link_of(client)._connecting is None)
    scripted.come_back()
    call = client.call_async("call")  # And connects when it calls.
    answer(scripted.accept())
    assert call.get() == "call"


def test_close_closes_both_connections(client: gmprpc.Client, scripted: Scripted) -> None:
    call = client.call_async("call")
    old = scripted.accept()
    old.receive()
    old.send(DRAINING)
    new = scripted.accept()
    wait_until(lambda: client.is_connected)
    closing = gevent.spawn(client.close)
    assert old.receive_rest() == new.receive_rest() == []
    old.close()
    new.close()
    closing.get()
    with pytest.raises(gmprpc.ConnectionClosed):
        call.get()


def test_a_client_of_a_child_process_stays_with_it() -> None:
    program = """
import gmprpc, msgpack, os, sys
unpacker = msgpack.Unpacker()
while data := os.read(0, 65536):
    unpacker.feed(data)
    for _, msgid, method, _ in unpacker:
        os.write(1, msgpack.packb([2, "$/draining", []]) + msgpack.packb([1, msgid, None, method]))
"""
    with gmprpc.Client.popen([sys.executable, "-c", program]) as client:
        assert [client.call("one"), client.call("two")] == ["one", "two"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_after_a_fork_both_connections_are_the_parents(scripted: Scripted) -> None:
    program = f"""
import gevent, gmprpc, os
client = gmprpc.Client({scripted.address!r})
call = client.call_async("call")
gevent.sleep(0.001)
while client.statistics()["connections"] < 2 or not client.is_connected:
    gevent.sleep(0.001)
if (pid := os.fork()) == 0:
    print("child:", client.call("child"), flush=True)
    try:
        call.get()
    except gmprpc.ConnectionClosed:
        os._exit(0)
os.waitpid(pid, 0)
print("parent:", call.get(), client.call("parent"), flush=True)
client.close()
"""
    with Program(*FORKING_PYTHON, "-c", program) as child:
        old = scripted.accept()
        msgid = old.receive()[1]
        old.send(DRAINING)
        new = scripted.accept()
        answer(scripted.accept())
        assert child.line() == "child: child"
        old.send([1, msgid, None, "old"])
        answer(new)
        assert child.line() == "parent: old parent"
        assert old.receive_rest() == new.receive_rest() == []


def test_when_a_thread_ends_both_its_connections_are_closed(client: gmprpc.Client, scripted: Scripted) -> None:
    may_end = threading.Event()

    def run() -> None:
        client.call_async("call")
        while client.statistics()["connections"] < 2 or not client.is_connected:
            gevent.sleep(0.001)
        while not may_end.is_set():
            gevent.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    old = scripted.accept()
    old.receive()
    old.send(DRAINING)
    new = scripted.accept()
    may_end.set()
    assert old.receive_rest() == new.receive_rest() == []
    wait_until(lambda: not thread.is_alive())


# Announcing.


@pytest.mark.parametrize(
    "reply",
    [
        [None, "SERVING"],
        [None, "NOT_SERVING"],
        ['No such method "$/health" found', None],
        [None, b"\xc1"],
    ],
)
def test_no_call_leaves_before_the_server_has_told_of_its_health_whatever_it_says(
    draining: gmprpc.Client, scripted: Scripted, reply: list[Any]
) -> None:
    call = draining.call_async("call")
    notifying = gevent.spawn(draining.notify, "news")
    peer = scripted.accept()
    _, msgid, method, params = peer.receive()
    assert [method, params] == ["$/health", []]
    gevent.sleep(0.01)
    assert not draining.is_connected
    assert not notifying.ready()
    if reply[1] == b"\xc1":
        peer.send_bytes(bytes([0x94, 1, msgid, 0xC0, 0xA1, 0xFF]))  # A string that isn't UTF-8.
    else:
        peer.send([1, msgid, *reply])
    answer(peer)
    assert peer.receive() == [2, "news", []]
    assert call.get() == "call"
    draining.call_async("again")
    assert answer(peer)[2] == "again"  # It was asked once.


def test_a_connection_that_ends_before_the_answer_costs_no_call(
    draining: gmprpc.Client, scripted: Scripted, errors: list[Exception]
) -> None:
    call = draining.call_async("call")
    peer = scripted.accept()
    peer.receive()
    peer.reset()
    peer = scripted.accept()
    peer.receive()
    peer.close()
    peer = scripted.accept()
    answer(peer)
    answer(peer)
    assert call.get() == "call"
    wait_until(lambda: len(errors) == 2)
    assert all(isinstance(error, gmprpc.ConnectFailed) for error in errors)
    assert "connection lost: Connection reset by peer" in str(errors[0])


def test_who_is_told_before_the_answer_tries_again(
    draining: gmprpc.Client, scripted: Scripted, errors: list[Exception]
) -> None:
    call = draining.call_async("call")
    stopping = scripted.accept()
    stopping.send(DRAINING)
    answer(stopping)
    assert stopping.receive_rest() == []
    peer = scripted.accept()
    answer(peer)
    answer(peer)
    assert call.get() == "call"
    wait_until(lambda: errors)
    assert "is about to stop" in str(errors[0])


def test_who_is_told_behind_the_answer_moves(draining: gmprpc.Client, scripted: Scripted) -> None:
    call = draining.call_async("call")
    old = scripted.accept()
    request = old.receive()
    old.send([1, request[1], None, "SERVING"], DRAINING)
    new = scripted.accept()
    answer(old)  # It had left.
    assert call.get() == "call"
    other = draining.call_async("other")
    answer(new)
    answer(new)
    assert other.get() == "other"
    assert old.receive_rest() == []


def test_the_answer_has_what_is_left_of_the_time_to_connect(
    make_client: Callable[..., gmprpc.Client], scripted: Scripted, errors: list[Exception]
) -> None:
    client = make_client(draining=True, connect_timeout=0.05, retry_interval=None)
    with pytest.raises(gmprpc.ConnectFailed, match=r"no answer to \$/health within 0.05 s"):
        client.call("call", timeout=10)
    peer = scripted.accept()
    assert peer.receive()[2] == "$/health"
    with pytest.raises((EOFError, ConnectionError)):
        peer.receive()
    wait_until(lambda: len(errors) == 1)


def test_it_takes_its_time_if_there_is_no_limit(make_client: Callable[..., gmprpc.Client], scripted: Scripted) -> None:
    client = make_client(draining=True, connect_timeout=None)
    connecting = gevent.spawn(client.connect)
    answer(scripted.accept())
    connecting.get()
    assert client.is_connected


@pytest.mark.parametrize("end", [gmprpc.Client.close, lambda client: link_of(client)._connecting.kill()])
def test_it_may_be_ended_while_it_waits_for_the_answer(
    draining: gmprpc.Client, scripted: Scripted, end: Callable[[gmprpc.Client], None]
) -> None:
    call = draining.call_async("call")
    peer = scripted.accept()
    peer.receive()
    ending = gevent.spawn(end, draining)
    with pytest.raises((EOFError, ConnectionError)):
        peer.receive()
    peer.close()
    ending.get()
    with pytest.raises(gmprpc.ConnectionClosed) as closed:
        call.get()
    assert not closed.value.sent


def test_a_thread_may_end_while_it_waits_for_the_answer(draining: gmprpc.Client, scripted: Scripted) -> None:
    may_end = threading.Event()

    def run() -> None:
        draining.call_async("call")
        while not may_end.is_set():
            gevent.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    peer = scripted.accept()
    peer.receive()
    may_end.set()
    with pytest.raises((EOFError, ConnectionError)):
        peer.receive()
    wait_until(lambda: not thread.is_alive())


def test_a_certificate_that_the_server_misses_is_told_at_once(tmp_path: Path) -> None:
    # In TLS 1.3 the client takes the handshake for good before the server has seen that there is none.
    certificates = Certificates(tmp_path)
    context = gmprpc.tls.server_context(certificates.server, client_cafile=certificates.authority)
    client_context = gmprpc.tls.client_context(certificates.authority)
    with gmprpc.Server(("127.0.0.1", 0), ssl_context=context) as server:
        client = gmprpc.Client(server.address, draining=True, ssl_context=client_context, server_hostname="localhost")
        with pytest.raises(gmprpc.ConnectFailed, match="certificate required"):
            client.call("call")
        client.close()


def test_who_has_yet_to_be_let_in_may_announce_himself(service: gmprpc.Service) -> None:
    server = gmprpc.Server(
        ("127.0.0.1", 0), service, authenticate=lambda _, message: message[2:] == ["echo", ["secret"]]
    )
    server.start()
    with gmprpc.Client(server.address, draining=True, retry_interval=None) as client:
        assert client.call("echo", "secret") == "secret"
        held = client.call_async("hold", "held")
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        stopping = gevent.spawn(server.stop)
        wait_until(lambda: not client.is_connected)
        service.methods["release"]()
        assert held.get() == "held"
        assert stopping.get() == 0


# Balancers.


@contextmanager
def balancing(*scripted: Scripted, **options: Any) -> Iterator[gmprpc.Balancer]:
    """A balancer over the servers, connected to each; its calls go where fewest are pending."""
    settings = {"retry_interval": 0.001, "max_retry_interval": 0.01} | options
    balancer = gmprpc.Balancer([server.address for server in scripted], **settings)
    try:
        yield balancer
    finally:
        for server in scripted:
            server.close()
        balancer.close()
        assert balancer.statistics()["pending"] == balancer.statistics()["open_connections"] == 0


@pytest.fixture
def other() -> Iterator[Scripted]:
    other = Scripted()
    yield other
    other.close()


def is_usable(balancer: gmprpc.Balancer, server: Scripted) -> bool:
    return any(status.is_usable for status in balancer.endpoints if status.address == server.address)


@pytest.mark.parametrize("options", [{}, {"probe": "connect", "draining": True}])
def test_an_endpoint_that_drains_gets_no_calls_until_it_is_back(
    scripted: Scripted, other: Scripted, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with balancing(scripted, other, **options) as balancer:
        connecting = gevent.spawn(balancer.connect)
        old, others = scripted.accept(), other.accept()
        assert answer(old)[2] == answer(others)[2] == "$/health"
        connecting.get()
        wait_until(lambda: balancer.statistics()["usable_endpoints"] == 2)
        calls = [balancer.call_async("first") for _ in range(2)]  # One for each.
        msgid = old.receive()[1]
        answer(others)
        scripted.go()
        old.send(DRAINING)
        wait_until(lambda: not is_usable(balancer, scripted))
        calls += [balancer.call_async("call") for _ in range(5)]
        for _ in range(5):
            answer(others)
        old.send([1, msgid, None, "first"])
        assert [call.get() for call in calls] == 2 * ["first"] + 5 * ["call"]
        assert old.receive_rest() == []
        wait_until(lambda: balancer.statistics()["failed_probes"] > 2)
        scripted.come_back()
        new = scripted.accept()
        assert answer(new)[2] == "$/health"
        wait_until(lambda: is_usable(balancer, scripted))
        calls = [balancer.call_async("again") for _ in range(2)]
        answer(new)
        answer(others)
        assert [call.get() for call in calls] == 2 * ["again"]
        assert balancer.statistics()["ejections"] == 0
    lines = [record for record in caplog.records if record.name == "gmprpc.balancer"]
    assert len(lines) <= 2, caplog.text  # That it gets no calls, and that it gets calls again.


def test_the_only_endpoint_may_let_go_of_its_connection(scripted: Scripted) -> None:
    with balancing(scripted) as balancer:
        call = balancer.call_async("call", timeout=20)
        old = scripted.accept()
        answer(old)
        answer(old)
        assert call.get() == "call"
        old.send(DRAINING)
        wait_until(lambda: not is_usable(balancer, scripted))
        calls = [gevent.spawn(outcome, balancer.call, name) for name in ("one", "two")]
        new = scripted.accept()
        assert [answer(new)[2] for _ in range(3)] == ["$/health", "one", "two"]
        assert [call.get() for call in calls] == ["one", "two"]
        assert old.receive_rest() == []


def test_what_waits_for_room_at_an_endpoint_that_drains_goes_to_another(scripted: Scripted, other: Scripted) -> None:
    with balancing(scripted, other, max_pending=1) as balancer:
        connecting = gevent.spawn(balancer.connect)
        old, others = scripted.accept(), other.accept()
        answer(old)
        answer(others)
        connecting.get()
        wait_until(lambda: balancer.statistics()["usable_endpoints"] == 2)
        calls = [balancer.call_async("first") for _ in range(4)]  # Two for each, of which one waits.
        msgid = old.receive()[1]
        scripted.go()
        old.send(DRAINING)
        for _ in range(3):
            answer(others)
        old.send([1, msgid, None, "first"])
        assert [call.get() for call in calls] == 4 * ["first"]
        assert balancer.statistics()["moved_calls"] == 1


# Servers that are restarted.


class Load:
    """Greenlets that call again and again; each call is counted where it is carried out."""

    def __init__(self, client: Callable[[], Any]) -> None:
        self.executions: Counter[int] = Counter()
        self.service = gmprpc.Service()
        self.service.register(self._do, "do")
        self.service.register(self._do_later, "later")
        self._client = client
        self._number = 0
        self._callers = [gevent.spawn(self._call_on_and_on, method) for method in 10 * ("do", "later")]
        self._is_over = False

    def _do(self, number: int) -> int:
        self.executions[number] += 1
        gevent.sleep(number % 4 * 0.002)
        return number

    def _do_later(self, number: int) -> Any:
        self.executions[number] += 1
        reply = gmprpc.Reply()
        gevent.spawn_later(number % 4 * 0.002, reply.result, number)
        return reply

    def _call_on_and_on(self, method: str) -> None:
        while not self._is_over:
            number = self._number = self._number + 1
            assert self._client().call(method, number, timeout=20) == number
            gevent.sleep(0.002)

    def wait_more(self, calls: int) -> None:
        """Wait until so many more calls have been made."""
        until = self._number + calls
        wait_until(lambda: self._number >= until or any(caller.ready() for caller in self._callers))

    def check(self) -> None:
        """Make no more calls; every one has been answered, and carried out once."""
        self._is_over = True
        gevent.joinall(self._callers, raise_error=True)
        assert self.executions == dict.fromkeys(range(1, self._number + 1), 1)


def test_ten_restarts_of_its_server_fail_no_call_of_a_draining_client() -> None:
    load = Load(lambda: client)
    server = gmprpc.Server(("127.0.0.1", 0), load.service)
    server.start()
    address = server.address
    client = gmprpc.Client(address, draining=True, retry_interval=0.01, max_retry_interval=0.05)
    for _ in range(10):
        load.wait_more(100)
        assert server.stop() == 0
        server = gmprpc.Server(address, load.service)
        server.start()
    load.wait_more(100)
    load.check()
    assert client.statistics()["resent_requests"] == 0
    client.close()
    server.stop()


def test_restarts_of_one_server_after_the_other_fail_no_call_of_a_balancer() -> None:
    servers: list[gmprpc.Server] = []
    load = Load(lambda: balancer)
    for _ in range(2):
        servers.append(gmprpc.Server(("127.0.0.1", 0), load.service))
        servers[-1].start()
    addresses = [server.address for server in servers]
    balancer = gmprpc.Balancer(addresses, retry_interval=0.01, max_retry_interval=0.05)
    for turn in range(10):
        load.wait_more(100)
        wait_until(lambda: balancer.statistics()["usable_endpoints"] == 2)
        assert servers[turn % 2].stop() == 0
        servers[turn % 2] = gmprpc.Server(addresses[turn % 2], load.service)
        servers[turn % 2].start()
    load.wait_more(100)
    load.check()
    assert balancer.statistics()["ejections"] == 0
    balancer.close()
    for server in servers:
        server.stop()


def test_connections_that_get_old_cost_no_call_of_a_draining_client() -> None:
    load = Load(lambda: client)
    with gmprpc.Server(("127.0.0.1", 0), load.service, max_connection_age=0.05) as server:
        client = gmprpc.Client(server.address, draining=True, retry_interval=0.01)
        wait_until(lambda: client.statistics()["connections"] >= 10)
        load.check()
        client.close()


def test_restarts_of_its_servers_process_fail_no_call_of_a_draining_client(tmp_path: Path) -> None:
    numbers: list[int] = []
    is_over = False

    def call_on_and_on(method: str, *params: Any) -> None:
        while not is_over:
            number = server.number()
            numbers.append(number)
            assert client.call(method, number, *params, timeout=20) == number
            gevent.sleep(0.005)

    def wait_more() -> None:
        until = len(numbers) + 100
        wait_until(lambda: len(numbers) >= until or any(caller.ready() for caller in callers))

    with CountingServer(tmp_path) as server:
        client = gmprpc.Client(server.address, draining=True)
        callers = [gevent.spawn(call_on_and_on, *what) for what in 5 * (("do",), ("pause", 0.01), ("later", 0.05))]
        for _ in range(2):
            wait_more()
            server.stop()
            server.start()
        wait_more()
        is_over = True
        gevent.joinall(callers, raise_error=True)
        assert {server.executions(number) for number in numbers} == {1}
        client.close()
