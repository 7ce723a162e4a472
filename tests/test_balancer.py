"""Many endpoints, some of which fail: every call ends once, in what one of them answers or in the documented error."""

from __future__ import annotations

import gc
import os
import signal
import ssl
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
import trustme
from gevent import socket
from gevent.event import AsyncResult, Event
from gevent.server import StreamServer
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc.backoff import Backoff
from gmprpc.pool import EndpointClient

from .helpers import Peer, listening, wait_until
from .programs import FORKING_PYTHON, Program


class Place:
    """A server that may be down, at an address that it keeps."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.address = f"unix:{path}"
        self.log: list[Any] = []
        self.release = Event()
        self.server: Any = None
        self.start()

    def start(self) -> None:
        self.release = Event()
        self.server = gmprpc.Server(self.address)
        self.server.register(lambda: self.name, "who")
        self.server.register(self.hold, "hold")
        self.server.register(self.fail, "fail")
        self.server.register(self.log.append, "log")
        self.server.start()

    def stop(self) -> None:
        """Break off, as if the process had been killed."""
        self.server.stop(timeout=0)

    def hold(self, value: Any = None) -> Any:
        self.log.append(value)
        try:
            self.release.wait()
        except gmprpc.CallCancelled:
            self.log.append(f"{value} cancelled")
            raise
        return [self.name, value]

    def fail(self) -> None:
        raise ValueError("no")

    @property
    def connections(self) -> int:
        return self.server.statistics()["open_connections"]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Place]]:
    """Three servers, all up."""
    places = [Place(tmp_path / name) for name in "abc"]
    yield places
    for place in places:
        place.stop()


@pytest.fixture
def make() -> Iterator[Callable[..., gmprpc.Balancer]]:
    """Balancers that are closed at the end, and try again quickly."""
    made = []

    def make(addresses: Any, **options: Any) -> gmprpc.Balancer:
        if isinstance(addresses, list):
            addresses = [getattr(address, "address", address) for address in addresses]
        options = {"retry_interval": 0.001, "max_retry_interval": 0.01, **options}
        made.append(gmprpc.Balancer(addresses, **options))
        return made[-1]

    yield make
    for balancer in made:
        balancer.close()
        assert balancer.statistics()["pending"] == 0


def all_usable(balancer: gmprpc.Balancer) -> gmprpc.Balancer:
    """``balancer``, when it has found out that every endpoint can be called."""
    balancer.connect()
    wait_until(lambda: usable(balancer) == len(balancer.endpoints))
    return balancer


def none_usable(balancer: gmprpc.Balancer) -> gmprpc.Balancer:
    """``balancer``, when it has found out that no endpoint can be called."""
    with suppress(gmprpc.CallTimeout):
        balancer.call("who", timeout=0)
    wait_until(lambda: balancer.endpoints and all(endpoint.error for endpoint in balancer.endpoints))
    return balancer


def usable(balancer: gmprpc.Balancer) -> int:
    return sum(endpoint.is_usable for endpoint in balancer.endpoints)


def has_had_late_answers(balancer: gmprpc.Balancer, number: int) -> bool:
    return balancer.statistics()["late_answers"] == number


def spawn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> AsyncResult[Any]:
    """What ``function`` returns or raises, in a greenlet of its own; gevent would show what it raises."""
    result: AsyncResult[Any] = AsyncResult()

    def run() -> None:
        try:
            result.set(function(*args, **kwargs))
        except Exception as exc:
            result.set_exception(exc)

    gevent.spawn(run)
    return result


def name_of(held: Any) -> str:
    """Who has answered ``hold``."""
    return held.get()[0]


def value_of(held: Any) -> Any:
    """What ``hold`` was called with."""
    return held.get()[1]


def greenlets() -> set[gevent.Greenlet]:
    return {thing for thing in gc.get_objects() if isinstance(thing, gevent.Greenlet) and not thing.dead}


# Calling.


def test_it_calls_like_a_client(places: list[Place], make: Any) -> None:
    balancer = make(places)
    assert balancer.call("who") in "abc"
    assert balancer.call_async("who").get() in "abc"
    assert balancer.proxy.who() in "abc"
    balancer.notify("log", "hello")
    wait_until(lambda: [line for place in places for line in place.log] == ["hello"])
    with pytest.raises(gmprpc.MethodNotFound):
        balancer.call("nosuch")
    with pytest.raises(gmprpc.RemoteError, match="ValueError: no"):
        balancer.call_async("fail").get()
    for call in balancer.call, balancer.call_async, balancer.notify:
        with pytest.raises(TypeError):
            call("who", object())
    assert balancer.statistics()["ejections"] == 0
    assert balancer.statistics()["pending"] == 0


def test_nothing_happens_before_the_first_call(places: list[Place], make: Any) -> None:
    balancer = make(places)
    gevent.sleep(0)
    assert balancer.endpoints == []
    assert [place.server.statistics()["connections"] for place in places] == [0, 0, 0]


def test_calls_go_to_all_endpoints(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    assert {balancer.call("who") for _ in range(100)} == set("abc")
    assert {call.get() for call in [balancer.call_async("who") for _ in range(100)]} == set("abc")


def test_an_address_that_is_named_twice_is_one_endpoint(places: list[Place], make: Any) -> None:
    balancer = all_usable(make([places[0], places[1], places[0].address]))
    assert len(balancer.endpoints) == 2
    assert places[0].connections == 1


def test_the_less_busy_endpoint_is_called(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:2]))
    held = [balancer.call_async("hold", number) for number in range(10)]
    wait_until(lambda: sum(len(place.log) for place in places) == 10)
    assert [len(place.log) for place in places] == [5, 5, 0]
    places[0].release.set()
    wait_until(lambda: sum(call.ready() for call in held) == 5)
    assert {balancer.call("who") for _ in range(20)} == {"a"}
    assert sorted(endpoint.pending for endpoint in balancer.endpoints) == [0, 5]
    places[1].release.set()
    assert sorted(value_of(call) for call in held) == list(range(10))


def test_errors_that_are_answers_eject_nobody(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    for _ in range(20):
        with pytest.raises(gmprpc.RemoteError):
            balancer.call("fail")
    assert usable(balancer) == 3


def test_the_hub_is_not_blocked(places: list[Place], make: Any) -> None:
    balancer = make(places)
    results: AsyncResult[Any] = AsyncResult()

    def call_in_hub() -> None:
        try:
            balancer.call("who")
        except RuntimeError as exc:
            results.set([str(exc), balancer.call_async("who")])

    gevent.get_hub().loop.run_callback(call_in_hub)
    outcome: Any = results.get()
    error, call = outcome
    assert "would block the hub" in error
    assert call.get() in "abc"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probe": "ping"}, "probe has to be"),
        ({"retry_interval": 0}, "retry_interval has to be"),
        ({"retry_interval": None}, "retry_interval has to be"),
        ({"max_retry_interval": -1}, "max_retry_interval has to be"),
        ({"resolve_interval": 0}, "resolve_interval has to be"),
        ({"timeout": "5"}, "timeout has to be"),
        ({"connect_timeout": -1}, "connect_timeout has to be"),
        ({"max_message_size": 0}, "max_message_size has to be"),
        ({"addresses": []}, "at least one address"),
        ({"addresses": "nonsense"}, "is no address"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gmprpc.Balancer(**{"addresses": ["127.0.0.1:1"], **options})


@pytest.mark.parametrize("addresses", [["127.0.0.1:1"], "localhost:1", list])
def test_an_unknown_keyword_is_refused_at_once(addresses: Any) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        gmprpc.Balancer(addresses, nonsense=1)
    balancer = gmprpc.Balancer(addresses)
    with pytest.raises(ValueError, match="timeout"):
        balancer.call("who", timeout=-1)


# Endpoints that fail.


def test_an_endpoint_that_is_down_costs_nobody_anything(places: list[Place], make: Any) -> None:
    places[0].stop()
    balancer = make(places)
    assert {balancer.call("who", timeout=5) for _ in range(50)} <= set("bc")
    wait_until(lambda: usable(balancer) == 2)
    status = balancer.endpoints[0]
    assert status.address == places[0].address
    assert not status.is_usable
    assert isinstance(status.error, gmprpc.ConnectFailed)


def test_an_endpoint_is_called_as_soon_as_it_is_back(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    for _ in range(3):
        places[0].stop()
        assert {balancer.call("who") for _ in range(50)} == set("bc")
        places[0].start()
        wait_until(lambda: usable(balancer) == 3)
        assert "a" in {balancer.call("who") for _ in range(100)}


def test_an_idle_connection_that_ends_costs_no_call(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    for place in places:
        place.stop()
        place.start()
    assert balancer.call("who", timeout=5) in "abc"
    assert balancer.statistics()["ejections"] == 0


@pytest.mark.parametrize("idempotent", [False, True])
def test_what_was_sent_is_sent_again_only_if_it_may_be(places: list[Place], make: Any, idempotent: bool) -> None:
    balancer = all_usable(make(places))
    call = spawn(balancer.call, "hold", 1, idempotent=idempotent)
    call_async = balancer.call_async("hold", 2, idempotent=idempotent)
    wait_until(lambda: sum(len(place.log) for place in places) == 2)
    # Least pending: they are at two places.
    victims = [place for place in places if place.log]
    survivor = next(place for place in places if not place.log)
    for victim in victims:
        victim.stop()
    if idempotent:
        survivor.release.set()
        assert call.get() == [survivor.name, 1]
        assert call_async.get() == [survivor.name, 2]
        assert sorted(survivor.log) == [1, 2]
        assert balancer.statistics()["moved_calls"] == 2
    else:
        for failed in call, call_async:
            with pytest.raises(gmprpc.ConnectionClosed) as raised:
                failed.get()
            assert raised.value.sent
            assert type(raised.value) is gmprpc.ConnectionClosed
        assert survivor.log == []
        assert balancer.statistics()["moved_calls"] == 0
    assert balancer.statistics()["ejections"] == 2


def test_what_had_not_left_goes_elsewhere_unseen(places: list[Place], make: Any) -> None:
    with listening(("127.0.0.1", 0)) as deaf:
        addresses = [deaf.getsockname()]
        reported: list[Exception] = []
        options = {"on_error": lambda client, exc: reported.append(exc)}
        balancer = make(lambda: addresses, probe="connect", resolve_interval=0.001, **options)
        balancer.connect()
        sock, _ = deaf.accept()
        filling = balancer.call_async("echo", bytes(10_000_000))
        behind = [balancer.call_async("hold", 1), spawn(balancer.call, "hold", 2)]
        gevent.sleep(0)
        addresses.append(places[0].address)
        addresses.remove(deaf.getsockname())
        gevent.sleep(0.005)  # More than resolve_interval: now a call has them looked up.
        behind.append(balancer.call_async("hold", 3))
        wait_until(lambda: [endpoint.address for endpoint in balancer.endpoints] == [places[0].address])
        deaf.close()
        Peer(sock).reset()
        with pytest.raises(gmprpc.ConnectionClosed) as raised:
            filling.get()
        assert raised.value.sent
        places[0].release.set()
        assert [call.get() for call in behind] == [["a", 1], ["a", 2], ["a", 3]]
        wait_until(lambda: reported)
        # Of the connection, and of nothing else.
        assert [type(exc) for exc in reported] == [gmprpc.ConnectionClosed]


def test_a_notification_goes_to_one_that_is_there(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    places[0].stop()
    places[1].stop()
    for number in range(10):
        balancer.notify("log", number)
    wait_until(lambda: len(places[2].log) == 10)


def test_three_calls_without_an_answer_eject(places: list[Place], make: Any) -> None:
    balancer = make(places[:1])
    balancer.connect()
    for _ in range(2):
        with pytest.raises(gmprpc.CallTimeout):
            balancer.call("hold", timeout=0.001)
    assert balancer.call("who") == "a"  # It has answered: counted from the beginning again.
    with pytest.raises(gmprpc.CallTimeout):
        balancer.call("hold", timeout=0.001)
    with pytest.raises(gmprpc.CallTimeout):
        balancer.call_async("hold", timeout=0.001).get()
    assert balancer.statistics()["ejections"] == 0
    with pytest.raises(gmprpc.RemoteError):
        balancer.call_async("fail").get()
    for _ in range(3):
        with pytest.raises(gmprpc.CallTimeout):
            balancer.call_async("hold", timeout=0.001).get()
    assert balancer.statistics()["ejections"] == 1
    assert isinstance(balancer.endpoints[0].error, gmprpc.CallTimeout)
    assert balancer.call("who", timeout=5) == "a"  # It answers when it is asked for its health.
    # And is called over a connection that isn't the one on which nothing came.
    assert places[0].server.statistics()["connections"] == 2


def test_one_that_is_only_slow_is_not_ejected(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:1]))
    for number in range(5):
        places[0].release.clear()
        with pytest.raises(gmprpc.CallTimeout):
            balancer.call("hold", timeout=0.001)
        places[0].release.set()
        wait_until(partial(has_had_late_answers, balancer, number + 1))
    assert balancer.statistics()["ejections"] == 0


def test_calls_that_were_made_before_its_return_eject_nobody(places: list[Place], make: Any) -> None:
    balancer = make(places[:1])
    balancer.connect()
    slow = [balancer.call_async("hold", timeout=0.3) for _ in range(5)]
    for _ in range(3):
        with pytest.raises(gmprpc.CallTimeout):
            balancer.call("hold", timeout=0.001)
    wait_until(lambda: usable(balancer) == 1)
    gevent.wait(slow)
    assert balancer.statistics()["ejections"] == 1


def test_a_call_that_still_waits_keeps_its_connection(places: list[Place], make: Any) -> None:
    balancer = make(places[:1])
    held = balancer.call_async("hold", 1)
    for _ in range(3):
        with pytest.raises(gmprpc.CallTimeout):
            balancer.call("hold", timeout=0.001)
    assert balancer.call("who") == "a"
    places[0].release.set()
    assert held.get() == ["a", 1]
    assert places[0].server.statistics()["connections"] == 1


# No endpoint at all.


def test_calls_wait_for_the_first_to_come_back(places: list[Place], make: Any) -> None:
    for place in places:
        place.stop()
    balancer = make(places)
    waiting = [spawn(balancer.call, "who"), spawn(balancer.call, "who", timeout=20)]
    waiting_async = [balancer.call_async("who"), balancer.call_async("who", timeout=20)]
    notifying = spawn(balancer.notify, "log", 1)
    connecting = spawn(balancer.connect)
    wait_until(lambda: balancer.statistics()["failed_probes"] >= 9)
    assert balancer.statistics()["pending"] == 6
    assert not any(call.ready() for call in [*waiting, *waiting_async, notifying, connecting])
    places[1].start()
    assert [call.get() for call in [*waiting, *waiting_async]] == ["b"] * 4
    notifying.get()
    assert connecting.get() is balancer
    wait_until(lambda: places[1].log == [1])


def test_a_call_waits_no_longer_than_its_timeout(places: list[Place], make: Any) -> None:
    for place in places:
        place.stop()
    balancer = none_usable(make(places, timeout=0.05))
    for call in balancer.call, lambda *args: balancer.call_async(*args).get():
        with pytest.raises(gmprpc.CallTimeout) as raised:
            call("who")
        assert (raised.value.method, raised.value.timeout) == ("who", 0.05)
        assert isinstance(raised.value.__cause__, gmprpc.ConnectFailed)


def test_a_call_without_timeout_waits_for_connect_timeout(places: list[Place], make: Any) -> None:
    for place in places:
        place.stop()
    balancer = none_usable(make(places, connect_timeout=0.05))
    for call in (
        lambda: balancer.call("who"),
        lambda: balancer.call_async("who").get(),
        lambda: balancer.notify("log", 1),
        balancer.connect,
    ):
        with pytest.raises(gmprpc.ConnectFailed, match=r"no endpoint was usable within 0\.05 s: can't conn") as raised:
            call()
        assert not raised.value.sent
        assert isinstance(raised.value.__cause__, gmprpc.ConnectFailed)


def test_the_timeout_covers_waiting_and_the_answer(places: list[Place], make: Any) -> None:
    places[0].stop()
    balancer = make(places[:1])
    call = spawn(balancer.call, "hold", timeout=0.2)
    wait_until(lambda: balancer.statistics()["failed_probes"] >= 2)
    places[0].start()
    with pytest.raises(gmprpc.CallTimeout, match=r"within 0\.2 s"):
        call.get()


def test_a_failed_with_leaves_nothing_behind(places: list[Place], make: Any) -> None:
    for place in places:
        place.stop()
    before = greenlets()
    with pytest.raises(gmprpc.ConnectFailed), make(places, connect_timeout=0.02):
        raise AssertionError("there is nobody")
    gevent.sleep(0)
    wait_until(lambda: greenlets() <= before)


def test_when_all_fail_they_are_not_stormed(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every wait is the longest possible one: 0.2, 0.4, 0.8 s and so on after each failure.
    monkeypatch.setattr("gmprpc.pool.Backoff", partial(Backoff, random=lambda: 1.0))
    addresses = [f"unix:{tmp_path / str(number)}" for number in range(5)]
    balancer = make(addresses, retry_interval=0.1, max_retry_interval=5.0)
    calls = [spawn(balancer.call, "who", timeout=0.5) for _ in range(100)]
    gevent.wait(calls)
    assert {type(call.exception) for call in calls} == {gmprpc.CallTimeout}
    assert 5 <= balancer.statistics()["probes"] <= 20


def test_one_that_accepts_and_closes_is_not_stormed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmprpc.pool.Backoff", partial(Backoff, random=lambda: 1.0))
    accepted = []

    def accept(sock: Any, _: Any) -> None:
        accepted.append(1)
        sock.close()

    server = StreamServer(("127.0.0.1", 0), accept)
    server.start()
    try:
        balancer = make([server.address], probe="connect", retry_interval=0.1, max_retry_interval=5.0)
        calls = [spawn(balancer.call, "who", timeout=0.5, idempotent=True) for _ in range(20)]
        gevent.wait(calls)
        assert {type(call.exception) for call in calls} == {gmprpc.CallTimeout}
        assert 1 <= len(accepted) <= 4
    finally:
        server.stop()


# Probes.


def test_one_that_is_not_serving_gets_no_calls_until_it_is(places: list[Place], make: Any) -> None:
    places[0].server.is_healthy = False
    balancer = make(places[:2])
    assert {balancer.call("who") for _ in range(50)} == {"b"}
    wait_until(lambda: balancer.endpoints[0].error is not None)
    assert "answers NOT_SERVING" in str(balancer.endpoints[0].error)
    places[0].server.is_healthy = True
    wait_until(lambda: usable(balancer) == 2)
    assert {balancer.call("who") for _ in range(50)} == {"a", "b"}


def test_endpoints_are_asked_for_their_health_while_they_are_called(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:2], resolve_interval=0.01))
    held = [balancer.call_async("hold", number) for number in range(2)]
    places[0].server.is_healthy = False
    wait_until(lambda: balancer.call("who") and usable(balancer) == 1)
    assert {balancer.call("who") for _ in range(50)} == {"b"}
    places[0].release.set()
    places[1].release.set()
    assert sorted(name_of(call) for call in held) == ["a", "b"]  # It answers what it had.


def test_one_that_does_not_answer_is_asked_only_once_at_a_time(places: list[Place], make: Any) -> None:
    asked = []
    balancer = all_usable(make(places[:1], resolve_interval=0.001))
    gevent.sleep(0.01)

    def answer() -> None:
        asked.append(1)
        places[0].release.wait()

    places[0].server._table["$/health"] = answer
    wait_until(lambda: balancer.call("who") and asked)
    for _ in range(20):
        gevent.sleep(0.001)
        balancer.call("who")
    assert asked == [1]
    places[0].release.set()
    wait_until(lambda: balancer.call("who") and len(asked) > 2)
    assert balancer.statistics()["ejections"] == 0


def test_any_other_answer_to_the_question_means_alive(places: list[Place], make: Any) -> None:
    places[0].server._table["$/health"] = lambda: None
    places[1].server._table["$/health"] = lambda: {"not": "serving"}
    del places[2].server._table["$/health"]
    balancer = all_usable(make(places))
    assert {balancer.call("who") for _ in range(100)} == set("abc")


def test_a_probe_that_hangs_has_a_timeout(places: list[Place], make: Any) -> None:
    with listening(("127.0.0.1", 0)) as deaf:
        balancer = make([deaf.getsockname(), places[0]], connect_timeout=0.1)
        assert {balancer.call("who", timeout=20) for _ in range(50)} == {"a"}
        wait_until(lambda: balancer.endpoints[0].error is not None)
        assert "gave no sign of life within 0.1 s" in str(balancer.endpoints[0].error)
        # Each probe has a connection of its own: the one before may be dead.
        socks = [deaf.accept()[0] for _ in range(3)]
        assert {balancer.call("who", timeout=20) for _ in range(50)} == {"a"}
        for sock in socks:
            sock.close()


def test_with_a_probe_that_only_connects_nobody_is_asked(places: list[Place], make: Any) -> None:
    asked = []

    def answer() -> str:
        asked.append(1)
        return "NOT_SERVING"

    for place in places:
        place.server._table["$/health"] = answer
    balancer = all_usable(make(places, probe="connect", resolve_interval=0.001))
    for _ in range(20):
        balancer.call("who")
    gevent.sleep(0.002)
    balancer.call("who")
    assert asked == []


# Addresses that change.


def test_the_list_may_change_while_calls_are_in_flight(places: list[Place], make: Any) -> None:
    addresses = [places[0].address, places[1].address]
    balancer = all_usable(make(lambda: list(addresses), resolve_interval=0.01))
    held = [balancer.call_async("hold", number) for number in range(6)]
    addresses[:] = [places[1].address, places[2].address]

    def known() -> set[Any]:
        return {endpoint.address for endpoint in balancer.endpoints}

    wait_until(lambda: balancer.call("who") and known() == set(addresses) and usable(balancer) == 2)
    assert {balancer.call("who") for _ in range(50)} == {"c"}  # It's idle.
    assert places[0].connections == 1
    assert balancer.statistics()["pending"] == 6
    places[0].release.set()
    places[1].release.set()
    assert Counter(name_of(call) for call in held) == {"a": 3, "b": 3}
    wait_until(lambda: places[0].connections == 0)
    assert places[1].server.statistics()["connections"] == 1
    assert balancer.statistics()["connections"] == 3  # Also what the one that is gone has counted.


def test_what_was_counted_stays_counted_while_it_closes(
    places: list[Place], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer = all_usable(make(places))
    balancer.call("who")
    before = balancer.statistics()
    go = Event()
    close = EndpointClient.close

    def close_slowly(client: EndpointClient) -> None:
        go.wait()
        close(client)

    monkeypatch.setattr(EndpointClient, "close", close_slowly)
    closing = gevent.spawn(balancer.close)
    wait_until(lambda: all(place.connections == 0 for place in places))
    during = balancer.statistics()
    balancer.connect()  # Another may be made meanwhile.
    wait_until(lambda: usable(balancer) == 3)
    reopened = balancer.statistics()
    go.set()
    closing.get()
    balancer.close()
    after = balancer.statistics()
    assert before["connections"] == during["connections"] == 3
    assert before["probes"] == during["probes"] == 3
    assert reopened["connections"] == after["connections"] == 6
    assert reopened["probes"] == after["probes"] == 6


def test_a_list_that_becomes_empty_and_is_filled_again(places: list[Place], make: Any) -> None:
    addresses = [places[0].address]
    balancer = all_usable(make(lambda: list(addresses), resolve_interval=0.01))
    addresses.clear()

    def obstacle() -> str:
        try:
            balancer.call("who", timeout=0.05)
        except gmprpc.CallTimeout as late:  # On a busy machine it may also be the answer that was late.
            return str(late.__cause__)
        return ""

    wait_until(lambda: "there is no endpoint: the list of addresses is empty" in obstacle())
    assert balancer.endpoints == []
    wait_until(lambda: places[0].connections == 0)
    waiting = spawn(balancer.call, "who", timeout=20)
    failed = balancer.statistics()["failed_look_ups"]
    wait_until(lambda: balancer.statistics()["failed_look_ups"] > failed)
    addresses.append(places[1].address)
    assert waiting.get() == "b"


@pytest.mark.parametrize("error", [OSError("no list today"), SystemExit(3)])
def test_a_function_that_fails_is_asked_again(places: list[Place], make: Any, error: BaseException) -> None:
    answers: list[Any] = []

    def ask() -> Any:
        if not answers:
            raise error
        return answers

    balancer = make(ask)
    with pytest.raises(gmprpc.CallTimeout) as raised:
        balancer.call("who", timeout=0.1)
    cause = raised.value.__cause__
    assert cause is error or "SystemExit: 3" in str(cause)
    waiting = spawn(balancer.call, "who", timeout=20)
    failed = balancer.statistics()["failed_look_ups"]
    wait_until(lambda: balancer.statistics()["failed_look_ups"] > failed + 2)
    answers.append(places[0].address)
    assert waiting.get() == "a"


def test_when_the_function_fails_the_endpoints_stay(places: list[Place], make: Any) -> None:
    answers: list[Any] = [[places[0].address]]
    balancer = make(lambda: answers.pop(), resolve_interval=0.001)
    balancer.connect()
    wait_until(lambda: balancer.call("who") and balancer.statistics()["failed_look_ups"] >= 3)
    assert balancer.call("who") == "a"


def test_a_function_that_hangs_has_a_timeout(make: Any) -> None:
    balancer = make(Event().wait, connect_timeout=0.02)
    with pytest.raises(gmprpc.CallTimeout) as raised:
        balancer.call("who", timeout=0.1)
    assert "the addresses were not known within 0.02 s" in str(raised.value.__cause__)
    wait_until(lambda: balancer.statistics()["failed_look_ups"] >= 2)


def test_when_an_endpoint_fails_the_addresses_are_asked_for(places: list[Place], make: Any) -> None:
    addresses = [places[0].address]
    balancer = make(lambda: addresses, resolve_interval=0.02)
    balancer.connect()
    held = balancer.call_async("hold", idempotent=True)
    wait_until(lambda: places[0].log)
    looked = balancer.statistics()["look_ups"]
    gevent.sleep(0.03)  # Nobody asks without a call.
    assert balancer.statistics()["look_ups"] == looked
    addresses[:] = [places[1].address]
    places[1].release.set()
    places[0].stop()
    assert held.get() == ["b", None]
    assert [endpoint.address for endpoint in balancer.endpoints] == addresses


def test_a_name_is_all_its_addresses(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        if host != "servers.example":
            return original(host, port, type=socket.SOCK_STREAM)
        if not hosts:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with gmprpc.Server(("0.0.0.0", 0)) as server:
        server.register(lambda: "here", "where")
        balancer = make(("servers.example", server.server_port), resolve_interval=0.01)
        with pytest.raises(gmprpc.CallTimeout) as raised:
            balancer.call("where", timeout=0.1)
        assert "can't resolve servers.example" in str(raised.value.__cause__)
        hosts += ["127.0.0.1", "127.0.0.2"]
        assert balancer.call("where", timeout=20) == "here"
        wait_until(lambda: usable(balancer) == 2)
        assert [endpoint.address[0] for endpoint in balancer.endpoints] == hosts
        del hosts[0]
        wait_until(lambda: balancer.call("where") and len(balancer.endpoints) == 1)
        wait_until(lambda: server.statistics()["open_connections"] == 1)


# Calls that are given up.


@pytest.mark.parametrize("moment", ["answer", "endpoint"])
@pytest.mark.parametrize("how", ["kill", "timeout", "cancel"])
def test_a_call_that_is_given_up_leaves_the_counts_right(places: list[Place], make: Any, moment: str, how: str) -> None:
    balancer = make(places[:1])
    if moment == "answer":
        balancer.connect()
    else:
        places[0].stop()
    if how == "cancel":
        call = balancer.call_async("hold")
    else:
        call = gevent.spawn(balancer.call, "hold")
    wait_until(lambda: places[0].log if moment == "answer" else balancer.statistics()["failed_probes"] > 2)
    assert balancer.statistics()["pending"] == 1
    if how == "cancel":
        assert call.cancel()
        with pytest.raises(gmprpc.CallCancelled):
            call.get()
        assert not call.cancel()
    else:
        call.kill(gevent.Timeout if how == "timeout" else gevent.GreenletExit)
    wait_until(lambda: balancer.statistics()["pending"] == 0)
    assert [endpoint.pending for endpoint in balancer.endpoints] == [0]
    if moment == "endpoint":
        places[0].start()
    assert balancer.call("who") == "a"
    assert balancer.statistics()["ejections"] == 0


def test_a_call_that_has_moved_can_be_cancelled(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:2]))
    call = balancer.call_async("hold", idempotent=True)
    wait_until(lambda: places[0].log or places[1].log)
    first, second = places[:2] if places[0].log else (places[1], places[0])
    first.stop()
    wait_until(lambda: second.log)
    call.cancel()
    wait_until(lambda: balancer.statistics()["pending"] == 0)
    assert balancer.call("who") == second.name


def test_the_endpoint_is_told_of_a_cancelled_call(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:2]))
    call = balancer.call_async("hold", "first")
    moved = balancer.call_async("hold", "moved", idempotent=True)
    wait_until(lambda: len(places[0].log) == len(places[1].log) == 1)
    one, other = places[:2] if places[0].log == ["first"] else (places[1], places[0])
    other.stop()
    wait_until(lambda: one.log == ["first", "moved"])
    call.cancel()
    wait_until(lambda: one.log == ["first", "moved", "first cancelled"])
    moved.cancel()
    wait_until(lambda: one.log == ["first", "moved", "first cancelled", "moved cancelled"])
    call = balancer.call_async("hold", "untold")
    wait_until(lambda: one.log[-1] == "untold")
    call.cancel(tell=False)
    balancer.call("log", "end")
    assert one.log[-2:] == ["untold", "end"]


def test_the_endpoint_is_told_of_a_timeout_if_that_is_asked_for(places: list[Place], make: Any) -> None:
    for default in True, False:
        balancer = all_usable(make(places[:1], cancel_on_timeout=default))
        for options in {}, {"cancel_on_timeout": True}, {"cancel_on_timeout": False}:
            told = options.get("cancel_on_timeout", default)
            with pytest.raises(gmprpc.CallTimeout):
                balancer.call("hold", told, timeout=0.02, **options)
            with pytest.raises(gmprpc.CallTimeout):
                balancer.call_async("hold", told, timeout=0.02, **options).get()
            balancer.call("who")
    wait_until(lambda: Counter(places[0].log) == {True: 6, "True cancelled": 6, False: 6})


def test_a_timeout_says_whose_it_was_and_whether_the_request_had_left(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:1], timeout=0.02))
    for call in balancer.call, lambda *args, **kwargs: balancer.call_async(*args, **kwargs).get():
        with pytest.raises(
            gmprpc.CallTimeout, match=r"^no answer to 'hold' within 0\.02 s \(the balancer's timeout\)$"
        ):
            call("hold")
        with pytest.raises(gmprpc.CallTimeout, match=r"within 0\.01 s \(the call's timeout\)$") as raised:
            call("hold", timeout=0.01)
        assert raised.value.sent
        balancer.call("who", timeout=None)
    places[0].stop()
    with pytest.raises(gmprpc.CallTimeout, match="'who' could not be sent within") as raised:
        balancer.call("who")
    assert not raised.value.sent


# The end.


def test_close_ends_everything(places: list[Place], make: Any) -> None:
    before = greenlets()
    places[0].server.is_healthy = False
    places[2].stop()
    with listening(("127.0.0.1", 0)) as deaf:
        balancer = make([*places, deaf.getsockname()])
        held = [spawn(balancer.call, "hold"), balancer.call_async("hold")]
        wait_until(lambda: len(places[1].log) == 2)
        wait_until(lambda: balancer.statistics()["failed_probes"] > 4)
        balancer.close()
        for call in held:
            with pytest.raises(gmprpc.ConnectionClosed) as raised:
                call.get()
            assert raised.value.sent
        for call in balancer.call, balancer.call_async, balancer.notify:
            with pytest.raises(gmprpc.ConnectionClosed, match="the balancer is closed"):
                call("who")
        del held, call
    balancer.close()
    places[1].release.set()
    wait_until(lambda: not places[0].connections and not places[1].connections)
    probes = balancer.statistics()["probes"]
    wait_until(lambda: greenlets() <= before)
    assert balancer.statistics()["probes"] == probes > 4
    assert balancer.endpoints == []


def test_close_ends_calls_that_wait_for_an_endpoint(places: list[Place], make: Any) -> None:
    places[0].stop()
    balancer = make(places[:1])
    waiting = [spawn(balancer.call, "who"), balancer.call_async("who"), spawn(balancer.connect)]
    wait_until(lambda: balancer.statistics()["pending"] == 3)
    balancer.close()
    for call in waiting:
        with pytest.raises(gmprpc.ConnectionClosed, match="the balancer was closed"):
            call.get()


def test_idempotent_calls_end_at_close_too(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places[:2]))
    held: list[Any] = [spawn(balancer.call, "hold", idempotent=True)]
    held.append(balancer.call_async("hold", idempotent=True))
    wait_until(lambda: len(places[0].log) + len(places[1].log) == 2)
    balancer.close()
    for call in held:
        with pytest.raises(gmprpc.ConnectionClosed):
            call.get()
    assert len(places[0].log) + len(places[1].log) == 2


def test_connect_opens_it_again(places: list[Place], make: Any) -> None:
    balancer = make(places)
    with balancer:
        assert balancer.call("who") in "abc"
    with balancer as again:
        assert again is balancer
        assert balancer.call("who") in "abc"
    assert balancer.statistics()["connections"] >= 2


def test_it_may_be_closed_in_a_hook(places: list[Place], make: Any) -> None:
    closed = Event()

    def close(client: gmprpc.Client, exc: Exception) -> None:
        balancer.close()
        closed.set()

    balancer = all_usable(make(places, on_error=close))
    call = balancer.call_async("hold")
    wait_until(lambda: any(place.log for place in places))
    next(place for place in places if place.log).stop()
    assert closed.wait()
    with pytest.raises(gmprpc.ConnectionClosed):
        call.get()


def test_hooks_are_given_the_endpoints_client(places: list[Place], make: Any) -> None:
    places[2].stop()
    said: list[Any] = []
    balancer = make(
        places,
        before_connect=lambda client, sock: said.append(("before", client.address)),
        after_connect=lambda client, sock: said.append(("after", client.address)),
        on_error=lambda client, exc: said.append(("error", client.address, type(exc))),
    )
    balancer.connect()
    wait_until(lambda: usable(balancer) == 2 and len(said) >= 6)
    assert {("before", place.address) for place in places} <= set(said)
    assert ("after", places[0].address) in said
    assert ("error", places[2].address, gmprpc.ConnectFailed) in said


def test_a_hook_that_fails_is_why_there_is_no_endpoint(places: list[Place], make: Any) -> None:
    def refuse(client: gmprpc.Client, sock: Any) -> None:
        raise ValueError("not there")

    balancer = none_usable(make(places, before_connect=refuse, connect_timeout=0.05))
    with pytest.raises(gmprpc.ConnectFailed, match="not there") as raised:
        balancer.call("who")
    assert isinstance(raised.value.__cause__, ValueError)


def test_the_servers_may_call_back(places: list[Place], make: Any) -> None:
    service = gmprpc.Service()
    service.register(lambda: "the caller", "whoami")
    for place in places:
        place.server.register(lambda: gmprpc.current_call().connection.call("whoami"), "ask")
    assert make(places, service=service).call("ask") == "the caller"


def test_servers_that_call_back_are_connected_to_again_without_a_call(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places, keep_connected=True))
    for _ in range(3):
        for place in places:
            place.stop()
            place.start()
        wait_until(lambda: [place.connections for place in places] == [1, 1, 1])
        wait_until(lambda: usable(balancer) == 3)
    assert balancer.statistics()["ejections"] == 0


def test_statistics_have_all_keys_at_all_times(places: list[Place], make: Any) -> None:
    balancer = make(places)
    keys = set(balancer.statistics())
    all_usable(balancer)
    statistics = balancer.statistics()
    assert set(statistics) == keys
    assert {name: count for name, count in statistics.items() if count} == {
        "connections": 3,
        "open_connections": 3,
        "endpoints": 3,
        "usable_endpoints": 3,
        "probes": 3,
    }
    balancer.close()
    assert {name: count for name, count in balancer.statistics().items() if count} == {"connections": 3, "probes": 3}


# Threads and processes.


def test_each_thread_has_connections_of_its_own(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    threads = ThreadPool(1)
    try:
        assert threads.apply(lambda: {all_usable(balancer).call("who") for _ in range(50)}) == set("abc")
        assert [place.connections for place in places] == [2, 2, 2]
        assert {balancer.call("who") for _ in range(50)} == set("abc")
        waiting = threads.spawn(balancer.call, "hold")
        wait_until(lambda: any(place.log for place in places))
        balancer.close()  # Also there, where nobody else can.
        with pytest.raises(gmprpc.ConnectionClosed):
            waiting.get()
        for place in places:
            place.release.set()
        # As soon as that thread's loop runs.
        wait_until(lambda: threads.apply(gevent.sleep) or [place.connections for place in places] == [0, 0, 0])
    finally:
        threads.kill()


def test_a_thread_that_ends_closes_its_connections(places: list[Place], make: Any) -> None:
    balancer = all_usable(make(places))
    threads = ThreadPool(1)
    assert threads.apply(lambda: usable(all_usable(balancer))) == 3
    assert [place.connections for place in places] == [2, 2, 2]
    threads.kill()
    wait_until(lambda: [place.connections for place in places] == [1, 1, 1])
    assert balancer.statistics()["connections"] == 6
    assert balancer.statistics()["open_connections"] == 3
    assert balancer.call("who") in "abc"


def test_the_certificate_is_that_of_the_name(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        host = "127.0.0.1" if host == "servers.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    authority = trustme.CA()
    server_context, client_context = (
        ssl.SSLContext(side) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    )
    authority.issue_cert("servers.example").configure_cert(server_context)
    authority.configure_trust(client_context)
    with gmprpc.Server(("127.0.0.1", 0), ssl_context=server_context) as server:
        server.register(lambda: "here", "where")
        balancer = make(("servers.example", server.server_port), ssl_context=client_context)
        assert balancer.call("where", timeout=20) == "here"
        assert balancer.endpoints[0].address == server.address
        named = make([server.address], ssl_context=client_context, server_hostname="servers.example")
        assert named.call("where", timeout=20) == "here"
        other = none_usable(make([server.address], ssl_context=client_context, connect_timeout=0.2))
        with pytest.raises(gmprpc.ConnectFailed, match="certificate"):
            other.call("where")


FORKING = """
import os, sys
import gevent, gmprpc
if "patched" in sys.argv:
    from gevent import monkey; monkey.patch_all()

path = sys.argv[1]
balancer = gmprpc.Balancer([f"unix:{path}/a", f"unix:{path}/b"], retry_interval=0.01)
balancer.connect()

def call(method, param):
    try:
        return balancer.call(method, param, idempotent=True)
    except gmprpc.ConnectionClosed as exc:
        return exc

waiting = gevent.spawn(call, "hold", "from " + str(os.getpid()))
waiting_async = balancer.call_async("hold", "from " + str(os.getpid()), idempotent=True)
gevent.sleep(0.05)
pid = os.fork()
if pid == 0:
    print(type(waiting.get()).__name__, flush=True)
    try:
        waiting_async.get()
    except gmprpc.ConnectionClosed as exc:
        print(type(exc).__name__, flush=True)
    print(balancer.call("who", timeout=10) in ("a", "b"), flush=True)
    balancer.close()
    os._exit(0)
os.waitpid(pid, 0)
balancer.call("release", timeout=10)
print(balancer.endpoints[0].is_usable, flush=True)
print([call.get()[1] == "from " + str(os.getpid()) for call in (waiting, waiting_async)], flush=True)
"""


@pytest.mark.parametrize("way", ["plain", "patched"])
def test_a_process_that_is_forked_off_calls_on_its_own(places: list[Place], tmp_path: Path, way: str) -> None:
    def release() -> None:
        for place in places:
            place.release.set()

    for place in places:
        place.server.register(release)
    with Program(*FORKING_PYTHON, "-c", FORKING, tmp_path, way) as program:
        assert program.lines() == ["ConnectionClosed", "ConnectionClosed", "True", "True", "[True, True]"]
        assert program.wait() == 0
    assert sum(len(place.log) for place in places) == 2  # Nothing was carried out twice.


# Real processes.

SERVER = """
import os, sys
import gevent, gmprpc
server = gmprpc.Server("unix:" + sys.argv[1])
server.register(lambda: os.getpid(), "pid")
server.register(lambda number: (gevent.sleep(0.002), number)[1], "echo")
server.start()
print("ready", flush=True)
server.serve_forever()
"""


class Process:
    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self.start()

    def start(self) -> None:
        self.program = Program(sys.executable, "-c", SERVER, self._path)
        assert self.program.line() == "ready"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.program.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.program.wait()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.program.__exit__()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[Process]]:
    processes: list[Process] = []
    try:
        for name in "ab":
            processes.append(Process(tmp_path / f"process-{name}"))
        yield processes
    finally:
        for process in processes:
            process.end()


def test_servers_may_be_killed_one_by_one_under_load(processes: list[Process], make: Any) -> None:
    balancer = all_usable(make(processes))
    is_over = False
    wrong: list[Any] = []
    done = Counter[int]()

    def call_on_and_on(caller: int) -> None:
        number = 0
        while not is_over:
            number += 1
            if balancer.call("echo", number, timeout=20, idempotent=True) != number:
                wrong.append((caller, number))
            done[caller] += 1

    callers = [gevent.spawn(call_on_and_on, caller) for caller in range(20)]

    def all_go_on() -> None:
        before = done.copy()
        wait_until(lambda: all(done[caller] > before[caller] + 3 for caller in range(20)))

    for victim in processes * 2:
        victim.kill()
        all_go_on()
        victim.program.__exit__()
        victim.start()
        wait_until(lambda: usable(balancer) == 2)
    is_over = True
    gevent.joinall(callers, raise_error=True)
    assert wrong == []
    assert balancer.statistics()["moved_calls"] >= 1
    assert balancer.statistics()["pending"] == 0


def test_a_process_that_hangs_is_left_out_until_it_goes_on(processes: list[Process], make: Any) -> None:
    balancer = all_usable(make(processes, connect_timeout=0.5))
    hung, other = processes
    hung.signal(signal.SIGSTOP)
    while usable(balancer) == 2:
        with suppress(gmprpc.CallTimeout):
            balancer.call("pid", timeout=0.05)
    assert {balancer.call("pid", timeout=5) for _ in range(50)} == {other.program.pid}
    wait_until(lambda: balancer.statistics()["failed_probes"] >= 2)
    assert usable(balancer) == 1
    hung.signal(signal.SIGCONT)
    wait_until(lambda: usable(balancer) == 2)
    assert {balancer.call("pid") for _ in range(50)} == {hung.program.pid, other.program.pid}
