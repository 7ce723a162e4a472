"""What a client survives: servers that are late, lost connections, full ones, threads and forks; and what is told."""

from __future__ import annotations

import os
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import AsyncResult, Event

import gmprpc
from gmprpc.backoff import Backoff
from gmprpc.link import Link

from .helpers import Peer, Scripted, collected, listening, wait_until
from .programs import FORKING_PYTHON, Program

start_new_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def client(scripted: Scripted, errors: list[Exception]) -> Iterator[gmprpc.Client]:
    """A client of ``scripted`` that loses no time between attempts."""
    client = gmprpc.Client(
        scripted.address,
        retry_interval=0.001,
        max_retry_interval=0.01,
        on_error=lambda client, exc: errors.append(exc),
    )
    yield client
    client.close()
    assert client.statistics()["pending"] == 0


def answer(peer: Peer) -> Any:
    """Answer the next request with its first param, or its method; returns the request."""
    request = peer.receive()
    _, msgid, method, params = request
    peer.send([1, msgid, None, params[0] if params else method])
    return request


def link_of(client: gmprpc.Client) -> Link:
    return client._links.get()


# A server that isn't there.


def test_a_client_may_start_before_its_server(
    scripted: Scripted, client: gmprpc.Client, errors: list[Exception]
) -> None:
    scripted.go()
    calls: list[Any] = [gevent.spawn(client.call, "first", timeout=20), client.call_async("second")]
    notified = gevent.spawn(client.notify, "third")
    connected = gevent.spawn(client.connect)
    wait_until(lambda: len(errors) > 3)
    assert all(isinstance(exc.__cause__, ConnectionRefusedError) for exc in errors)
    scripted.come_back()
    peer = scripted.accept()
    assert {answer(peer)[2], answer(peer)[2]} == {"first", "second"}
    assert peer.receive() == [2, "third", []]
    assert sorted(call.get() for call in calls) == ["first", "second"]
    notified.get()
    assert connected.get() is client


def test_a_call_waits_for_a_connection_as_long_as_its_time_out_allows(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    scripted.go()
    client.timeout = 0.04
    for call, which, timeout in (
        (lambda: client.call("m", timeout=0.03), "call", 0.03),
        (lambda: client.call("m"), "client", 0.04),
        (lambda: client.call_async("m", timeout=0.03).get(), "call", 0.03),
        (lambda: client.call_async("m").get(), "client", 0.04),
        (lambda: client.notify("m", timeout=0.03), "call", 0.03),
        (lambda: client.notify("m"), "client", 0.04),
    ):
        with pytest.raises(gmprpc.CallTimeout) as caught:
            call()
        late = caught.value
        assert (late.method, late.timeout, late.which, late.sent) == ("m", timeout, which, False)
        assert isinstance(late.__cause__, gmprpc.ConnectFailed)
        where = "{}:{}".format(*scripted.address)
        assert str(late) == (
            f"'m' could not be sent within {timeout} s (the {which}'s timeout): "
            f"can't connect to {where}: Connection refused"
        )
    assert client.statistics()["pending"] == 0


def test_without_a_time_out_of_its_own_it_waits_as_long_as_connecting_may_take(scripted: Scripted) -> None:
    scripted.go()
    client = gmprpc.Client(scripted.address, connect_timeout=0.05, retry_interval=0.001, max_retry_interval=0.01)
    for call in (
        lambda: client.call("m"),
        lambda: client.call_async("m").get(),
        lambda: client.notify("m"),
        lambda: client.connect(),
    ):
        with pytest.raises(
            gmprpc.ConnectFailed, match=r"refused; no connection within 0.05 s \(connect_timeout\)"
        ) as caught:
            call()
        assert isinstance(caught.value.__cause__, gmprpc.ConnectFailed)
        assert caught.value.sent is False
    # But one that has a time-out goes on waiting.
    patient = gevent.spawn(client.call, "m", timeout=20)
    with pytest.raises(gmprpc.ConnectFailed):
        client.call("m")
    scripted.come_back()
    answer(scripted.accept())
    assert patient.get() == "m"
    client.close()


def test_nobody_tries_to_connect_when_nobody_waits_any_more(scripted: Scripted, client: gmprpc.Client) -> None:
    scripted.go()
    link = link_of(client)
    calls = [client.call_async("m"), client.call_async("m", timeout=0.01)]
    killed = gevent.spawn(client.call, "m")
    wait_until(lambda: link._failure)
    link._not_before += 1000
    wait_until(lambda: len(link._queue) == 2)
    killed.kill()
    assert calls[0].cancel()
    wait_until(lambda: link._connecting is None)
    # The wait is still to be observed by who comes next.
    call = client.call_async("m")
    gevent.sleep(0.01)
    assert link._connecting is not None
    call.cancel()
    wait_until(lambda: link._connecting is None)


def test_attempts_without_a_pause_keep_nobody_from_his_turn(tmp_path: Path) -> None:
    errors: list[Exception] = []
    client = gmprpc.Client(f"unix:{tmp_path}/none", retry_interval=0, on_error=lambda client, exc: errors.append(exc))
    with pytest.raises(gmprpc.CallTimeout):
        client.call("m", timeout=0.02)
    client.close()
    assert 1 <= len(errors) <= 30


def test_a_client_that_doesnt_retry_fails_those_who_wait_at_once(scripted: Scripted) -> None:
    scripted.go()
    client = gmprpc.Client(scripted.address, retry_interval=None)
    calls: list[Any] = [
        gevent.spawn(client.call, "m", timeout=20),
        client.call_async("m"),
        gevent.spawn(client.connect),
    ]
    for call in calls:
        with pytest.raises(gmprpc.ConnectFailed) as caught:
            call.get()
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    scripted.come_back()
    call = gevent.spawn(client.call, "m")
    answer(scripted.accept())
    assert call.get() == "m"
    client.close()


def test_what_will_not_be_otherwise_next_time_is_not_tried_again(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "closed", 0o000)
    if os.getuid() != 0:  # Root may go anywhere.
        client = gmprpc.Client(f"unix:{tmp_path}/closed/socket")
        with pytest.raises(gmprpc.ConnectFailed, match="Permission denied"):
            client.call("m", timeout=20)
    attempts: list[int] = []

    def refuse(client: gmprpc.Client, sock: Any) -> None:
        attempts.append(1)
        raise ssl.SSLCertVerificationError("not trusted")

    client = gmprpc.Client(("127.0.0.1", 1), before_connect=refuse)
    with pytest.raises(gmprpc.ConnectFailed, match="not trusted"):
        client.call("m", timeout=20)
    assert attempts == [1]


@pytest.mark.parametrize("when", ["before it began", "while it waits", "while it connects"])
def test_a_kill_of_who_connects_fails_the_calls_that_wait_and_no_others(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    # As by a test suite that kills whatever greenlets it finds.
    client = gmprpc.Client(scripted.address)
    link = link_of(client)
    if when == "while it waits":
        link._not_before = sys.maxsize
    elif when == "while it connects":
        monkeypatch.setattr(client, "_before_connect", lambda client, sock: gevent.sleep(100))
    calls = [client.call_async("m"), client.call_async("m", timeout=20)]
    if when != "before it began":
        gevent.sleep(0.001)
    assert link._connecting is not None
    link._connecting.kill()
    for call in calls:
        with pytest.raises(gmprpc.ConnectFailed, match="can't connect: GreenletExit"):
            call.get()
    link._not_before = 0
    monkeypatch.undo()
    call = client.call_async("m")
    answer(scripted.accept())
    assert call.get() == "m"
    client.close()


# A connection that is lost.


def test_a_call_in_the_gap_of_a_restart_is_answered_by_the_new_server(
    scripted: Scripted, client: gmprpc.Client, errors: list[Exception]
) -> None:
    call = gevent.spawn(client.call, "before")
    peer = scripted.accept()
    answer(peer)
    assert call.get() == "before"
    scripted.go()
    peer.close()
    wait_until(lambda: not client.is_connected)
    call = gevent.spawn(client.call, "amid", timeout=20)
    wait_until(lambda: errors)
    scripted.come_back()
    answer(scripted.accept())
    assert call.get() == "amid"


def ways(client: gmprpc.Client, *params: Any, **settings: Any) -> list[Any]:
    """The same call in both ways."""
    return [gevent.spawn(client.call, *params, **settings), client.call_async(*params, **settings)]


@pytest.mark.parametrize("end", [Peer.close, Peer.reset, Peer.shutdown, lambda peer: peer.send_bytes(b"\xc1")])
def test_a_request_that_had_left_is_sent_again_only_if_it_is_idempotent(
    scripted: Scripted, client: gmprpc.Client, end: Callable[[Peer], Any]
) -> None:
    careful, careless = ways(client, "careful"), ways(client, "again", idempotent=True)
    peer = scripted.accept()
    assert Counter(peer.receive()[2] for _ in range(4)) == {"careful": 2, "again": 2}
    end(peer)
    peer.close()
    for call in careful:
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            call.get()
        assert caught.value.sent is True
        assert type(caught.value) is gmprpc.ConnectionClosed
    peer = scripted.accept()
    assert [answer(peer)[2] for _ in range(2)] == ["again", "again"]
    assert [call.get() for call in careless] == ["again", "again"]
    assert client.statistics()["resent_requests"] == 2


def test_an_idempotent_call_ends_with_its_time_out_however_often_it_is_sent(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    accepting = gevent.spawn(scripted.hang_up_on_everybody)
    for call in ways(client, "again", idempotent=True, timeout=0.1):
        with pytest.raises(gmprpc.CallTimeout):
            call.get()
    accepting.kill()
    assert client.statistics()["connections"] > 2


def test_whoever_waits_to_be_sent_again_is_told_that_the_request_had_left(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, retry_interval=0.001, max_retry_interval=0.01, connect_timeout=0.2)

    def lost(**settings: Any) -> list[Any]:
        client.connect()
        peer = scripted.accept()
        calls = ways(client, "again", idempotent=True, **settings)
        assert [peer.receive()[2] for _ in calls] == ["again"] * 2
        scripted.go()
        peer.close()
        wait_until(lambda: link_of(client)._failure)
        calls += ways(client, "new", **settings)
        wait_until(lambda: len(link_of(client)._queue) + len(link_of(client)._returned) == 4)
        return calls

    for settings, error in (({"timeout": 0.2}, gmprpc.CallTimeout), ({}, gmprpc.ConnectFailed)):
        for call, is_sent in zip(lost(**settings), [True, True, False, False], strict=True):
            with pytest.raises(error) as caught:
                call.get()
            failure: Any = caught.value
            assert failure.sent is is_sent
        scripted.come_back()
    calls = lost(timeout=20)
    client.close()
    caught_all = []
    for call, is_sent in zip(calls, [True, True, False, False], strict=True):
        with pytest.raises(gmprpc.ConnectionClosed, match="was closed") as caught_one:
            call.get()
        assert caught_one.value.sent is is_sent
        caught_all.append(caught_one.value)
    # What happens to the exception of one is not seen at another's.
    assert len(set(map(id, caught_all))) == 4


def test_also_who_had_not_left_the_second_time_is_told_that_the_request_had_left(scripted: Scripted) -> None:
    client = gmprpc.Client(
        scripted.address, retry_interval=0.001, max_retry_interval=0.01, max_unsent_size=None
    ).connect()
    first = scripted.accept()
    calls = [client.call_async("large", b"x" * 20_000_000, idempotent=True), client.call_async("m", idempotent=True)]
    assert [first.receive()[2] for _ in calls] == ["large", "m"]
    first.reset()
    second = scripted.accept()  # It reads nothing: the large one has left in part, the other one not at all.
    wait_until(lambda: client.is_connected and client.connection.pending == 2)
    client.is_closed = True  # They can't go anywhere else any more.
    second.reset()
    for call in calls:
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            call.get()
        assert caught.value.sent
    client.close()


def test_an_idempotent_call_without_a_time_out_is_sent_three_times_at_most(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    # It may be what the server dies of.
    calls = ways(client, "deadly", b"x" * 1000, idempotent=True)
    for _ in range(3):
        peer = scripted.accept()
        assert [peer.receive()[2] for _ in range(2)] == ["deadly"] * 2
        peer.close()
    for call in calls:
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            call.get()
        assert caught.value.sent is True
        assert caught.value._body is None
    assert client.statistics()["resent_requests"] == 4


def test_a_server_that_hangs_up_at_once_is_not_asked_without_a_pause(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, retry_interval=0.05, max_retry_interval=0.05)
    waits: list[int] = []
    link_of(client)._backoff = Backoff(0.001, 0.001, lambda: waits.append(1) or 1.0)  # type: ignore[func-returns-value]
    accepting = gevent.spawn(scripted.hang_up_on_everybody)
    call = client.call_async("again", idempotent=True)
    wait_until(lambda: client.statistics()["connections"] > 2)
    call.cancel()
    accepting.kill()
    connections = client.statistics()["connections"]
    assert len(waits) >= connections - 1
    client.close()


@pytest.mark.parametrize("word", [b"HTTP/1.1 400 Bad Request\r\n", b"\x93\x02\xa3new\x90"], ids=["another's", "new"])
def test_a_server_that_says_something_and_hangs_up_is_not_asked_without_a_pause(
    scripted: Scripted, word: bytes
) -> None:
    service = gmprpc.Service()
    service.register(lambda: None, "new")
    client = gmprpc.Client(scripted.address, service=service, retry_interval=1000, max_retry_interval=1000)
    calls = ways(client, "m", idempotent=True)
    peer = scripted.accept()
    peer.receive()
    peer.send_bytes(word)
    peer.close()
    backoff = link_of(client)._backoff
    wait_until(lambda: backoff.failures)
    client.close()
    for call in calls:
        with pytest.raises(gmprpc.ConnectionClosed):
            call.get()
    assert client.statistics()["connections"] == 1


def test_a_server_that_hangs_up_is_asked_a_second_time_at_most_by_a_client_that_doesnt_retry(
    scripted: Scripted,
) -> None:
    client = gmprpc.Client(scripted.address, retry_interval=None)
    accepting = gevent.spawn(scripted.hang_up_on_everybody)
    for is_connected in (False, True):
        if is_connected:
            client.connect()
        for call in ways(client, "again", idempotent=True):
            with pytest.raises(gmprpc.ConnectionClosed):
                call.get()
    accepting.kill()
    assert client.statistics()["connections"] <= 6
    client.close()


def test_calls_that_had_not_left_go_out_in_their_order_before_later_ones(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    client.connect()
    peer = scripted.accept()
    large = client.call_async("large", b"x" * 20_000_000)
    first = [client.call_async("note", number) for number in range(5)]
    given_up = client.call_async("given up")
    late = client.call_async("late", timeout=0.01)
    gevent.sleep(0)
    given_up.cancel()
    with pytest.raises(gmprpc.CallTimeout):
        late.get()
    peer.reset()
    with pytest.raises(gmprpc.ConnectionClosed):
        large.get()
    then = [client.call_async("note", number) for number in range(5, 10)]
    peer = scripted.accept()
    assert [answer(peer)[3] for _ in range(10)] == [[number] for number in range(10)]
    assert [call.get() for call in first + then] == list(range(10))


def test_their_order_holds_however_often_the_connection_is_lost(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_pending=3, retry_interval=0.001, max_retry_interval=0.01).connect()
    peer = scripted.accept()
    calls = [client.call_async("note", number, idempotent=True) for number in range(3)]
    assert [peer.receive()[3] for _ in range(3)] == [[0], [1], [2]]
    link_of(client)._max_pending = 1  # So that two of them still wait when the next connection is lost.
    peer.reset()
    peer = scripted.accept()
    assert peer.receive()[3] == [0]
    peer.reset()
    peer = scripted.accept()
    # Whoever is quick to call again comes after them, too.
    caller = gevent.spawn(lambda: [client.call("note", number) for number in (3, 4)])
    wait_until(lambda: client.statistics()["pending"] == 4)
    assert [answer(peer)[3] for _ in range(5)] == [[number] for number in range(5)]
    assert [call.get() for call in calls] == [0, 1, 2]
    assert caller.get() == [3, 4]
    client.close()


def test_who_is_quick_to_call_again_lets_those_go_first_who_wait_already(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_pending=2, retry_interval=0.001, max_retry_interval=0.01).connect()
    peer = scripted.accept()
    calls = [client.call_async("slow", number, idempotent=True) for number in range(2)]
    assert [peer.receive()[3] for _ in range(2)] == [[0], [1]]
    link_of(client)._max_pending = 1
    peer.reset()
    peer = scripted.accept()
    assert peer.receive()[3] == [0]

    # It goes on amid what the loop does for the answer, when nobody else has heard of it yet.
    def call_twice() -> Any:
        assert client.connection is not None
        return client.connection.call("first"), client.call("second")

    quick = gevent.spawn(call_twice)
    assert peer.receive()[:3] == [0, 1, "first"]
    peer.send([1, 0, None, 0], [1, 1, None, "first"])
    assert [answer(peer)[2] for _ in range(2)] == ["slow", "second"]
    assert [call.get() for call in calls] == [0, 1]
    assert quick.get() == ("first", "second")
    client.close()


def test_what_had_not_left_when_the_peer_said_its_last_word_never_does(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    # It may still read, and carry out what comes: only what is not sent to it may be sent to another.
    client.connect()
    peer = scripted.accept()
    sent = [client.call_async("sent", b"x" * 10_000_000), client.call_async("first piece behind it")]
    unsent = [client.call_async("unsent", number) for number in range(3)]
    gevent.sleep(0)
    client.connection.notify("news")
    peer.shutdown()
    for call in sent[:1]:
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            call.get()
        assert caught.value.sent
    second = scripted.accept()
    methods = [answer(second)[2] for _ in range(4)]
    assert [call.get() for call in unsent] == [0, 1, 2]
    heard = [message[-2] for message in peer.receive_rest()]
    assert sorted(methods + heard) == sorted(["sent", "first piece behind it", *["unsent"] * 3, "news"])


def test_a_client_that_is_to_be_called_connects_again_by_itself(scripted: Scripted) -> None:
    service = gmprpc.Service()
    service.register(lambda: "here", "where")
    client = gmprpc.Client(
        scripted.address, service=service, keep_connected=True, retry_interval=0.001, max_retry_interval=0.01
    ).connect()
    for end in (Peer.close, Peer.reset):
        peer = scripted.accept()
        assert peer.call("where") == [1, 0, None, "here"]
        end(peer)
    scripted.go()
    scripted.come_back()
    assert scripted.accept().call("where") == [1, 0, None, "here"]
    client.close()
    assert link_of(client)._connecting is None


def test_what_cant_be_packed_cant_be_packed_without_a_connection_either(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, packer_options={"default": str})
    for is_connected in (False, True):
        if is_connected:
            client.connect()
        for way in (client.call, client.call_async, client.notify):
            with pytest.raises(TypeError, match="AsyncResult"):
                way("m", AsyncResult())
    assert client.statistics()["pending"] == 0
    client.close()


# Time-outs and cancelling.


def test_a_call_that_is_given_up_is_cancelled_at_the_server_where_that_is_asked_for(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    client.connect()
    peer = scripted.accept()

    def given_up(call: Callable[[], Any], is_told: bool) -> None:
        with pytest.raises((gmprpc.CallTimeout, gmprpc.CallCancelled, gevent.Timeout)):
            call()
        client.notify("marker")
        _, msgid, method, _ = peer.receive()
        assert method == "m"
        if is_told:
            assert peer.receive() == [2, "$/cancel", [msgid]]
        assert peer.receive() == [2, "marker", []]

    def cancelled(tell: bool) -> Any:
        call = client.call_async("m")
        assert call.cancel(tell)
        return call.get()

    def struck(**settings: Any) -> None:
        with gevent.Timeout(0.01):
            client.call("m", **settings)

    given_up(lambda: cancelled(True), True)
    given_up(lambda: cancelled(False), False)
    given_up(lambda: client.call("m", timeout=0.01), False)
    given_up(lambda: client.call("m", timeout=0.01, cancel_on_timeout=True), True)
    given_up(lambda: client.call_async("m", timeout=0.01).get(), False)
    given_up(lambda: client.call_async("m", timeout=0.01, cancel_on_timeout=True).get(), True)
    given_up(struck, False)
    given_up(lambda: struck(cancel_on_timeout=True), True)
    client.cancel_on_timeout = True
    given_up(lambda: client.call("m", timeout=0.01), True)
    given_up(lambda: client.call("m", timeout=0.01, cancel_on_timeout=False), False)
    # What has not left needs no cancelling.
    assert client.statistics()["pending"] == 0


def test_a_time_out_of_gevents_that_raises_what_a_lost_connection_does_is_still_one(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    client.connect()
    peer = scripted.accept()
    with pytest.raises(gmprpc.ConnectFailed, match="mine"), gevent.Timeout(0.01, gmprpc.ConnectFailed("mine")):
        client.call("m")
    client.notify("marker")
    assert [peer.receive()[-2] for _ in range(2)] == ["m", "marker"]


def test_cancelling_a_call_on_a_connection_that_has_gone_tells_nobody(
    scripted: Scripted, client: gmprpc.Client
) -> None:
    client.connect()
    peer = scripted.accept()
    call = client.call_async("m")
    peer.receive()
    connection = client.connection
    peer.close()
    gevent.get_hub().loop.run_callback(call.cancel)
    with pytest.raises((gmprpc.CallCancelled, gmprpc.ConnectionClosed)):
        call.get()
    wait_until(lambda: connection.is_closed)
    assert not call.cancel()


# Room.


def test_no_more_than_max_pending_calls_are_under_way_and_the_others_wait_their_turn(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_pending=2).connect()
    peer = scripted.accept()
    calls: list[Any] = [client.call_async("m", number) for number in range(4)]
    calls += [gevent.spawn(client.call, "m", number) for number in range(4, 6)]
    requests = [peer.receive(), peer.receive()]
    wait_until(lambda: client.statistics()["pending"] == 6)
    assert client.connection.pending == 2
    late = gevent.spawn(client.call, "m", timeout=0.01)
    with pytest.raises(gmprpc.CallTimeout) as caught:
        late.get()
    assert caught.value.sent is False
    killed = gevent.spawn(client.call, "m")
    gevent.sleep(0)
    killed.kill()
    assert calls[2].cancel()
    for number in (0, 1, 3, 4, 5):
        request = requests.pop(0) if requests else peer.receive()
        assert request[3] == [number]
        peer.send([1, request[1], None, number])
        assert calls[number].get() == number
    assert client.statistics()["pending"] == 0
    # All is as before: it goes straight through.
    call = client.call_async("m", 7)
    assert client.connection.pending == 1
    answer(peer)
    assert call.get() == 7
    client.close()


@pytest.mark.parametrize("way", ["cancelled", "timed out", "called on the connection itself"])
def test_whoever_makes_room_lets_the_next_one_go(scripted: Scripted, way: str) -> None:
    client = gmprpc.Client(scripted.address, max_pending=1).connect()
    peer = scripted.accept()
    if way == "timed out":
        first = client.call_async("first", timeout=0.01)
    elif way == "cancelled":
        first = client.call_async("first")
    else:
        first = client.connection.call_async("first")
    second = client.call_async("second")
    if way == "cancelled":
        first.cancel(tell=False)
        assert peer.receive()[2] == "first"
    elif way == "timed out":
        assert peer.receive()[2] == "first"
    else:
        answer(peer)
    assert answer(peer)[2] == "second"
    assert second.get() == "second"
    client.close()


def test_call_async_waits_only_when_max_pending_calls_wait_to_be_sent(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_pending=2).connect()
    peer = scripted.accept()
    made: list[Any] = []

    def make() -> None:
        for number in range(8):
            made.append(client.call_async("m", number))

    making = gevent.spawn(make)
    wait_until(lambda: client.statistics()["pending"] == 5)
    # Two are under way, two wait to be sent, and whoever makes the fifth waits with it.
    assert len(made) == 4
    for _ in range(3):
        answer(peer)
    wait_until(lambda: len(made) == 7)
    # In the hub nobody may wait.
    from_hub: list[Any] = []
    gevent.get_hub().loop.run_callback(lambda: from_hub.append(client.call_async("m", 8)))
    wait_until(lambda: from_hub)
    assert not making.ready()
    for _ in range(6):
        answer(peer)
    making.join()
    assert sorted(call.get() for call in made + from_hub) == list(range(9))

    # Whose time is up meanwhile is told which it was.
    for _ in range(4):
        client.call_async("m")
    client.timeout = 0.01
    with pytest.raises(gmprpc.CallTimeout, match="the client's timeout"):
        client.call_async("late").get()
    client.timeout = None
    for _ in range(4):
        answer(peer)
    wait_until(lambda: client.statistics()["pending"] == 0)

    # Whoever is killed meanwhile has not called.
    for number in range(4):
        client.call_async("m", number)
    killed = gevent.spawn(client.call_async, "never")
    late = gevent.spawn(client.call_async, "late", timeout=0.01)
    with pytest.raises(gmprpc.CallTimeout):
        late.get().get()
    killed.kill()
    assert [answer(peer)[2] for _ in range(4)] == ["m"] * 4
    wait_until(lambda: client.statistics()["pending"] == 0)
    client.close()


def test_who_has_much_unsent_waits_and_so_does_a_notification(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_unsent_size=1000, timeout=20).connect()
    peer = scripted.accept()
    large = client.call_async("large", b"x" * 20_000_000)
    gevent.sleep(0)
    waiting: list[Any] = [client.call_async("m"), gevent.spawn(client.call, "m"), gevent.spawn(client.notify, "n")]
    with pytest.raises(gmprpc.CallTimeout) as caught:
        client.notify("never", timeout=0.01)
    assert str(caught.value) == "'never' could not be sent within 0.01 s (the call's timeout)"
    # In the hub nobody may wait.
    gevent.get_hub().loop.run_callback(client.notify, "n")
    gevent.sleep(0)
    assert client.connection.pending == 1
    heard = Counter(peer.receive()[-2] for _ in range(5))
    assert heard == {"large": 1, "m": 2, "n": 2}
    waiting[2].get()
    for msgid in range(3):
        peer.send([1, msgid, None, msgid])
    assert [large.get(), waiting[0].get(), waiting[1].get()] == [0, 1, 2]
    client.close()


def test_who_never_lets_the_loop_run_is_kept_from_piling_up_what_is_unsent(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_unsent_size=1000, timeout=20).connect()
    peer = scripted.accept()
    sizes: list[int] = []

    def unsent_size() -> int:
        assert client.connection is not None
        return client.connection.unsent_size + len(b"".join(client.connection._out))

    def notify() -> None:
        for number in range(2000):
            client.notify("n", number, b"x" * 10_000)
            sizes.append(unsent_size())

    notifying = gevent.spawn(notify)
    assert [peer.receive()[2][0] for _ in range(2000)] == list(range(2000))
    notifying.get()
    assert max(sizes) < 100_000
    # Nor does all that has waited for room go at once when there is some.
    calls = [client.call_async("large", b"x" * 20_000_000)]
    gevent.sleep(0)
    calls += [client.call_async("m", b"x" * 100_000) for _ in range(100)]
    assert client.connection.pending == 1
    for msgid in range(101):
        assert peer.receive()[1] == msgid
        if msgid > 0:
            assert unsent_size() < 300_000
        peer.send([1, msgid, None, msgid])
    assert [call.get() for call in calls] == list(range(101))
    client.close()


def test_a_connection_lost_with_calls_waiting_for_room_is_made_again_for_them(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, max_pending=1, retry_interval=0.001, max_retry_interval=0.01).connect()
    first = scripted.accept()
    calls: list[Any] = [client.call_async("m", number) for number in range(2)]
    calls.append(gevent.spawn(client.call, "m", 2))
    first.receive()
    first.reset()
    with pytest.raises(gmprpc.ConnectionClosed):
        calls[0].get()
    second = scripted.accept()
    assert [answer(second)[3], answer(second)[3]] == [[1], [2]]
    assert [call.get() for call in calls[1:]] == [1, 2]
    client.close()


# Callbacks and hooks.


def test_calls_may_be_made_from_callbacks_and_hooks(scripted: Scripted) -> None:
    made: list[Any] = []
    client = gmprpc.Client(
        scripted.address, retry_interval=0.001, on_error=lambda client, exc: made.append(client.call("from hook"))
    )
    call = client.call_async("m")
    call.rawlink(lambda call: made.append(client.call_async("from link")))
    peer = scripted.accept()
    answer(peer)
    assert answer(peer)[2] == "from link"
    assert made[0].get() == "from link"
    peer.reset()
    assert answer(scripted.accept())[2] == "from hook"
    wait_until(lambda: made[1:] == ["from hook"])
    client.close()


def test_a_call_that_would_block_the_hub_is_refused_there(scripted: Scripted, client: gmprpc.Client) -> None:
    refused = AsyncResult()

    def call() -> None:
        try:
            client.call("m")
        except RuntimeError as exc:
            refused.set(exc)

    gevent.get_hub().loop.run_callback(call)
    assert "call_async" in str(refused.get())


# The end.


def test_close_ends_whatever_waits(scripted: Scripted) -> None:
    scripted.go()
    client = gmprpc.Client(scripted.address, max_pending=4, retry_interval=0.001, max_retry_interval=0.01)
    for is_connected in (False, True):
        if is_connected:
            scripted.come_back()
            client.connect()
        waiting = [
            *ways(client, "m"),
            *ways(client, "m", idempotent=True),
            *ways(client, "m", timeout=20),
            gevent.spawn(client.call_async, "m"),
        ]
        wait_until(lambda: client.statistics()["pending"] == 7)
        client.close()
        for call in waiting:
            with pytest.raises(gmprpc.ConnectionClosed):
                outcome = call.get()
                outcome.get()
        assert client.statistics()["pending"] == 0
        with pytest.raises(gmprpc.ConnectionClosed, match="the client is closed"):
            client.call("m")


def test_close_may_be_called_in_the_hub_and_waits_for_nobody_there(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address).connect()
    call = client.call_async("m")
    closed = AsyncResult()
    gevent.get_hub().loop.run_callback(lambda: closed.set(client.close()))  # type: ignore[func-returns-value]
    closed.get()
    with pytest.raises(gmprpc.ConnectionClosed):
        call.get()
    assert [message[2] for message in scripted.accept().receive_rest()] == ["m"]


def test_close_waits_for_no_hook_and_may_be_called_in_one(scripted: Scripted) -> None:
    begun, ended = Event(), Event()

    def on_error(client: gmprpc.Client, exc: Exception) -> None:
        begun.set()
        gevent.spawn(client.close).get()  # Whoever closes is waited for: who closes mustn't wait for this.
        client.close()
        ended.set()

    client = gmprpc.Client(scripted.address, on_error=on_error).connect()
    scripted.accept().reset()
    begun.wait()
    client.close()
    ended.wait()


def test_a_call_amid_which_the_client_is_closed_is_not_sent_again_after_connect(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address).connect()
    first = scripted.accept()
    waiting = ways(client, "m", idempotent=True)
    wait_until(lambda: client.statistics()["pending"] == 2)
    closing = gevent.spawn(client.close)
    gevent.sleep(0)
    connecting = gevent.spawn(client.connect)
    first.close()
    closing.get()
    for call in waiting:
        with pytest.raises(gmprpc.ConnectionClosed):
            call.get()
    second = scripted.accept()
    connecting.get()
    client.notify("marker")
    assert second.receive() == [2, "marker", []]
    client.close()


# Threads.


def in_thread(function: Callable[[], Any]) -> AsyncResult:
    """What ``function()`` returns in a native thread of its own."""
    result = AsyncResult()
    loop = gevent.get_hub().loop

    def run() -> None:
        try:
            value = function()
        except BaseException as exc:
            loop.run_callback_threadsafe(result.set_exception, exc)
        else:
            loop.run_callback_threadsafe(result.set, value)

    start_new_thread(run, ())
    return result


def test_native_threads_share_a_client_each_with_a_connection(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address, timeout=20)

    def work() -> int:
        greenlets = [gevent.spawn(client.call, "echo", number) for number in range(50)]
        calls = [client.call_async("echo", number) for number in range(50)]
        gevent.joinall(greenlets)
        assert [greenlet.value for greenlet in greenlets] == [call.get() for call in calls] == list(range(50))
        return threading.get_ident()

    threads = [in_thread(work) for _ in range(3)]
    work()
    assert len({thread.get() for thread in threads}) == 3
    assert client.statistics()["connections"] == 4
    # A thread that ends closes its connection.
    wait_until(lambda: len(server.connections) == 1)
    assert client.statistics()["open_connections"] == 1
    client.close()
    wait_until(lambda: not server.connections)


def test_close_closes_the_connections_of_other_threads(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address, timeout=20)
    outcome = in_thread(lambda: client.call("hold", 1))
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        outcome.get()
    server.service.methods["release"]()
    wait_until(lambda: not server.connections)
    with pytest.raises(gmprpc.ConnectionClosed, match="the client is closed"):
        in_thread(lambda: client.call("echo", 1)).get()
    client.connect()
    assert in_thread(lambda: client.call("echo", 1)).get() == 1
    client.close()


def test_threads_that_have_ended_leave_nothing_behind(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address, timeout=20)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert in_thread(lambda: client.call("echo", 1)).get() == 1
    wait_until(lambda: not server.connections)
    assert not client._links.all()
    collected()
    # Of the loops of threads that have ended gevent keeps what it needs to wake them up, until they are collected.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    client.close()


def test_a_thread_that_ends_does_not_connect_again(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address, keep_connected=True)
    links: list[Link] = []
    in_thread(lambda: links.append(link_of(client.connect()))).get()
    wait_until(lambda: not client._links.all())
    assert links[0]._connecting is None
    assert client.statistics()["connections"] == 1
    wait_until(lambda: not server.connections)


@pytest.mark.parametrize("is_destroyed", [False, True])
def test_a_thread_that_ends_while_it_connects_leaves_no_socket_behind(is_destroyed: bool) -> None:
    # TLS is asked of somebody who says nothing.
    silent = listening(("127.0.0.1", 0))
    client = gmprpc.Client(silent.getsockname(), ssl_context=ssl.create_default_context())

    def accept() -> None:
        with silent.accept()[0] as peer:
            while peer.recv(65536):
                pass

    def connect() -> None:
        client.call_async("m")
        wait_until(lambda: len(link_of(client)._opened) == 2)
        if is_destroyed:
            gevent.get_hub().destroy(destroy_loop=True)

    accepting = gevent.spawn(accept)
    in_thread(connect).get()
    accepting.get()
    assert not client._links.all()
    silent.close()


# Forks.

FORK = """
import os, sys, gevent, gmprpc
gevent.get_hub().exception_stream = None  # The child's copies of greenlets fail, as they should.
client = gmprpc.Client(("127.0.0.1", int(sys.argv[1])), timeout=20)
client.call("echo", 1)
calls = [gevent.spawn(client.call, "hold", os.getpid(), idempotent=True), client.call_async("hold", os.getpid())]
queued = gmprpc.Client(("localhost", int(sys.argv[1])), timeout=20)
calls.append(queued.call_async("note", "queued"))
gevent.sleep(0)
if sys.argv[2] == "connecting":
    pass
else:
    queued.call("echo", 1)
    calls.append(client.call_async("note", "unsent"))
pid = os.fork()
if pid == 0:
    assert client.call("echo", 2) == 2
    assert queued.call("echo", 2) == 2
    for call in calls:
        try:
            call.get()
            assert call is calls[2] and sys.argv[2] != "connecting", call
        except gmprpc.ConnectionClosed as exc:
            assert "forked" in str(exc) or "forked" in str(exc.__cause__), (exc, exc.__cause__)
    client.close()
    queued.close()
    print("child", flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert client.call("release") is None
for call in calls:
    call.get()
assert client.call("echo", 3) == 3
client.close()
queued.close()
print("parent", status, flush=True)
"""


@pytest.mark.parametrize("state", ["connected", "connecting"])
def test_a_child_opens_its_own_connection_and_sends_nothing_that_is_its_parents(
    service: gmprpc.Service, server: gmprpc.Server, state: str
) -> None:
    noted: list[str] = []
    service.register(noted.append, "note")
    with Program(*FORKING_PYTHON, "-c", FORK, str(server.server_port), state) as program:
        assert program.lines() == ["child", "parent 0"]
        assert program.wait() == 0
    assert noted == ["queued", "unsent"] if state == "connected" else ["queued"]


# Pings.


def test_a_quiet_connection_is_asked_whether_its_server_is_there_and_any_answer_will_do(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, ping_interval=0.01).connect()
    peer = scripted.accept()
    for _ in range(3):
        _, msgid, method, params = peer.receive()
        assert (method, params) == ("$/health", [])
        peer.send([1, msgid, 'No such method "$/health" found', None])
    # Not while something is under way: whoever is busy may take its time.
    call = client.call_async("m")
    while (request := peer.receive())[2] != "m":
        peer.send([1, request[1], None, "SERVING"])
    gevent.sleep(0.05)
    peer.send([1, request[1], None, 5])
    assert call.get() == 5
    assert client.connection.is_open
    assert peer.receive()[2] == "$/health"
    client.close()


def test_a_server_that_answers_no_ping_is_given_up(scripted: Scripted) -> None:
    errors: list[Exception] = []
    client = gmprpc.Client(
        scripted.address, ping_interval=0.01, on_error=lambda client, exc: errors.append(exc)
    ).connect()
    peer = scripted.accept()
    assert peer.receive()[2] == "$/health"
    wait_until(lambda: errors)
    assert "no answer to a ping within 0.01 s" in str(errors[0])
    assert not client.is_connected
    client.close()


def test_a_connection_that_is_still_sending_is_asked_nothing(scripted: Scripted) -> None:
    client = gmprpc.Client(scripted.address, ping_interval=0.01).connect()
    peer = scripted.accept()
    client.notify("large", b"x" * 20_000_000)
    assert client.connection is not None
    gevent.sleep(0.1)
    assert client.is_connected
    assert client.connection.pending == 0
    assert peer.receive()[1] == "large"
    assert peer.receive()[2] == "$/health"
    client.close()


def test_there_is_no_ping_unless_it_is_asked_for(server: gmprpc.Server) -> None:
    seen: list[str] = []
    with (
        gmprpc.Server(("127.0.0.1", 0), on_dispatch=lambda connection, message: seen.append(message[2])) as server,
        gmprpc.Client(server.address) as client,
    ):
        gevent.sleep(0.05)
        assert client.is_connected
    assert not seen


@pytest.mark.parametrize(
    "settings",
    [{"ping_interval": 0}, {"ping_interval": -1}, {"retry_interval": -1}, {"max_retry_interval": None}]
    + [{"max_pending": 0}, {"max_pending": 1.5}, {"connect_timeout": "5"}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        gmprpc.Client(("127.0.0.1", 1), **settings)
