"""What an operator asks `gmprpc serve --metrics-bind` over HTTP."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gevent import socket

from gmprpc.sharedmetrics import VARIABLE

from .commands import ANY_PORT, Served, assert_fails, assert_misused, run, serving
from .helpers import Peer, listening, wait_until
from .http import get
from .programs import Program

APP = """
import socket

import gmprpc
from prometheus_client import Counter

service = gmprpc.Service()
greetings = Counter("greetings", "Of the application.")


@service.method
def greet():
    greetings.inc()


@service.method
def hold(port):
    # Until the test closes the connection.
    with socket.create_connection(("127.0.0.1", port)) as test:
        test.recv(1)
"""


@pytest.fixture(scope="session")
def app_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module `app` is."""
    directory = tmp_path_factory.mktemp("app")
    (directory / "app.py").write_text(APP, encoding="utf-8")
    return directory


class Observed(NamedTuple):
    """A program, where it serves, and where it tells how it does."""

    program: Served
    address: tuple[str, int]
    admin: Any

    def metrics(self) -> list[str]:
        """The lines of its metrics."""
        answer = get(self.admin, "/metrics")
        assert answer.status == 200
        return answer.body.decode().splitlines()


def place_of(text: str) -> Any:
    """What the program says of where it is, as an address."""
    host, _, port = text.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    return (host, int(port)) if port.isdecimal() else text


@contextmanager
def observing(
    app_dir: Path, *options: str, bind: str = ANY_PORT, env: Mapping[str, str] | None = None
) -> Iterator[Observed]:
    """A server of `app:service` whose metrics are at ``bind``."""
    by_option = [f"--metrics-bind={bind}"] if bind else []
    with serving("--app-dir", app_dir, *by_option, *options, "app:service", env=env) as program:
        place = program.expect("^metrics at ").removeprefix("metrics at ")
        yield Observed(program, place_of(program.addresses[0]), place_of(place))


def test_metrics_are_those_of_the_server_of_the_application_and_of_the_process(app_dir: Path) -> None:
    with observing(app_dir) as observed, Peer.connect(observed.address) as peer:
        peer.call("greet")
        wait_until(lambda: 'gmprpc_call_duration_seconds_count{method="greet"} 1.0' in observed.metrics())
        lines = observed.metrics()
        assert 'gmprpc_calls_total{kind="request",method="greet",outcome="ok"} 1.0' in lines
        assert "gmprpc_serving 1.0" in lines
        assert "greetings_total 1.0" in lines
        assert any(line.startswith("process_cpu_seconds_total ") for line in lines)


def test_the_place_may_be_the_environments(app_dir: Path) -> None:
    with observing(app_dir, bind="", env={"GMPRPC_METRICS_BIND": ANY_PORT}) as observed:
        assert get(observed.admin, "/livez").status == 200


def test_several_places_to_serve_at_are_told_of_together(app_dir: Path, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/socket"
    with serving("--metrics-bind", ANY_PORT, binds=(ANY_PORT, path)) as program:
        admin = place_of(program.expect("^metrics at ").removeprefix("metrics at "))
        for address in (place_of(program.addresses[0]), path):
            with Peer.connect(address) as peer:
                peer.call("echo", 1)
        wait_until(lambda: b'method="echo",outcome="ok"} 2.0\n' in get(admin, "/metrics").body)
        assert b"gmprpc_serving 2.0\n" in get(admin, "/metrics").body


def test_it_answers_until_the_very_end_and_is_not_ready_from_the_signal_on(app_dir: Path, tmp_path: Path) -> None:
    admin = f"unix:{tmp_path}/admin"
    with (
        listening(("127.0.0.1", 0)) as listener,
        observing(app_dir, bind=admin) as observed,
        Peer.connect(observed.address) as peer,
    ):
        assert observed.admin == admin
        peer.send([0, 0, "hold", [listener.getsockname()[1]]])
        holding, _ = listener.accept()
        assert get(admin, "/readyz").status == 200
        observed.program.kill(signal.SIGTERM)
        wait_until(lambda: get(admin, "/readyz").status == 503)
        assert get(admin, "/livez").status == 200
        assert {"gmprpc_calls_in_flight 1.0", "gmprpc_serving 0.0"} <= {*observed.metrics()}
        holding.close()
        assert peer.receive_rest() == [[1, 0, None, None]]
        assert observed.program.wait() == 0
    assert not (tmp_path / "admin").exists()


def test_it_is_not_ready_while_whoever_calls_is_still_served(app_dir: Path) -> None:
    with observing(app_dir, "--drain-delay=60") as observed:
        observed.program.kill(signal.SIGTERM)
        wait_until(lambda: get(observed.admin, "/readyz").status == 503)
        with Peer.connect(observed.address) as peer:
            assert peer.call("greet") == [1, 0, None, None]
        observed.program.kill(signal.SIGINT)
        assert observed.program.wait() == 0


def test_over_standard_streams_it_answers_too(tmp_path: Path) -> None:
    admin = f"unix:{tmp_path}/admin"
    process = run("serve", "--stdio", "--metrics-bind", admin)  # There is nothing to read.
    assert (process.returncode, process.stderr) == (0, f"metrics at {admin}\n")
    assert not (tmp_path / "admin").exists()


def test_a_place_that_is_taken_is_said_in_one_line_and_nothing_is_served() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        process = run("serve", "-b", ANY_PORT, "--metrics-bind", place)
    assert_fails(process, 3, f"can't listen on {place}: Address already in use; --metrics-bind names another place.")


def test_a_place_to_serve_at_that_is_taken_takes_the_metrics_along(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        process = run("serve", "-b", place, "--metrics-bind", f"unix:{tmp_path}/admin")
    assert_fails(process, 3, f"can't listen on {place}: Address already in use; --bind names another place.")
    assert not (tmp_path / "admin").exists()


def test_what_is_no_place_is_misuse() -> None:
    assert_misused(run("serve", "--metrics-bind", "9000"), "'9000' is no address")


def test_without_the_extra_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; from gmprpc.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "-b", ANY_PORT, "--metrics-bind", ANY_PORT]
    with Program(*command) as process:
        assert process.lines() == ["Error: --metrics-bind needs prometheus-client: pip install 'gmprpc[metrics]'."]
        assert process.wait() == 3


def test_programs_that_share_a_directory_answer_for_each_other(app_dir: Path, tmp_path: Path) -> None:
    env = {VARIABLE: str(tmp_path)}
    with observing(app_dir, env=env) as one, Peer.connect(one.address) as peer:
        with observing(app_dir, env=env) as other, Peer.connect(other.address) as others_peer:
            for _ in range(3):
                peer.call("greet")
            others_peer.call("greet")
            wait_until(lambda: 'gmprpc_calls_total{kind="request",method="greet",outcome="ok"} 4.0' in one.metrics())
            wait_until(lambda: "gmprpc_open_connections 2.0" in one.metrics())
            assert one.metrics() == other.metrics()
            assert "greetings_total 4.0" in one.metrics()
            assert "gmprpc_serving 2.0" in one.metrics()
            other.program.kill(signal.SIGTERM)
            others_peer.receive_rest()
            assert other.program.wait() == 0
        # What it has done stays, what it was doing doesn't; and one that serves is enough.
        assert 'gmprpc_calls_total{kind="request",method="greet",outcome="ok"} 4.0' in one.metrics()
        assert "gmprpc_connections_total 2.0" in one.metrics()
        assert "gmprpc_serving 1.0" in one.metrics()
        assert get(one.admin, "/readyz").status == 200


def test_a_program_that_was_killed_is_not_told_of_any_more(app_dir: Path, tmp_path: Path) -> None:
    env = {VARIABLE: str(tmp_path)}
    with observing(app_dir, env=env) as one:
        with observing(app_dir, env=env) as other, Peer.connect(other.address) as peer:
            peer.call("greet")
            wait_until(lambda: "gmprpc_serving 2.0" in one.metrics())
            wait_until(lambda: "gmprpc_open_connections 1.0" in one.metrics())
            other.program.kill(signal.SIGKILL)
            assert other.program.wait() == -signal.SIGKILL
        lines = one.metrics()
        assert "gmprpc_serving 1.0" in lines
        assert "gmprpc_open_connections 0.0" in lines
        assert "greetings_total 1.0" in lines
