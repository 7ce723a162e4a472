"""Child processes: spoken with over their standard streams, ended for certain, and nothing left of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import gevent
import pytest
from gevent.socket import wait_read
from gevent.threadpool import ThreadPool

from gmprpc import children
from gmprpc.children import Child, start

from .helpers import wait_until
from .programs import DEADLINE, Program


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No child, no descriptor."""
    gevent.get_hub()  # The loop has its own.
    gevent.sleep(0)
    before = open_descriptors()
    yield
    assert open_descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child that wants to end have all the time that a busy machine takes for it."""
    monkeypatch.setattr(children, "_PATIENCE", DEADLINE)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child have little time to end."""
    monkeypatch.setattr(children, "_PATIENCE", 0.05)


def python(program: str, **options: Any) -> Child:
    return start([sys.executable, "-c", program], **options)


def read(child: Child) -> bytes:
    """What the child says next, b"" when it has closed its output."""
    while True:
        try:
            return child.stream.recv()
        except BlockingIOError:
            wait_read(child.stream.fileno())


ECHO = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
SAYS_WHEN_READY = "import os, sys, time, signal; {}; os.write(1, b'ready'); time.sleep(1000)"
IGNORES_ITS_INPUT = SAYS_WHEN_READY.format("pass")
IGNORES_SIGTERM = SAYS_WHEN_READY.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")


def test_it_hears_and_says_and_ends_with_its_input() -> None:
    child = python(ECHO)
    assert child.status is None
    assert child.process.poll() is None
    child.stream.send(b"hello")
    reading = os.dup(child.stream.fileno())
    child.stream.close()
    child.end()
    assert os.read(reading, 100) == b"hello"
    os.close(reading)
    assert child.status == "exited with status 0"
    child.end()


@pytest.mark.parametrize(
    "program, status",
    [
        ("raise SystemExit(3)", "exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "was killed by signal 40"),
    ],
)
def test_one_that_ends_by_itself_says_how(program: str, status: str) -> None:
    child = python(program)
    assert read(child) == b""
    child.stream.close()
    child.end()
    assert child.status == status


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "program, status",
    [(IGNORES_ITS_INPUT, "was killed by SIGTERM"), (IGNORES_SIGTERM, "was killed by SIGKILL")],
    ids=["ignores its input", "ignores SIGTERM"],
)
def test_one_that_does_not_want_to_end_is_made_to(program: str, status: str) -> None:
    child = python(program)
    assert read(child) == b"ready"
    child.stream.close()
    child.end()
    assert child.status == status


def test_one_that_ends_is_not_waited_for_any_longer() -> None:
    child = python(ECHO)
    child.stream.close()
    begun = perf_counter()
    child.end()
    assert child.status == "exited with status 0"
    assert perf_counter() - begun < children._PATIENCE


def test_others_go_on_while_it_is_waited_for() -> None:
    child = python(IGNORES_ITS_INPUT)
    assert read(child) == b"ready"
    child.stream.close()
    ending = gevent.spawn(child.end)
    gevent.sleep(0.01)
    assert not ending.ready()
    child.process.kill()
    ending.get()


def test_who_is_killed_while_waiting_leaves_no_child() -> None:
    child = python(IGNORES_SIGTERM)
    assert read(child) == b"ready"
    child.stream.close()
    ending = gevent.spawn(child.end)
    gevent.sleep(0.01)
    ending.kill()
    assert child.status == "was killed by SIGKILL"


def test_several_may_wait_for_the_same_end() -> None:
    child = python(ECHO)
    child.stream.close()
    gevent.joinall([gevent.spawn(child.end) for _ in range(3)], raise_error=True)
    assert child.status == "exited with status 0"


@pytest.mark.parametrize(
    "command, options, expected",
    [
        (["/nothing/there"], {}, FileNotFoundError),
        (["/"], {}, PermissionError),
        ([sys.executable], {"cwd": "/nothing/there"}, FileNotFoundError),
        ([sys.executable], {"no_such_option": 1}, TypeError),
        ([sys.executable], {"stdin": subprocess.PIPE}, ValueError),
        ([sys.executable], {"stdout": None}, ValueError),
        ([sys.executable], {"stderr": subprocess.STDOUT}, ValueError),
    ],
)
def test_one_that_can_not_be_started_is_an_error(command: Any, options: Any, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        start(command, **options)


def test_without_descriptors_for_its_pipes_it_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pipe, [1]

    def pipe() -> tuple[int, int]:
        if not left:
            raise OSError(24, "Too many open files")
        left.pop()
        return real()

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(OSError, match="Too many open files"):
        python(ECHO)


def test_options_go_to_popen(tmp_path: Path) -> None:
    child = python(
        "import os; os.write(1, os.getcwd().encode() + os.environ['X'].encode())", cwd=tmp_path, env={"X": "y"}
    )
    assert read(child) == f"{tmp_path}y".encode()
    child.stream.close()
    child.end()


def test_its_siblings_hold_nothing_of_it_open() -> None:
    first, second = python(ECHO), python(ECHO, close_fds=False)
    first.stream.close()
    first.end()
    assert first.status == "exited with status 0"
    second.stream.close()
    second.end()


def test_a_process_that_was_forked_off_leaves_it_alone() -> None:
    child = python(IGNORES_ITS_INPUT)
    assert read(child) == b"ready"
    child._parent = -1  # As in a process that was forked off.
    child.stream.close()
    child.end()
    assert child.process.poll() is None
    child.process.kill()
    child.process.wait()


def test_a_thread_may_have_children() -> None:
    def have() -> str | None:
        child = python(ECHO)
        child.stream.close()
        child.end()
        return child.status

    pool = ThreadPool(1)
    try:
        assert pool.apply(have) == "exited with status 0"
    finally:
        pool.kill()
        wait_until(lambda: pool.size == 0)


PATCHED = """
from gevent import monkey
monkey.patch_all()
import os, sys
import gevent
from gevent.threadpool import ThreadPool
from gmprpc import children

children._PATIENCE = 20.0
end_in = ThreadPool(1).apply if "thread" in sys.argv else lambda end: end()

def one(program, says_when_ready=False):
    child = children.start([sys.executable, "-c", program])
    assert type(child.process).__module__.startswith("gevent")
    while says_when_ready:
        try:
            assert child.stream.recv() == b"ready"
            break
        except BlockingIOError:
            gevent.sleep(0.001)
    child.stream.close()
    end_in(child.end)
    assert child.process.poll() is not None
    return child.status

def descriptors():
    gevent.sleep(0.01)
    return len(os.listdir("/proc/self/fd"))

one("pass")  # What is made once is there now.
before = descriptors()
said = "import os, time, signal; {}; os.write(1, b'ready'); time.sleep(1000)"
print(one("import sys; sys.stdin.read()"))
print(one("raise SystemExit(3)"))
children._PATIENCE = 0.05
print(one(said.format("pass"), True))
print(one(said.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)"), True))
assert descriptors() == before, (before, descriptors())
try:
    print(monkey.get_original("os", "waitpid")(-1, os.WNOHANG))
except ChildProcessError:
    print("none left")
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_it_is_the_same_in_a_patched_program(where: str) -> None:
    with Program(sys.executable, "-c", PATCHED, where) as program:
        assert program.lines() == [
            "exited with status 0",
            "exited with status 3",
            "was killed by SIGTERM",
            "was killed by SIGKILL",
            "none left",
        ]
