"""What a client does when the line to its server is cut, reset, half-closed, stalled or garbled, at any byte.

The server is a process that counts how often it carries out each call, and between the two there is a proxy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme

import gmprpc

from .counting import CountingServer, begin, outcome
from .helpers import Scripted, wait_until
from .proxy import Flow, Line, Proxy
from .test_bad_input import PROTOCOL_ERRORS, UNDECODABLE

pack = msgpack.packb

pytestmark = pytest.mark.usefixtures("_each_call_ends_once")

#: Seconds that no call here may take, so that one that isn't ended shows.
LONG = 10.0

REQUEST_SIZE = len(pack([0, 0, "do", [100_000]]))
ANSWER_SIZE = len(pack([1, 0, None, 100_000]))

ENDS = pytest.mark.parametrize("end", [Flow.reset, Flow.cut, Flow.half_close], ids=["reset", "cut", "half-close"])
WAYS = pytest.mark.parametrize("way", ["call", "call_async"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingServer]:
    with CountingServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: CountingServer) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[gmprpc.Client]:
    with gmprpc.Client(proxy.address, timeout=LONG, retry_interval=0.001) as client:
        yield client
        wait_until(lambda: client.statistics()["pending"] == 0)


def call(client: gmprpc.Client, way: str, *params: Any, **options: Any) -> Any:
    """The outcome of a call."""
    if way == "call":
        return outcome(client.call, *params, **options)
    return outcome(client.call_async(*params, **options).get)


def connect_anew(proxy: Proxy, client: gmprpc.Client, direction: str, fault: Callable[[Flow], Any]) -> None:
    """Give ``client`` another line, to the flow of which ``fault`` is applied; those after it have no faults."""

    def plan(line: Line) -> None:
        proxy.plan = None
        fault(getattr(line, direction))

    client.close()
    wait_until(lambda: proxy.count == client.statistics()["connections"])  # Each has come to the proxy.
    proxy.plan = plan
    client.connect()


def is_lost(outcome: Any) -> bool:
    """Whether it is that of a call whose connection ended when its request had left."""
    return type(outcome) is gmprpc.ConnectionClosed and outcome.sent is True


# At each byte.


@ENDS
@WAYS
@pytest.mark.parametrize(
    "flow, size, executions", [("requests", REQUEST_SIZE, 0), ("answers", ANSWER_SIZE, 1)], ids=["request", "answer"]
)
def test_a_call_that_is_broken_off_at_any_byte_is_lost_and_not_made_again(
    server: CountingServer,
    proxy: Proxy,
    client: gmprpc.Client,
    end: Callable[[Flow], None],
    way: str,
    flow: str,
    size: int,
    executions: int,
) -> None:
    for position in range(size):
        connect_anew(proxy, client, flow, partial(Flow.at, position=position, action=end))
        number, following = server.number(), server.number()
        assert is_lost(call(client, way, "do", number)), position
        assert call(client, way, "do", following) == following
        assert (server.executions(number), server.executions(following)) == (executions, 1)
    server.wait_quiet(1)


@ENDS
@WAYS
def test_a_call_whose_answer_has_come_is_not_lost_with_its_connection(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client, end: Callable[[Flow], None], way: str
) -> None:
    connect_anew(proxy, client, "answers", partial(Flow.at, position=ANSWER_SIZE, action=end))
    number = server.number()
    old: Any = client.connection
    assert call(client, way, "do", number) == number
    following = server.number()
    wait_until(lambda: not old.is_open)
    assert call(client, way, "do", following) == following
    assert (server.executions(number), server.executions(following)) == (1, 1)


@WAYS
@pytest.mark.parametrize("end", [Flow.reset, Flow.cut], ids=["reset", "cut"])
def test_a_call_whose_request_has_arrived_is_lost_with_its_connection(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client, end: Callable[[Flow], None], way: str
) -> None:
    connect_anew(proxy, client, "requests", partial(Flow.at, position=REQUEST_SIZE, action=end))
    number = server.number()
    assert is_lost(call(client, way, "do", number))
    server.wait_quiet()
    assert server.executions(number) <= 1


@WAYS
def test_a_call_behind_which_the_server_hears_the_end_is_answered(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client, way: str
) -> None:
    connect_anew(proxy, client, "requests", partial(Flow.at, position=REQUEST_SIZE, action=Flow.half_close))
    number = server.number()
    assert call(client, way, "do", number) == number
    assert server.executions(number) == 1


@ENDS
@WAYS
@pytest.mark.parametrize("direction, size", [("requests", REQUEST_SIZE), ("answers", ANSWER_SIZE)])
def test_an_idempotent_call_survives_an_end_at_any_byte(
    server: CountingServer,
    proxy: Proxy,
    client: gmprpc.Client,
    direction: str,
    size: int,
    end: Callable[[Flow], None],
    way: str,
) -> None:
    numbers = [server.number() for _ in range(size + 1)]
    for position, number in enumerate(numbers):
        connect_anew(proxy, client, direction, partial(Flow.at, position=position, action=end))
        assert call(client, way, "do", number, idempotent=True) == number
    client.close()
    server.wait_quiet()
    # What was broken off amid its request was carried out once in all, what was broken off amid its answer twice.
    times = [server.executions(number) for number in numbers]
    assert times[:-1] == [1 if direction == "requests" else 2] * size
    assert times[-1] in (1, 2)


@ENDS
def test_of_several_calls_those_whose_answers_have_come_have_them_and_the_others_are_lost(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client, end: Callable[[Flow], None]
) -> None:
    for position in range(3 * ANSWER_SIZE + 1):
        connect_anew(proxy, client, "answers", partial(Flow.at, position=position, action=end))
        numbers = [server.number() for _ in range(3)]
        calls = [client.call_async("do", number) for number in numbers]
        answered = position // ANSWER_SIZE
        outcomes = [outcome(call.get) for call in calls]
        assert outcomes[:answered] == numbers[:answered]
        assert all(map(is_lost, outcomes[answered:]))
        assert [server.executions(number) for number in numbers] == [1, 1, 1]


# Half-closed.


def test_calls_are_answered_after_their_server_has_heard_the_end(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    calls = begin(server, client, "hold", "half-closed")
    server.wait_begun(*(call.number for call in calls))
    proxy.line.requests.half_close()
    server.release("half-closed")
    assert [call.outcome() for call in calls] == [call.number for call in calls]
    # The connection has ended with that, and the next call makes another one.
    wait_until(lambda: not proxy.lines)
    number = server.number()
    assert client.call("do", number) == number
    assert [server.executions(call.number) for call in calls] == [1, 1]


def test_calls_are_lost_when_their_client_hears_the_end(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    calls = begin(server, client, "hold", "other half")
    server.wait_begun(*(call.number for call in calls))
    proxy.line.answers.half_close()
    assert all(is_lost(call.outcome()) for call in calls)
    number = server.number()
    assert client.call("do", number) == number
    server.release("other half")
    server.wait_quiet(1)
    assert [server.executions(call.number) for call in calls] == [1, 1]


# Nobody reads.


@pytest.mark.parametrize("is_read", [False, True])
def test_a_peer_that_accepts_and_never_reads_costs_each_call_its_timeout(scripted: Scripted, is_read: bool) -> None:
    with gmprpc.Client(scripted.address) as client:
        peer = scripted.accept()
        for timeout in (0.001, 0.05):
            late = outcome(client.call, "do", 1, timeout=timeout)
            assert type(late) is gmprpc.CallTimeout
            assert (late.timeout, late.sent) == (timeout, True)
            pending = client.call_async("do", 2, timeout=timeout)
            assert outcome(pending.get).sent is True
        if is_read:
            assert [peer.receive()[3] for _ in range(4)] == [[1], [2], [1], [2]]
        assert client.statistics()["pending"] == 0
        assert client.is_connected


def test_what_a_peer_that_never_reads_leaves_no_room_for_times_out_unsent(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address, max_unsent_size=1000) as client:
        peer = scripted.accept()
        large = client.call_async("large", b"x" * 20_000_000, timeout=LONG)
        # Whoever calls waits within its deadline, whoever notifies, too; nobody fills the memory.
        late = outcome(client.call, "behind", timeout=0.02)
        assert type(late) is gmprpc.CallTimeout
        assert late.sent is False
        late = outcome(client.call_async("behind", timeout=0.02).get)
        assert (type(late), late.sent) == (gmprpc.CallTimeout, False)
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.02):
            client.notify("behind")
        peer.reset()
        assert is_lost(outcome(large.get))
        # What was given up isn't made up for.
        last = client.call_async("last")
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "last", []]
        peer.send([1, 0, None, "answered"])
        assert last.get() == "answered"


def test_calls_that_had_not_left_go_to_the_next_connection_unseen(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address, timeout=LONG, retry_interval=0.001) as client:
        peer = scripted.accept()
        # More than the kernel takes: what follows waits.
        first = client.call_async("large", b"x" * 20_000_000)
        blocked = gevent.spawn(outcome, client.call, "blocked")
        pending = [client.call_async("behind", number) for number in range(3)]
        notifying = gevent.spawn(client.notify, "notified")
        gevent.sleep(0)
        peer.reset()
        assert is_lost(outcome(first.get))
        peer = scripted.accept()
        messages = [peer.receive() for _ in range(5)]
        assert [message[3][0] for message in messages if message[-2] == "behind"] == [0, 1, 2]
        for message in messages:
            if message[0] == 0:
                peer.send([1, message[1], None, message[3]])
        assert [call.get() for call in pending] == [[0], [1], [2]]
        assert blocked.get() == []
        notifying.get()


def test_a_connection_on_which_nothing_can_be_written_is_given_up_after_the_write_timeout(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address, write_timeout=0.1, retry_interval=0.001) as client:
        peer = scripted.accept()
        large = client.call_async("large", b"x" * 20_000_000)
        lost = outcome(large.get)
        assert is_lost(lost)
        assert "nothing could be written" in str(lost.__cause__)
        # The next connection is as good as new.
        call = client.call_async("next")
        peer = scripted.accept()
        assert peer.receive() == [0, 0, "next", []]
        peer.send([1, 0, None, 5])
        assert call.get() == 5


# Answers.


def test_a_call_that_is_never_answered_times_out_and_frees_its_slot(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address, timeout=0.02) as client:
        peer = scripted.accept()
        assert type(outcome(client.call, "never")) is gmprpc.CallTimeout
        assert type(outcome(client.call_async("never").get)) is gmprpc.CallTimeout
        assert client.statistics()["pending"] == 0
        # Too late, both.
        peer.send(*([1, peer.receive()[1], None, "late"] for _ in range(2)))
        wait_until(lambda: client.statistics()["late_answers"] == 2)
        assert client.is_connected


@pytest.mark.parametrize("second", [[None, "other"], ["an error", None]])
def test_the_first_of_two_answers_counts(scripted: Scripted, second: list[Any]) -> None:
    with gmprpc.Client(scripted.address, timeout=LONG) as client:
        peer = scripted.accept()
        blocked = gevent.spawn(outcome, client.call, "twice")
        pending = client.call_async("twice")
        for msgid in [peer.receive()[1] for _ in range(2)]:
            peer.send([1, msgid, None, "first"], [1, msgid, *second])
        assert (blocked.get(), pending.get()) == ("first", "first")
        wait_until(lambda: client.statistics()["late_answers"] == 2)
        assert pending.get() == "first"
        assert client.is_connected


@pytest.mark.parametrize("msgid", [1, 2**32 - 1, 4711])
def test_an_answer_with_a_msgid_that_nobody_knows_is_counted_and_dropped(scripted: Scripted, msgid: int) -> None:
    with gmprpc.Client(scripted.address, timeout=LONG) as client:
        peer = scripted.accept()
        pending = client.call_async("ask")
        assert peer.receive()[1] == 0
        peer.send([1, msgid, None, "nobody's"], [1, 0, None, "mine"])
        assert pending.get() == "mine"
        assert client.statistics()["late_answers"] == 1
        assert client.is_connected


@pytest.mark.parametrize("garbage", PROTOCOL_ERRORS.values(), ids=PROTOCOL_ERRORS)
def test_garbage_ends_the_connection_and_every_call_on_it_and_the_next_one_makes_another(
    scripted: Scripted, garbage: bytes
) -> None:
    with gmprpc.Client(scripted.address, timeout=LONG, retry_interval=0.001) as client:
        peer = scripted.accept()
        blocked = gevent.spawn(outcome, client.call, "ask", 1)
        pending = client.call_async("ask", 2)
        again = client.call_async("ask", 3, idempotent=True)
        for _ in range(3):
            peer.receive()
        peer.send_bytes(garbage[:100_000])
        for lost in (blocked.get(), outcome(pending.get)):
            assert is_lost(lost)
            assert isinstance(lost.__cause__, gmprpc.ProtocolError)
        peer.close()
        peer = scripted.accept()
        _, msgid, _, params = peer.receive()
        assert params == [3]
        peer.send([1, msgid, None, "again"])
        assert again.get() == "again"


@pytest.mark.parametrize("value", UNDECODABLE.values(), ids=UNDECODABLE)
def test_an_answer_that_cant_be_decoded_ends_its_own_call_alone(scripted: Scripted, value: bytes) -> None:
    with gmprpc.Client(scripted.address, timeout=LONG) as client:
        peer = scripted.accept()
        bad = client.call_async("bad", idempotent=True)
        good = client.call_async("good")
        assert [peer.receive()[1] for _ in range(2)] == [0, 1]
        peer.send_bytes(b"\x94\x01\x00\xc0" + value + pack([1, 1, None, "good"]))
        assert type(outcome(bad.get)) is gmprpc.ProtocolError
        assert good.get() == "good"
        assert client.is_connected


def test_garbage_between_two_answers_leaves_the_first_call_its_answer(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    connect_anew(proxy, client, "answers", lambda flow: flow.between_messages(0, Flow.insert))
    numbers = [server.number() for _ in range(3)]
    first, second, third = [client.call_async("do", number, idempotent=number == numbers[2]) for number in numbers]
    assert first.get() == numbers[0]
    lost = outcome(second.get)
    assert is_lost(lost)
    assert isinstance(lost.__cause__, gmprpc.ProtocolError)
    assert third.get() == numbers[2]
    assert [server.executions(number) for number in numbers] == [1, 1, 2]


# Slow lines.


def test_an_answer_that_comes_after_the_timeout_is_dropped_and_the_line_goes_on(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    numbers = [server.number() for _ in range(2)]
    assert client.call("do", numbers[0]) == numbers[0]
    proxy.line.answers.delay(0.05)
    late = outcome(client.call, "do", numbers[1], timeout=0.02)
    assert (type(late), late.sent) == (gmprpc.CallTimeout, True)
    wait_until(lambda: client.statistics()["late_answers"] == 1)
    following = server.number()
    assert client.call("do", following) == following
    assert proxy.count == 1
    assert [server.executions(number) for number in numbers] == [1, 1]


def test_calls_over_a_slow_line_are_answered_in_their_time(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    wait_until(lambda: proxy.lines)
    proxy.line.requests.throttle(100_000)
    proxy.line.answers.lag(0.002)
    data = bytes(10_000)
    calls = [begin(server, client, "echo", data) for _ in range(3)]
    assert all(call.outcome() == data for pair in calls for call in pair)
    assert all(server.executions(call.number) == 1 for pair in calls for call in pair)


def test_a_line_that_stalls_for_a_while_loses_nothing(
    server: CountingServer, proxy: Proxy, client: gmprpc.Client
) -> None:
    number = server.number()
    assert client.call("do", number) == number
    for flow in (proxy.line.requests, proxy.line.answers):
        flow.stall()
        calls = begin(server, client, "do")
        late = outcome(client.call, "do", server.number(), timeout=0.02)
        assert (type(late), late.sent) == (gmprpc.CallTimeout, True)
        flow.go_on()
        assert [call.outcome() for call in calls] == [call.number for call in calls]
    wait_until(lambda: client.statistics()["late_answers"] == 2)


# TLS.


_TLS_POSITIONS = 25


@pytest.mark.parametrize(
    "direction, end",
    [
        *(("requests", end) for end in (Flow.reset, Flow.cut)),  # To a half-close a server's TLS objects: a refusal.
        *(("answers", end) for end in (Flow.reset, Flow.cut, Flow.half_close)),
    ],
)
def test_over_tls_an_end_anywhere_costs_no_call_that_had_not_left(
    tmp_path: Path, direction: str, end: Callable[[Flow], None]
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    executions: Counter[int] = Counter()
    outcomes: dict[int, Any] = {}

    def do(number: int) -> int:
        executions[number] += 1
        return number

    with (
        gmprpc.Server(("127.0.0.1", 0), ssl_context=gmprpc.tls.server_context(tmp_path / "server.pem")) as server,
        Proxy(server.address) as proxy,
    ):
        server.register(do)
        client = gmprpc.Client(
            proxy.address,
            timeout=LONG,
            retry_interval=0.001,
            ssl_context=gmprpc.tls.client_context(tmp_path / "authority.pem"),
            server_hostname="localhost",
        )
        with client:  # First without a fault, to see how much there is.
            outcomes[0] = client.call("do", 0)
            size = getattr(proxy.line, direction).position
        for number in range(1, _TLS_POSITIONS):
            proxy.plan = partial(_end_once, proxy, direction, size * number // _TLS_POSITIONS, end)
            client.is_closed = False  # Lazily: it is the call that connects.
            outcomes[number] = outcome(client.call, "do", number)
            client.close()
        wait_until(lambda: not server.connections)
    for number, found in outcomes.items():
        assert (found, executions[number]) == (number, 1) or (is_lost(found) and executions[number] <= 1), number
    # Most bytes are those of the handshake, behind which nothing of a call leaves.
    assert sum(found == number for number, found in outcomes.items()) >= _TLS_POSITIONS // 2


def _end_once(proxy: Proxy, direction: str, position: int, end: Callable[[Flow], None], line: Line) -> None:
    proxy.plan = None
    getattr(line, direction).at(position, end)
