"""One connection under load and in odd company: batches, back-pressure, partial writes, what dies around it."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from gevent.event import Event
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc import connection
from gmprpc.connection import Connection
from gmprpc.metrics import Counters
from gmprpc.options import ConnectionOptions
from gmprpc.protocol import Decoder
from gmprpc.streams import PlainStream
from gmprpc.sweeper import Sweeper

from .helpers import Peer, collected, wait_until


class Pair:
    """A connection over a socketpair, and the peer at its other end."""

    def __init__(self, service: gmprpc.Service, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        self.counters = Counters()
        self.connection = Connection(
            PlainStream(ours), service.table(), ConnectionOptions(**options), counters=self.counters, peer="the peer"
        )
        self.life = gevent.spawn(self.connection.run)
        gevent.sleep(0)
        self.peer = Peer(theirs)

    def close(self) -> None:
        self.peer.close()
        self.connection.abort()
        self.life.join()


@pytest.fixture
def pair(service: gmprpc.Service) -> Any:
    pair = Pair(service)
    yield pair
    pair.close()


# Batches.


def test_the_answers_of_a_batch_are_written_together(service: gmprpc.Service) -> None:
    writes: list[int] = []
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)
    send = stream.send

    def counted(data: Any) -> int:
        writes.append(len(data))
        return send(data)

    stream.send = counted  # type: ignore[assignment]
    connection = Connection(stream, service.table(), ConnectionOptions(), counters=Counters())
    life = gevent.spawn(connection.run)
    peer = Peer(theirs)
    peer.send(*([0, number, "echo", [number]] for number in range(90)))
    assert [peer.receive()[1] for _ in range(90)] == list(range(90))
    assert len(writes) == 1
    # Those of handlers that have blocked and end in the same turn of the loop, too.
    peer.send(*([0, number, "hold", [number]] for number in range(50)), [2, "release", []])
    assert sorted(peer.receive()[1] for _ in range(50)) == list(range(50))
    assert len(writes) == 2
    peer.close()
    life.join()


def test_one_greenlet_carries_a_batch_out_until_its_handler_blocks(service: gmprpc.Service, pair: Pair) -> None:
    used: list[Any] = []

    @service.method
    def note(blocks: bool) -> None:
        used.append(gevent.getcurrent())
        if blocks:
            gevent.sleep(0)

    pair.peer.send(*([0, number, "note", [number == 2]] for number in range(5)))
    assert sorted(pair.peer.receive()[1] for _ in range(5)) == list(range(5))
    assert used[0] is used[1] is used[2]
    assert used[3] is used[4]
    assert used[3] is not used[2]


def test_a_greenlet_that_has_blocked_leaves_the_rest_of_the_batch_alone(service: gmprpc.Service, pair: Pair) -> None:
    done: list[Any] = []
    released = Event()

    @service.method
    def wait(number: int) -> None:
        released.wait()
        done.append(number)

    service.register(done.append, "note")
    # The first two block, and go on only when all the others have had their turn.
    pair.peer.send(
        [0, 0, "wait", [0]], [0, 1, "wait", [1]], *([0, number, "note", [number]] for number in range(2, 50))
    )
    for _ in range(48):
        pair.peer.receive()
    released.set()
    assert [pair.peer.receive()[1] for _ in range(2)] == [0, 1]
    assert done == [*range(2, 50), 0, 1]


@pytest.mark.parametrize("end", ["close", "abort"])
def test_what_is_behind_the_end_of_a_connection_is_not_carried_out(
    service: gmprpc.Service, pair: Pair, end: str
) -> None:
    done: list[int] = []
    service.register(done.append, "note")
    service.register(lambda: getattr(pair.connection, end)(), "end")
    pair.peer.send(*([0, number, "note", [number]] for number in range(3)), [0, 3, "end", []], [0, 4, "note", [4]])
    # What was answered before is still written, but for the one that ended it.
    assert pair.peer.receive_rest() == [[1, number, None, None] for number in range(3)]
    assert done == [0, 1, 2]


def test_what_is_behind_the_beginning_of_the_end_is_carried_out(service: gmprpc.Service, pair: Pair) -> None:
    service.register(pair.connection.finish, "finish")
    pair.peer.send([0, 0, "finish", []], *([0, number, "echo", [number]] for number in range(1, 500)))
    assert [answer[1] for answer in pair.peer.receive_rest()] == list(range(500))


def test_a_handler_amid_a_batch_may_call_back_and_be_called_back(service: gmprpc.Service, pair: Pair) -> None:
    @service.method
    def ask(number: int) -> Any:
        return pair.connection.call("question", number)

    pair.peer.send(*([0, number, "ask" if number % 3 == 0 else "echo", [number]] for number in range(30)))
    got = [pair.peer.receive() for _ in range(30)]
    questions = [message for message in got if message[0] == 0]
    assert [question[3] for question in questions] == [[number] for number in range(0, 30, 3)]
    # The answers come in one read with requests between them, which ask again.
    pair.peer.send(
        *(
            message
            for _, msgid, _, params in questions
            for message in ([1, msgid, None, params], [0, 100 + params[0], "ask", [100 + params[0]]])
        )
    )
    again = [pair.peer.receive() for _ in range(20)]
    for _, msgid, _, params in [message for message in again if message[0] == 0]:
        pair.peer.send([1, msgid, None, params])
    answers = [message for message in got + again if message[0] == 1] + [pair.peer.receive() for _ in range(10)]
    numbers = range(0, 30, 3)
    expected = [[1, number, None, number if number % 3 else [number]] for number in range(30)]
    assert sorted(answers) == expected + [[1, 100 + number, None, [100 + number]] for number in numbers]


def test_a_flooding_connection_lets_others_in_between(service: gmprpc.Service, server: gmprpc.Server) -> None:
    done: list[str] = []
    service.register(done.append, "note")
    with Peer.connect(server.address) as flooding, Peer.connect(server.address) as modest:
        modest.call("echo", 1)
        flooding.send(*([2, "note", ["flood"]] for _ in range(5000)))
        modest.send([0, 1, "note", ["modest"]])
        modest.receive()
        wait_until(lambda: len(done) == 5001)
    # It was behind the batches that were due, not behind the whole flood.
    assert done.index("modest") < 2500


def test_a_handler_that_takes_its_time_ends_the_batch(service: gmprpc.Service, server: gmprpc.Server) -> None:
    from time import perf_counter

    done: list[str] = []

    @service.method
    def burn(name: str) -> None:
        end = perf_counter() + 0.005
        while perf_counter() < end:
            pass
        done.append(name)

    with Peer.connect(server.address) as busy, Peer.connect(server.address) as modest:
        modest.call("echo", 1)
        busy.send(*([2, "burn", ["busy"]] for _ in range(20)))
        modest.send([0, 1, "burn", ["modest"]])
        modest.receive()
        wait_until(lambda: len(done) == 21)
    assert done.index("modest") < 10


# Turns.


def test_those_who_are_ready_at_once_get_their_turns_in_order(service: gmprpc.Service) -> None:
    order: list[int] = []
    service.register(order.append, "note")
    pairs = [Pair(service) for _ in range(20)]
    for each in pairs:
        each.peer.call("echo", 1)  # The first look at a connection doesn't wait for a turn.
    for number in (1, 0, *range(2, 20)):
        pairs[number].peer.send([2, "note", [number]])
    wait_until(lambda: len(order) == 20)
    assert order == [1, 0, *range(2, 20)]
    for each in pairs:
        each.close()


def test_a_ctrl_c_where_turns_are_to_be_given_only_delays_them(service: gmprpc.Service, pair: Pair) -> None:
    pair.peer.call("echo", 1)
    pair.connection._stage.ready.append(pair.connection)  # As it leaves them: noted, and no callback will come.
    assert pair.peer.call("echo", 1) == [1, 0, None, 1]
    assert not pair.connection._stage.ready


def test_who_is_closed_while_it_waits_for_its_turn_gets_none(service: gmprpc.Service) -> None:
    done: list[str] = []
    pairs = [Pair(service), Pair(service)]
    for each in pairs:
        each.peer.call("echo", 1)

    @service.method
    def close(number: int) -> None:
        done.append("close")
        pairs[number].connection.close()

    service.register(lambda: done.append("never"), "note")
    pairs[0].peer.send([2, "close", [1]])
    pairs[1].peer.send([2, "note", []])
    pairs[1].life.join()
    assert done == ["close"]
    for each in pairs:
        each.close()


# Looking again at once.


def be_alone(pair: Pair) -> None:
    """Have it that nobody else has had anything to say for long."""
    pair.peer.call("echo", 1)
    pair.connection._looks_to_skip = 0


def test_what_a_quick_peer_has_said_meanwhile_is_read_before_anything_else_runs(
    service: gmprpc.Service, pair: Pair
) -> None:
    order: list[str] = []

    @service.method
    def first() -> None:
        gevent.get_hub().loop.run_callback(order.append, "else")
        pair.peer.send([2, "second", []])

    service.register(lambda: order.append("second"), "second")
    be_alone(pair)
    pair.peer.call("first")
    wait_until(lambda: len(order) == 2)
    assert order == ["second", "else"]


def test_a_quick_peer_is_not_preferred_where_another_has_had_something_to_say(
    service: gmprpc.Service, pair: Pair
) -> None:
    order: list[str] = []
    other = Pair(service)

    @service.method
    def first() -> None:
        gevent.get_hub().loop.run_callback(order.append, "else")
        pair.peer.send([2, "second", []])

    service.register(lambda: order.append("second"), "second")
    pair.peer.call("echo", 1)
    other.peer.call("echo", 1)
    pair.peer.call("first")
    wait_until(lambda: len(order) == 2)
    assert order == ["else", "second"]
    other.close()


def test_a_peer_that_is_always_quick_lets_others_in_between(service: gmprpc.Service, pair: Pair) -> None:
    count = 0
    others: list[int] = []

    @service.method
    def again() -> None:
        nonlocal count
        count += 1
        if count == 1:
            gevent.get_hub().loop.run_callback(lambda: others.append(count))
        if not others:
            pair.peer.send([2, "again", []])

    be_alone(pair)
    pair.peer.send([2, "again", []])
    wait_until(lambda: others)
    assert others[0] >= 2


def test_the_answer_of_a_quick_peer_is_waited_for_on_the_spot(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    be_alone(pair)

    def ask() -> None:
        pair.connection.call("first")
        gevent.get_hub().loop.run_callback(order.append, "else")
        order.append(pair.connection.call("second"))

    def answer() -> None:
        if (request := pair.peer.receive())[2] == "second":
            pair.peer.send([1, request[1], None, "second"])

    asking = gevent.spawn(ask)
    _, msgid, _, _ = pair.peer.receive()
    monkeypatch.setattr(connection, "_SPIN_TIME", 10.0)
    monkeypatch.setattr(os, "sched_yield", answer)
    pair.peer.send([1, msgid, None, "first"])
    asking.get()
    wait_until(lambda: len(order) == 2)
    assert order == ["second", "else"]


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_peer_that_leaves_in_the_wait_for_its_answer_is_noticed_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    be_alone(pair)
    call = pair.connection.call_async("question")
    monkeypatch.setattr(os, "sched_yield", getattr(pair.peer, leave))
    pair.peer.send([0, 1, "echo", [2]])
    with pytest.raises(gmprpc.ConnectionClosed):
        call.get()
    pair.life.join()
    assert pair.connection.is_closed


def test_looks_that_are_in_vain_are_left_out_for_longer_and_longer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    looks: list[int] = []

    def look(_: Connection) -> bool:
        looks.append(reads)
        return False

    monkeypatch.setattr(Connection, "_read_soon", look)
    monkeypatch.setattr(connection, "_SKIPPED_LOOKS", 7)
    monkeypatch.setattr(connection, "_LOOKS_AFTER_OTHERS", 2)
    pair.connection.call_async("question")
    pair.peer.receive()
    for reads in range(30):  # noqa: B007 - it is noted above
        pair.peer.call("echo", 1)
    # With the first read it comes to be the last one, and two looks are left out for others; then one, three and
    # seven, and never more.
    assert looks == [3, 5, 9, 17, 25]


# Writing.


def test_an_answer_of_any_size_arrives_whole(pair: Pair) -> None:
    for size in (16 * 1024, 16 * 1024 + 1, 300_000, 1_000_000):
        value = "x" * size
        assert pair.peer.call("echo", value) == [1, 0, None, value]


def test_answers_keep_their_order_and_bytes_when_writing_blocks(service: gmprpc.Service) -> None:
    service.register(lambda size: b"y" * size, "give")
    pair = Pair(service)
    sizes = [100_000, 10, 500_000, 20_000, 1, 300_000, 17_000] * 5
    pair.peer.send(*([0, number, "give", [size]] for number, size in enumerate(sizes)))
    gevent.sleep(0.01)  # Nothing is read until writing has blocked.
    assert pair.connection._backlog
    assert [(answer[1], len(answer[3])) for answer in (pair.peer.receive() for _ in sizes)] == list(enumerate(sizes))
    assert not pair.connection._backlog
    assert pair.peer.call("echo", "next") == [1, 0, None, "next"]
    pair.close()


def test_a_peer_that_doesnt_read_is_not_read_any_further(service: gmprpc.Service) -> None:
    calls = [0]

    @service.method
    def give() -> bytes:
        calls[0] += 1
        return b"x" * 100_000

    pair = Pair(service)
    pair.peer.send(*([0, number, "give", []] for number in range(1000)))
    wait_until(lambda: pair.connection._backlog)
    gevent.sleep(0.05)
    seen = calls[0]
    # The high-water mark, what the kernel took, and no more than one answer beyond.
    assert pair.connection.unsent_size < 256 * 1024 + 2 * 100_100
    gevent.sleep(0.05)
    assert calls[0] == seen < 100
    assert [len(pair.peer.receive()[3]) for _ in range(1000)] == [100_000] * 1000
    pair.close()


class Stuck:
    """A connection of which the kernel takes nothing until it is told to."""

    def __init__(self, service: gmprpc.Service, **options: Any) -> None:
        self.calls = 0
        self.may_send = False
        ours, theirs = socket.socketpair()
        self.peer = Peer(theirs)
        stream = PlainStream(ours)
        send = stream.send

        def held_up(data: Any) -> int:
            if not self.may_send:
                raise BlockingIOError
            return send(data)

        @service.method
        def count() -> bytes:
            self.calls += 1
            return b"x" * 95

        #: What one answer of ``count`` takes.
        self.answer_size = len(msgpack.packb([1, 0, None, b"x" * 95]))
        stream.send = held_up  # type: ignore[assignment]
        self.connection = Connection(stream, service.table(), ConnectionOptions(**options), counters=Counters())
        self.life = gevent.spawn(self.connection.run)

    def call_one_after_the_other(self, number: int) -> int:
        """Send ``number`` requests, each when the last one has been answered; how many that were."""
        before = self.calls
        for expected in range(before + 1, before + 1 + number):
            self.peer.send([0, 0, "count", []])
            # What is sent is there: a few turns of the loop are enough for it to be read and carried out.
            for _ in range(10):
                gevent.sleep(0)
                gevent.sleep(0.0001)
                if self.calls == expected:
                    break
        return self.calls - before

    def let_go(self) -> None:
        self.may_send = True


@pytest.fixture
def make_stuck(service: gmprpc.Service) -> Iterator[Callable[..., Stuck]]:
    made: list[Stuck] = []

    def make(**options: Any) -> Stuck:
        made.append(Stuck(service, **options))
        return made[-1]

    yield make
    for stuck in made:
        stuck.peer.close()
        stuck.connection.abort()
        stuck.life.join()


def test_reading_goes_on_up_to_max_unsent_size_and_stops_above(make_stuck: Callable[..., Stuck]) -> None:
    size = make_stuck().answer_size
    for limit, answered in ((3 * size - 1, 3), (3 * size, 4), (3 * size + 1, 4)):
        stuck = make_stuck(max_unsent_size=limit)
        assert stuck.call_one_after_the_other(10) == answered
        stuck.let_go()
        assert [stuck.peer.receive() for _ in range(10)] == [[1, 0, None, b"x" * 95]] * 10
        assert stuck.call_one_after_the_other(5) == 5


def test_an_answer_takes_its_place_of_max_concurrency_until_it_is_sent(make_stuck: Callable[..., Stuck]) -> None:
    for limit in (1, 2, 7):
        stuck = make_stuck(max_concurrency=limit)
        assert stuck.call_one_after_the_other(10) == limit
        assert stuck.connection.in_flight == limit
        stuck.let_go()
        for _ in range(10):
            stuck.peer.receive()
        while stuck.connection.in_flight:
            gevent.sleep(0.001)
        assert stuck.call_one_after_the_other(5) == 5


def test_of_what_comes_at_once_no_more_is_carried_out_than_there_are_places(make_stuck: Callable[..., Stuck]) -> None:
    stuck = make_stuck(max_concurrency=20)
    assert stuck.call_one_after_the_other(1) == 1
    stuck.peer.send(*[[0, 0, "count", []]] * 50)
    wait_until(lambda: stuck.calls == 20)
    gevent.sleep(0.01)
    assert stuck.calls == 20
    stuck.let_go()
    for _ in range(51):
        stuck.peer.receive()


def test_no_more_places_than_there_are_are_taken_though_an_answer_gets_stuck_amid_a_batch(
    service: gmprpc.Service, make_stuck: Callable[..., Stuck]
) -> None:
    service.register(lambda: b"y" * 20_000, "give")
    stuck = make_stuck(max_concurrency=20)
    stuck.peer.send([0, 0, "give", []], *[[0, 0, "count", []]] * 50)
    wait_until(lambda: stuck.calls and not stuck.connection._is_reading)
    assert stuck.calls == 19
    assert stuck.connection.in_flight == 20
    stuck.let_go()
    for _ in range(51):
        stuck.peer.receive()


@pytest.mark.parametrize("size", [1, 1000, 1100, 16_000, 17_000])
def test_however_large_the_answers_of_a_batch_are_not_much_more_than_max_unsent_size_gathers(
    service: gmprpc.Service, make_stuck: Callable[..., Stuck], size: int
) -> None:
    service.register(lambda: b"y" * size, "give")
    stuck = make_stuck(max_concurrency=None, max_unsent_size=50_000)
    stuck.peer.send(*[[0, 0, "give", []]] * 380)  # As many as are read at once.
    wait_until(lambda: stuck.connection._backlog)
    assert stuck.connection.unsent_size < 50_000 + 2 * 17_000 + 380 * 1024
    stuck.let_go()
    for _ in range(380):
        assert len(stuck.peer.receive()[3]) == size


def test_without_limits_everything_is_read(make_stuck: Callable[..., Stuck]) -> None:
    stuck = make_stuck(max_unsent_size=None, max_concurrency=None)
    stuck.peer.send(*[[0, 0, "count", []]] * 3000)
    wait_until(lambda: stuck.calls == 3000)
    stuck.let_go()
    for _ in range(3000):
        stuck.peer.receive()


def test_calls_of_this_side_take_no_places(make_stuck: Callable[..., Stuck]) -> None:
    stuck = make_stuck(max_concurrency=5)
    for _ in range(10):
        stuck.connection.notify("note")
    assert stuck.connection.in_flight == 0
    assert stuck.call_one_after_the_other(10) == 5
    stuck.let_go()
    received = [stuck.peer.receive() for _ in range(20)]
    assert received.count([2, "note", []]) == 10


def test_what_is_written_to_a_peer_that_has_gone_ends_the_connection(service: gmprpc.Service, pair: Pair) -> None:
    pair.peer.send([0, 1, "hold", [1]])
    wait_until(lambda: pair.connection.in_flight == 1)
    pair.peer.close()
    service.methods["release"]()
    error = pair.life.get()
    assert isinstance(error, gmprpc.ConnectionClosed)
    assert isinstance(error.__cause__, OSError)
    assert pair.counters.failed_connections == 1


def test_of_what_waits_to_be_sent_only_as_much_is_joined_as_may_go(service: gmprpc.Service) -> None:
    sizes: list[int] = []
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)
    send = stream.send

    def measured(data: Any) -> int:
        sizes.append(len(data))
        return send(data)

    stream.send = measured  # type: ignore[assignment]
    conn = Connection(stream, service.table(), ConnectionOptions(max_unsent_size=None), counters=Counters())
    life = gevent.spawn(conn.run)
    peer = Peer(theirs)
    service.register(lambda size: b"x" * size, "give")
    wanted = [500_000, *[10_000] * 100, 500_000, *[10_000] * 100]
    for number, size in enumerate(wanted):
        peer.send([0, number, "give", [size]])
        wait_until(partial(lambda expected: conn._unsent_answers == expected, number + 1))
    sizes.clear()
    assert [len(peer.receive()[3]) for _ in wanted] == wanted
    assert max(sizes) < 256 * 1024 + 500_100
    assert len(sizes) < 50  # And small ones don't go one by one.
    peer.close()
    conn.abort()
    life.join()


def test_answers_that_nobody_reads_are_not_looked_through_when_the_peer_has_gone(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look(data: bytes) -> Any:
        looks.append(len(data))
        return {}, []

    monkeypatch.setattr(connection, "parted", look)
    service.register(lambda: b"x" * 1_000_000, "give")
    pair = Pair(service)
    pair.peer.send(*([0, number, "give", []] for number in range(10)))
    wait_until(lambda: pair.connection._backlog)
    pair.peer.close()
    assert isinstance(pair.life.get(), gmprpc.ConnectionClosed)
    assert not looks


def test_what_came_before_a_stream_was_cut_off_is_answered(service: gmprpc.Service) -> None:
    # As TLS is cut off: nothing more will come, but something may still be sent.
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)
    recv = stream.recv

    def recv_or_fail() -> bytes:
        if not (data := recv()):
            stream.recv = recv  # type: ignore[method-assign]  # The farewell listens to the plain stream.
            raise EOFError("cut off")
        return data

    stream.recv = recv_or_fail  # type: ignore[method-assign]
    connection = Connection(stream, service.table(), ConnectionOptions(), counters=Counters())
    life = gevent.spawn(connection.run)
    peer = Peer(theirs)
    peer.send([0, 1, "hold", [1]])
    peer.shutdown()
    wait_until(lambda: not connection.is_open)
    service.methods["release"]()
    assert peer.receive_rest() == [[1, 1, None, 1]]
    peer.close()
    error = life.get()
    assert isinstance(error, gmprpc.ConnectionClosed)
    assert str(error) == "connection lost: cut off"


def test_a_stream_that_takes_nothing_for_a_moment_is_written_to_later(service: gmprpc.Service) -> None:
    # The kernel may be just full, and may wake up who waits for nothing.
    refusals = [1, 1, 0, 1, 1, 1]
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)
    send = stream.send

    def choosy(data: Any) -> int:
        if refusals and refusals.pop():
            raise BlockingIOError
        return send(data)

    stream.send = choosy  # type: ignore[assignment]
    connection = Connection(stream, service.table(), ConnectionOptions(), counters=Counters())
    life = gevent.spawn(connection.run)
    peer = Peer(theirs)
    assert peer.call("echo", "first") == [1, 0, None, "first"]
    assert peer.call("echo", "second") == [1, 0, None, "second"]
    assert not refusals
    assert not connection._write_deadline.is_set
    peer.close()
    life.join()


@pytest.mark.parametrize("is_taken", [True, False])
def test_what_a_stream_has_taken_may_have_left_whatever_it_owns_up_to(service: gmprpc.Service, is_taken: bool) -> None:
    # As TLS does it: a record that is encrypted counts as sent when it has left, but what TLS has to say itself, when
    # the peer asks for other keys, takes it along.
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)

    def take(data: Any) -> int:
        if is_taken:
            return 0
        raise BlockingIOError

    stream.send = take  # type: ignore[assignment]
    connection = Connection(stream, service.table(), ConnectionOptions(), counters=Counters())
    life = gevent.spawn(connection.run)
    calls = [connection.call_async("m", number) for number in range(2)]
    connection.flush()
    connection.lose(TimeoutError("no more"))
    for call, is_sent in zip(calls, [is_taken, False], strict=True):
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            call.get()
        assert caught.value.sent is is_sent
    life.join()
    theirs.close()


def test_what_has_ended_is_not_lost_too(pair: Any) -> None:
    pair.connection.close()
    pair.connection.lose(TimeoutError("no answer"))
    assert pair.life.get() is None


def test_a_connection_that_ends_before_it_is_run_leaves_no_timer(service: gmprpc.Service) -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(
        PlainStream(ours), service.table(), ConnectionOptions(idle_timeout=1000), counters=Counters()
    )
    connection.lose(TimeoutError("no more"))
    assert isinstance(connection.run(), gmprpc.ConnectionClosed)
    assert not connection._idle_deadline.is_set
    theirs.close()


def test_a_connection_of_a_loop_that_is_gone_is_closed_where_its_thread_ends(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pair.connection, "_hub", SimpleNamespace(loop=None))
        pair.connection.leave()
    assert pair.connection.is_closed
    assert pair.peer.receive_rest() == []
    pair.life.kill()  # Where there really is no loop it stays, and does no harm.


def test_a_connection_whose_thread_ends_is_closed(pair: Any) -> None:
    pair.connection.leave()
    assert pair.connection.is_closed
    assert pair.peer.receive_rest() == []


def test_what_the_connections_of_a_hub_shared_is_forgotten_with_it() -> None:
    class Hub:
        loop = gevent.get_hub().loop

    hub = Hub()
    shared = [connection._Stage.of(hub), Sweeper.of(hub)]
    assert [connection._Stage.of(hub), Sweeper.of(hub)] == shared
    for _ in range(2):
        Connection.forget_hub(hub)
        assert not {connection._Stage.of(hub), Sweeper.of(hub)} & set(shared)
    Connection.forget_hub(hub)


# Time-outs.


def test_half_a_message_and_then_silence_ends_the_connection(service: gmprpc.Service) -> None:
    pair = Pair(service, read_timeout=0.05)
    pair.peer.send_bytes(msgpack.packb([0, 1, "echo", ["whole"]]) + b"\x94\x00")
    assert pair.peer.receive() == [1, 1, None, "whole"]
    assert pair.peer.receive_rest() == []
    assert str(pair.life.get()) == "the rest of a message didn't come within 0.05 s"
    pair.close()


def test_only_the_rest_of_a_message_is_waited_for_with_a_deadline(service: gmprpc.Service) -> None:
    pair = Pair(service, max_concurrency=1)
    deadline = pair.connection._read_deadline
    data = msgpack.packb([0, 1, "echo", ["in parts"]])
    pair.peer.send_bytes(data[:5])
    wait_until(lambda: deadline.is_set)
    pair.peer.send_bytes(data[5:])
    assert pair.peer.receive() == [1, 1, None, "in parts"]
    assert not deadline.is_set
    # Time in which nothing is read is not the peer's.
    pair.peer.send_bytes(msgpack.packb([0, 2, "hold", ["held"]]) + data[:5])
    wait_until(lambda: pair.connection.in_flight == 1)
    gevent.sleep(0)
    assert not deadline.is_set
    service.methods["release"]()
    assert pair.peer.receive() == [1, 2, None, "held"]
    wait_until(lambda: deadline.is_set)
    pair.peer.send_bytes(data[5:])
    assert pair.peer.receive() == [1, 1, None, "in parts"]
    pair.close()
    assert not deadline.is_set


def test_a_peer_that_takes_no_answers_is_given_up(service: gmprpc.Service) -> None:
    service.register(lambda: b"x" * 1_000_000, "give")
    pair = Pair(service, write_timeout=0.05)
    pair.peer.send(*([0, number, "give", []] for number in range(5)))
    assert str(pair.life.get()) == "connection lost: nothing could be written for 0.05 s"
    pair.close()


def test_the_deadline_for_writing_is_lifted_when_all_is_written(service: gmprpc.Service) -> None:
    service.register(lambda: b"x" * 1_000_000, "give")
    pair = Pair(service)
    deadline = pair.connection._write_deadline
    pair.peer.send(*([0, number, "give", []] for number in range(5)))
    wait_until(lambda: deadline.is_set)
    assert [len(pair.peer.receive()[3]) for _ in range(5)] == [1_000_000] * 5
    wait_until(lambda: not deadline.is_set)
    pair.close()


def test_an_idle_connection_ends_in_good_order_and_one_at_work_is_not_idle(service: gmprpc.Service) -> None:
    pair = Pair(service, idle_timeout=0.02)
    pair.peer.send([0, 1, "hold", ["held"]])
    gevent.sleep(0.1)
    service.methods["release"]()
    assert pair.peer.receive_rest() == [[1, 1, None, "held"]]
    pair.close()
    assert pair.life.get() is None


def test_the_idle_time_counts_from_the_last_call(service: gmprpc.Service) -> None:
    pair = Pair(service, idle_timeout=0.1)
    for _ in range(8):
        gevent.sleep(0.02)
        assert pair.peer.call("echo", "not idle") == [1, 0, None, "not idle"]
    assert pair.peer.receive_rest() == []
    pair.close()


# Ends.


def test_killing_the_life_of_a_connection_closes_it(pair: Pair) -> None:
    call = pair.connection.call_async("never")
    pair.peer.receive()
    pair.life.kill()
    assert pair.connection.is_closed
    with pytest.raises(gmprpc.ConnectionClosed):
        call.get()
    assert pair.peer.receive_rest() == []


def test_close_may_be_called_by_a_handler_any_number_of_times(service: gmprpc.Service, pair: Pair) -> None:
    @service.method
    def hang_up() -> str:
        connection = gmprpc.current_call().connection
        connection.close()
        connection.close()
        connection.finish()
        return "dropped"

    pair.peer.send([0, 1, "echo", ["before"]], [0, 2, "hang_up", []], [0, 3, "echo", ["behind"]])
    assert pair.peer.receive_rest() == [[1, 1, None, "before"]]
    assert pair.life.get() is None
    assert pair.counters.dropped_answers == 1
    with pytest.raises(gmprpc.ConnectionClosed, match="the connection is closed"):
        pair.connection.notify("late")


def test_a_large_answer_after_the_close_is_dropped_though_writing_is_not_done(service: gmprpc.Service) -> None:
    go = Event()
    service.register(lambda: go.wait() and b"B" * 200_000, "late")
    service.register(lambda: b"A" * 3_000_000, "early")
    pair = Pair(service)
    pair.peer.send([0, 1, "late", []], [0, 2, "early", []])
    wait_until(lambda: pair.connection._backlog)
    pair.connection.close()
    go.set()
    assert [answer[1] for answer in pair.peer.receive_rest()] == [2]
    assert pair.counters.dropped_answers == 1
    pair.close()


def test_refusals_that_nobody_reads_are_bounded(service: gmprpc.Service) -> None:
    service.register(lambda: b"x" * 1_000_000, "give")
    service.register(lambda: gmprpc.current_call().connection.call("question"), "ask")
    pair = Pair(service)
    pair.peer.send([0, 1, "ask", []])
    assert pair.peer.receive()[2] == "question"
    pair.peer.send(*([0, number, "give", []] for number in range(10)))
    wait_until(lambda: pair.connection._backlog)
    # A call is pending, so reading goes on; but not for ever.
    flood = gevent.spawn(pair.peer.send, *[[0, 5, "give", []]] * 1_000_000)
    wait_until(lambda: not pair.connection._is_reading and pair.connection._turn is None)
    assert pair.connection.unsent_size < 4_000_000
    flood.kill()
    pair.close()


def test_nothing_is_refused_because_too_much_is_unsent_just_before_its_turn(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_BATCH_MESSAGES", 1)
    monkeypatch.setattr(Decoder, "_RUN_SIZE", 1)
    pair = Pair(service)

    @service.method
    def tell() -> None:
        # Between this batch and the turn of what was read with it.
        gevent.get_hub().loop.run_callback(pair.connection.notify, "note", b"x" * 5_000_000)

    pair.peer.send([0, 0, "tell", []], [0, 1, "echo", [1]])
    assert [pair.peer.receive()[1] for _ in range(3)] == [0, "note", 1]
    assert pair.counters.refused_messages == 0
    pair.close()


def test_nothing_is_refused_because_the_last_call_of_this_side_ends_just_before_its_turn(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_BATCH_MESSAGES", 1)
    monkeypatch.setattr(Decoder, "_RUN_SIZE", 1)
    pair = Pair(service, max_concurrency=1)
    call = pair.connection.call_async("question")
    assert pair.peer.receive()[2] == "question"

    @service.method
    def give_up() -> None:
        gevent.get_hub().loop.run_callback(call.cancel, False)
        service.methods["hold"](0)

    pair.peer.send([0, 0, "give_up", []], [0, 1, "echo", [1]])
    wait_until(call.ready)
    gevent.sleep(0.01)
    service.methods["release"]()
    assert [pair.peer.receive() for _ in range(2)] == [[1, 0, None, None], [1, 1, None, 1]]
    assert pair.counters.refused_messages == 0
    pair.close()


def test_refusals_that_are_read_are_not_held_against_the_peer(service: gmprpc.Service) -> None:
    service.register(lambda: gmprpc.current_call().connection.call("question"), "ask")
    pair = Pair(service, max_concurrency=1, max_unsent_size=1000)
    pair.peer.send([0, 1, "ask", []])
    question = pair.peer.receive()
    for msgid in range(2, 200):  # Several times what may wait to be sent, but none of it waits.
        assert pair.peer.call("echo", 1, msgid=msgid) == [1, msgid, "too many requests in flight", None]
    pair.peer.send([1, question[1], None, "answer"])
    assert pair.peer.receive() == [1, 1, None, "answer"]
    pair.close()


def test_finish_reads_what_was_sent_even_beyond_max_concurrency(service: gmprpc.Service) -> None:
    pair = Pair(service, max_concurrency=2)
    pair.peer.send(*([0, number, "hold", [number]] for number in range(20)))
    wait_until(lambda: pair.connection.in_flight == 2)
    pair.connection.finish()
    service.methods["release"]()
    assert sorted(answer[1] for answer in pair.peer.receive_rest()) == list(range(20))
    pair.peer.close()
    assert pair.life.get() is None


def test_nothing_is_left_of_a_connection_that_has_ended(service: gmprpc.Service) -> None:
    pair = Pair(service)
    pair.peer.send(*([0, number, "hold", [number]] for number in range(10)), [2, "release", []])
    for _ in range(10):
        pair.peer.receive()
    greenlets = set(pair.connection._requests.greenlets)
    assert len(greenlets) == 11
    pair.peer.close()
    pair.life.join()
    wait_until(lambda: all(request.dead for request in greenlets))
    assert not pair.connection._requests.greenlets


def test_nobody_holds_a_connection_that_has_ended(service: gmprpc.Service) -> None:
    pair = Pair(service)
    pair.peer.call("echo", 1)
    connection = weakref.ref(pair.connection)
    pair.peer.close()
    pair.life.join()
    gevent.sleep(0)
    del pair
    collected()
    assert connection() is None


def test_nothing_is_kept_of_requests_that_took_longer_than_the_connection_was_busy(service: gmprpc.Service) -> None:
    pair = Pair(service)
    pair.peer.send(*([0, number, "hold", [number]] for number in range(10)))
    wait_until(lambda: pair.connection.in_flight == 10)
    sweeper = Sweeper.of(gevent.get_hub())
    while not pair.connection.rest():
        pass
    sweeper.forget(pair.connection)
    service.methods["release"]()
    for _ in range(10):
        pair.peer.receive()
    wait_until(lambda: len(pair.connection._requests.idle) == 10)
    wait_until(lambda: not pair.connection._requests.greenlets)
    pair.close()


# Odd company.


def test_a_caller_that_is_no_greenlet_of_gevents_may_die_of_its_answer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, exc, traceback: errors.append(exc))

    def call() -> None:
        pair.connection.call("question")
        raise ValueError("dead of it")

    gevent.spawn_raw(call)
    _, msgid, _, _ = pair.peer.receive()
    pair.peer.send([1, msgid, None, None], [0, 1, "echo", ["still here"]])
    assert pair.peer.receive() == [1, 1, None, "still here"]
    assert str(errors.pop()) == "dead of it"
    # And of the end of the connection.
    gevent.spawn_raw(pair.connection.call, "question")
    gevent.sleep(0)
    other = pair.connection.call_async("question")
    pair.peer.receive(), pair.peer.receive()
    pair.peer.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        other.get()
    assert isinstance(errors.pop(), gmprpc.ConnectionClosed)


def test_a_packer_hook_may_block_without_mixing_up_messages(service: gmprpc.Service) -> None:
    class Slow:
        def __init__(self, value: str) -> None:
            self.value = value

    def default(obj: Any) -> Any:
        gevent.sleep(0.001)
        return obj.value

    service.register(lambda value: ["a", Slow(value), "z"], "slow")
    pair = Pair(service, packer_options={"default": default})
    pair.peer.send(*([0, number, "slow", [f"value {number}"]] for number in range(20)))
    assert sorted(pair.peer.receive() for _ in range(20)) == [
        [1, number, None, ["a", f"value {number}", "z"]] for number in range(20)
    ]
    pair.close()


@pytest.mark.parametrize("hook", ["object_hook", "ext_hook"])
def test_an_unpacker_hook_that_fails_costs_its_own_request_only(service: gmprpc.Service, hook: str) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("not this one")

    pair = Pair(service, unpacker_options={hook: fail})
    pair.peer.send([0, 1, "echo", [{"a": 1}, msgpack.ExtType(5, b"x")]], [0, 2, "echo", ["next"]])
    assert pair.peer.receive() == [1, 1, "can't be decoded: ValueError: not this one", None]
    assert pair.peer.receive() == [1, 2, None, "next"]
    pair.close()


def test_a_reason_that_cant_be_sent_as_it_is_is_sent_all_the_same(service: gmprpc.Service) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("\udc80")

    pair = Pair(service, unpacker_options={"ext_hook": fail})
    pair.peer.send([0, 1, "echo", [msgpack.ExtType(5, b"x")]], [0, 2, "echo", ["next"]])
    assert pair.peer.receive() == [1, 1, "can't be decoded: ValueError: \\udc80", None]
    assert pair.peer.receive() == [1, 2, None, "next"]
    pair.close()


def test_an_answer_that_cant_be_decoded_and_that_nobody_waits_for_is_counted(pair: Pair) -> None:
    pair.peer.send_bytes(b"\x94\x01\x63\xc0\xa2\xff\xfe")
    assert pair.peer.call("echo", "next") == [1, 0, None, "next"]
    assert pair.counters.invalid_messages == 1


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 250])
def test_a_batch_may_end_on_any_message(pair: Pair, count: int) -> None:
    pair.peer.send(*([0, number, "echo", [number]] for number in range(count)))
    assert [pair.peer.receive()[1] for _ in range(count)] == list(range(count))
    assert pair.peer.call("echo", "next") == [1, 0, None, "next"]


def test_the_peers_name_stands_in_every_log_line(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pair.peer.send([0, 1, "fail", ["oops"]], [2, "nosuch", []])
    pair.peer.send_bytes(b"\xc1")
    pair.peer.receive()
    wait_until(lambda: len(caplog.records) == 3)
    assert all("the peer" in record.getMessage() for record in caplog.records)


def test_a_greenlet_that_waits_for_the_end_is_told(pair: Pair) -> None:
    assert pair.connection.wait(0) is False
    waiting = gevent.spawn(pair.connection.wait)
    gevent.sleep(0)
    pair.peer.close()
    assert waiting.get() is True


def test_reading_goes_on_while_handlers_block(service: gmprpc.Service, pair: Pair) -> None:
    pair.peer.send(*([0, number, "hold", [number]] for number in range(200)))
    assert pair.peer.call("echo", "read", msgid=999) == [1, 999, None, "read"]
    service.methods["release"]()
    assert sorted(pair.peer.receive()[1] for _ in range(200)) == list(range(200))


# What only happens at fork, at exit, and by bad luck.


def test_a_connection_that_is_abandoned_ends_quietly_here(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    pair = Pair(service)
    pair.peer.send([0, 1, "hold", [1]])
    wait_until(lambda: pair.connection.in_flight == 1)
    told: list[str] = []
    replies: list[gmprpc.Reply] = []

    def later(reply: gmprpc.Reply) -> None:
        reply.on_cancel(lambda: told.append("told"))
        replies.append(reply)

    service.reg_cb(later=later)
    pair.peer.send([0, 2, "later", []])
    wait_until(lambda: replies)
    call = pair.connection.call_async("never")
    connection._abandon_all()
    assert pair.connection.is_closed
    assert isinstance(pair.life.get(), gevent.GreenletExit)
    with pytest.raises(gmprpc.ConnectionClosed) as info:
        call.get()
    assert "the process which this one was forked off from" in str(info.value.__cause__)
    service.methods["release"]()
    wait_until(lambda: pair.counters.dropped_answers == 1)
    pair.connection.abandon()  # Once more does nothing.
    assert not told, "the caller still waits, for the other process"
    assert not caplog.records
    # Another process would hold the other end open; here it is the last.
    assert [message[2] for message in pair.peer.receive_rest()] == ["never"]
    pair.close()


def test_at_exit_what_is_held_back_is_written(pair: Pair) -> None:
    wait_until(lambda: pair.connection._is_reading)
    pair.connection.is_settling = True  # Somebody else will write it; but at exit nobody does.
    pair.connection.notify("last words")
    ThreadPool(1).apply(connection._flush_all)
    assert pair.connection._out, "it is not that thread's to write"
    connection._flush_all()
    assert pair.peer.receive() == [2, "last words", []]


def test_who_waits_for_a_connection_that_has_ended_waits_for_nothing(pair: Pair) -> None:
    waiting = gevent.spawn(pair.connection.wait)
    gevent.sleep(0)
    pair.connection.close()
    assert waiting.get() is True
    assert pair.connection.wait() is True


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the main greenlet would have been interrupted with."""
    interrupts: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_system_error", lambda *args: interrupts.append(args[0]))
    return interrupts


@pytest.mark.usefixtures("capfd")
def test_a_ctrl_c_amid_decoding_ends_the_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, interrupts: list[Any]
) -> None:
    feed = Decoder.feed

    def struck(decoder: Decoder, data: bytes) -> Any:
        if decoder is pair.connection._decoder:
            raise KeyboardInterrupt
        return feed(decoder, data)

    monkeypatch.setattr(Decoder, "feed", struck)
    pair.peer.send([0, 1, "echo", ["before"]])
    error = pair.life.get()
    assert str(error) == "connection lost: interrupted while decoding"
    assert interrupts == [KeyboardInterrupt]


@pytest.mark.usefixtures("capfd")
def test_a_ctrl_c_amid_reading_ends_the_connection(pair: Pair, interrupts: list[Any]) -> None:
    recv = pair.connection._recv

    def struck() -> bytes:
        recv()
        raise KeyboardInterrupt

    pair.connection._recv = struck
    pair.peer.send([0, 1, "echo", ["lost"]])
    error = pair.life.get()
    assert str(error) == "connection lost: interrupted while reading"
    assert interrupts == [KeyboardInterrupt]


@pytest.mark.usefixtures("capfd")
def test_a_ctrl_c_amid_a_batch_costs_none_of_the_messages_behind_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, interrupts: list[Any]
) -> None:
    def struck(connection: Connection, message: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "_reject", struck)
    pair.peer.send([0, 1, "echo", ["before"]], [0, 2, "echo", "no array"], [0, 3, "echo", ["behind"]])
    assert pair.peer.receive() == [1, 1, None, "before"]
    assert pair.peer.receive() == [1, 3, None, "behind"]
    assert interrupts == [KeyboardInterrupt]


@pytest.mark.usefixtures("capfd")
def test_a_ctrl_c_in_the_wait_for_a_quick_peer_costs_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, interrupts: list[Any]
) -> None:
    def struck() -> None:
        if not interrupts:
            raise KeyboardInterrupt

    be_alone(pair)
    call = pair.connection.call_async("question")
    assert pair.peer.receive()[2] == "question"
    monkeypatch.setattr(os, "sched_yield", struck)
    assert pair.peer.call("echo", 2) == [1, 0, None, 2]
    assert interrupts == [KeyboardInterrupt]
    pair.peer.send([1, 0, None, "answer"])
    assert call.get() == "answer"


def test_a_watcher_that_the_loop_has_stopped_because_of_a_ctrl_c_is_started_again(pair: Pair) -> None:
    assert pair.peer.call("echo", 1) == [1, 0, None, 1]
    pair.connection._read_watcher.stop()
    call = pair.connection.call_async("question")
    assert pair.peer.receive()[2] == "question"
    pair.peer.send([1, 0, None, "answer"])
    assert call.get() == "answer"


def test_a_ctrl_c_amid_sending_leaves_no_call_behind(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def struck(connection: Connection, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "post", struck)
    with pytest.raises(KeyboardInterrupt):
        pair.connection.call("question")
    assert pair.connection.pending == 0
