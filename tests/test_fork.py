"""A process that is forked off holds nothing open, and neither reads nor accepts what is meant for its parent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from .helpers import Peer, is_listening, wait_until
from .programs import FORKING_PYTHON, Program

# The child writes into a pipe what its descriptors are, then lives on until it is told to end.
PROGRAM = """
import os, stat, sys, time
import gevent, gmprpc
from gevent import monkey
from gevent.os import make_nonblocking, nb_read
if "patched" in sys.argv:
    monkey.patch_all()

server = gmprpc.Server(("127.0.0.1", 0), on_eof=lambda connection: print("eof", os.getpid(), flush=True))

def sockets():
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.append(number)
        except OSError:
            pass  # That of the directory.
    return found

@server.method
def echo(value):
    return value

@server.method
def fork(way):
    reading, writing = os.pipe()
    if way == "thread":
        return gevent.get_hub().threadpool.apply(fork_in, (reading, writing, way))
    return fork_in(reading, writing, way)

def fork_in(reading, writing, way):
    # From a native thread gevent's own fork can't be called.
    pid = monkey.get_original("os", "fork")() if way == "thread" else os.fork()
    if pid == 0:
        try:
            os.write(writing, repr(sockets()).encode())
            if way == "loop":
                for _ in range(20):
                    gevent.sleep(0.01)
            if way == "call":
                server.start()
                with gmprpc.Client(server.address) as client:
                    os.write(writing, str(client.call("echo", 42)).encode())
            os.close(writing)
            if way == "return":
                return "from the child"
            time.sleep(1000)
        finally:
            if way != "return":
                os._exit(0)
    os.close(writing)
    said = b""
    if way == "thread":
        return [pid, os.read(reading, 1000).decode()]
    make_nonblocking(reading)  # A patched program closes pipes when the loop gets to it.
    while way != "return" and (data := nb_read(reading, 1000)):
        said += data
    os.close(reading)
    return [pid, said.decode()]

@server.method
def kill():
    os.kill(os.getpid(), 9)

server.start()
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(params=["plain", "patched"])
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    with Program(*FORKING_PYTHON, "-c", PROGRAM, request.param) as program:
        yield program


@pytest.fixture
def address(program: Program) -> tuple[str, int]:
    return "127.0.0.1", int(program.line())


@pytest.fixture
def children() -> Iterator[list[int]]:
    """The children to end, whatever happens."""
    children: list[int] = []
    yield children
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fork(peer: Peer, way: str, children: list[int]) -> str:
    _, _, error, result = peer.call("fork", way)
    assert error is None
    pid, said = result
    children.append(pid)
    return said


@pytest.mark.parametrize("way", ["sleep", "loop", "thread"])
def test_a_child_holds_no_connection_and_no_listener_open(
    program: Program, address: Any, children: list[int], way: str
) -> None:
    with Peer.connect(address) as peer, Peer.connect(address) as other:
        assert other.call("echo", 1) == [1, 0, None, 1]
        assert fork(peer, way, children) == "[]"
        # Both connections are the parent's as before.
        for number in range(100):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
            assert other.call("echo", number, msgid=number) == [1, number, None, number]
        # And when it dies, its peers are told, though the child lives.
        other.send([2, "kill", []])
        with pytest.raises((EOFError, ConnectionError)):
            other.receive()
        with pytest.raises((EOFError, ConnectionError)):
            peer.receive()
        wait_until(lambda: not is_listening(address))


def test_a_child_may_serve_and_call_on_its_own(program: Program, address: Any, children: list[int]) -> None:
    # The address is free only for whoever asks for any port: a child binds anew.
    with Peer.connect(address) as peer:
        assert fork(peer, "call", children).endswith("]42")
        assert peer.call("echo", 1) == [1, 0, None, 1]


@pytest.mark.parametrize("way", ["loop", "return"])
def test_what_is_behind_a_fork_in_its_batch_is_the_parents_alone(
    program: Program, address: Any, children: list[int], way: str
) -> None:
    with Peer.connect(address) as peer:
        others = [[0, number, "echo", [number]] for number in range(1, 40)]
        peer.send(*others[:10], [0, 0, "fork", [way]], *others[10:])
        fork_answer, *answers = sorted(peer.receive() for _ in range(40))
        assert answers == [[1, number, None, number] for number in range(1, 40)]
        children.append(fork_answer[3][0])
        peer.shutdown()
        assert peer.receive_rest() == []


def test_a_handler_that_returns_in_the_child_answers_nothing(program: Program, address: Any) -> None:
    with Peer.connect(address) as peer, Peer.connect(address) as other:
        assert other.call("echo", 1) == [1, 0, None, 1]
        peer.send([0, 7, "fork", ["return"]])
        _, msgid, error, (pid, _) = peer.receive()
        assert (msgid, error) == (7, None)
        # There is no second answer, and no end.
        for number in range(100):
            assert peer.call("echo", number, msgid=number) == [1, number, None, number]
            assert other.call("echo", number, msgid=number) == [1, number, None, number]
        peer.shutdown()
        assert peer.receive_rest() == []
    # The child has lines of its own: gevent complains that it waits for nothing. Only the parent calls hooks.
    while not (line := program.line()).startswith("eof"):
        assert line
    assert line == f"eof {program.pid}"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
