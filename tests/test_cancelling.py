"""A caller that gives a call up says so with ``$/cancel``: the handler, or its Reply, is told, and just once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult, Event

import gmprpc

from .helpers import Peer, collected, wait_until

CANCELLED = "CallCancelled: the caller has cancelled it"


def cancel(msgid: Any) -> list[Any]:
    return [2, "$/cancel", [msgid]]


class Waiting:
    """Methods that wait, and what became of them."""

    def __init__(self) -> None:
        #: The msgids of those that have begun.
        self.begun: list[int | None] = []
        #: What came out of each wait; None for its end.
        self.ends: list[BaseException | None] = []
        self.replies: list[gmprpc.Reply] = []
        self.told: list[int] = []
        self.go = Event()
        self.clean = Event()

    def wait(self, value: Any = None) -> Any:
        self.begun.append(gmprpc.current_call().msgid)
        try:
            self.go.wait()
        except BaseException as exc:
            self.ends.append(exc)
            raise
        self.ends.append(None)
        return value

    def clean_up(self) -> str:
        """Catches CallCancelled, and takes its time to end."""
        try:
            self.wait()
        except gmprpc.CallCancelled:
            self.clean.wait()
        return "clean"

    def later(self) -> gmprpc.Reply:
        reply = gmprpc.Reply()
        number = len(self.replies)
        reply.on_cancel(lambda: self.told.append(number))
        self.replies.append(reply)
        return reply

    def wait_and_reply_later(self) -> gmprpc.Reply:
        self.wait()
        return self.later()

    def call_back(self, reply: gmprpc.Reply) -> None:
        reply.on_cancel(lambda: self.told.append(0))
        self.replies.append(reply)
        self.wait()


@pytest.fixture
def waiting(service: gmprpc.Service) -> Waiting:
    """What waits, registered at the server."""
    waiting = Waiting()
    for function in (waiting.wait, waiting.clean_up, waiting.later, waiting.wait_and_reply_later):
        service.register(function)
    service.reg_cb(call_back=waiting.call_back)
    return waiting


def counts(server: gmprpc.Server) -> tuple[int, int, int]:
    """How many were cancelled, failed, and are in flight."""
    statistics = server.statistics()
    return statistics["cancelled_requests"], statistics["handler_errors"], statistics["in_flight"]


# Handlers.


def test_a_handler_whose_caller_gives_up_is_told_and_its_end_is_answered(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 5, "wait", []])
    wait_until(lambda: waiting.begun)
    peer.send(cancel(5))
    assert peer.receive() == [1, 5, CANCELLED, None]
    (end,) = waiting.ends
    assert isinstance(end, gmprpc.CallCancelled)
    assert str(end) == "the caller has cancelled it"
    wait_until(lambda: counts(server) == (1, 0, 0))
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not caplog.records


def test_a_request_to_cancel_is_answered_and_once_is_enough(
    server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    peer.send([0, 5, "wait", []], [0, 6, "$/cancel", [5]], [0, 7, "$/cancel", [5]])
    assert sorted(peer.receive() for _ in range(3)) == [[1, 5, CANCELLED, None], [1, 6, None, None], [1, 7, None, None]]
    assert counts(server)[:2] == (1, 0)


@pytest.mark.parametrize("way", ["cancel", "timeout"])
def test_a_client_says_it_when_its_caller_gives_up(server: gmprpc.Server, waiting: Waiting, way: str) -> None:
    with gmprpc.Client(server.address) as client:
        if way == "cancel":
            pending = client.call_async("wait")
            wait_until(lambda: waiting.begun)
            assert pending.cancel()
        else:
            with pytest.raises(gmprpc.CallTimeout):
                client.call("wait", timeout=0.01, cancel_on_timeout=True)
        wait_until(lambda: waiting.ends)
        assert isinstance(waiting.ends[0], gmprpc.CallCancelled)
        wait_until(lambda: client.statistics()["late_answers"] == 1)  # Every request is answered.
        wait_until(lambda: counts(server) == (1, 0, 0))


def test_anybody_may_say_it_with_a_notification(server: gmprpc.Server, waiting: Waiting) -> None:
    with gmprpc.Client(server.address) as client:
        pending = client.call_async("wait")  # The first call: its msgid is 0.
        client.notify("$/cancel", 0)
        with pytest.raises(gmprpc.RemoteError, match=CANCELLED):
            pending.get()


@pytest.mark.parametrize("msgid", [6, -1, True, 5.0, "5", None, [5], {}, b"5", 2**64 - 1])
def test_what_is_not_the_msgid_of_a_request_at_work_changes_nothing(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture, msgid: Any
) -> None:
    peer.send([2, "wait", []], [0, 5, "wait", ["yes"]], [0, 1, "wait", ["yes"]], cancel(msgid))
    assert peer.call("echo", 2, msgid=2) == [1, 2, None, 2]
    waiting.go.set()
    assert sorted([peer.receive(), peer.receive()]) == [[1, 1, None, "yes"], [1, 5, None, "yes"]]
    assert waiting.ends == [None] * 3
    assert counts(server)[0] == 0
    assert not caplog.records


def test_a_finished_request_is_not_cancelled(server: gmprpc.Server, peer: Peer) -> None:
    assert peer.call("echo", 1, msgid=5) == [1, 5, None, 1]
    peer.send([0, 6, "echo", [2]], cancel(6), cancel(5), [0, 7, "$/cancel", [7]])
    assert [peer.receive(), peer.receive()] == [[1, 6, None, 2], [1, 7, None, None]]
    wait_until(lambda: counts(server)[2] == 0)
    # Each `$/cancel` finds itself at work if it is a request; but by the time that it would be told it isn't any more.
    assert peer.call("echo", 3) == [1, 0, None, 3]


def test_wrong_params_cancel_nothing_and_say_so(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 5, "wait", []], [2, "$/cancel", []])
    assert peer.call("$/cancel", 5, 5)[2] == "wrong params for $/cancel(msgid): too many positional arguments"
    (record,) = caplog.records
    assert "notification of $/cancel" in record.getMessage()
    assert counts(server)[0] == 0
    waiting.go.set()
    assert peer.receive() == [1, 5, None, None]


def test_a_request_is_cancelled_on_its_own_connection_only(server: gmprpc.Server, peer: Peer, waiting: Waiting) -> None:
    with Peer.connect(server.address) as other:
        other.send([0, 5, "wait", ["other's"]])
        peer.send([0, 5, "wait", []])
        wait_until(lambda: len(waiting.begun) == 2)
        peer.send(cancel(5))
        assert peer.receive() == [1, 5, CANCELLED, None]
        waiting.go.set()
        assert other.receive() == [1, 5, None, "other's"]


def test_every_request_with_the_msgid_is_cancelled(server: gmprpc.Server, peer: Peer, waiting: Waiting) -> None:
    peer.send([0, 5, "wait", []], [0, 5, "later", []], [0, 5, "wait", []], [0, 6, "wait", ["not me"]], cancel(5))
    assert [peer.receive(), peer.receive()] == [[1, 5, CANCELLED, None]] * 2
    wait_until(lambda: waiting.told)
    waiting.replies[0].result("told")
    assert peer.receive() == [1, 5, None, "told"]
    waiting.go.set()
    assert peer.receive() == [1, 6, None, "not me"]
    assert counts(server)[0] == 3


def test_a_request_that_comes_later_with_the_same_msgid_is_not_meant(peer: Peer, waiting: Waiting) -> None:
    peer.send([0, 5, "wait", []], cancel(5), [0, 5, "wait", ["the second"]])
    assert peer.receive() == [1, 5, CANCELLED, None]
    waiting.go.set()
    assert peer.receive() == [1, 5, None, "the second"]


@pytest.mark.parametrize("reuse_greenlets", [True, False])
def test_requests_and_what_cancels_them_may_come_in_one_piece(
    service: gmprpc.Service, waiting: Waiting, reuse_greenlets: bool
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, max_concurrency=None, reuse_greenlets=reuse_greenlets) as server,
        Peer.connect(server.address) as peer,
    ):
        # More than a batch has.
        peer.send(*(message for msgid in range(200) for message in ([0, msgid, "wait", []], cancel(msgid))))
        assert sorted(peer.receive() for _ in range(200)) == [[1, msgid, CANCELLED, None] for msgid in range(200)]
        wait_until(lambda: counts(server) == (200, 0, 0))
    assert waiting.begun == list(range(200))


def test_a_request_that_has_to_wait_for_its_turn_has_begun_when_its_cancellation_is_read(
    service: gmprpc.Service, waiting: Waiting
) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, max_concurrency=2) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 1, "hold", [1]], [0, 2, "hold", [2]], [0, 5, "wait", []], cancel(5))
        with Peer.connect(server.address) as other:
            other.call("release")
        assert sorted(peer.receive() for _ in range(3)) == [[1, 1, None, 1], [1, 2, None, 2], [1, 5, CANCELLED, None]]
        assert waiting.begun == [5]


def test_with_no_place_left_a_cancellation_waits_unread(service: gmprpc.Service, waiting: Waiting) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, max_concurrency=1) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 5, "wait", ["not cancelled"]], cancel(5))
        wait_until(lambda: waiting.begun)
        waiting.go.set()
        assert peer.receive() == [1, 5, None, "not cancelled"]
        assert peer.call("echo", 1) == [1, 0, None, 1]
        assert counts(server)[0] == 0


def test_a_greenlet_that_is_at_work_on_another_message_by_now_is_left_alone(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    used: list[Any] = []

    @service.method
    def first() -> None:
        used.append(gevent.getcurrent())
        waiting.wait()

    @service.method
    def second() -> str:
        used.append(gevent.getcurrent())
        gevent.sleep(0)
        return "unharmed"

    @service.method
    def let_the_first_end_and_the_second_begin() -> None:
        # All before the hub comes to what the cancellation, which is the next message, wants of it.
        waiting.go.set()
        peer.send([0, 7, "second", []])
        gevent.get_hub().loop.run_callback(gmprpc.current_call().connection._take_turn)

    peer.send([0, 5, "first", []])
    wait_until(lambda: waiting.begun)
    peer.send([0, 6, "let_the_first_end_and_the_second_begin", []], cancel(5))
    assert sorted(peer.receive() for _ in range(3)) == [
        [1, 5, None, None],
        [1, 6, None, None],
        [1, 7, None, "unharmed"],
    ]
    assert used[0] is used[1]
    assert counts(server)[0] == 1  # It was at work.


@pytest.mark.parametrize("way", ["return", "raise", "raise GreenletExit", "return later"])
def test_a_handler_may_end_in_its_own_way(
    service: gmprpc.Service,
    server: gmprpc.Server,
    peer: Peer,
    waiting: Waiting,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    @service.method
    def stubborn() -> Any:
        try:
            waiting.wait()
        except gmprpc.CallCancelled:
            if way == "raise":
                raise ValueError("while it cleaned up") from None
            if way == "raise GreenletExit":
                raise gevent.GreenletExit from None
        return waiting.later() if way == "return later" else "done"

    peer.send([0, 5, "stubborn", []], cancel(5))
    if way == "return later":
        wait_until(lambda: waiting.told)
        waiting.replies[0].result("done")
    error = {"raise": "ValueError: while it cleaned up", "raise GreenletExit": "GreenletExit"}.get(way)
    assert peer.receive() == [1, 5, error, None if error else "done"]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert counts(server)[:2] == (1, int(way.startswith("raise")))
    assert ("failed" in caplog.text) == way.startswith("raise")


def test_a_handler_that_is_cleaning_up_is_not_disturbed_again(
    server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    peer.send([0, 5, "clean_up", []], cancel(5))
    wait_until(lambda: waiting.ends)
    peer.send(cancel(5), [0, 6, "echo", [6]], cancel(6))
    assert peer.receive() == [1, 6, None, 6]
    peer.send(cancel(5))
    assert peer.call("echo", 7) == [1, 0, None, 7]
    waiting.clean.set()
    assert peer.receive() == [1, 5, None, "clean"]
    assert len(waiting.ends) == 1
    assert counts(server)[0] == 1


def test_the_params_of_a_handler_that_went_on_are_not_kept(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    used: list[Any] = []

    @service.method
    def go_on(value: Any) -> None:
        used.append(gevent.getcurrent())
        try:
            waiting.wait()
        except gmprpc.CallCancelled:
            pass

    peer.send([0, 5, "go_on", ["large"]], cancel(5))
    assert peer.receive() == [1, 5, None, None]
    peer.send(cancel(6))
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert used[0].cancelled is used[0].message is None


def test_a_call_of_its_own_that_a_handler_cancelled_is_no_cancellation_of_the_request(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    @service.method
    def call_back() -> Any:
        pending = gmprpc.current_call().connection.call_async("secret")
        gevent.spawn(pending.cancel, tell=False)
        return pending.get()

    peer.send([0, 5, "call_back", []])
    assert peer.receive()[2] == "secret"
    assert peer.receive() == [1, 5, "CallCancelled: call of 'secret' was cancelled", None]
    wait_until(lambda: counts(server) == (0, 1, 0))
    assert "request 5 of call_back" in caplog.text


def test_a_call_of_its_own_that_a_handler_waits_for_ends_with_it(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer
) -> None:
    service.register(lambda: gmprpc.current_call().connection.call("question"), "ask")
    peer.send([0, 5, "ask", []])
    _, msgid, method, _ = peer.receive()
    assert method == "question"
    peer.send(cancel(5))
    assert peer.receive() == [1, 5, CANCELLED, None]
    peer.send([1, msgid, None, "too late"])
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert server.statistics()["late_answers"] == 1


def test_the_hook_of_a_request_is_a_part_of_it(service: gmprpc.Service, waiting: Waiting) -> None:
    def on_dispatch(connection: gmprpc.Connection, message: Any) -> None:
        if message[2] == "echo":
            waiting.wait()

    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 5, "echo", [1]], cancel(5))
        assert peer.receive() == [1, 5, CANCELLED, None]


class SlowHandler(logging.Handler):
    """A log that somebody else writes to for long."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waiting = False
        self.free = Event()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.is_waiting = True
        self.free.wait()
        self.records.append(record)


def test_the_log_line_of_a_handler_that_has_failed_can_not_be_prevented(server: gmprpc.Server, peer: Peer) -> None:
    slow = SlowHandler()
    logger = logging.getLogger("gmprpc.connection")
    logger.addHandler(slow)
    try:
        peer.send([0, 5, "fail", ["x"]])
        assert peer.receive() == [1, 5, "ValueError: x", None]
        wait_until(lambda: slow.is_waiting)
        peer.send(cancel(5))
        assert peer.call("echo", 1) == [1, 0, None, 1]
        assert not slow.records
        slow.free.set()
        wait_until(lambda: slow.records)
    finally:
        logger.removeHandler(slow)
    assert counts(server)[0] == 0
    # Its greenlet goes on as if nothing had been.
    assert peer.call("echo", 2) == [1, 0, None, 2]


def test_a_handler_that_fails_just_then_is_not_disturbed(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowError(Exception):
        def __str__(self) -> str:
            gevent.sleep(0)
            return "slow to say"

    @service.method
    def fail_slowly() -> None:
        waiting.wait()
        raise SlowError

    @service.method
    def go() -> None:
        waiting.go.set()  # It fails before the hub comes to tell it.

    peer.send([0, 5, "fail_slowly", []], [0, 6, "go", []], cancel(5))
    assert sorted([peer.receive(), peer.receive()]) == [[1, 5, "SlowError: slow to say", None], [1, 6, None, None]]
    assert waiting.ends == [None]
    wait_until(lambda: "request 5 of fail_slowly" in caplog.text)


# Replies.


def test_a_deferred_reply_is_told_and_answered_by_who_has_it(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 5, "later", []], [0, 6, "later", []], cancel(5), cancel(5))
    wait_until(lambda: waiting.told)
    reply, other = waiting.replies
    assert reply.cancelled()
    assert not reply.answered()
    assert not other.cancelled()
    assert counts(server) == (1, 0, 2)  # It takes its place until it is answered.
    reply.error("given up")
    assert peer.receive() == [1, 5, "given up", None]
    other.result("wanted")
    assert peer.receive() == [1, 6, None, "wanted"]
    assert waiting.told == [0]
    assert not caplog.records


def test_who_drops_a_reply_that_is_cancelled_has_answered_it(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 5, "later", []], cancel(5))
    wait_until(lambda: waiting.told)
    waiting.replies.clear()
    collected()
    assert peer.receive() == [1, 5, "the reply was dropped unanswered", None]
    wait_until(lambda: counts(server) == (1, 0, 0))
    assert not caplog.records


def test_a_reply_that_is_answered_is_not_cancelled(server: gmprpc.Server, peer: Peer, waiting: Waiting) -> None:
    peer.send([0, 5, "later", []])
    wait_until(lambda: waiting.replies)
    waiting.replies[0].result("just in time")
    peer.send(cancel(5))
    assert peer.receive() == [1, 5, None, "just in time"]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not waiting.replies[0].cancelled()
    assert counts(server)[0] == 0


def test_what_is_no_reply_can_not_be_told(service: gmprpc.Service, server: gmprpc.Server, peer: Peer) -> None:
    result: AsyncResult[str] = AsyncResult()
    service.register(lambda: result, "result")
    service.register(lambda: gevent.spawn(result.get), "greenlet")
    peer.send([0, 5, "result", []], [0, 6, "greenlet", []], cancel(5), cancel(6))
    assert peer.call("echo", 1) == [1, 0, None, 1]
    result.set("not cancelled")
    assert sorted([peer.receive(), peer.receive()]) == [[1, 5, None, "not cancelled"], [1, 6, None, "not cancelled"]]
    assert counts(server)[0] == 0


def test_a_reply_that_is_returned_before_the_handler_could_be_told_is_told_instead(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    service.register(waiting.go.set, "go")
    peer.send([0, 5, "wait_and_reply_later", []], [0, 6, "go", []], cancel(5))
    assert peer.receive() == [1, 6, None, None]
    wait_until(lambda: waiting.told)
    assert waiting.ends == [None]
    waiting.replies[0].result("told")
    assert peer.receive() == [1, 5, None, "told"]
    assert counts(server)[0] == 1


def test_a_callback_that_blocks_is_told_both_ways(
    server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send([0, 5, "call_back", []], cancel(5))
    assert peer.receive() == [1, 5, CANCELLED, None]
    assert isinstance(waiting.ends[0], gmprpc.CallCancelled)
    assert waiting.replies[0].cancelled()
    wait_until(lambda: waiting.told)
    waiting.replies[0].result("too late")
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert not caplog.records


def test_a_callback_that_has_answered_has_answered(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    def answer_and_wait(reply: gmprpc.Reply) -> None:
        reply.result("answered")
        waiting.wait()

    service.reg_cb(answer_and_wait=answer_and_wait)
    peer.send([0, 5, "answer_and_wait", []], cancel(5))
    assert peer.receive() == [1, 5, None, "answered"]
    assert isinstance(waiting.ends[0], gmprpc.CallCancelled)
    assert not caplog.records


def test_a_reply_of_an_earlier_request_is_not_told_in_place_of_that_of_the_handler(
    service: gmprpc.Service, peer: Peer, waiting: Waiting
) -> None:
    kept: list[gmprpc.Reply] = []
    service.reg_cb(keep=kept.append)
    peer.send([0, 5, "keep", []])
    wait_until(lambda: kept)
    peer.send([0, 6, "wait", []], cancel(6))  # In the same greenlet.
    assert peer.receive() == [1, 6, CANCELLED, None]
    assert not kept[0].cancelled()
    kept[0].result("wanted")
    assert peer.receive() == [1, 5, None, "wanted"]


def test_the_reply_of_a_callback_that_fails_hears_that_nobody_waits_for_it(
    service: gmprpc.Service, peer: Peer, waiting: Waiting
) -> None:
    def keep_and_fail(reply: gmprpc.Reply) -> None:
        waiting.replies.append(reply)
        raise ValueError("after all")

    service.reg_cb(keep_and_fail=keep_and_fail)
    assert peer.call("keep_and_fail") == [1, 0, "ValueError: after all", None]
    assert waiting.replies[0].cancelled()


# All at once.


@pytest.mark.parametrize("reply_timeout", [None, 0.001])
@pytest.mark.parametrize("reuse_greenlets", [True, False])
def test_whatever_is_cancelled_and_when_every_request_is_answered_once(
    service: gmprpc.Service, waiting: Waiting, reply_timeout: float | None, reuse_greenlets: bool
) -> None:
    random = Random(f"{reply_timeout} {reuse_greenlets}")

    @service.method
    def sleep(seconds: float) -> str:
        gevent.sleep(seconds)
        return "slept"

    @service.method
    def reply_late(seconds: float) -> gmprpc.Reply:
        gevent.sleep(seconds)
        reply = gmprpc.Reply()
        gevent.spawn_later(seconds, reply.result, "slept")
        return reply

    @service.method
    def go_on(seconds: float) -> str:
        try:
            gevent.sleep(seconds)
        except gmprpc.CallCancelled:
            gevent.sleep(seconds)
        return "slept"

    methods = ["sleep", "reply_late", "go_on"]
    msgids = [random.randrange(50) for _ in range(300)]
    messages: list[Any] = []
    for msgid in msgids:
        messages.append([0, msgid, random.choice(methods), [random.choice([0, 0, 0.001, 0.002])]])
        messages += [cancel(random.choice(msgids)) for _ in range(random.randrange(4))]
    with (
        gmprpc.Server(
            ("127.0.0.1", 0), service, reply_timeout=reply_timeout, reuse_greenlets=reuse_greenlets
        ) as server,
        Peer.connect(server.address) as peer,
    ):
        while messages:
            size = random.randrange(1, 20)
            peer.send(*messages[:size])
            del messages[:size]
            gevent.sleep(random.choice([0, 0, 0.001]))
        peer.shutdown()
        answers = peer.receive_rest()
        assert sorted(answer[1] for answer in answers) == sorted(msgids)
        outcomes = {error or result for _, _, error, result in answers}
        assert CANCELLED in outcomes
        assert outcomes <= {"slept", CANCELLED, *(["no answer within 0.001 s"] if reply_timeout else [])}
        assert counts(server)[1:] == (0, 0)


# With `reply_timeout`.


@pytest.fixture
def timed_server(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=0.02) as server:
        yield server


@pytest.fixture
def timed_peer(timed_server: gmprpc.Server) -> Iterator[Peer]:
    with Peer.connect(timed_server.address) as peer:
        yield peer


def test_who_is_cancelled_in_time_is_not_late(service: gmprpc.Service, waiting: Waiting) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=1000) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 5, "wait", []], [0, 6, "later", []], [0, 7, "call_back", []], cancel(5), cancel(6), cancel(7))
        assert sorted([peer.receive(), peer.receive()]) == [[1, 5, CANCELLED, None], [1, 7, CANCELLED, None]]
        wait_until(lambda: len(waiting.told) == 2)
        waiting.replies[0].result("in time")
        assert peer.receive() == [1, 6, None, "in time"]
        wait_until(lambda: counts(server) == (3, 0, 0))
        assert server.statistics()["expired_requests"] == 0


def test_a_handler_that_was_answered_for_is_not_told_again(
    timed_server: gmprpc.Server, timed_peer: Peer, waiting: Waiting
) -> None:
    timed_peer.send([0, 5, "clean_up", []])
    assert timed_peer.receive() == [1, 5, "no answer within 0.02 s", None]
    timed_peer.send(cancel(5))
    assert timed_peer.call("echo", 1) == [1, 0, None, 1]
    waiting.clean.set()
    wait_until(lambda: counts(timed_server) == (0, 0, 0))
    assert len(waiting.ends) == 1


def test_a_handler_that_goes_on_has_the_time_that_it_has(
    timed_server: gmprpc.Server, timed_peer: Peer, waiting: Waiting
) -> None:
    timed_peer.send([0, 5, "clean_up", []], cancel(5))
    assert timed_peer.receive() == [1, 5, "no answer within 0.02 s", None]
    wait_until(lambda: counts(timed_server) == (1, 0, 0))
    assert timed_server.statistics()["expired_requests"] == 1


def test_a_reply_that_is_cancelled_and_never_answered_is_answered_for(
    timed_server: gmprpc.Server, timed_peer: Peer, waiting: Waiting
) -> None:
    timed_peer.send([0, 5, "later", []], cancel(5))
    assert timed_peer.receive() == [1, 5, "no answer within 0.02 s", None]
    assert waiting.told == [0]
    waiting.replies[0].result("too late")
    assert timed_server.statistics()["dropped_answers"] == 1
    assert counts(timed_server) == (1, 0, 0)


def test_a_callback_that_has_answered_and_goes_on_too_long_is_no_fault(
    service: gmprpc.Service,
    timed_server: gmprpc.Server,
    timed_peer: Peer,
    waiting: Waiting,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer_and_wait(reply: gmprpc.Reply) -> None:
        reply.result("answered")
        waiting.wait()

    service.reg_cb(answer_and_wait=answer_and_wait)
    assert timed_peer.call("answer_and_wait", msgid=5) == [1, 5, "no answer within 0.02 s", None]
    wait_until(lambda: counts(timed_server)[2] == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Other settings, other ends.


def test_hidden_errors_dont_hide_that_a_call_was_cancelled_but_whatever_the_handler_says(
    service: gmprpc.Service, waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    @service.method
    def say_something_else() -> None:
        try:
            waiting.wait()
        except gmprpc.CallCancelled:
            raise gmprpc.CallCancelled("call of 'secret' was cancelled") from None

    with (
        gmprpc.Server(("127.0.0.1", 0), service, hide_errors=True) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.send([0, 5, "wait", []], [0, 6, "say_something_else", []], cancel(5), cancel(6))
        assert sorted([peer.receive(), peer.receive()]) == [[1, 5, CANCELLED, None], [1, 6, CANCELLED, None]]
        assert counts(server)[:2] == (2, 0)
    assert not caplog.records


def test_a_server_that_stops_does_not_wait_for_what_is_cancelled(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    @service.method
    def stop() -> None:
        server.stop(1000)
        gevent.sleep(0)
        # Now it has begun; what has been received by now is carried out.
        peer.send(cancel(5), cancel(6))

    peer.send([0, 5, "wait", []], [0, 6, "later", []], [0, 7, "stop", []])
    wait_until(lambda: waiting.told)
    waiting.replies[0].error("given up")
    assert sorted(peer.receive_rest()) == [[1, 5, CANCELLED, None], [1, 6, "given up", None], [1, 7, None, None]]
    peer.close()
    wait_until(lambda: not server.connections)


def test_a_connection_that_is_lost_just_then_takes_nothing_along(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, waiting: Waiting
) -> None:
    service.register(lambda: gmprpc.current_call().connection.abort(), "abort")
    peer.send([0, 5, "wait", []], [0, 6, "later", []], cancel(5), [0, 7, "abort", []])
    wait_until(lambda: not server.connections)
    wait_until(lambda: waiting.ends and waiting.told)
    assert isinstance(waiting.ends[0], gmprpc.CallCancelled)
    wait_until(lambda: server.statistics()["dropped_answers"] == 2)
    with Peer.connect(server.address) as other:
        assert other.call("echo", 1) == [1, 0, None, 1]


def test_a_server_may_cancel_what_it_has_called_at_its_client(
    service: gmprpc.Service, server: gmprpc.Server, waiting: Waiting
) -> None:
    own = gmprpc.Service()
    own.register(waiting.wait)

    @service.method
    def call_and_cancel() -> Any:
        connection = gmprpc.current_call().connection
        pending = connection.call_async("wait")
        wait_until(lambda: waiting.begun)
        connection.notify("$/cancel", waiting.begun[0])
        with pytest.raises(gmprpc.RemoteError) as caught:
            pending.get()
        return caught.value.error

    with gmprpc.Client(server.address, service=own) as client:
        assert client.call("call_and_cancel") == CANCELLED
        assert client.statistics()["cancelled_requests"] == 1
