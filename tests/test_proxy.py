"""The proxy of the tests does to connections what it is told to, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import socket

from .helpers import Peer, Scripted, wait_until
from .proxy import GARBAGE, Flow, Line, Proxy


@pytest.fixture
def proxy(scripted: Scripted) -> Iterator[Proxy]:
    with Proxy(scripted.address) as proxy:
        yield proxy


def receive(peer: Peer, size: int) -> bytes:
    """``size`` bytes, or what comes until the end."""
    data = b""
    while len(data) < size and (part := peer.socket.recv(size - len(data))):
        data += part
    return data


def rest(peer: Peer) -> bytes | type[OSError]:
    """Everything up to the end; the error, if it is no proper one and nothing came before."""
    data = b""
    try:
        while part := peer.socket.recv(65536):
            data += part
    except ConnectionResetError:
        return data or ConnectionResetError
    return data


def talk(proxy: Proxy, scripted: Scripted) -> tuple[Peer, Peer]:
    """Both ends of a new connection."""
    client = Peer.connect(proxy.address)
    return client, scripted.accept()


def test_it_passes_on_both_directions_and_both_ends(scripted: Scripted, proxy: Proxy) -> None:
    client, ours = talk(proxy, scripted)
    with client, ours:
        large = os.urandom(3_000_000)
        sending = gevent.spawn(client.send_bytes, large)
        assert receive(ours, len(large)) == large
        sending.get()
        client.shutdown()
        assert rest(ours) == b""
        ours.send_bytes(b"still here")
        assert receive(client, 10) == b"still here"
        ours.shutdown()
        assert rest(client) == b""
    wait_until(lambda: not proxy.lines)
    assert proxy.count == 1


def test_a_reset_by_one_side_is_one_for_the_other(scripted: Scripted, proxy: Proxy) -> None:
    for number in range(2):
        pair = talk(proxy, scripted)
        with pair[0], pair[1]:
            pair[number].reset()
            assert rest(pair[1 - number]) is ConnectionResetError
    wait_until(lambda: not proxy.lines)


def test_who_cant_be_connected_to_the_server_is_reset(scripted: Scripted, proxy: Proxy) -> None:
    scripted.close()
    with Peer.connect(proxy.address) as client:
        assert rest(client) is ConnectionResetError
    assert not proxy.lines


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("direction", ["requests", "answers"])
@pytest.mark.parametrize("action", [Flow.reset, Flow.cut, Flow.half_close, Flow.swallow])
def test_what_is_planned_happens_at_its_byte(
    scripted: Scripted, proxy: Proxy, position: int, direction: str, action: Callable[[Flow], None]
) -> None:
    def plan(line: Line) -> None:
        getattr(line, direction).at(position, action)

    proxy.plan = plan
    client, ours = talk(proxy, scripted)
    with client, ours:
        sender, receiver = (client, ours) if direction == "requests" else (ours, client)
        # In two parts: it makes no difference how the bytes arrive.
        sender.send_bytes(b"abc")
        heard = receive(receiver, min(3, position))
        if position > 3:
            sender.send_bytes(b"def")
            heard += receive(receiver, position - 3)
        assert heard == b"abcdef"[:position]
        if action is Flow.reset:
            assert rest(receiver) is ConnectionResetError
            assert rest(sender) is ConnectionResetError
        elif action is Flow.cut:
            assert rest(receiver) == b""
            assert rest(sender) == b""
        else:
            receiver.send_bytes(b"other direction")
            assert receive(sender, 15) == b"other direction"
            if action is Flow.swallow:
                sender.send_bytes(b"lost")
                sender.shutdown()
            assert rest(receiver) == b""


def test_faults_at_one_byte_happen_in_the_order_of_the_plan(scripted: Scripted, proxy: Proxy) -> None:
    def plan(line: Line) -> None:
        line.requests.at(2, lambda flow: flow.insert(b"1"))
        line.requests.at(2, lambda flow: flow.insert(b"2"))

    proxy.plan = plan
    client, ours = talk(proxy, scripted)
    with client, ours:
        client.send_bytes(b"abcd")
        assert receive(ours, 6) == b"ab12cd"
        assert proxy.line.requests.position == 4


def test_garbage_can_be_put_between_two_messages(scripted: Scripted, proxy: Proxy) -> None:
    proxy.plan = lambda line: line.answers.between_messages(3, Flow.insert)
    client, ours = talk(proxy, scripted)
    with client, ours:
        # The byte 3 is in the second message: its end counts, in whatever parts it comes.
        for part in (b"\x92\x01\x02\xa3", b"a", b"bc\x92\xa1", b"x\x01"):
            ours.send_bytes(part)
        assert receive(client, 12) == b"\x92\x01\x02\xa3abc" + GARBAGE + b"\x92\xa1x\x01"


def test_what_is_stalled_is_held_until_it_goes_on(scripted: Scripted) -> None:
    with Proxy(scripted.address, buffer_size=65536) as proxy:
        client, ours = talk(proxy, scripted)
        with client, ours:
            client.send_bytes(b"before")
            assert receive(ours, 6) == b"before"
            proxy.line.requests.stall()
            data = b"x" * 8_000_000
            sending = gevent.spawn(client.send_bytes, data)
            # The other direction goes on, and nothing of this one comes.
            ours.send_bytes(b"answer")
            assert receive(client, 6) == b"answer"
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
                receive(ours, 1)
            assert not sending.ready()
            proxy.line.requests.go_on()
            assert receive(ours, len(data)) == data
            sending.get()


@pytest.mark.parametrize(
    "slow", [lambda flow: flow.delay(0.1), lambda flow: flow.lag(0.1), lambda flow: flow.throttle(1000)]
)
def test_what_is_slowed_down_comes_late_and_whole(
    scripted: Scripted, proxy: Proxy, slow: Callable[[Flow], None]
) -> None:
    client, ours = talk(proxy, scripted)
    with client, ours:
        wait_until(lambda: proxy.lines)
        slow(proxy.line.requests)
        begin = time.perf_counter()
        client.send_bytes(b"x" * 100)
        assert receive(ours, 100) == b"x" * 100
        assert time.perf_counter() - begin >= 0.099
        # What doesn't last is over, the rest can be ended.
        proxy.line.requests.go_on()
        begin = time.perf_counter()
        client.send_bytes(b"x" * 100)
        assert receive(ours, 100) == b"x" * 100
        assert time.perf_counter() - begin < 0.099


def test_it_refuses_for_a_while_and_listens_again_at_the_same_address(scripted: Scripted, proxy: Proxy) -> None:
    client, ours = talk(proxy, scripted)
    with client, ours:
        address = proxy.address
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        client.send_bytes(b"goes on")
        assert receive(ours, 7) == b"goes on"
        proxy.reset_all()
        assert rest(client) is ConnectionResetError
        proxy.listen()
        assert proxy.address == address
    client, ours = talk(proxy, scripted)
    with client, ours:
        client.send_bytes(b"again")
        assert receive(ours, 5) == b"again"


def test_the_server_may_move(scripted: Scripted, proxy: Proxy) -> None:
    other = Scripted()
    proxy.target = other.address
    client, ours = talk(proxy, other)
    with client, ours:
        client.send_bytes(b"moved")
        assert receive(ours, 5) == b"moved"
    other.close()


def test_it_leaves_nothing_behind(scripted: Scripted) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    lives: list[Any] = []
    with Proxy(scripted.address) as proxy:
        pairs = [talk(proxy, scripted) for _ in range(20)]
        proxy.line.requests.stall()
        lives += proxy._lives
    for client, ours in pairs:
        client.close()
        ours.close()
    wait_until(lambda: all(life.ready() for life in lives))
    assert descriptors() == before
