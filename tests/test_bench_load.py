"""Load on servers that do well, and on some that don't: every call ends, and is counted once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter_ns
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent.event import Event

import gmprpc
from gmprpc.bench.lane import Lane
from gmprpc.bench.load import Load, Result, load_of
from gmprpc.bench.plan import Plan
from gmprpc.bench.ring import FIRST_MSGID
from gmprpc.bench.tally import Ending
from gmprpc.protocol import Encoder

from .helpers import Peer, Scripted, wait_until


def plan_for(address: Any, method: str = "echo", *params: Any, **settings: Any) -> Plan:
    settings = {"timeout": 5.0, **settings}
    if "duration" not in settings:
        settings.setdefault("calls", 100)
    options = settings.pop("options", {})
    client = gmprpc.Client(address, connect_timeout=5, **options)
    return Plan(partial(client.open_stream, lambda _: None), method, Encoder().body(method, params), **settings)


def run(plan: Plan) -> Result:
    load = load_of(plan)
    load.connect()
    return load.run(perf_counter_ns())


def assert_went_well(result: Result, calls: int | None = None) -> None:
    tally = result.tally
    assert (result.ending, dict(tally.errors), dict(tally.lost)) == (Ending.DONE, {}, {})
    assert sum(tally.latencies.values()) == tally.answered > 0
    assert calls in (None, tally.answered)
    assert result.seconds > 0


@pytest.fixture
def counted(server: gmprpc.Server) -> list[Any]:
    """The params of each call of `count` that was carried out."""
    counted: list[Any] = []
    server.register(lambda *params: counted.append(params), name="count")
    return counted


# What is called, and how often.


@pytest.mark.parametrize("connections, depth", [(1, 1), (1, 64), (7, 1), (3, 5)])
@pytest.mark.parametrize("rate", [None, 20_000.0])
@pytest.mark.parametrize("calls", [1, 10, 1000])
def test_so_many_calls_are_made(
    server: gmprpc.Server, counted: list[Any], connections: int, depth: int, rate: float | None, calls: int
) -> None:
    plan = plan_for(server.address, "count", 1, "two", connections=connections, depth=depth, rate=rate, calls=calls)
    assert_went_well(run(plan), calls)
    assert counted == [(1, "two")] * calls
    wait_until(lambda: server.statistics()["open_connections"] == 0)


@pytest.mark.parametrize("rate", [None, 2000.0])
def test_load_lasts_so_long(server: gmprpc.Server, rate: float | None) -> None:
    result = run(plan_for(server.address, "echo", "hello", depth=400, rate=rate, duration=0.2))
    assert_went_well(result)
    assert 0.2 <= result.seconds < 1
    if rate:
        assert (result.seconds, result.tally.answered) == (0.2, 400)
        assert sum(result.tally.lateness.values()) == 400


@pytest.mark.parametrize("rate", [None, 2000.0])
@pytest.mark.parametrize("limit", [{"calls": 50}, {"duration": 0.1}])
def test_calls_of_the_warm_up_are_made_and_not_counted(
    server: gmprpc.Server, counted: list[Any], rate: float | None, limit: dict[str, Any]
) -> None:
    result = run(plan_for(server.address, "count", rate=rate, warm_up=0.05, depth=400, **limit))
    assert_went_well(result, limit.get("calls"))
    assert len(counted) > result.tally.answered


@pytest.mark.parametrize("size", [0, 1000, 70_000, 1_500_000])
def test_results_may_be_of_any_size(server: gmprpc.Server, size: int) -> None:
    with gmprpc.Server(("127.0.0.1", 0), server.service, max_message_size=4 * 1024 * 1024) as large:
        result = run(plan_for(large.address, "echo", "x" * size, calls=20, depth=2, connections=2))
    assert_went_well(result, 20)
    assert result.tally.sent > 20 * size
    assert result.tally.received > 20 * size


@pytest.mark.parametrize("rate", [None, 5000.0])
def test_answers_may_come_in_any_order(server: gmprpc.Server, rate: float | None) -> None:
    """Every tenth call is overtaken by all the others, some by several rounds of msgids."""
    number = 0

    @server.method
    def work() -> int:
        nonlocal number
        number += 1
        gevent.sleep(0.05 if number % 10 == 0 else 0)
        return number

    assert_went_well(run(plan_for(server.address, "work", calls=2000, depth=16, connections=2, rate=rate)), 2000)


def test_a_call_that_others_overtake_for_long_keeps_its_msgid(server: gmprpc.Server) -> None:
    waiting = Event()
    seen: list[int] = []

    @server.method
    def work() -> None:
        msgid = gmprpc.current_call().msgid
        assert msgid is not None
        seen.append(msgid)
        if len(seen) in (1, 3):
            waiting.wait()
        elif len(seen) == 1000:
            waiting.set()

    assert_went_well(run(plan_for(server.address, "work", calls=1100, depth=4)), 1100)
    assert seen.count(seen[0]) < 1100 // 64
    for held in (seen[0], seen[2]):
        assert held not in seen[4:990]


def test_latency_counts_from_when_a_call_should_have_left(server: gmprpc.Server) -> None:
    """Coordinated omission: one call stalls everything for 200 ms, and those that have to wait suffer, too."""
    stalls = iter([0.2])
    server.register(lambda: gevent.sleep(next(stalls, 0)), name="stall")
    closed = run(plan_for(server.address, "stall", calls=100))
    stalls = iter([0.2])
    open_ = run(plan_for(server.address, "stall", calls=100, rate=1000.0, depth=1))
    for result in (closed, open_):
        assert_went_well(result, 100)
    slow = [sum(n for d, n in result.tally.latencies.items() if d > 50_000_000) for result in (closed, open_)]
    assert slow[0] == 1 or slow[0] < 50  # Others may be slow on a busy machine.
    assert slow[1] >= 99


def test_what_could_not_be_sent_in_time_is_an_error(server: gmprpc.Server) -> None:
    server.register(lambda: gevent.sleep(0.02), name="slow")
    result = run(plan_for(server.address, "slow", rate=1000.0, depth=1, duration=0.2))
    assert result.ending is Ending.DONE
    (reason,) = result.tally.errors
    assert reason.startswith("not sent")
    assert result.tally.answered + result.tally.errors[reason] == 200
    assert 1 <= result.tally.answered <= 11


def test_what_the_warm_up_could_not_send_is_not_made_up_for(server: gmprpc.Server, counted: list[Any]) -> None:
    plan = plan_for(server.address, "count", rate=100.0, warm_up=10.0, calls=1)
    load = load_of(plan)
    load.connect()
    result = load.run(perf_counter_ns() - 10_000_000_000)  # As if nothing had gone for all that time.
    assert result.tally.answered == 1
    assert len(counted) == 1


def test_it_works_over_unix_sockets(service: gmprpc.Service, tmp_path: Any) -> None:
    with gmprpc.Server(f"unix:{tmp_path}/socket", service) as server:
        assert_went_well(run(plan_for(server.address, "echo", "hello", depth=8)), 100)


def test_it_works_over_tls(service: gmprpc.Service, tmp_path: Any) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    context = gmprpc.tls.server_context(tmp_path / "server.pem")
    options = {"ssl_context": gmprpc.tls.client_context(tmp_path / "ca.pem"), "server_hostname": "localhost"}
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context) as server:
        plan = plan_for(server.address, "echo", "x" * 30_000, depth=8, connections=2, options=options)
        assert_went_well(run(plan), 100)


def test_interrupted_it_ends_with_what_was(server: gmprpc.Server) -> None:
    load = load_of(plan_for(server.address, "echo", 1, duration=3600.0, depth=4))
    load.connect()
    running = gevent.spawn(load.run, perf_counter_ns())
    wait_until(lambda: load.tally.answered > 10)
    load.interrupt()
    result = running.get()
    assert result.ending is Ending.INTERRUPTED
    assert result.tally.answered > 10
    assert not result.tally.errors


def test_interrupted_it_does_not_wait_long_for_what_is_in_flight(
    server: gmprpc.Server, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmprpc.bench.load._INTERRUPTED_TIMEOUT", 0.01)
    load = load_of(plan_for(server.address, "hold", 1, duration=3600.0))
    load.connect()
    running = gevent.spawn(load.run, perf_counter_ns())
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    load.interrupt()
    result = running.get()
    assert (result.ending, result.tally.answered, dict(result.tally.errors)) == (Ending.INTERRUPTED, 0, {})
    peer.call("release")


# What goes wrong.


def test_errors_are_counted_by_what_they_say(server: gmprpc.Server) -> None:
    errors = iter(["busy"] * 3 + [[1, "of a kind"]] * 2)

    @server.method
    def may_fail() -> str:
        if (error := next(errors, None)) is not None:
            raise gmprpc.ErrorResponse(error)
        return "fine"

    tally = run(plan_for(server.address, "may_fail", calls=10)).tally
    assert dict(tally.errors) == {"error: busy": 3, "error: (1, b'of a kind')": 2}
    assert tally.answered == 5


def test_an_unknown_method_ends_it_at_once(server: gmprpc.Server) -> None:
    result = run(plan_for(server.address, "no_such", duration=3600.0))
    assert result.ending is Ending.UNKNOWN_METHOD


def test_a_method_that_goes_away_does_not(server: gmprpc.Server) -> None:
    @server.method
    def once() -> None:
        server.unregister("once")

    result = run(plan_for(server.address, "once", calls=10))
    assert (result.ending, result.tally.answered) == (Ending.DONE, 1)
    assert dict(result.tally.errors) == {'error: No such method "once" found': 9}


def test_server_that_is_not_there_is_told(scripted: Scripted) -> None:
    scripted.go()
    with pytest.raises(gmprpc.ConnectFailed, match="refused"):
        run(plan_for(scripted.address, connections=100))


def test_not_all_connections_is_none(server: gmprpc.Server) -> None:
    with gmprpc.Server(("127.0.0.1", 0), server.service) as other:
        addresses = [server.address] * 3 + [("127.0.0.1", 1)]
        streams: Iterator[Callable[[], Any]] = iter(
            [partial(gmprpc.Client(address).open_stream, lambda _: None) for address in addresses]
        )
        plan = Plan(lambda: next(streams)(), "echo", Encoder().body("echo", [1]), connections=4, calls=10)
        with pytest.raises(gmprpc.ConnectFailed):
            load_of(plan).connect()
        assert other.statistics()["open_connections"] == 0
    wait_until(lambda: server.statistics()["open_connections"] == 0)


class Foreign:
    """A server that answers in its own way: ``answer`` is called with each request, and says what to send."""

    def __init__(self, answer: Callable[[list[Any]], bytes | None]) -> None:
        self._answer = answer
        self._scripted = Scripted()
        self.address = self._scripted.address
        self._accepting = gevent.spawn(self._accept)
        self._serving: list[Any] = []

    def _accept(self) -> None:
        while True:
            self._serving.append(gevent.spawn(self._serve, self._scripted.accept()))

    def _serve(self, peer: Peer) -> None:
        try:
            while True:
                if (data := self._answer(peer.receive())) is None:
                    break
                peer.send_bytes(data)
        except (EOFError, OSError):
            pass
        peer.close()

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None:
        gevent.killall([self._accepting, *self._serving])
        self._scripted.close()


def answer(msgid: int, result: Any = "hello", error: Any = None) -> bytes:
    return msgpack.packb([1, msgid, error, result])


def nth(number: int, special: Callable[[int], bytes | None]) -> Callable[[list[Any]], bytes | None]:
    """Answers as everybody does, but for the request ``number``, of which ``special`` gets the msgid."""
    count = 0

    def answer_request(request: list[Any]) -> bytes | None:
        nonlocal count
        count += 1
        return special(request[1]) if count == number else answer(request[1])

    return answer_request


@pytest.mark.parametrize("number", [1, 2, 30])
def test_an_answer_that_comes_twice_is_an_error(number: int) -> None:
    with Foreign(nth(number, lambda msgid: 2 * answer(msgid))) as foreign:
        result = run(plan_for(foreign.address, calls=50))
    assert dict(result.tally.errors) == {"a call answered twice": 1}
    assert (result.ending, result.tally.answered) == (Ending.DONE, 50)


@pytest.mark.parametrize("msgid", [0, 1, FIRST_MSGID - 1, FIRST_MSGID + 60, FIRST_MSGID + 100_000, 2**32 - 1])
@pytest.mark.parametrize("number", [1, 30])
def test_an_answer_to_no_call_is_an_error(number: int, msgid: int) -> None:
    with Foreign(nth(number, lambda right: answer(msgid) + answer(right))) as foreign:
        result = run(plan_for(foreign.address, calls=50))
    assert dict(result.tally.errors) == {"an answer to no call": 1}
    assert (result.ending, result.tally.answered) == (Ending.DONE, 50)


@pytest.mark.parametrize("number", [1, 2, 30])
def test_a_lost_answer_is_an_error_and_ends_it(number: int) -> None:
    with Foreign(nth(number, lambda msgid: b"")) as foreign:
        result = run(plan_for(foreign.address, calls=50, depth=3, timeout=1.0))
    assert dict(result.tally.errors) == {"no answer": 1}
    assert (result.ending, result.tally.answered) == (Ending.STALLED, 49)


@pytest.mark.parametrize("rate", [None, 500.0])
def test_server_that_hangs_is_waited_for_to_the_end_and_not_longer(rate: float | None) -> None:
    with Foreign(lambda _: b"") as foreign:
        result = run(plan_for(foreign.address, rate=rate, duration=0.05, timeout=0.05, depth=2, connections=2))
    assert result.ending is Ending.STALLED
    assert result.tally.errors["no answer"] == 4
    assert result.tally.answered == 0
    if rate:
        assert sum(result.tally.errors.values()) == 25


@pytest.mark.parametrize("number", [1, 2, 30])
@pytest.mark.parametrize("garbage", [b"\xc1", b"HTTP/1.1 400 Bad Request\r\n", b"\x94\x01\xa1x\xc0\xc0", b"\x91\x01"])
def test_garbage_ends_its_connection(number: int, garbage: bytes) -> None:
    with Foreign(nth(number, lambda _: garbage)) as foreign:
        result = run(plan_for(foreign.address, duration=3600.0))
    assert result.ending is Ending.LOST
    assert result.tally.answered == number - 1
    (reason,) = result.tally.lost
    assert "not MessagePack-RPC" in reason
    assert dict(result.tally.errors) == {f"connection lost: {reason}": 1}


@pytest.mark.parametrize("number", [1, 2, 30])
def test_server_that_hangs_up_ends_it(number: int) -> None:
    with Foreign(nth(number, lambda _: None)) as foreign:
        result = run(plan_for(foreign.address, duration=3600.0))
    assert result.ending is Ending.LOST
    assert result.tally.answered == number - 1
    assert dict(result.tally.lost) == {"closed by the server": 1}
    assert sum(result.tally.errors.values()) == 1


def test_one_lost_connection_does_not_end_it() -> None:
    with Foreign(nth(7, lambda _: None)) as foreign:
        result = run(plan_for(foreign.address, calls=100, connections=4, depth=2))
    assert result.ending is Ending.DONE
    assert result.tally.answered + result.tally.errors["connection lost: closed by the server"] == 100
    assert result.tally.lost.total() == 1


def test_answers_in_pieces_of_any_size_are_understood(scripted: Scripted) -> None:
    """The pieces end everywhere in an answer, and some hold several."""

    def serve() -> None:
        peer = scripted.accept()
        data, size = b"", 1
        for number in range(400):
            data += answer(peer.receive()[1], "x" * 20)
            while len(data) >= size:
                peer.send_bytes(data[:size])
                data = data[size:]
                size = size % 90 + 1
                gevent.sleep(0)
            if number % 10 == 9 or number == 399:
                peer.send_bytes(data)
                data = b""
        peer.receive_rest()

    serving = gevent.spawn(serve)
    assert_went_well(run(plan_for(scripted.address, calls=400, depth=30)), 400)
    serving.get()


def test_results_may_differ_and_be_anything() -> None:
    results = iter([None, {"a": [1, 2]}, "x" * 300, b"\xff", -1.5, msgpack.ExtType(5, b"x"), [], {}, True] * 20)
    with Foreign(lambda request: answer(request[1], next(results))) as foreign:
        assert_went_well(run(plan_for(foreign.address, calls=150, depth=4)), 150)


def test_what_the_server_asks_is_declined_and_what_it_tells_ignored() -> None:
    heard: list[Any] = []

    def answer_request(message: list[Any]) -> bytes:
        if message[0] == 1:
            heard.append(message)
            return b""
        return msgpack.packb([0, 5, "ask", []]) + msgpack.packb([2, "tell", []]) + answer(message[1])

    with Foreign(answer_request) as foreign:
        assert_went_well(run(plan_for(foreign.address, calls=3)), 3)
        wait_until(lambda: len(heard) >= 2)
    assert heard[0] == [1, 5, 'No such method "ask" found', None]


def test_server_that_reads_slowly_gets_everything(scripted: Scripted) -> None:
    def serve() -> None:
        peer = scripted.accept()
        gevent.sleep(0.05)  # More is sent meanwhile than all buffers hold.
        for _ in range(80):
            message = peer.receive()
            assert message[3] == ["x" * 200_000]
            peer.send_bytes(answer(message[1]))
        peer.receive_rest()

    serving = gevent.spawn(serve)
    assert_went_well(run(plan_for(scripted.address, "echo", "x" * 200_000, calls=80, depth=40)), 80)
    serving.get()


class Listening(Load):
    """A load that doesn't go on by itself."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.begin = 0
        self.asked = self.answered = 0
        self.go_on = self._count

    def _count(self, lane: Lane, count: int) -> None:
        self.answered += count


def test_answers_before_they_are_asked_for_are_errors(sockets: tuple[Any, Any]) -> None:
    """Also when they are just those that are going to be expected."""
    ours, theirs = sockets
    load = Listening(plan_for(("127.0.0.1", 1)))
    lane = Lane(load, gmprpc.streams.PlainStream(ours), gevent.get_hub().loop)
    peer = Peer(theirs)
    for load.asked in (1, 2, 3):
        lane.request([perf_counter_ns()])
        peer.send_bytes(answer(peer.receive()[1]))
        wait_until(lambda: load.answered == load.asked)
    peer.send_bytes(answer(FIRST_MSGID + 3))
    wait_until(lambda: load.tally.errors)
    assert dict(load.tally.errors) == {"an answer to no call": 1}
    lane.request([perf_counter_ns()])
    peer.send_bytes(answer(peer.receive()[1]))
    wait_until(lambda: load.answered == 4)
    lane.close()
    assert peer.receive_rest() == []


def test_in_order_nothing_is_decoded(server: gmprpc.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it quicker than the server: after the first answers of each connection, one comparison a read."""
    decoded = 0
    decode = Lane._decode

    def counting(lane: Lane, data: bytes, now: int) -> None:
        nonlocal decoded
        decoded += 1
        decode(lane, data, now)

    monkeypatch.setattr(Lane, "_decode", counting)
    assert_went_well(run(plan_for(server.address, "echo", "hello", calls=5000, connections=5, depth=16)), 5000)
    assert decoded <= 10


def test_the_time_to_begin_with_is_never() -> None:
    assert load_of(plan_for(("127.0.0.1", 1))).begin == sys.maxsize
