"""``gmprpc serve --stdio``: real processes, over pipes, sockets and files."""

from __future__ import annotations

import os
import pty
import signal
import socket as stdlib_socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import msgpack
import pytest

from gmprpc.connection import Connection
from gmprpc.metrics import Counters
from gmprpc.options import ConnectionOptions
from gmprpc.pipes import PipeStream
from gmprpc.streams import PlainStream, Stream

from .helpers import wait_until
from .programs import DEADLINE

APP = """
import os
import subprocess
import sys

import gevent
import gmprpc

print("imported")
service = gmprpc.Service()


@service.method
def echo(value):
    return value


@service.method
def shout(value):
    print("printed", value)
    os.write(1, b"written\\n")
    subprocess.run(["sh", "-c", "echo from a child; cat"], check=True)
    sys.stdin.read()
    return value


@service.method
def hold(seconds):
    sys.stderr.write("holding\\n")
    sys.stderr.flush()
    gevent.sleep(seconds)
    return "held"


@service.method
def peer():
    return str(gmprpc.current_call().peer)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Serves the application above."""
    directory = tmp_path_factory.mktemp("stdio")
    (directory / "stdio_app.py").write_text(APP)
    return [
        *(sys.executable, "-P", "-m", "gmprpc"),
        *("serve", "--stdio", "--app-dir", str(directory), "stdio_app:service"),
    ]


def packed(*messages: Any) -> bytes:
    return b"".join(map(msgpack.packb, messages))


def unpacked(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


REQUESTS = [[0, number, "echo", ["x" * number]] for number in range(500)]
ANSWERS = [[1, number, None, "x" * number] for number in range(500)]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    process: subprocess.CompletedProcess[bytes] = subprocess.run(command, timeout=DEADLINE, check=False, **options)
    return process


# To its end.


def test_what_comes_through_a_pipe_is_answered_until_its_end(command: list[str]) -> None:
    done = run(command, input=packed(*REQUESTS), capture_output=True)
    assert done.returncode == 0
    assert unpacked(done.stdout) == ANSWERS


def test_a_file_of_requests_becomes_a_file_of_answers(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "requests").write_bytes(packed(*REQUESTS))
    with (tmp_path / "requests").open("rb") as requests, (tmp_path / "answers").open("wb") as answers:
        done = run(command, stdin=requests, stdout=answers, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert unpacked((tmp_path / "answers").read_bytes()) == ANSWERS


def test_nothing_to_read_is_an_end_too(command: list[str]) -> None:
    done = run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_what_is_at_work_at_the_end_is_waited_for(command: list[str]) -> None:
    done = run(command, input=packed([0, 1, "hold", [0.05]]), capture_output=True)
    assert (done.returncode, unpacked(done.stdout)) == (0, [[1, 1, None, "held"]])


def test_what_is_printed_goes_to_standard_error_and_nothing_is_taken_away(command: list[str]) -> None:
    done = run(command, input=packed([0, 1, "shout", ["hi"]], [0, 2, "echo", [2]]), capture_output=True)
    assert done.returncode == 0
    assert sorted(unpacked(done.stdout)) == [[1, 1, None, "hi"], [1, 2, None, 2]]
    for text in ("imported", "printed hi", "written", "from a child"):
        assert text in done.stderr.decode().splitlines()


def test_the_log_does_not_get_between_the_answers_where_all_is_one_socket(command: list[str]) -> None:
    # As from inetd.
    ours, theirs = stdlib_socket.socketpair()
    ours.settimeout(DEADLINE)
    fd = theirs.fileno()
    with ours, subprocess.Popen(command, stdin=fd, stdout=fd, stderr=fd) as process:
        theirs.close()
        ours.sendall(packed([0, 1, "shout", ["hi"]], [0, 2, "peer", []]))
        ours.shutdown(stdlib_socket.SHUT_WR)
        data = b""
        while piece := ours.recv(65536):
            data += piece
        assert sorted(unpacked(data)) == [[1, 1, None, "hi"], [1, 2, None, "stdio"]]
    assert process.returncode == 0


def test_garbage_is_an_error_of_the_connection(command: list[str]) -> None:
    done = run(command, input=packed(*REQUESTS[:3]) + b"\xc1", capture_output=True)
    assert done.returncode == 5
    assert unpacked(done.stdout) == ANSWERS[:3]
    assert "Error: " in done.stderr.decode()


def test_pipes_that_a_shell_has_too_are_left_as_they_were(command: list[str]) -> None:
    reading, writing = os.pipe()
    answers, output = os.pipe()
    try:
        os.write(writing, packed([0, 1, "echo", [1]]))
        os.close(writing)
        assert run(command, stdin=reading, stdout=output, stderr=subprocess.DEVNULL).returncode == 0
        assert os.get_blocking(reading)
        assert os.get_blocking(output)
        assert unpacked(os.read(answers, 100)) == [[1, 1, None, 1]]
    finally:
        for fd in (reading, output, answers):
            os.close(fd)


# What it can't serve.


def refused(command: list[str], *words: str, exit_code: int = 2, **options: Any) -> None:
    done = run(command, **{"stdin": subprocess.DEVNULL, "capture_output": True, **options})
    assert done.returncode == exit_code
    for word in words:
        assert word in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_a_terminal_is_told_what_it_is_for(command: list[str]) -> None:
    near, far = pty.openpty()
    try:
        refused(command, "standard input is a terminal", "a program that starts this one", stdin=far)
        refused(
            command,
            "standard output is a terminal",
            capture_output=False,
            stdout=far,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(near)
        os.close(far)


def test_there_can_be_no_other_place(command: list[str]) -> None:
    refused([*command, "--bind", "127.0.0.1:0"], "--stdio", "--bind")
    env = {**os.environ, "GMPRPC_BIND": "127.0.0.1:0"}  # Was meant for others.
    assert run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env).returncode == 0


def test_closed_descriptors_are_nobody_to_serve(command: list[str]) -> None:
    refused(["sh", "-c", '"$@" <&-', "sh", *command], "closed", exit_code=3)
    refused(["sh", "-c", '"$@" >&-', "sh", *command], "closed", exit_code=3)


def test_no_standard_error_is_no_matter(command: list[str]) -> None:
    done = run(["sh", "-c", '"$@" 2>&-', "sh", *command], input=packed([0, 1, "shout", [1]]), capture_output=True)
    assert unpacked(done.stdout) == [[1, 1, None, 1]]


# Both ways, and signals.


class Child(NamedTuple):
    """A process and a connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    life: Any
    stderr: Any

    def wait(self) -> int:
        """Wait until the process has ended, which must not block the connection."""
        wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode


@pytest.fixture(params=["pipes", "sockets", "one socket"])
def child(request: pytest.FixtureRequest, command: list[str]) -> Iterator[Child]:
    """The program, with a connection to it. (libuv, and so Neovim, gives its children sockets.)"""
    if request.param == "pipes":
        (reading, stdout), (stdin, writing) = os.pipe(), os.pipe()
        stream: Stream = PipeStream(reading, writing)
    elif request.param == "sockets":
        first, second = stdlib_socket.socketpair(), stdlib_socket.socketpair()
        stdin, stdout = first[1].detach(), second[1].detach()
        stream = PipeStream(second[0].detach(), first[0].detach())
    else:
        near, far = stdlib_socket.socketpair()
        stdin, stdout = far.detach(), os.dup(near.fileno())
        os.dup2(stdin, stdout)
        stream = PlainStream(near)
    with subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE) as process:
        os.close(stdin)
        os.close(stdout)
        connection = Connection(
            stream, {"double": lambda number: 2 * number}, ConnectionOptions(), counters=Counters(), peer="the child"
        )
        child = Child(process, connection, gevent.spawn(connection.run), process.stderr)
        try:
            yield child
        finally:
            process.kill()
            connection.close()
            child.life.join()


def test_calls_are_answered_until_the_end_is_told(child: Child) -> None:
    assert child.connection.call("echo", 1) == 1
    assert child.connection.call("shout", 2) == 2
    large = "x" * 900_000
    assert child.connection.call("echo", large) == large
    child.connection.finish()
    child.life.join()
    assert child.wait() == 0
    assert child.life.value is None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_at_work_be_answered(child: Child, signum: signal.Signals) -> None:
    call = child.connection.call_async("hold", 0.1)
    assert child.connection.call("echo", 1) == 1  # Which came later: it is at work.
    child.process.send_signal(signum)
    assert call.get() == "held"
    child.life.join()
    assert child.wait() == 0


def test_a_second_sigint_stops_at_once(child: Child) -> None:
    call = child.connection.call_async("hold", 1000)
    assert child.connection.call("echo", 1) == 1
    child.process.send_signal(signal.SIGINT)
    while b"stopping on SIGINT" not in child.stderr.readline():
        pass
    child.process.send_signal(signal.SIGINT)
    call.wait()
    assert not call.successful()
    assert child.wait() == 0


def test_a_parent_that_dies_leaves_no_child_behind(child: Child) -> None:
    call = child.connection.call_async("hold", 0.05)
    assert child.connection.call("echo", 1) == 1
    child.connection.abort()
    with suppress(ConnectionError):
        call.get()
    assert child.wait() in (0, 5)  # Its answer may come to nobody.
