"""A request that takes longer than ``reply_timeout`` is answered with an error, and just once."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import AsyncResult, Event
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc.connection import Connection
from gmprpc.expiry import _Expiry, expiring
from gmprpc.metrics import Counters
from gmprpc.options import ConnectionOptions
from gmprpc.streams import PlainStream

from .helpers import Peer, collected, wait_until

NO_ANSWER = "no answer within 0.02 s"


@pytest.fixture
def server(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=0.02) as server:
        yield server


def test_a_handler_that_never_answers_is_answered_for_and_told(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[BaseException] = []

    @service.method
    def never(secret: str) -> None:
        try:
            Event().wait()
        except BaseException as exc:
            ends.append(exc)
            raise

    assert peer.call("never", "s3cret", msgid=5) == [1, 5, NO_ANSWER, None]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    (end,) = ends
    assert isinstance(end, gmprpc.CallCancelled)
    assert str(end) == NO_ANSWER
    wait_until(lambda: server.statistics()["in_flight"] == 0)
    statistics = server.statistics()
    assert (statistics["expired_requests"], statistics["handler_errors"], statistics["dropped_answers"]) == (1, 0, 0)
    (record,) = caplog.records
    assert record.getMessage().startswith("request 5 of never from 127.0.0.1:")
    assert record.getMessage().endswith(": " + NO_ANSWER)


def test_a_handler_that_answers_in_time_is_left_alone(service: gmprpc.Service) -> None:
    @service.method
    def quick() -> str:
        gevent.sleep(0)
        return "in time"

    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=1000) as server,
        Peer.connect(server.address) as peer,
    ):
        for number in range(5):
            assert peer.call("quick", msgid=number) == [1, number, None, "in time"]
        assert peer.call("fail", "x") == [1, 0, "ValueError: x", None]
        assert peer.call("add", 1) == [1, 0, "wrong params for add(a, b): missing a required argument: 'b'", None]
        assert peer.call("nosuch") == [1, 0, 'No such method "nosuch" found', None]
        assert nothing_expires()


def nothing_expires() -> bool:
    """Whether no request's time runs any more."""
    return not any(isinstance(thing, _Expiry) and thing._timer.active for thing in gc.get_objects())


@pytest.mark.parametrize("way", ["return", "raise", "block again", "raise SystemExit"])
def test_what_a_handler_does_after_that_is_dropped(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    go = Event()

    @service.method
    def stubborn() -> str:
        try:
            Event().wait()
        except gmprpc.CallCancelled:
            if way == "raise":
                raise ValueError("while it cleaned up") from None
            if way == "raise SystemExit":
                raise SystemExit(1) from None
            if way == "block again":
                go.wait()
        return "late"

    assert peer.call("stubborn", msgid=1) == [1, 1, NO_ANSWER, None]
    go.set()
    wait_until(lambda: server.statistics()["in_flight"] == 0)
    peer.shutdown()
    assert peer.receive_rest() == []
    assert server.statistics()["dropped_answers"] == 1
    # A fault is a fault, even if nobody waits for the answer.
    assert server.statistics()["handler_errors"] == int(way.startswith("raise"))
    assert ("while it cleaned up" in caplog.text) == (way == "raise")


def test_the_time_of_one_request_of_a_batch_is_not_that_of_the_others(service: gmprpc.Service, peer: Peer) -> None:
    ends: list[Any] = []

    @service.method
    def never() -> None:
        try:
            Event().wait()
        finally:
            ends.append(gmprpc.current_call().msgid)

    late = range(2, 30, 5)
    peer.send(*([0, number, *(["never", []] if number in late else ["echo", [number]])] for number in range(30)))
    assert sorted(peer.receive() for _ in range(30)) == [
        [1, number, *([NO_ANSWER, None] if number in late else [None, number])] for number in range(30)
    ]
    assert sorted(ends) == list(late)


def test_a_notification_has_all_the_time_that_it_likes(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    done = Event()

    @service.method
    def slow() -> None:
        gevent.sleep(0.05)
        done.set()

    peer.send([2, "slow", []])
    done.wait()
    assert server.statistics()["expired_requests"] == 0


def test_a_deferred_reply_is_cancelled_and_what_is_set_after_that_dropped(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    replies: list[gmprpc.Reply] = []
    told: list[str] = []

    def later(reply: gmprpc.Reply) -> None:
        reply.on_cancel(lambda: told.append("told"))
        replies.append(reply)

    service.reg_cb(later=later)
    assert peer.call("later", msgid=3) == [1, 3, NO_ANSWER, None]
    wait_until(lambda: told)
    reply = replies[0]
    assert reply.cancelled()
    assert reply.answered()
    reply.result("late")
    with pytest.raises(gmprpc.AlreadyAnswered):
        reply.error("again")
    assert peer.call("echo", 1) == [1, 0, None, 1]
    statistics = server.statistics()
    assert (statistics["expired_requests"], statistics["dropped_answers"], statistics["in_flight"]) == (1, 1, 0)
    assert [record.getMessage()[:18] for record in caplog.records] == ["request 3 of later"]


def test_a_late_answer_from_another_thread_is_dropped_too(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=replies.append)
    assert peer.call("later")[2] == NO_ANSWER
    ThreadPool(1).apply(replies[0].result, ("late",))
    wait_until(lambda: server.statistics()["dropped_answers"] == 1)


def test_a_callback_that_blocks_before_it_answers_is_told_both_ways(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    replies: list[gmprpc.Reply] = []

    def blocking(reply: gmprpc.Reply) -> None:
        replies.append(reply)
        try:
            Event().wait()
        except gmprpc.CallCancelled:
            reply.result("late")

    service.reg_cb(blocking=blocking)
    assert peer.call("blocking", msgid=4) == [1, 4, NO_ANSWER, None]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert replies[0].cancelled()


def test_a_reply_of_an_earlier_request_is_not_cancelled_in_its_place(service: gmprpc.Service) -> None:
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=lambda reply: replies.append(reply))

    @service.method
    def never() -> None:
        Event().wait()

    table = service.table(lambda function: expiring(0.02 if inspect.unwrap(function) is never else 1000.0, function))
    ours, theirs = socket.socketpair()
    connection = Connection(PlainStream(ours), table, ConnectionOptions(), counters=Counters())
    life = gevent.spawn(connection.run)
    with Peer(theirs) as peer:
        peer.send([0, 1, "later", []])
        wait_until(lambda: replies)
        # The same greenlet carries out the next request.
        assert peer.call("never", msgid=2) == [1, 2, NO_ANSWER, None]
        assert not replies[0].cancelled()
        replies[0].result("in time")
        assert peer.receive() == [1, 1, None, "in time"]
    life.join()


@pytest.mark.parametrize("make", [gmprpc.Reply, AsyncResult, lambda: gevent.Greenlet(Event().wait)])
def test_whatever_a_function_returns_to_be_waited_for_has_to_complete_in_time(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, make: Any
) -> None:
    returned: list[Any] = []

    @service.method
    def later() -> Any:
        returned.append(make())
        return returned[0]

    assert peer.call("later", msgid=6) == [1, 6, NO_ANSWER, None]
    if not isinstance(returned[0], gevent.Greenlet):
        returned[0].set("late")
        wait_until(lambda: server.statistics()["dropped_answers"] == 1)
    assert peer.call("echo", 1) == [1, 0, None, 1]


@pytest.mark.parametrize("make", [gmprpc.Reply, AsyncResult])
@pytest.mark.parametrize("fails", [False, True])
def test_what_completes_in_time_is_the_answer(service: gmprpc.Service, make: Any, fails: bool) -> None:
    @service.method
    def later() -> Any:
        result = make()
        if fails:
            gevent.spawn(result.set_exception, ValueError("no"))
        else:
            gevent.spawn(result.set, "yes")
        return result

    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=1000) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("later") == ([1, 0, "ValueError: no", None] if fails else [1, 0, None, "yes"])
        assert nothing_expires()


@pytest.mark.parametrize("make", [gmprpc.Reply, AsyncResult])
def test_what_is_dropped_unanswered_is_answered_at_once(service: gmprpc.Service, make: Any) -> None:
    service.register(make, "drop")
    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=1000) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 1, "drop", []])
        answer = gevent.spawn(peer.receive)
        while not answer.ready():
            collected()
            gevent.sleep(0.001)
        assert answer.get() == [1, 1, "the reply was dropped unanswered", None]


def test_after_the_peer_has_gone_time_runs_out_quietly(
    service: gmprpc.Service, server: gmprpc.Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=replies.append)
    peer = Peer.connect(server.address)
    peer.send([0, 1, "later", []])
    wait_until(lambda: replies)
    peer.reset()
    wait_until(lambda: not server.connections)
    gevent.sleep(0.03)
    assert replies[0].cancelled()
    replies[0].result("late")
    assert not [record for record in caplog.records if "no answer" in record.getMessage()]


def test_on_dispatch_and_a_deadline_go_together(service: gmprpc.Service) -> None:
    seen: list[Any] = []
    service.register(Event().wait, "never")
    with (
        gmprpc.Server(
            ("127.0.0.1", 0),
            service,
            reply_timeout=0.02,
            on_dispatch=lambda connection, message: seen.append(message[2]),
        ) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("never") == [1, 0, NO_ANSWER, None]
        assert peer.call("nosuch") == [1, 0, 'No such method "nosuch" found', None]
    assert seen == ["never", "nosuch"]


def test_a_hook_that_hangs_takes_from_the_time_of_its_request(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        gmprpc.Server(
            ("127.0.0.1", 0), service, reply_timeout=0.02, on_dispatch=lambda connection, message: Event().wait()
        ) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("echo", 1) == [1, 0, NO_ANSWER, None]
        assert peer.call("no such\nmethod" * 1000) == [1, 0, NO_ANSWER, None]
        wait_until(lambda: len(caplog.records) == 2)
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 400 for record in caplog.records)
