"""aio-msgpack-rpc, an implementation on asyncio: its client and our server, our client and its server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gevent.event import AsyncResult

import gmprpc
from tests.programs import DEADLINE, Program

PEERS = Path(__file__).parent / "peers"

# Several times what it reads at once; its client is given it on the command line, which holds no more than 128 KiB.
LARGE = "é" * 15_000

VALUES = [None, True, -(2**63), 2**64 - 1, 0.5, "", "grüße", [], [1, [2, [3]]], {}, {"a": {"b": [None]}}]


@pytest.fixture(autouse=True)
def _peer(require_peer: Callable[[str, Any], None]) -> None:
    require_peer("aio-msgpack-rpc", find_spec("aio_msgpack_rpc"))


# Its client, our server.


def outcomes_of(server: gmprpc.Server, *messages: tuple[Any, ...]) -> list[Any]:
    """What comes of ``messages``, sent all at once by its client: each is ``("call" or "notify", method, *params)``."""
    encoded = json.dumps([[kind, method, params] for kind, method, *params in messages])
    with Program(sys.executable, PEERS / "aio_client.py", str(server.server_port), encoded) as program:
        lines = program.lines()
        assert program.wait() == 0, lines
    (line,) = lines
    return json.loads(line)


def test_its_client_gets_results(server: gmprpc.Server) -> None:
    outcomes = outcomes_of(server, ("call", "add", 1, 2), *(("call", "echo", value) for value in VALUES))
    assert outcomes == [{"result": 3}, *({"result": value} for value in VALUES)]


def test_its_client_gets_what_takes_many_reads(server: gmprpc.Server) -> None:
    assert outcomes_of(server, ("call", "echo", LARGE)) == [{"result": LARGE}]


def test_its_client_gets_errors(server: gmprpc.Server) -> None:
    raised, unknown, mismatch, fine = outcomes_of(
        server, ("call", "fail", "on purpose"), ("call", "nope"), ("call", "add", 1), ("call", "add", 1, 2)
    )
    assert raised == {"error": "ValueError: on purpose"}
    assert unknown == {"error": 'No such method "nope" found'}
    assert mismatch["error"].startswith("wrong params for add(a, b)")
    assert fine == {"result": 3}


def test_calls_of_its_client_are_in_flight_together(server: gmprpc.Server, service: gmprpc.Service) -> None:
    """Each waits for all the others, and the last to come is the first to be answered."""
    count = 100
    replies: list[gmprpc.Reply] = []

    @service.method(deferred=True)
    def meet(reply: gmprpc.Reply) -> None:
        replies.append(reply)
        if len(replies) == count:
            while replies:
                last = replies.pop()
                last.result(len(replies))

    outcomes = outcomes_of(server, *[("call", "meet")] * count)
    assert outcomes == [{"result": number} for number in range(count)]


def test_its_client_notifies(server: gmprpc.Server, service: gmprpc.Service) -> None:
    noted: AsyncResult[Any] = AsyncResult()

    @service.method
    def note(*params: Any) -> None:
        noted.set(params)

    outcomes = outcomes_of(server, ("notify", "note", 1, "two"), ("notify", "nope"), ("call", "add", 1, 2))
    assert outcomes == [None, None, {"result": 3}]
    assert noted.get(timeout=DEADLINE) == (1, "two")


# Our client, its server.


@pytest.fixture
def aio_server() -> Iterator[Program]:
    with Program(sys.executable, PEERS / "aio_server.py") as program:
        yield program


@pytest.fixture
def client(aio_server: Program) -> Iterator[gmprpc.Client]:
    with gmprpc.Client(f"127.0.0.1:{aio_server.line()}", timeout=DEADLINE) as client:
        yield client


def test_its_server_answers(client: gmprpc.Client) -> None:
    for value in [*VALUES, b"\xff\x00", LARGE * 20]:
        assert client.call("echo", value) == [value]
    assert client.call("echo") == []


def test_its_server_answers_errors(client: gmprpc.Client) -> None:
    with pytest.raises(gmprpc.RemoteError, match="on purpose") as raised:
        client.call("fail", "on purpose")
    assert raised.value.error == "on purpose"
    with pytest.raises(gmprpc.RemoteError, match="has no attribute 'nope'"):
        client.call("nope")
    assert client.call("echo", 1) == [1]


def test_calls_of_its_server_are_in_flight_together(client: gmprpc.Client) -> None:
    """It answers the last one first."""
    count = 100
    calls = [client.call_async("hold", number) for number in range(count)]
    assert client.call("release") == count
    assert [call.get(timeout=DEADLINE) for call in calls] == list(range(count))


def test_its_server_is_notified(client: gmprpc.Client) -> None:
    client.notify("note", 1, "two")
    client.notify("note")
    assert client.call("notes") == [[1, "two"], []]


def test_call_ends_when_its_server_goes(client: gmprpc.Client, aio_server: Program) -> None:
    call = client.call_async("hold", 1)
    client.call("echo")  # So that it has got the call.
    aio_server.terminate()
    with pytest.raises(gmprpc.ConnectionClosed) as raised:
        call.get(timeout=DEADLINE)
    assert raised.value.sent
