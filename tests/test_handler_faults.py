"""What a handler may do wrong: each fault costs its own call one error, and nobody else anything."""

from __future__ import annotations

import struct
from typing import Any

import gevent
import pytest
from gevent.event import Event

import gmprpc

from .helpers import Peer, wait_until

pytestmark = pytest.mark.usefixtures("bystander")


def assert_still_answers(peer: Peer) -> None:
    assert peer.call("echo", "still", msgid=4242) == [1, 4242, None, "still"]


class Unpackable:
    pass


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "value",
    [Unpackable(), 2**64, {1, 2}, "\udcff", {"a": [object()]}, RECURSIVE],
    ids=["object", "int", "set", "surrogate", "nested", "recursive"],
)
def test_a_result_that_cant_be_packed_is_an_error_answer_and_logged(
    service: gmprpc.Service, peer: Peer, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    service.register(lambda: value, "bad")
    _, msgid, error, result = peer.call("bad", msgid=9)
    assert (msgid, result) == (9, None)
    assert isinstance(error, str)
    assert_still_answers(peer)
    assert "request 9 of bad from 127.0.0.1:" in caplog.text


@pytest.mark.parametrize(
    "exc, error",
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (gevent.GreenletExit("x"), "GreenletExit: x"),
        (gevent.Timeout(5), "Timeout: 5 seconds"),
        (BaseException("base"), "BaseException: base"),
        (ExceptionGroup("group", [ValueError(1)]), "ExceptionGroup: group (1 sub-exception)"),
        (RecursionError("deep"), "RecursionError: deep"),
        (ValueError("\udcff"), "ValueError: \\udcff"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_handler_raises_is_an_error_answer(
    service: gmprpc.Service, peer: Peer, exc: BaseException, error: str
) -> None:
    @service.method
    def bad(where: str) -> None:
        if where == "later":
            gevent.sleep(0)
        raise exc

    assert peer.call("bad", "at once") == [1, 0, error, None]
    assert peer.call("bad", "later") == [1, 0, error, None]
    peer.send([2, "bad", ["at once"]], [2, "bad", ["later"]])
    assert_still_answers(peer)


def test_an_answer_after_the_peer_has_gone_is_dropped_and_counted(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    go, done = Event(), Event()
    replies: list[gmprpc.Reply] = []

    @service.method
    def slow() -> str:
        go.wait()
        done.set()
        return "too late"

    service.reg_cb(later=lambda reply: replies.append(reply))
    peer = Peer.connect(server.address)
    peer.send([0, 1, "slow", []], [0, 2, "later", []], [0, 3, "echo", [b"x" * 100_000]])
    wait_until(lambda: replies and server.statistics()["in_flight"] == 3)
    # Closing with unread input resets the connection.
    peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    wait_until(lambda: len(server.connections) == 1)
    assert replies[0].cancelled()
    replies[0].result("too late")
    go.set()
    done.wait()
    wait_until(lambda: server.statistics()["dropped_answers"] == 2)
