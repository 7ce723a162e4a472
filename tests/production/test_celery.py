"""Celery's tasks as methods, as "celery_service.py" among the examples makes them, with Redis and real workers."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import gmprpc
from tests.helpers import wait_until
from tests.programs import Program

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "celery_service.py"

#: The example's service with tasks that tell when they begin: each adds a line to the file of its name, with the number
#: of the process that is at work on it.
TASKS = '''
import os, time
from pathlib import Path
from celery_service import app, method, service

directory = Path(__file__).parent
# What a worker that has died had is given to another one as soon as can be.
app.conf.broker_transport_options = {
    "visibility_timeout": float(os.environ.get("VISIBILITY", "180")),
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}

@method
@app.task
def echo(value):
    return value

@method
@app.task
def fail(message):
    raise ValueError(message)

@method
@app.task
def hold(name):
    with (directory / name).open("a") as file:
        print(os.getpid(), file=file)
    late = time.monotonic() + 60
    while not (directory / f"{name}.go").exists():
        assert time.monotonic() < late
        time.sleep(0.01)
    return name

class SlowlySent(app.Task):
    """What sends it doesn't know yet that it has."""

    def apply_async(self, *args, **options):
        result = super().apply_async(*args, **options)
        time.sleep(60)
        return result

@method
@app.task(base=SlowlySent)
def hold_slowly(name):
    return hold.run(name)
'''


class Tasks:
    """The tasks, workers that carry them out, and a server that has them done."""

    def __init__(self, directory: Path, redis_url: str, programs: ExitStack) -> None:
        (directory / "tasks.py").write_text(TASKS)
        self._directory = directory
        self._programs = programs
        path = [str(EXAMPLE.parent), str(directory), os.environ.get("PYTHONPATH", "")]
        self._env = {"REDIS_URL": redis_url, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    def start_worker(self, *options: str, **env: str) -> Program:
        """A worker, which soon begins with what there is to do."""
        command = (sys.executable, "-W", "ignore", "-m", "celery", "-A", "tasks", "worker", "--loglevel", "critical")
        return self._programs.enter_context(Program(*command, *options, env={**self._env, **env}))

    def start_server(self, *options: str, **env: str) -> str:
        """A server; where it is."""
        command = (sys.executable, "-m", "gmprpc", "serve", "-b", "127.0.0.1:0", *options, "tasks:service")
        program = self._programs.enter_context(Program(*command, env={**self._env, **env}))
        return program.line_with("listening on ").removeprefix("listening on ")

    def processes(self, name: str) -> list[int]:
        """Which processes have begun with the task that holds as ``name``."""
        file = self._directory / name
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_begun(self, name: str, times: int = 1) -> int:
        """Wait until it has been begun with so many times; the process that did so last."""
        wait_until(lambda: len(self.processes(name)) >= times)
        return self.processes(name)[-1]

    def release(self, name: str) -> None:
        """Let it end."""
        (self._directory / f"{name}.go").touch()


@pytest.fixture
def tasks(require_peer: Callable[[str, Any], None], redis_url: str, directory: Path) -> Iterator[Tasks]:
    require_peer("Celery (celery)", importlib.util.find_spec("celery"))
    with ExitStack() as programs:
        tasks = Tasks(directory, redis_url, programs)
        yield tasks
        for path in directory.iterdir():  # However the test went: a worker ends when its tasks have.
            tasks.release(path.name)


@pytest.fixture
def client(tasks: Tasks) -> Iterator[gmprpc.Client]:
    """A client of a server; what it calls waits for a worker."""
    with gmprpc.Client(tasks.start_server(), timeout=60) as client:
        yield client


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_task_is_a_method(tasks: Tasks, client: gmprpc.Client) -> None:
    tasks.start_worker("--concurrency", "2")
    assert client.call("fibonacci", 10) == 55
    assert client.call("$/describe", "fibonacci") == {
        "name": "fibonacci",
        "signature": "(n)",
        "doc": "The n-th Fibonacci number, the slow way.",
    }
    # All at once, each gets its own.
    calls = [client.call_async("echo", number) for number in range(200)]
    assert [call.get() for call in calls] == list(range(200))
    # What goes wrong with a task goes wrong with the call.
    with pytest.raises(gmprpc.RemoteError) as raised:
        client.call("fail", "x")
    assert raised.value.error == "ValueError: x"
    with pytest.raises(gmprpc.RemoteError) as raised:
        client.call("echo")
    assert raised.value.error == "wrong params for echo(value): missing a required argument: 'value'"
    # A notification is carried out.
    client.notify("hold", "notified")
    tasks.wait_begun("notified")
    assert client.call("echo", 1) == 1


def test_a_call_that_is_cancelled_ends_its_task(tasks: Tasks, client: gmprpc.Client) -> None:
    tasks.start_worker("--concurrency", "1")
    assert client.call("echo", 0) == 0  # Now it hears what is revoked, too: a task may begin a moment before.
    running, waiting = client.call_async("hold", "running"), client.call_async("hold", "waiting")
    process = tasks.wait_begun("running")
    waiting.cancel()
    assert client.call("$/health") == "SERVING"  # It has been read, at least.
    running.cancel()
    wait_until(lambda: not is_alive(process))
    assert client.call("echo", 1) == 1  # Comes behind both.
    assert tasks.processes("running") == [process]
    assert tasks.processes("waiting") == []


def test_a_call_that_is_cancelled_while_its_task_is_being_sent_ends_it(tasks: Tasks, client: gmprpc.Client) -> None:
    tasks.start_worker("--concurrency", "1")
    assert client.call("echo", 0) == 0  # Now it hears what is revoked, too: a task may begin a moment before.
    call = client.call_async("hold_slowly", "it")
    process = tasks.wait_begun("it")
    call.cancel()
    wait_until(lambda: not is_alive(process))
    assert client.call("echo", 1) == 1


def test_a_call_that_takes_too_long_ends_its_task(tasks: Tasks, client: gmprpc.Client) -> None:
    tasks.start_worker("--concurrency", "1")
    assert client.call("echo", 1) == 1
    with gmprpc.Client(tasks.start_server("--reply-timeout", "1")) as hasty:
        with pytest.raises(gmprpc.RemoteError, match="no answer within 1 s"):
            hasty.call("hold", "long")
        # It has begun, unless this machine is very slow.
        wait_until(lambda: not any(map(is_alive, tasks.processes("long"))))
        assert client.call("echo", 2) == 2


def test_a_task_whose_process_is_killed_is_begun_again_and_its_caller_gets_the_answer(
    tasks: Tasks, client: gmprpc.Client
) -> None:
    tasks.start_worker("--concurrency", "2")
    call = client.call_async("hold", "it")
    killed = tasks.wait_begun("it")
    os.kill(killed, signal.SIGKILL)
    assert tasks.wait_begun("it", 2) != killed
    assert not call.ready()
    tasks.release("it")
    assert call.get() == "it"


def test_a_task_whose_worker_is_killed_is_begun_by_another_one_and_its_caller_gets_the_answer(
    tasks: Tasks, client: gmprpc.Client
) -> None:
    # Of a single process: there are no children that would outlive it.
    worker = tasks.start_worker("--pool", "solo", VISIBILITY="2")
    call = client.call_async("hold", "it")
    assert tasks.wait_begun("it") == worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    other = tasks.start_worker("--pool", "solo", VISIBILITY="2")
    assert tasks.wait_begun("it", 2) == other.pid
    tasks.release("it")
    assert call.get() == "it"
