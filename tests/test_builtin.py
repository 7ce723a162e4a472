"""The built-in methods: whether a server is serving, what can be called there, and what a method takes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.server import StreamServer

import gmprpc

from .helpers import Peer, collected, wait_until


def describe(peer: Peer, name: Any) -> Any:
    """What ``$/describe`` answers: the result, or the error."""
    _, _, error, result = peer.call("$/describe", name)
    return result if error is None else error


# $/health.


def test_a_server_is_serving(peer: Peer) -> None:
    assert peer.call("$/health") == [1, 0, None, "SERVING"]


#: What HAProxy sends and expects as its health check: ``[0, 1, "$/health", []]`` and ``[1, 1, nil, "SERVING"]``.
HEALTH_CHECK = bytes.fromhex("940001a8242f6865616c746890")
IS_SERVING = bytes.fromhex("940101c0a753455256494e47")
IS_NOT_SERVING = bytes.fromhex("940101c0ab4e4f545f53455256494e47")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packer_options": {"use_bin_type": False, "default": repr}, "unpacker_options": {"raw": True}},
        {"hide_errors": True, "introspection": False, "reply_timeout": 5, "on_dispatch": lambda *_: None},
    ],
)
def test_health_is_answered_with_the_same_bytes_under_all_options(service: gmprpc.Service, options: Any) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, **options) as server, Peer.connect(server.address) as peer:
        for is_healthy, answer in ((True, IS_SERVING), (False, IS_NOT_SERVING)):
            server.is_healthy = is_healthy
            peer.send_bytes(HEALTH_CHECK)
            assert peer.socket.recv(100) == answer


def test_a_program_may_say_that_its_server_is_not_healthy_and_calls_are_served_all_the_same(
    server: gmprpc.Server, peer: Peer
) -> None:
    assert server.is_healthy is True
    server.is_healthy = False
    assert peer.call("$/health") == [1, 0, None, "NOT_SERVING"]
    assert peer.call("echo", 1) == [1, 0, None, 1]
    server.is_healthy = True
    assert peer.call("$/health") == [1, 0, None, "SERVING"]


def test_each_server_of_a_service_has_a_health_of_its_own(service: gmprpc.Service, peer: Peer) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service) as other, Peer.connect(other.address) as others_peer:
        other.is_healthy = False
        assert others_peer.call("$/health")[3] == "NOT_SERVING"
        assert peer.call("$/health")[3] == "SERVING"


def test_a_server_that_is_stopping_is_not_serving_until_it_is_started_again(
    server: gmprpc.Server, peer: Peer, service: gmprpc.Service
) -> None:
    @service.method
    def stop() -> None:
        server.stop()  # Goes on by itself.
        gevent.sleep(0)
        # Now it has begun; what has been received by now is answered.
        peer.send([0, 2, "$/health", []])

    peer.send([0, 1, "stop", []])
    assert peer.receive_rest() == [[1, 1, None, None], [2, "$/draining", []], [1, 2, None, "NOT_SERVING"]]
    peer.close()
    wait_until(lambda: not server.connections)
    server.start()
    with Peer.connect(server.address) as other:
        assert other.call("$/health")[3] == "SERVING"


# $/list.


def test_every_registered_method_is_listed_and_none_that_is_built_in(service: gmprpc.Service, peer: Peer) -> None:
    assert peer.call("$/list") == [1, 0, None, ["add", "echo", "fail", "hold", "release"]]
    service.register(len, "later.registered")
    service.unregister("fail")
    assert peer.call("$/list")[3] == ["add", "echo", "hold", "later.registered", "release"]
    assert list(service.methods) == ["echo", "add", "hold", "release", "later.registered"]


# $/describe.


class Greeter:
    """What has methods."""

    def greet(self, name: str, /, greeting: str = "a secret", *titles: str, loudly: bool = False) -> str:
        """
        Greet somebody.

        As it is done.
        """
        return f"{greeting} {titles} {name} {loudly}"


class Callable:
    """Can be called."""

    def __call__(self, value: Any) -> Any:
        return value


class Secretive(Callable):
    __signature__ = "secret"


def test_a_method_is_described_by_its_name_its_params_and_the_first_line_of_its_docstring(
    service: gmprpc.Service, peer: Peer
) -> None:
    service.register_object(Greeter(), "greeter.")
    assert describe(peer, "add") == {"name": "add", "signature": "(a, b)", "doc": ""}
    assert describe(peer, "greeter.greet") == {
        "name": "greeter.greet",
        "signature": "(name, /, greeting=..., *titles, loudly=...)",
        "doc": "Greet somebody.",
    }


def test_whatever_can_be_registered_can_be_described(service: gmprpc.Service, peer: Peer) -> None:
    def later(reply: gmprpc.Reply, value: Any, then: Any = None) -> None:
        """Answers later."""

    service.reg_cb(later=later)
    service.register(Callable(), "callable")
    service.register(Secretive(), "secretive")
    service.register(functools.partial(functools.partial(Greeter().greet, "you"), greeting="hi"), "partial")
    service.register(functools.cache(Greeter().greet), "cached")
    service.register(print, "print")
    service.register(max, "max")
    expected = {
        "later": ("(value, then=...)", "Answers later."),
        "callable": ("(value)", "Can be called."),
        "secretive": ("(...)", ""),
        "partial": ("(*, greeting=..., loudly=...)", "Greet somebody."),
        "cached": ("(name, /, greeting=..., *titles, loudly=...)", "Greet somebody."),
    }
    for name, (signature, doc) in expected.items():
        description = describe(peer, name)
        if name == "partial":  # What is left of its params depends on the version of Python.
            description["signature"] = signature
        if name == "secretive":  # Whether a class inherits its docstring, too.
            description["doc"] = doc
        assert description == {"name": name, "signature": signature, "doc": doc}
    assert describe(peer, "print")["doc"].startswith("Prints the values")
    assert describe(peer, "max")["signature"] == "(...)"


def test_what_is_not_registered_is_not_described(peer: Peer) -> None:
    for name in ("nosuch", "", "$/list", "$/describe", "__class__", "echo "):
        assert describe(peer, name) == f'No such method "{name}" found'
    assert describe(peer, b"nosuch\xff") == 'No such method "nosuch\ufffd" found'
    assert describe(peer, b"echo")["name"] == "echo"
    assert describe(peer, 5) == "name has to be a string, not int"
    assert describe(peer, ["echo"]) == "name has to be a string, not list"
    assert describe(peer, None) == "name has to be a string, not NoneType"


# All of them.


def test_built_in_methods_say_what_they_take(peer: Peer) -> None:
    assert peer.call("$/list", 1)[2] == "wrong params for $/list(): too many positional arguments"
    assert peer.call("$/health", 1)[2] == "wrong params for $/health(): too many positional arguments"
    assert peer.call("$/describe")[2] == "wrong params for $/describe(name): missing a required argument: 'name'"


def test_nothing_can_be_registered_in_their_place(server: gmprpc.Server, service: gmprpc.Service) -> None:
    for name in ("$/health", "$/list", "$/describe", "$/cancel", "$/mine"):
        with pytest.raises(ValueError, match="reserved"):
            server.register(print, name)
        with pytest.raises(KeyError):
            service.unregister(name)


def test_without_introspection_nothing_is_told_about_methods(service: gmprpc.Service) -> None:
    with (
        gmprpc.Server(("127.0.0.1", 0), service, introspection=False) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("$/list") == [1, 0, 'No such method "$/list" found', None]
        assert describe(peer, "echo") == 'No such method "$/describe" found'
        assert peer.call("$/health") == [1, 0, None, "SERVING"]
        assert server.statistics()["unknown_methods"] == 2


def test_hooks_see_built_in_methods_and_may_refuse_them(service: gmprpc.Service) -> None:
    def on_dispatch(connection: gmprpc.Connection, message: Any) -> None:
        seen.append(message[2])
        if message[2] == "$/list":
            raise gmprpc.ErrorResponse("not for you")

    seen: list[str] = []
    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch, reply_timeout=1000) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("$/list") == [1, 0, "not for you", None]
        assert peer.call("$/health") == [1, 0, None, "SERVING"]
        assert describe(peer, "echo") == {"name": "echo", "signature": "(value)", "doc": ""}
        assert peer.call("$/describe")[2].startswith("wrong params for $/describe(name): ")
    assert seen == ["$/list", "$/health", "$/describe", "$/describe"]


def test_a_hook_that_hangs_takes_from_the_time_of_a_built_in_method(service: gmprpc.Service) -> None:
    with (
        gmprpc.Server(
            ("127.0.0.1", 0), service, on_dispatch=lambda connection, message: Event().wait(), reply_timeout=0.02
        ) as server,
        Peer.connect(server.address) as peer,
    ):
        assert peer.call("$/health") == [1, 0, "no answer within 0.02 s", None]


@pytest.fixture
def stream_server(service: gmprpc.Service) -> Iterator[StreamServer]:
    server = StreamServer(("127.0.0.1", 0), service)
    server.start()
    yield server
    server.stop()


def test_a_plain_stream_server_has_them_too(stream_server: StreamServer) -> None:
    with Peer.connect(stream_server.address) as peer:
        assert peer.call("$/health") == [1, 0, None, "SERVING"]
        assert peer.call("$/list")[3] == ["add", "echo", "fail", "hold", "release"]
        assert describe(peer, "echo")["signature"] == "(value)"


def test_a_client_tells_its_server_of_its_health_and_nothing_of_its_methods(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    @service.method
    def ask(method: str, *params: Any) -> Any:
        try:
            return gmprpc.current_call().connection.call(method, *params)
        except gmprpc.MethodNotFound as exc:
            return exc.error

    own = gmprpc.Service()
    own.register(len)
    with gmprpc.Client(server.address, service=own) as client:
        assert client.call("ask", "len", [1, 2]) == 2
        assert client.call("ask", "$/health") == "SERVING"
        assert client.call("ask", "$/list") == 'No such method "$/list" found'
        assert client.call("ask", "$/describe", "len") == 'No such method "$/describe" found'


def test_a_server_can_be_forgotten_while_its_service_lives_on(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    gone = weakref.ref(server)
    del server
    collected()
    assert gone() is None
    assert list(service._methods._tables) == [id(service._own_table)]
