"""What a server does about peers that are wrong, byte for byte; each time a bystander's call must not notice."""

from __future__ import annotations

import logging
import struct
from typing import Any

import gevent
import msgpack
import pytest
from gevent.event import Event

import gmprpc

from .helpers import Peer, wait_until

pytestmark = pytest.mark.usefixtures("bystander")

pack = msgpack.packb


def assert_still_answers(peer: Peer) -> None:
    assert peer.call("echo", "still", msgid=4242) == [1, 4242, None, "still"]


def assert_closed(peer: Peer) -> None:
    assert peer.receive_rest() == []


# Well-formed, but not an ordinary request.


def test_a_notification_is_never_answered_whatever_happens_in_it(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    peer.send([2, "echo", [1]], [2, "fail", ["secret"]], [2, "nosuch", []], [2, "add", [1]], [2, "echo", "no array"])
    assert_still_answers(peer)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for method in ("fail", "nosuch", "add"):
        assert f"notification of {method} from 127.0.0.1:" in text
    assert "invalid notification from 127.0.0.1:" in text
    assert "echo" not in text


def test_a_response_for_an_unknown_msgid_is_ignored_and_counted(server: gmprpc.Server, peer: Peer) -> None:
    peer.send([1, 99, None, "nobody asked"], [1, 99, "no", None])
    assert_still_answers(peer)
    assert server.statistics()["late_answers"] == 2


def test_an_unknown_method_is_an_error_answer_in_the_words_of_the_ancestor(server: gmprpc.Server, peer: Peer) -> None:
    assert peer.call("nosuch", 1, msgid=5) == [1, 5, 'No such method "nosuch" found', None]
    assert_still_answers(peer)
    assert server.statistics()["unknown_methods"] == 1


@pytest.mark.parametrize(
    "params, complaint",
    [
        ([], "missing a required argument: 'a'"),
        ([1], "missing a required argument: 'b'"),
        ([1, 2, 3], "too many positional arguments"),
    ],
)
def test_a_wrong_number_of_params_is_an_error_that_names_the_signature(
    peer: Peer, caplog: pytest.LogCaptureFixture, params: list[Any], complaint: str
) -> None:
    assert peer.call("add", *params) == [1, 0, f"wrong params for add(a, b): {complaint}", None]
    assert_still_answers(peer)
    assert not caplog.records


def test_a_type_error_in_the_handler_is_not_mistaken_for_wrong_params(peer: Peer) -> None:
    assert peer.call("add", 1, "x") == [1, 0, "TypeError: unsupported operand type(s) for +: 'int' and 'str'", None]


@pytest.mark.parametrize("params", [None, 5, "ab", b"ab", {"a": 1}, True, 1.5])
def test_params_that_are_no_array_are_an_error_answer(peer: Peer, params: Any) -> None:
    peer.send([0, 1, "echo", params])
    assert peer.receive()[:2] == [1, 1]
    peer.send([0, 2, "echo", params])
    _, msgid, error, result = peer.receive()
    assert (msgid, result) == (2, None)
    assert error.startswith("params has to be an array, not ")
    assert_still_answers(peer)


@pytest.mark.parametrize("method", [b"\xa4echo", b"\xd9\x04echo", b"\xda\x00\x04echo", b"\xc4\x04echo"])
def test_a_method_may_be_str_of_any_width_or_bin(peer: Peer, method: bytes) -> None:
    peer.send_bytes(b"\x94\x00\x07" + method + pack(["hello"]))
    assert peer.receive() == [1, 7, None, "hello"]


@pytest.mark.parametrize("method", [b"\xa2\xff\xfe", b"\xc4\x02\xff\xfe"])
def test_a_method_that_is_not_utf_8_is_an_unknown_method(peer: Peer, method: bytes) -> None:
    peer.send_bytes(b"\x94\x00\x07" + method + b"\x90")
    assert peer.receive() == [1, 7, 'No such method "\ufffd\ufffd" found', None]
    assert_still_answers(peer)


@pytest.mark.parametrize("method", [None, 5, [], {}, True])
def test_a_method_that_is_no_string_is_an_error_answer(peer: Peer, method: Any) -> None:
    peer.send([0, 1, method, []])
    assert peer.receive()[2].startswith("method has to be a string, not ")
    assert_still_answers(peer)


class Base:
    def inherited(self) -> str:
        return "not yours"


class Exposed(Base):
    attribute = "not yours"

    def __init__(self) -> None:
        self.callback = lambda: "not yours"

    def public(self) -> str:
        return "yours"

    def _private(self) -> str:
        return "not yours"

    @property
    def prop(self) -> Any:
        return lambda: "not yours"

    class Nested:
        pass


@pytest.mark.parametrize(
    "name",
    ["_private", "__init__", "__class__", "__class__.__base__", "inherited", "attribute", "callback", "prop", "Nested"]
    + ["public.__func__", "public.__globals__", "method", "register", "echo.__call__", "", "$/eval", "os.system", "*"]
    + ["Public", "public ", "public\0"],
)
def test_only_registered_names_can_be_called(service: gmprpc.Service, peer: Peer, name: str) -> None:
    service.register_object(Exposed())
    assert peer.call("public") == [1, 0, None, "yours"]
    assert peer.call(name) == [1, 0, f'No such method "{name}" found', None]


@pytest.mark.parametrize(
    "encoded, msgid",
    [
        (b"\x00", 0),
        (b"\x7f", 127),
        (b"\xcc\x05", 5),
        (b"\xcd\x00\x05", 5),
        (b"\xce\x00\x00\x00\x05", 5),
        (b"\xcf\x00\x00\x00\x00\x00\x00\x00\x05", 5),
        (b"\xd0\x05", 5),
        (b"\xd3\x00\x00\x00\x00\xff\xff\xff\xff", 2**32 - 1),
        (b"\xce\xff\xff\xff\xff", 2**32 - 1),
    ],
)
def test_a_msgid_of_any_width_is_echoed(peer: Peer, encoded: bytes, msgid: int) -> None:
    peer.send_bytes(b"\x94\x00" + encoded + b"\xa4echo\x91\x01")
    assert peer.receive() == [1, msgid, None, 1]


def test_two_requests_with_one_msgid_are_both_answered(peer: Peer) -> None:
    peer.send([0, 5, "echo", ["a"]], [0, 5, "echo", ["b"]])
    assert [peer.receive(), peer.receive()] == [[1, 5, None, "a"], [1, 5, None, "b"]]


def test_a_peer_can_not_write_the_log(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    forged = "x\n2026-01-01 CRITICAL all is lost\x1b[2J"
    peer.send([2, forged, []], [2, "y" * 500_000, []])
    peer.send_bytes(b"\x93\x02\xa3\xff\n\n\x90")
    assert_still_answers(peer)
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 600


# Values that can't be decoded.

DEEP = b"\x91" * 2000 + b"\x01"
UNDECODABLE = {
    "invalid UTF-8": b"\xa2\xff\xfe",
    "unhashable key": b"\x81\x90\x01",
    "timestamp": b"\xc7\x0c\xff" + b"\xff" * 12,
    "nested too deeply": DEEP,
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("value", UNDECODABLE.values(), ids=UNDECODABLE.keys())
def test_a_value_that_cant_be_decoded_costs_its_own_request_only(peer: Peer, value: bytes, split: bool) -> None:
    data = pack([0, 1, "echo", ["before"]]) + b"\x94\x00\x02\xa4echo\x91" + value + pack([0, 3, "echo", ["behind"]])
    if split:
        for byte in data:
            peer.send_bytes(bytes([byte]))
    else:
        peer.send_bytes(data)
    before, failed, behind = sorted([peer.receive(), peer.receive(), peer.receive()], key=lambda message: message[1])
    assert before == [1, 1, None, "before"]
    assert behind == [1, 3, None, "behind"]
    assert failed[1] == 2
    assert failed[2].startswith("can't be decoded: ")
    assert failed[3] is None


# Not MessagePack-RPC.

PROTOCOL_ERRORS = {
    "an integer": b"\x05",
    "nil": b"\xc0",
    "a map": b"\x80",
    "a string": b"\xa4echo",
    "an empty array": b"\x90",
    "two elements": b"\x92\x00\x01",
    "five elements": b"\x95\x00\x01\xa4echo\x90\x00",
    "a request of three": b"\x93\x00\x01\xa4echo",
    "a notification of four": b"\x94\x02\x01\xa4echo\x90",
    "kind 3": b"\x94\x03\x01\xa4echo\x90",
    "kind -1": b"\x94\xff\x01\xa4echo\x90",
    "kind 0.0": b"\x94\xca\x00\x00\x00\x00\x01\xa4echo\x90",
    "kind false": b"\x94\xc2\x01\xa4echo\x90",
    "msgid -1": b"\x94\x00\xff\xa4echo\x90",
    "msgid 2^32": b"\x94\x00\xcf\x00\x00\x00\x01\x00\x00\x00\x00\xa4echo\x90",
    "msgid true": b"\x94\x00\xc3\xa4echo\x90",
    "msgid nil": b"\x94\x00\xc0\xa4echo\x90",
    "msgid 1.0": b"\x94\x00\xca\x3f\x80\x00\x00\xa4echo\x90",
    "0xc1": b"\xc1",
    "0xc1 in params": b"\x94\x00\x01\xa4echo\x91\xc1",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "zeros": bytes(64 * 1024),
}


@pytest.mark.parametrize("data", PROTOCOL_ERRORS.values(), ids=PROTOCOL_ERRORS.keys())
def test_what_is_not_message_pack_rpc_closes_that_connection(
    server: gmprpc.Server, peer: Peer, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.set_level(logging.INFO)
    peer.send_bytes(data)
    assert_closed(peer)
    peer.close()
    wait_until(lambda: server.statistics()["open_connections"] == 1)
    assert len(caplog.records) == 1
    assert server.statistics()["protocol_errors"] == 1


def test_requests_before_a_protocol_error_are_answered_even_if_they_take_long(
    service: gmprpc.Service, peer: Peer
) -> None:
    go = Event()
    service.register(lambda: go.wait() and "slow", "slow")
    peer.send_bytes(pack([0, 1, "echo", ["before"]]) + pack([0, 2, "slow", []]) + b"\xc1" + pack([0, 3, "echo", [1]]))
    assert peer.receive() == [1, 1, None, "before"]
    go.set()
    assert peer.receive_rest() == [[1, 2, None, "slow"]]


# Sizes.


@pytest.fixture
def small_server(service: gmprpc.Service) -> Any:
    with gmprpc.Server(("127.0.0.1", 0), service, max_message_size=1000) as server:
        yield server


def request_of_size(size: int) -> bytes:
    head = b"\x94\x00\x01\xa4echo\x91\xda"
    length = size - len(head) - 2
    return head + struct.pack(">H", length) + b"x" * length


@pytest.mark.parametrize("parts", [1, 7, 1000])
@pytest.mark.parametrize("size, is_taken", [(999, True), (1000, True), (1001, False)])
def test_a_message_may_have_max_message_size_bytes_and_not_one_more(
    small_server: gmprpc.Server, parts: int, size: int, is_taken: bool
) -> None:
    data = request_of_size(size)
    with Peer.connect(small_server.address) as peer:
        step = -(-len(data) // parts)
        try:
            for start in range(0, len(data), step):
                peer.send_bytes(data[start : start + step])
        except OSError:
            assert not is_taken
            return
        if is_taken:
            assert peer.receive()[:3] == [1, 1, None]
            # And many messages that are larger together.
            peer.send_bytes(data * 5)
            assert [peer.receive()[:3] for _ in range(5)] == [[1, 1, None]] * 5
        else:
            assert_closed(peer)
    wait_until(lambda: not small_server.connections)


@pytest.mark.parametrize(
    "announcement",
    [b"\xdc\x03\xe8", b"\xdd\xff\xff\xff\xff", b"\xde\x01\xf4", b"\xdb\x00\x00\x03\xe8", b"\xc6\xff\xff\xff\xff"]
    + [b"\xc9\x00\x00\x03\xe8\x05"],
    ids=["array16", "array32", "map16", "str32", "bin32", "ext32"],
)
def test_what_is_announced_too_large_is_refused_before_it_comes(
    small_server: gmprpc.Server, caplog: pytest.LogCaptureFixture, announcement: bytes
) -> None:
    with Peer.connect(small_server.address) as peer:
        peer.send_bytes(b"\x94\x00\x01\xa4echo\x91" + announcement)
        assert_closed(peer)
    (record,) = caplog.records
    assert "exceeds max_message_size (1000 bytes)" in record.getMessage()
    assert small_server.statistics()["protocol_errors"] == 1


# max_concurrency.


@pytest.fixture
def narrow_server(service: gmprpc.Service) -> Any:
    with gmprpc.Server(("127.0.0.1", 0), service, max_concurrency=3) as server:
        yield server


def test_beyond_max_concurrency_the_rest_waits_until_a_place_is_free(
    service: gmprpc.Service, narrow_server: gmprpc.Server
) -> None:
    running: list[int] = []
    peak = 0
    step = Event()

    @service.method
    def work(number: int) -> int:
        nonlocal peak
        running.append(number)
        peak = max(peak, len(running))
        step.wait()
        running.remove(number)
        return number

    with Peer.connect(narrow_server.address) as peer:
        peer.send(*([0, number, "work", [number]] for number in range(10)))
        wait_until(lambda: len(running) == 3)
        gevent.sleep(0)
        assert running == [0, 1, 2]
        step.set()
        assert sorted(peer.receive()[3] for _ in range(10)) == list(range(10))
    assert peak == 3


def test_notifications_and_deferred_replies_take_places_too(
    service: gmprpc.Service, narrow_server: gmprpc.Server
) -> None:
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=lambda reply: replies.append(reply))
    go = Event()
    service.register(go.wait, "wait")
    with Peer.connect(narrow_server.address) as peer:
        peer.send([0, 1, "later", []], [2, "wait", []], [0, 2, "later", []], [0, 3, "echo", ["at last"]])
        wait_until(lambda: narrow_server.statistics()["in_flight"] == 3)
        replies.pop().result("two")
        assert peer.receive() == [1, 2, None, "two"]
        assert peer.receive() == [1, 3, None, "at last"]
        go.set()
        replies.pop().result("one")
        assert peer.receive() == [1, 1, None, "one"]


def test_while_a_call_of_this_side_is_pending_requests_beyond_the_limit_are_refused_so_that_its_answer_can_come(
    service: gmprpc.Service, narrow_server: gmprpc.Server
) -> None:
    @service.method
    def ask() -> Any:
        return gmprpc.current_call().connection.call("question")

    with Peer.connect(narrow_server.address) as peer:
        peer.send(*([0, number, "ask", []] for number in range(3)))
        questions = [peer.receive() for _ in range(3)]
        assert [question[2] for question in questions] == ["question"] * 3
        peer.send([0, 3, "echo", [1]], [2, "echo", [1]])
        assert peer.receive() == [1, 3, "too many requests in flight", None]
        peer.send(*([1, question[1], None, "answer"] for question in questions))
        assert sorted(peer.receive() for _ in range(3)) == [[1, number, None, "answer"] for number in range(3)]
        assert_still_answers(peer)
    assert narrow_server.statistics()["refused_messages"] == 2
