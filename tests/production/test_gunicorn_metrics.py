"""What an operator asks over HTTP is answered for all workers of a real gunicorn together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

import gmprpc
from tests.commands import GMPRPC, SLOW_TO_START
from tests.helpers import wait_until
from tests.http import get
from tests.programs import DEADLINE, FORKING_PYTHON, Program

from . import gunicorn as programs
from .gunicorn import Fleet, make_app

TWO_WORKERS = ("-w", "2", "-b", "127.0.0.1:0")


@pytest.fixture
def home(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the application is, and whatever is made for a while."""
    make_app(directory)
    temporary = directory / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("GMPRPC_METRICS_BIND", f"unix:{directory}/admin")
    return directory


@pytest.fixture
def admin(home: Path) -> str:
    """Where they answer over HTTP."""
    return f"unix:{home}/admin"


@pytest.fixture(params=[programs.gunicorn, programs.serve])
def command(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Gunicorn itself, or as `gmprpc serve --workers` runs it."""
    command: Callable[..., list[Any]] = request.param
    return command


@pytest.fixture
def fleet(home: Path, command: Callable[..., list[Any]]) -> Iterator[Fleet]:
    """Two workers."""
    with Fleet(*command(home, *TWO_WORKERS)) as fleet:
        yield fleet


class Metrics:
    """What is told at a place, read anew whenever it is asked for."""

    def __init__(self, admin: str) -> None:
        self._admin = admin

    def lines(self) -> list[str]:
        answer = get(self._admin, "/metrics")
        assert answer.status == 200, answer
        return answer.body.decode().splitlines()

    def value(self, series: str) -> float | None:
        """The value of one series, as it stands there; None if it doesn't."""
        values = [float(line.rpartition(" ")[2]) for line in self.lines() if line.rpartition(" ")[0] == series]
        return values[0] if values else None

    def wait_for(self, series: str, value: float) -> None:
        """Wait until each worker has told the others."""
        wait_until(lambda: self.value(series) == value)


OF_VERSION = 'gmprpc_calls_total{kind="request",method="version",outcome="ok"}'


def call_each_worker(fleet: Fleet, number: int) -> int:
    """Call ``number`` times over each of many connections, of which both workers have some; how often that was."""
    made = 0
    reached: set[int] = set()
    while len(reached) < 2 or made < 10 * number:
        with gmprpc.Client(fleet.addresses[0]) as client:
            reached.add(client.call("pid", timeout=DEADLINE))
            for _ in range(number):
                client.call("version", timeout=DEADLINE)
        made += number
    return made


def test_the_metrics_of_two_workers_add_up_to_the_calls_that_were_made(fleet: Fleet, admin: str) -> None:
    metrics = Metrics(admin)
    fleet.wait_serving(2)
    made = call_each_worker(fleet, 20)
    metrics.wait_for(OF_VERSION, made)
    assert metrics.value('gmprpc_call_duration_seconds_count{method="version"}') == made
    assert metrics.value('gmprpc_call_duration_seconds_bucket{le="+Inf",method="version"}') == made
    assert metrics.value("gmprpc_serving") == 2
    # Each of many requests is answered by whichever worker comes first, and all answers are the same.
    for _ in range(20):
        assert metrics.value(OF_VERSION) == made
    with gmprpc.Client(fleet.addresses[0]) as one, gmprpc.Client(fleet.addresses[0]) as other:
        assert one.call("version") == other.call("version") == 1
        metrics.wait_for("gmprpc_open_connections", 2)
    metrics.wait_for("gmprpc_open_connections", 0)


@pytest.mark.parametrize("command", [programs.serve], indirect=True)
def test_a_worker_that_is_killed_leaves_what_it_has_done_and_not_what_it_was_doing(fleet: Fleet, admin: str) -> None:
    metrics = Metrics(admin)
    workers = fleet.wait_serving(2)
    made = call_each_worker(fleet, 5)
    metrics.wait_for(OF_VERSION, made)
    with gmprpc.Client(fleet.addresses[0]) as client:
        victim = client.call("pid")
        metrics.wait_for("gmprpc_open_connections", 1)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in fleet.children)
        assert metrics.value("gmprpc_open_connections") == 0
    assert victim in workers
    assert metrics.value(OF_VERSION) == made
    metrics.wait_for("gmprpc_serving", 2)  # Another has taken its place.


@pytest.mark.parametrize("command", [programs.gunicorn], indirect=True)
def test_a_fleet_is_ready_all_the_time_while_its_workers_are_replaced(fleet: Fleet, admin: str) -> None:
    metrics = Metrics(admin)
    workers = fleet.wait_serving(2)
    made = call_each_worker(fleet, 5)
    metrics.wait_for(OF_VERSION, made)
    is_over = False
    statuses: list[int] = []

    def probe() -> None:
        while not is_over:
            statuses.append(get(admin, "/readyz").status)
            gevent.sleep(0.01)

    probing = gevent.spawn(probe)
    fleet.kill(signal.SIGHUP)
    fleet.wait_serving(2, but=workers)
    is_over = True
    probing.get()
    assert set(statuses) == {200}
    metrics.wait_for("gmprpc_serving", 2)
    assert metrics.value(OF_VERSION) == made  # Of workers that there aren't any more.


def test_a_fleet_answers_until_its_very_end_and_takes_away_what_it_has_made(
    fleet: Fleet, home: Path, admin: str
) -> None:
    metrics = Metrics(admin)
    fleet.wait_serving(2)
    assert [path.name.startswith("gmprpc-metrics-") for path in (home / "tmp").iterdir()].count(True) == 1
    with gmprpc.Client(fleet.addresses[0]) as client:
        call = client.call_async("begin", "a")
        metrics.wait_for("gmprpc_calls_in_flight", 1)
        assert get(admin, "/readyz").status == 200
        fleet.terminate()
        wait_until(lambda: get(admin, "/readyz").status == 503)
        assert get(admin, "/livez").status == 200
        assert metrics.value("gmprpc_calls_in_flight") == 1
        (home / "a.end").touch()
        assert call.get() == "a"
    assert fleet.wait() == 0
    assert not (home / "admin").exists()
    assert not [path for path in (home / "tmp").iterdir() if path.name.startswith("gmprpc")]


def test_serve_tells_where_the_metrics_of_its_workers_are(home: Path) -> None:
    command = programs.serve(home, *TWO_WORKERS, "--metrics-bind", "127.0.0.1:0")
    with Program(*FORKING_PYTHON, "-m", *command) as program:
        match = re.fullmatch(r"metrics at http://(127\.0\.0\.1):(\d+)/metrics", program.line())
        assert match
        assert get((match[1], int(match[2])), "/livez").status == 200


@pytest.mark.parametrize("command, status", [(programs.gunicorn, 1), (programs.serve, 3)])
def test_a_place_that_is_taken_is_said_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., list[Any]], status: int
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("GMPRPC_METRICS_BIND", place)
        process = subprocess.run(
            programs.python("-m", *command(home, *TWO_WORKERS)),
            capture_output=True,
            encoding="utf-8",
            timeout=DEADLINE,
            check=False,
        )
    assert process.returncode == status
    (line,) = filter(None, process.stderr.splitlines())
    assert line.startswith(f"Error: can't listen on {place}: Address already in use")


def test_what_blocks_the_hub_is_not_looked_for_before_a_worker_serves(home: Path) -> None:
    (home / "slow_app.py").write_text(SLOW_TO_START)
    options = ("--max-blocking-time=0.1", "-w", "1", "-b", "127.0.0.1:0", "--app-dir", home)
    with Program(*GMPRPC, "serve", *options, "slow_app:service") as program:
        lines = [program.line()]
        while "listening on" not in lines[-1]:
            lines.append(program.line())
        with gmprpc.Client(lines[-1].rpartition(" ")[2], timeout=DEADLINE) as client:
            client.call("block")
        while "gmprpc.hub" not in lines[-1]:
            lines.append(program.line())
        assert "request 0 of block" in lines[-1]
        program.terminate()
        program.wait()
