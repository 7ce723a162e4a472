"""A client of a child process: started, called both ways, and ended; and what its end means for calls."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import gevent
import pytest

import gmprpc

from .helpers import wait_until

CHILD = """
import os, sys, time
import gevent, gmprpc
from gmprpc.pipes import PipeStream
from gmprpc.server import Server
server = Server(None)

@server.method
def echo(value):
    return value

@server.method
def ask(depth):
    return [depth, gmprpc.current_call().connection.call("ask", depth - 1)] if depth else 0

@server.method
def environment(name):
    return os.environ.get(name)

@server.method
def end(status):
    os._exit(status)

server.serve_stream(PipeStream(0, 1))
"""
COMMAND = [sys.executable, "-c", CHILD]


def test_a_child_process_is_called_and_calls_back_at_any_depth() -> None:
    service = gmprpc.Service()
    service.register(
        lambda depth: [depth, gmprpc.current_call().connection.call("ask", depth - 1)] if depth else 0, "ask"
    )
    client = gmprpc.Client.popen(COMMAND, service=service, timeout=20)
    assert client.process is None
    with client:
        assert [client.call("echo", number) for number in range(100)] == list(range(100))
        assert [call.get() for call in [client.call_async("echo", "x" * 200_000) for _ in range(5)]] == [
            "x" * 200_000
        ] * 5
        result: Any = client.call("ask", 40)
        for depth in range(40, 0, -1):
            assert result[0] == depth
            result = result[1]
        assert client.process is not None
        assert client.process.poll() is None
    assert client.process.poll() == 0
    with pytest.raises(gmprpc.ConnectionClosed, match="the client is closed"):
        client.call("echo", 1)


def test_the_options_of_the_process_are_those_of_popen() -> None:
    with gmprpc.Client.popen(COMMAND, popen_options={"env": {**os.environ, "GREETING": "hello"}}) as client:
        assert client.call("environment", "GREETING") == "hello"


def test_a_process_that_has_ended_is_not_started_again_unseen() -> None:
    client = gmprpc.Client.popen(COMMAND, timeout=20)
    with pytest.raises(gmprpc.ConnectionClosed) as caught:
        client.call("end", 3, idempotent=False)
    assert caught.value.sent is True
    first = client.process
    for call in (
        lambda: client.call("echo", 1),
        lambda: client.call_async("echo", 1).get(),
        lambda: client.notify("echo"),
    ):
        with pytest.raises(gmprpc.ConnectFailed, match=r"exited with status 3; connect\(\) starts it anew"):
            call()
    assert client.process is first
    with pytest.raises(gmprpc.ConnectFailed):
        client.call("echo", 1, idempotent=True)
    client.connect()
    assert client.call("echo", 2) == 2
    assert client.process is not first
    assert client.process is not None
    os.kill(client.process.pid, signal.SIGKILL)
    wait_until(lambda: not client.is_connected)
    with pytest.raises(gmprpc.ConnectFailed, match="was killed by SIGKILL"):
        client.call("echo", 1)
    client.close()


def test_what_cant_be_started_is_no_server() -> None:
    client = gmprpc.Client.popen(["/nonexistent/program", "-x"])
    with pytest.raises(gmprpc.ConnectFailed, match="can't start /nonexistent/program -x: No such file"):
        client.call("echo", 1)


def test_close_ends_a_process_that_doesnt_heed_the_end_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmprpc.children._PATIENCE", 0.05)
    client = gmprpc.Client.popen([sys.executable, "-c", "import time; time.sleep(1000)"]).connect()
    calling = gevent.spawn(client.call, "echo", 1)
    gevent.sleep(0)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        calling.get()
    assert client.process is not None
    assert client.process.poll() == -signal.SIGTERM


@pytest.mark.parametrize(
    "command, options",
    [
        ([], {}),
        (COMMAND, {"popen_options": {"stdin": None}}),
        (COMMAND, {"before_connect": print}),
        (COMMAND, {"after_connect": print}),
    ],
    ids=["nothing", "stdin", "before_connect", "after_connect"],
)
def test_what_makes_no_sense_is_refused_at_once(command: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        gmprpc.Client.popen(command, **options)
