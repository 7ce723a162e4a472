"""What blocks the hub is reported: which request, for how long, and where."""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc import blocking
from gmprpc.blocking import report_blocking
from gmprpc.stacks import stack_of

from .commands import SLOW_TO_START, serving
from .helpers import Peer, collected, wait_until
from .programs import FORKING_PYTHON, Program

# It is looked at twice in this time.
SECONDS = 0.02


@pytest.fixture
def reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[logging.LogRecord]]]:
    """What has been reported of those that block here, and not of the tests themselves; the hub is watched."""
    monkeypatch.setattr(blocking, "_INTERVAL", 0.0)
    report_blocking(SECONDS)

    def reported() -> list[logging.LogRecord]:
        records = [record for record in caplog.records if record.name == "gmprpc.hub"]
        return [record for record in records if "in block_until_seen" in str(record.stack_info)]

    yield reported
    report_blocking(None)


Reported = Callable[[], list[logging.LogRecord]]


def block_until_seen(is_enough: Callable[[], bool] = lambda: True) -> None:
    """Block the hub, be seen at it for long enough, and then until it is enough."""
    watch, begun_at = blocking._watches[gevent.get_hub()], time.perf_counter()
    while True:
        seen = watch._culprit
        if seen is not None and seen.since >= begun_at and watch._seen_at >= seen.since + SECONDS and is_enough():
            return


def test_a_request_that_blocks_is_reported(service: gmprpc.Service, peer: Peer, reported: Reported) -> None:
    @service.method
    def crunch(secret: str) -> None:
        block_until_seen()

    peer.call("crunch", "s3cret", msgid=7)
    wait_until(reported)
    (record,) = reported()
    host, port = peer.socket.getsockname()
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"request 7 of crunch from {host}:{port} blocked the hub for 0.")
    told = vars(record)
    assert (told["method"], told["msgid"], told["peer"]) == ("crunch", 7, f"{host}:{port}")
    assert told["duration"] >= SECONDS
    assert record.stack_info is not None
    assert record.stack_info.startswith("Stack (most recent call last):\n")
    assert "in block_until_seen" in record.stack_info
    assert "in crunch" in record.stack_info
    assert "_run" not in record.stack_info
    assert "s3cret" not in str(told)


def test_a_notification_and_other_greenlets_are_reported_too(
    service: gmprpc.Service, peer: Peer, reported: Reported
) -> None:
    service.register(lambda: block_until_seen(), "crunch")
    peer.send([2, "crunch", []])
    wait_until(reported)
    gevent.spawn(lambda: block_until_seen()).join()
    wait_until(lambda: len(reported()) == 2)
    gevent.get_hub().loop.run_callback(lambda: block_until_seen())
    wait_until(lambda: len(reported()) == 3)
    texts = [record.getMessage().rpartition(" for ")[0] for record in reported()]
    host, port = peer.socket.getsockname()
    assert texts == [
        f"notification of crunch from {host}:{port} blocked the hub",
        "a greenlet blocked the hub",
        "a callback of the loop blocked the hub",
    ]
    for record in reported():
        assert record.stack_info
        assert "hub.py" not in record.stack_info


def test_requests_that_wait_or_are_quick_are_not_reported(
    service: gmprpc.Service, peer: Peer, reported: Reported
) -> None:
    service.register(lambda: gevent.sleep(5 * SECONDS), "wait")
    end = time.perf_counter() + 10 * SECONDS
    peer.send([0, 0, "wait", []])
    while time.perf_counter() < end:  # Busy all the time, but nothing for long.
        peer.send([0, 1, "echo", [1]])
        peer.receive()
    assert not reported()


def test_the_same_method_is_reported_once_in_a_while(
    service: gmprpc.Service, peer: Peer, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "_INTERVAL", 1000.0)
    service.register(lambda: block_until_seen(), "crunch")
    service.register(lambda: block_until_seen(), "other")
    for _ in range(3):
        peer.call("crunch")
    peer.call("other")
    wait_until(lambda: len(reported()) == 2)
    assert [vars(record)["method"] for record in reported()] == ["crunch", "other"]
    monkeypatch.setattr(blocking, "_INTERVAL", 0.0)
    peer.call("crunch")
    wait_until(lambda: len(reported()) == 3)


def test_what_blocks_for_long_is_reported_while_it_does(
    service: gmprpc.Service, peer: Peer, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "_PATIENCE", 2 * SECONDS)

    @service.method
    def crunch() -> None:
        block_until_seen(lambda: len(reported()) >= 2)

    peer.call("crunch")
    wait_until(lambda: "blocked the hub for" in reported()[-1].getMessage())
    assert "blocks the hub, for " in reported()[0].getMessage()
    first, second, last = (vars(record)["duration"] for record in (*reported()[:2], reported()[-1]))
    assert 2 * first <= second <= last
    assert "in crunch" in str(reported()[0].stack_info)


def test_only_so_many_methods_are_remembered(monkeypatch: pytest.MonkeyPatch, reported: Reported) -> None:
    monkeypatch.setattr(blocking, "_MAX_REMEMBERED", 3)
    watch = blocking._watches[gevent.get_hub()]
    for number in range(10):
        watch._tell(blocking.Culprit(number, str(number), {}, (), 0.0), 1.0, is_over=False)
    assert len(watch._told_at) <= 3


def test_a_log_that_fails_stops_nothing(
    reported: Reported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(record: logging.LogRecord) -> None:
        raise OSError("no space")

    monkeypatch.setattr(blocking.logger, "handle", fail)
    gevent.spawn(lambda: block_until_seen()).join()
    output = []

    def is_shown() -> bool:
        output.append(capsys.readouterr().err)
        return "no space" in "".join(output)

    wait_until(is_shown)
    monkeypatch.delattr(blocking.logger, "handle")
    gevent.spawn(lambda: block_until_seen()).join()
    wait_until(reported)


def test_nothing_is_made_where_nobody_reads(reported: Reported) -> None:
    logging.getLogger("gmprpc.hub").setLevel(logging.ERROR)
    try:
        gevent.spawn(lambda: block_until_seen()).join()
        gevent.sleep(2 * SECONDS)
    finally:
        logging.getLogger("gmprpc.hub").setLevel(logging.NOTSET)
    assert not reported()


def test_what_a_request_has_brought_is_not_held_after_that(
    service: gmprpc.Service, peer: Peer, reported: Reported
) -> None:
    class Result(dict):
        __hash__ = object.__hash__  # type: ignore[assignment]

    results: weakref.WeakSet[Any] = weakref.WeakSet()

    @service.method
    def crunch() -> Any:
        result = Result(a=1)
        results.add(result)
        block_until_seen()
        return result

    assert peer.call("crunch") == [1, 0, None, {"a": 1}]
    wait_until(reported)
    wait_until(lambda: blocking._watches[gevent.get_hub()]._culprit is None)
    collected()
    assert not results


def watching() -> int:
    """How many threads watch a hub."""
    code = blocking._Watch._run.__code__
    return sum(any(place[0] is code for place in stack_of(frame)) for frame in sys._current_frames().values())


def test_it_can_be_stopped_and_started_again() -> None:
    report_blocking(1000)
    report_blocking(1000)
    wait_until(lambda: watching() == 1)
    report_blocking(None)
    wait_until(lambda: watching() == 0)
    report_blocking(0)
    assert gevent.get_hub() not in blocking._watches
    with pytest.raises(ValueError, match="seconds"):
        report_blocking(-1)


def test_a_hub_that_ends_is_not_watched_any_longer() -> None:
    pool = ThreadPool(1)
    was_watched: list[bool] = []

    def watch() -> None:
        hub = gevent.get_hub()
        report_blocking(SECONDS)
        wait_until(lambda: watching() == 1)
        was_watched.append(hub in blocking._watches)
        hub.destroy(destroy_loop=True)

    pool.spawn(watch).get()
    pool.kill()
    wait_until(lambda: watching() == 0)
    assert was_watched == [True]


FORKING = """
import os, sys, time, threading
import gevent, gmprpc

gmprpc.report_blocking(0.01)
child = os.fork()
if child == 0:
    assert len(os.listdir("/proc/self/task")) == 1
    gmprpc.report_blocking(None)  # There is nothing to stop.
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done", flush=True)
"""


def test_a_child_that_was_forked_off_is_not_watched() -> None:
    with Program(*FORKING_PYTHON, "-c", FORKING) as program:
        assert "done" in program.lines()
        assert program.wait() == 0


APP = """
import time
import gevent
import gmprpc

native_sleep = gevent.monkey.get_original("time", "sleep")
service = gmprpc.Service()

@service.method
def block():
    native_sleep(0.2)
"""


@pytest.mark.parametrize("options", [["--no-patch"], []])
def test_serve_reports_what_blocks_it(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "app.py").write_text(APP)
    with serving(*options, "--max-blocking-time=0.05", "--app-dir", tmp_path, "app:service") as served:
        host, _, port = served.addresses[0].rpartition(":")
        with Peer.connect((host, int(port))) as peer:
            peer.call("block", msgid=3)
        served.expect(r"WARNING gmprpc\.hub: request 3 of block from 127\.0\.0\.1:\d+ blocked the hub for 0\.\d+ s")
        served.expect(r"native_sleep\(0\.2\)")


def test_serve_does_not_look_before_it_serves(tmp_path: Path) -> None:
    (tmp_path / "slow_app.py").write_text(SLOW_TO_START)
    options = ("--max-blocking-time=0.1", "--metrics-bind=127.0.0.1:0", "--app-dir", tmp_path)
    with serving(*options, "slow_app:service") as served:
        host, _, port = served.addresses[0].rpartition(":")
        with Peer.connect((host, int(port))) as peer:
            peer.call("block", msgid=3)
        assert "request 3 of block" in served.expect(r"gmprpc\.hub")


def test_serve_does_not_look_where_that_is_not_wanted(tmp_path: Path) -> None:
    for option, threads in (("--max-blocking-time=0", 1), ("--max-blocking-time=5", 2)):
        with serving(option) as served:
            served.expect("This is the demo")
            assert len(os.listdir(f"/proc/{served.pid}/task")) == threads
