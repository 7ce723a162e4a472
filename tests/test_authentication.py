"""The first message decides whether there are others: who isn't let in never enters a handler."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import msgpack
import pytest
from gevent import GreenletExit
from gevent.event import Event

import gmprpc

from .helpers import Peer, wait_until

DENIED = "not authenticated"


@pytest.fixture
def entered() -> list[Any]:
    """What has been called, of what the hooks should have prevented."""
    return []


@pytest.fixture
def service(service: gmprpc.Service, entered: list[Any]) -> gmprpc.Service:
    """As always; and ``login``, which does nothing, ``secret``, which remembers each call, and ``who``."""

    @service.method
    def login(token: Any) -> str:
        return "welcome"

    @service.method
    def secret(*params: Any) -> Any:
        entered.append(list(params))
        return "the secret"

    @service.method
    def who() -> Any:
        return gmprpc.current_call().connection.user

    return service


def by_token(connection: gmprpc.Connection, message: Any) -> bool:
    """The right token lets in, with ``login``."""
    _, _, method, params = message
    if method != "login" or list(params) != ["right"]:
        return False
    connection.user = "somebody"
    return True


class Hook:
    """An ``authenticate`` that waits for its verdict, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.decided = Event()
        self.verdict: Any = None

    def __call__(self, connection: gmprpc.Connection, message: Any) -> Any:
        self.asked.append(list(message))
        self.decided.wait()
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict

    def decide(self, verdict: Any) -> None:
        self.verdict = verdict
        self.decided.set()


@pytest.fixture
def hook() -> Hook:
    return Hook()


@contextmanager
def serving(service: gmprpc.Service, authenticate: Any, **options: Any) -> Iterator[tuple[gmprpc.Server, Peer]]:
    """A server, and a connection to it."""
    server = gmprpc.Server(("127.0.0.1", 0), service, authenticate=authenticate, **options)
    with server, Peer.connect(server.address) as peer:
        yield server, peer


def test_who_is_let_in_is_served_as_always(service: gmprpc.Service) -> None:
    with serving(service, by_token) as (server, peer):
        assert peer.call("login", "right") == [1, 0, None, "welcome"]
        assert peer.call("who") == [1, 0, None, "somebody"]
        assert peer.call("echo", 1) == [1, 0, None, 1]
        assert peer.call("add", 1) == [
            1,
            0,
            "wrong params for add(a, b): missing a required argument: 'b'",
            None,
        ]
        assert peer.call("nothing") == [1, 0, 'No such method "nothing" found', None]
        assert server.statistics()["denied_connections"] == 0


def test_who_is_not_let_in_gets_an_error_and_the_end(
    service: gmprpc.Service, entered: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    errors = []
    with serving(service, by_token, on_error=lambda _, exc: errors.append(exc)) as (server, peer):
        peer.send([0, 7, "login", ["wrong"]])
        assert peer.receive_rest() == [[1, 7, DENIED, None]]
        peer.close()
        wait_until(lambda: errors)
        assert isinstance(errors[0], gmprpc.ConnectionClosed)
        assert server.statistics()["denied_connections"] == 1
        (record,) = caplog.records
        assert record.levelname == "INFO"
        assert record.getMessage().endswith(": ConnectionClosed: not authenticated")
        assert not entered


def test_the_first_message_is_carried_out_whatever_it_is(service: gmprpc.Service, entered: list[Any]) -> None:
    with serving(service, lambda connection, message: True) as (_, peer):
        assert peer.call("secret", 1) == [1, 0, None, "the secret"]
        assert entered == [[1]]
    with serving(service, lambda connection, message: True) as (_, peer):
        peer.send([2, "secret", [2]], [0, 1, "echo", [3]])
        assert peer.receive() == [1, 1, None, 3]
        assert entered == [[1], [2]]
    with serving(service, lambda connection, message: True) as (_, peer):
        assert peer.call("nothing") == [1, 0, 'No such method "nothing" found', None]
        assert peer.call("echo", 1) == [1, 0, None, 1]
    with serving(service, lambda connection, message: True) as (_, peer):
        assert peer.call("add", 1)[2] == "wrong params for add(a, b): missing a required argument: 'b'"
        assert peer.call("add", 1, 2) == [1, 0, None, 3]


def test_the_hook_is_asked_once_and_sees_the_message(service: gmprpc.Service, hook: Hook) -> None:
    hook.decide(True)
    with serving(service, hook) as (_, peer):
        for number in range(3):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
    assert hook.asked == [[0, 0, "echo", [0]]]


@pytest.mark.parametrize("verdict", [None, False, 1, "yes", [True], object()], ids=repr)
def test_only_true_lets_in(service: gmprpc.Service, entered: list[Any], hook: Hook, verdict: Any) -> None:
    hook.decide(verdict)
    with serving(service, hook) as (_, peer):
        peer.send([0, 1, "secret", []])
        assert peer.receive_rest() == [[1, 1, DENIED, None]]
    assert not entered


@pytest.mark.parametrize("error", ["go away", {"code": 401}, 0, False])
def test_the_error_may_be_the_hooks(service: gmprpc.Service, entered: list[Any], hook: Hook, error: Any) -> None:
    hook.decide(gmprpc.ErrorResponse(error))
    with serving(service, hook) as (_, peer):
        peer.send([0, 1, "secret", []])
        assert peer.receive_rest() == [[1, 1, error, None]]
    assert not entered


@pytest.mark.parametrize(
    "failure",
    [ValueError("no such user: somebody"), SystemExit(3), GreenletExit(), KeyboardInterrupt(), gevent.Timeout(1)],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hook_that_fails_lets_nobody_in_and_tells_nobody_why(
    service: gmprpc.Service, entered: list[Any], hook: Hook, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    hook.decide(failure)
    with serving(service, hook) as (server, peer):
        peer.send([0, 1, "secret", []])
        assert peer.receive_rest() == [[1, 1, DENIED, None]]
        assert server.statistics()["denied_connections"] == 1
    assert not entered
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "failed" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is failure


def test_a_notification_may_be_the_first(service: gmprpc.Service, entered: list[Any]) -> None:
    with serving(service, by_token) as (_, peer):
        peer.send([2, "login", ["right"]], [0, 1, "secret", []])
        assert peer.receive() == [1, 1, None, "the secret"]
    with serving(service, by_token) as (_, peer):
        peer.send([2, "login", ["wrong"]], [0, 1, "secret", []])
        assert [message[:3] for message in peer.receive_rest()] in ([], [[1, 1, DENIED]])
    assert entered == [[]]


# What comes behind the first.


def test_what_comes_behind_the_first_waits_for_the_decision(
    service: gmprpc.Service, entered: list[Any], hook: Hook
) -> None:
    with serving(service, hook) as (_, peer):
        peer.send([0, 0, "login", [1]], *([0, n, "secret", [n]] for n in range(1, 10)))
        wait_until(lambda: hook.asked)
        peer.send(*([0, n, "secret", [n]] for n in range(10, 500)), [2, "secret", [500]], [0, 501, "secret", [501]])
        gevent.sleep(0.02)
        assert not entered
        hook.decide(True)
        assert [peer.receive()[1] for _ in range(501)] == [*range(500), 501]
        assert entered == [[n] for n in range(1, 502)]
        assert len(hook.asked) == 1


@pytest.mark.parametrize("is_late", [False, True], ids=["in a batch", "later"])
@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "slowly"])
def test_nothing_behind_the_first_is_carried_out_when_it_is_turned_away(
    service: gmprpc.Service, entered: list[Any], hook: Hook, is_late: bool, is_slow: bool
) -> None:
    if not is_slow:
        hook.decide(False)
    with serving(service, hook) as (server, peer):
        others = [message for n in range(1, 50) for message in ([0, n, "secret", [n]], [2, "secret", [n]])]
        peer.send([0, 0, "login", []], *([] if is_late else others))
        wait_until(lambda: hook.asked)
        if is_late:
            peer.send(*others)
        hook.decide(False)
        answers = peer.receive_rest()
        assert answers[0] == [1, 0, DENIED, None]
        assert all(error == DENIED for _, _, error, _ in answers)
        peer.close()
        wait_until(lambda: not server._greenlets)
        assert len(hook.asked) == 1
        assert server.statistics()["denied_connections"] == 1
    assert not entered


def test_there_is_no_second_attempt(service: gmprpc.Service, entered: list[Any]) -> None:
    with serving(service, by_token) as (_, peer):
        peer.send([0, 0, "login", ["wrong"]], [0, 1, "login", ["right"]], [0, 2, "secret", []])
        answers = peer.receive_rest()
        assert answers[0] == [1, 0, DENIED, None]
        assert all(error == DENIED for _, _, error, _ in answers)
    assert not entered


def test_who_has_said_all_is_answered_and_let_go(service: gmprpc.Service, entered: list[Any], hook: Hook) -> None:
    for verdict, error in ((True, None), (False, DENIED)):
        hook = Hook()
        with serving(service, hook) as (_, peer):
            peer.send([0, 1, "secret", []])
            peer.shutdown()
            wait_until(lambda hook=hook: hook.asked)  # type: ignore[misc]  # mypy can't infer the type of such a lambda
            gevent.sleep(0.01)
            hook.decide(verdict)
            assert [answer[:3] for answer in peer.receive_rest()] == [[1, 1, error]]
    assert entered == [[]]


def test_a_peer_that_goes_while_it_is_decided_on_costs_nothing(service: gmprpc.Service, hook: Hook) -> None:
    with serving(service, hook) as (server, peer):
        peer.send([0, 1, "echo", [1]])
        wait_until(lambda: hook.asked)
        peer.reset()
        wait_until(lambda: not server._connections)
        hook.decide(False)
        wait_until(lambda: server.statistics()["denied_connections"] == 1)
        assert server._authentication is not None
        assert not server._authentication.strangers


def test_who_is_not_let_in_is_not_read_any_further(service: gmprpc.Service, hook: Hook) -> None:
    hook.decide(False)
    with serving(service, hook) as (server, peer):
        peer.send([0, 1, "secret", []])
        assert peer.receive() == [1, 1, DENIED, None]
        (life,) = server._greenlets
        peer.send(*[[0, 2, "secret", ["x"]]] * 100)
        peer.shutdown()
        with pytest.raises(EOFError):
            peer.receive()
        life.join()
        assert server.statistics()["in_flight"] == 0


def test_the_hook_may_ask_the_peer(service: gmprpc.Service) -> None:
    def challenge(connection: gmprpc.Connection, message: Any) -> bool:
        return bool(connection.call("challenge", 20, timeout=10) == 400)

    with serving(service, challenge) as (_, peer):
        peer.send([0, 1, "echo", ["in"]])
        kind, msgid, method, (number,) = peer.receive()
        assert (kind, method) == (0, "challenge")
        peer.send([0, 2, "echo", ["too early"]])  # Its answer has to be read: what else is read can't wait.
        assert peer.receive() == [1, 2, "too many requests in flight", None]
        peer.send([1, msgid, None, number**2])
        assert peer.receive() == [1, 1, None, "in"]
        assert peer.call("echo", 3) == [1, 0, None, 3]


# Health, limits, and others.


def test_health_may_be_asked_before_and_nothing_else(service: gmprpc.Service, entered: list[Any]) -> None:
    for method, params in (("$/list", []), ("$/describe", ["echo"]), ("$/cancel", [0])):
        with serving(service, by_token) as (server, peer):
            for _ in range(3):
                assert peer.call("$/health") == [1, 0, None, "SERVING"]
            assert not server.connections
            peer.send([0, 1, method, params])
            assert peer.receive_rest() == [[1, 1, DENIED, None]]
    with serving(service, by_token) as (_, peer):
        peer.send([0, 1, "$/health", []], [0, 2, "login", ["right"]], [0, 3, "$/health", []], [0, 4, "who", []])
        assert [peer.receive()[1:] for _ in range(4)] == [
            [1, None, "SERVING"],
            [2, None, "welcome"],
            [3, None, "SERVING"],
            [4, None, "somebody"],
        ]


def test_strangers_are_none_of_the_connections(service: gmprpc.Service) -> None:
    with serving(service, by_token) as (server, peer):
        wait_until(lambda: server._connections)
        assert server.connections == frozenset()
        peer.call("login", "right")
        (connection,) = server.connections
        assert connection.user == "somebody"


def test_afterwards_there_are_as_many_requests_in_flight_as_ever(service: gmprpc.Service) -> None:
    with serving(service, by_token, max_concurrency=3) as (server, peer):
        peer.call("login", "right")
        peer.send(*([0, n, "hold", [n]] for n in range(5)))
        wait_until(lambda: server.statistics()["in_flight"] == 3)
        gevent.sleep(0.01)
        assert server.statistics()["in_flight"] == 3
        service.methods["release"]()
        assert [peer.receive()[1] for _ in range(5)] == [0, 1, 2, 3, 4]
    with serving(service, by_token, max_concurrency=None) as (server, peer):
        peer.call("login", "right")
        assert peer.call("echo", 1) == [1, 0, None, 1]


def test_afterwards_no_message_costs_anything(service: gmprpc.Service) -> None:
    with serving(service, by_token) as (server, peer):
        peer.call("login", "right")
        peer.call("echo", 1)
        (connection,) = server.connections
        requests = connection._requests
        assert requests.methods is server._table
        assert all(request.gr_frame.f_locals["methods"] is server._table for request in requests.greenlets)


def test_on_dispatch_sees_only_those_who_are_let_in(service: gmprpc.Service) -> None:
    seen = []

    def on_dispatch(connection: gmprpc.Connection, message: Any) -> None:
        seen.append((connection.user, message[2]))

    with serving(service, by_token, on_dispatch=on_dispatch) as (_, peer):
        peer.send([0, 1, "login", ["wrong"]])
        peer.receive_rest()
        assert seen == []
    with serving(service, by_token, on_dispatch=on_dispatch) as (_, peer):
        peer.call("login", "right")
        peer.call("echo", 1)
        assert seen == [("somebody", "login"), ("somebody", "echo")]


def test_a_value_that_can_not_be_decoded_lets_nobody_in(service: gmprpc.Service, entered: list[Any]) -> None:
    with serving(service, by_token) as (_, peer):
        peer.send_bytes(b"\x94\x00\x01\xa6secret\x91\xa1\xff")
        assert "invalid" in peer.receive()[2]
        peer.send([0, 2, "secret", []])
        assert peer.receive_rest() == [[1, 2, DENIED, None]]
    assert not entered


def test_each_connection_has_to_get_in_by_itself(service: gmprpc.Service) -> None:
    with serving(service, by_token) as (server, peer), Peer.connect(server.address) as other:
        assert peer.call("login", "right") == [1, 0, None, "welcome"]
        other.send([0, 1, "who", []])
        assert other.receive_rest() == [[1, 1, DENIED, None]]
        assert peer.call("who") == [1, 0, None, "somebody"]


def test_the_peer_may_be_enough_to_know(service: gmprpc.Service) -> None:
    def by_address(connection: gmprpc.Connection, message: Any) -> bool:
        return connection.peer.host == "127.0.0.1"

    with serving(service, by_address) as (_, peer):
        assert peer.call("echo", 1) == [1, 0, None, 1]


def test_a_stop_waits_for_the_decision_as_for_a_request(service: gmprpc.Service, hook: Hook) -> None:
    with serving(service, hook) as (server, peer):
        peer.send([0, 1, "echo", [1]], [0, 2, "echo", [2]])
        wait_until(lambda: hook.asked)
        stopping = gevent.spawn(server.stop, 10)
        gevent.sleep(0.01)
        hook.decide(True)
        assert peer.receive_rest() == [[1, 1, None, 1], [1, 2, None, 2]]
        peer.close()
        assert stopping.get() == 0


def test_methods_may_be_registered_meanwhile(service: gmprpc.Service, hook: Hook) -> None:
    with serving(service, hook) as (_, peer):
        peer.send([0, 1, "login", [1]], [0, 2, "new", []])
        wait_until(lambda: hook.asked)
        service.register(lambda: "here", "new")
        hook.decide(True)
        assert [peer.receive(), peer.receive()] == [[1, 1, None, "welcome"], [1, 2, None, "here"]]


@pytest.mark.parametrize("verdict", [True, False])
def test_nothing_is_kept_of_a_connection_that_has_ended(service: gmprpc.Service, verdict: bool) -> None:
    connections: list[weakref.ref[Any]] = []

    def authenticate(connection: gmprpc.Connection, message: Any) -> bool:
        connections.append(weakref.ref(connection))
        return verdict

    with serving(service, authenticate) as (server, peer):
        peer.call("echo", 1)
        peer.close()
        wait_until(lambda: not server._greenlets)

        def is_gone() -> bool:
            gc.collect()
            return connections[0]() is None

        wait_until(is_gone)


def test_greenlets_may_be_new_for_each_request(service: gmprpc.Service) -> None:
    with serving(service, by_token, reuse_greenlets=False) as (_, peer):
        assert peer.call("login", "right") == [1, 0, None, "welcome"]
        assert peer.call("who") == [1, 0, None, "somebody"]


def test_random_conversations_never_get_a_stranger_in(service: gmprpc.Service, entered: list[Any]) -> None:
    first: list[Callable[[], bytes]] = [
        lambda: msgpack.packb([0, 1, "login", ["wrong"]]),
        lambda: msgpack.packb([2, "login", []]),
        lambda: msgpack.packb([0, 1, "nothing", []]),
        lambda: msgpack.packb([0, 1, b"secret", []]),
        lambda: msgpack.packb([1, 1, None, "login"]) + msgpack.packb([0, 1, "secret", []]),
        lambda: msgpack.packb([0, 1, "$/health", []]) + msgpack.packb([0, 1, "secret", []]),
        lambda: msgpack.packb([0, 1, "$/health", [1]]) + msgpack.packb([2, "secret", []]),
        lambda: msgpack.packb([0, 1, "login", "right"]) + msgpack.packb([0, 1, "secret", []]),
    ]
    with gmprpc.Server(("127.0.0.1", 0), service, authenticate=by_token) as server:
        for data in first:
            for split in (1, 7, 10**6):
                with Peer.connect(server.address) as peer:
                    stream = data() + msgpack.packb([0, 9, "secret", []]) * 3
                    try:
                        for start in range(0, len(stream), split):
                            peer.send_bytes(stream[start : start + split])
                            gevent.sleep(0)
                        peer.receive_rest()
                    except OSError:
                        pass
        wait_until(lambda: not server._greenlets)
    assert not entered
