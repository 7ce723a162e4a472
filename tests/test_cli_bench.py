"""``gmprpc bench``, as it is typed: what it prints, how it exits, and that it always ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.os
import pytest
from gevent import socket
from gevent.event import Event

import gmprpc
from gmprpc.cli.bench_output import shown_duration

from .certificates import Certificates
from .commands import GMPRPC, assert_fails, assert_misused, run, serving
from .helpers import Scripted, wait_until
from .programs import DEADLINE, Program


@pytest.fixture(scope="module")
def ledger() -> list[Any]:
    """The params of each call of `count`."""
    return []


@pytest.fixture(scope="module")
def address(ledger: list[Any]) -> Iterator[str]:
    """A server in this process."""
    service = gmprpc.Service()
    service.register(lambda *params: ledger.append(list(params)), name="count")
    service.register(lambda value: value, name="echo")
    service.register(lambda: gevent.sleep(3600), name="never")
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        yield f"127.0.0.1:{server.address[1]}"
        server.stop(0)


def in_background(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `run`, while what is in this process goes on."""
    return gevent.get_hub().threadpool.apply(run, args, options)


def figures_of(*args: str | Path) -> dict[str, Any]:
    process = in_background("bench", "--output", "json", *args)
    assert process.stderr == ""
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


@pytest.mark.parametrize("processes", [1, 2])
def test_it_makes_just_the_calls_that_were_typed(address: str, ledger: list[Any], processes: int) -> None:
    ledger.clear()
    options = ["-n", "101", "-c", "3", "-d", "4", "-p", str(processes)]
    figures = figures_of(*options, address, "count", "1", "two", '{"a": []}', "-n")
    assert ledger == [[1, "two", {"a": []}, "-n"]] * 101
    assert figures["calls"] == 101
    assert figures["rate"] == pytest.approx(101 / figures["seconds"])
    latency = figures["latency"]
    assert (
        0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    )
    assert sum(bar["calls"] for bar in figures["histogram"]) == 101
    assert len(figures["load_generator"]) == processes
    expected = {"ending": "done", "errors": {}, "error_count": 0, "connections_lost": {}, "failed": [], "depth": 4}
    assert {name: figures[name] for name in expected} == expected


def test_params_may_come_from_a_file(address: str, ledger: list[Any], tmp_path: Path) -> None:
    ledger.clear()
    (tmp_path / "params").write_text('[1, {"$bytes": "AAA="}]')
    figures_of("-n", "2", "--data", f"@{tmp_path}/params", address, "count")
    assert ledger == [[1, b"\0\0"]] * 2


def test_figures_for_people(address: str) -> None:
    process = in_background("bench", "-n", "500", "-c", "2", address, "echo", "hello")
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert lines[0].startswith(f"echo at {address}: 1 process, 2 connections, 1 in flight on each, ")
    assert re.search(r"calls +500 +[\d,]+ a second", process.stdout)
    assert re.search(r"errors +0\n", process.stdout)
    assert re.search(r"mean +50 % +90 % +99 % +99.9 % +max", process.stdout)
    assert re.search(r"from [\d.]+ (µs|ms) +█", process.stdout)
    assert "load generator: " in process.stdout
    assert "\x1b" not in process.stdout
    assert max(map(len, lines)) <= 100


def test_a_rate_is_kept(address: str) -> None:
    figures = figures_of("--rate", "200", "--duration", "0.5", "--warm-up", "0.1", "-p", "2", address, "echo", "1")
    assert (figures["calls"], figures["error_count"], figures["target_rate"]) == (100, 0, 200)
    assert set(figures["lateness"]) == {"p50", "p99", "max"}


def test_it_works_over_unix_sockets(tmp_path: Path) -> None:
    service = gmprpc.Service()
    service.register(lambda: None, name="nothing")
    with gmprpc.Server(f"unix:{tmp_path}/socket", service):
        assert figures_of("-n", "10", f"unix:{tmp_path}/socket", "nothing")["calls"] == 10


def test_it_speaks_tls_as_all_commands_do(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with serving("--certfile", certificates.server, "--client-cafile", certificates.authority) as served:
        where = f"localhost:{served.addresses[0].rpartition(':')[2]}"
        options: list[str | Path] = ["--cafile", certificates.authority, "--certfile", certificates.client]
        assert figures_of("-n", "100", "-p", "2", "-c", "4", *options, where, "echo", "1")["calls"] == 100
        assert_fails(run("bench", *options, where, "ecko"), 1, "did you mean: echo?")
        assert_fails(run("bench", "-n", "100", "--tls", where, "echo", "1"), 3, "certificate verify failed")


# Conditions.


def test_conditions_that_are_met_fail(address: str) -> None:
    options = ["--fail-if", "p50>1us", "--fail-if", "errors>0", "--fail-if", "calls>=10"]
    process = in_background("bench", "-n", "10", "--output", "json", *options, address, "echo", "1")
    assert process.returncode == 1
    assert json.loads(process.stdout)["failed"] == ["p50>1us", "calls>=10"]
    first, second = process.stderr.splitlines()
    assert re.fullmatch(r"failed: p50>1us \(it is [\d.]+ .s\)", first)
    assert second == "failed: calls>=10 (it is 10)"


def test_conditions_that_are_not_met_do_not(address: str) -> None:
    options = ["--fail-if", "p99.9 > 60s", "--fail-if", "errors>0%"]
    process = in_background("bench", "-n", "10", *options, address, "echo", "1")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--fail-if", "p99>50"], ["--fail-if", "say of which unit 50 is"]),
        (["--fail-if", "fast"], ["--fail-if", "give a figure"]),
        (["-n", "1", "--duration", "1"], ["--calls or --duration"]),
        (["-p", "3", "-c", "2"], ["Each process needs a connection"]),
        (["-p", "3", "-n", "2"], ["Each process needs a connection and a call"]),
        (["--rate", "0"], ["'0' is no number of calls a second"]),
        (["--rate", "inf"], ["no number of calls a second"]),
        (["--duration", "0"], ["0 is too short"]),
        (["--duration", "nan"], ["no number of seconds"]),
    ],
)
def test_what_makes_no_sense_is_misuse(options: list[str], words: list[str]) -> None:
    assert_misused(run("bench", *options, "127.0.0.1:1", "echo"), *words)


# What goes wrong.


@pytest.mark.parametrize("processes", [1, 2])
def test_server_that_is_not_there_is_told(scripted: Scripted, processes: int) -> None:
    scripted.go()
    address = f"127.0.0.1:{scripted.address[1]}"
    process = run("bench", "-p", str(processes), address, "echo")
    assert_fails(process, 3, f"can't connect to {address}", "is the server running?")


def test_unknown_method_ends_it_with_a_hint(address: str) -> None:
    assert_fails(in_background("bench", address, "ecko"), 1, 'No such method "ecko" found; did you mean: echo?')


def test_errors_are_shown_and_all_of_them_fail(address: str) -> None:
    process = in_background("bench", "-n", "7", address, "echo")
    assert process.returncode == 1
    assert re.search(r"errors\n +7 +error: echo\(\) ", process.stdout) or "7  error: " in process.stdout
    assert process.stderr.startswith("no call has succeeded: error: ")


def test_calls_without_an_answer_time_out(address: str) -> None:
    process = in_background("bench", "-n", "3", "--timeout", "0.2", "-d", "2", address, "never")
    assert process.returncode == 4
    assert re.search(r"2 +no answer", process.stdout)
    assert "calls were left without an answer for 0.2 s" in process.stderr


def test_garbage_is_told(address: str) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.recv(1000)

    serving = gevent.spawn(serve)
    process = in_background("bench", f"127.0.0.1:{listener.getsockname()[1]}", "echo")
    serving.get()
    listener.close()
    assert process.returncode == 5
    assert "all connections were lost: what came is not MessagePack-RPC" in process.stderr


def test_what_a_server_says_does_nothing_to_a_terminal() -> None:
    service = gmprpc.Service()

    @service.method
    def fail() -> None:
        raise gmprpc.ErrorResponse("\x1b[2J[bold]\r\n")

    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        process = in_background("bench", "-n", "1", f"127.0.0.1:{server.address[1]}", "fail")
    assert "\\x1b[2J[bold]\\r\\n" in process.stdout
    assert "\x1b" not in process.stdout + process.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_server_that_dies_ends_it(processes: int) -> None:
    service = gmprpc.Service()
    service.register(lambda: None, name="nothing")
    server = gmprpc.Server(("127.0.0.1", 0), service)
    server.start()
    options = ["--warm-up", "0", "--duration", "3600", "-p", str(processes)]
    bench = Program(*GMPRPC, "bench", *options, f"127.0.0.1:{server.address[1]}", "nothing")
    with bench:
        wait_until(lambda: server.statistics()["open_connections"] == processes)
        server.stop(0)
        output = "\n".join(bench.lines())
        assert bench.wait() == 5
    assert "all connections were lost" in output
    assert re.search(rf"connections lost\n +{processes} ", output)


# Ctrl-C.


@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_it_shows_what_was(address: str, ledger: list[Any], processes: int) -> None:
    ledger.clear()
    options = ["--warm-up", "0", "--duration", "3600", "-p", str(processes)]
    with Program(*GMPRPC, "bench", *options, address, "count") as bench:
        wait_until(lambda: len(ledger) > 10)
        os.kill(bench.pid, signal.SIGINT)
        output = "\n".join(bench.lines())
        assert bench.wait() == 130
    assert "interrupted" in output
    calls = int(re.search(r"calls +([\d,]+) ", output)[1].replace(",", ""))  # type: ignore[index]
    assert calls == len(ledger)


def test_interrupted_twice_it_ends_at_once(ledger: list[Any]) -> None:
    asked = Event()
    service = gmprpc.Service()

    @service.method
    def never() -> None:
        asked.set()
        gevent.sleep(3600)

    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        with Program(*GMPRPC, "bench", "--duration", "3600", f"127.0.0.1:{server.address[1]}", "never") as bench:
            asked.wait()
            for _ in range(2):
                os.kill(bench.pid, signal.SIGINT)
                gevent.sleep(0.05)  # Two that come at once are one.
            assert bench.wait() == 130
        server.stop(0)


def test_killed_it_leaves_no_process_behind(address: str, ledger: list[Any]) -> None:
    ledger.clear()
    with Program(*GMPRPC, "bench", "-p", "2", "--duration", "3600", address, "count") as bench:
        wait_until(lambda: len(ledger) > 10)
        os.kill(bench.pid, signal.SIGKILL)
        bench.wait()  # Until nobody has its output any more.


# The terminal.


def test_a_line_shows_how_far_it_is(address: str) -> None:
    """And the figures at the end are those of the whole time."""
    leader, follower = pty.openpty()
    options = ["--warm-up", "1.2", "--duration", "1.2", "--rate", "100", "-p", "2", "--output", "json"]
    with subprocess.Popen(
        [*GMPRPC, "bench", *options, address, "echo", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while data := gevent.os.tp_read(leader, 1000):
                shown += data
        except OSError:  # So Linux tells the end of a terminal.
            pass
        os.close(leader)
        assert process.wait(DEADLINE) == 0
        assert process.stdout is not None
        figures = json.loads(process.stdout.read())
    text = shown.decode()
    assert "warming up" in text
    assert re.search(r"measuring.*calls/s +p50 [\d.]+ .s +p99 [\d.]+ .s", text)
    assert figures["calls"] == sum(bar["calls"] for bar in figures["histogram"]) == 120


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (None, "-"),
        (0.0, "0.00 µs"),
        (1.234e-6, "1.23 µs"),
        (12.34e-6, "12.3 µs"),
        (123.4e-6, "123 µs"),
        (999.4e-6, "999 µs"),
        (999.6e-6, "1.00 ms"),
        (0.9996, "1.00 s"),
        (12.0, "12.0 s"),
        (3600.0, "3600 s"),
    ],
)
def test_durations_have_three_digits(seconds: float | None, shown: str) -> None:
    assert shown_duration(seconds) == shown


# What it needs.


def test_help_needs_no_extra_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for name in ("rich", "hdrh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name}', name={name!r})")
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        assert run("bench", "--help", env=env).returncode == 0
        process = run("bench", "127.0.0.1:1", "echo", env=env)
        assert_fails(process, 3, f"bench needs {name}: pip install 'gmprpc[bench]'")
        (tmp_path / name / "__init__.py").unlink()
        (tmp_path / name).rmdir()
