"""The stacks of all greenlets and threads can be seen, whatever the process is doing."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.threadpool import ThreadPool

import gmprpc
from gmprpc import stacks

from .commands import result_of, serving
from .helpers import Peer, wait_until


def dumped() -> list[list[str]]:
    """What `dump` writes: the lines of each of its parts."""
    file = io.StringIO()
    stacks.dump(file)
    parts: list[list[str]] = []
    for line in file.getvalue().splitlines():
        if not line.startswith(" "):
            parts.append([])
        parts[-1].append(line)
    return parts


def part_with(line: str, parts: list[list[str]]) -> list[str]:
    """The only part in which ``line`` stands."""
    (part,) = [part for part in parts if line in part]
    return part


def test_a_request_is_shown_with_its_method_msgid_and_peer(server: gmprpc.Server, peer: Peer, bystander: Peer) -> None:
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    host, port = bystander.socket.getsockname()
    parts = dumped()
    assert parts[1][0] == f"request 77 of hold from {host}:{port}"  # Before all others, but for the title.
    assert any(line.endswith("in hold") for line in parts[1])
    assert any("released.wait()" in line for line in parts[1])


def test_those_at_the_same_place_are_shown_together(server: gmprpc.Server, peer: Peer) -> None:
    peer.send([2, "hold", [1]], *([0, number, "hold", [number]] for number in range(30)))
    wait_until(lambda: server.statistics()["in_flight"] == 31)
    parts = dumped()
    peer.send([2, "release", []])
    part = part_with("31 greenlets at the same place:", parts)
    host, port = peer.socket.getsockname()
    name = re.compile(rf"  (request \d+|notification) of hold from {host}:{port}")
    assert all(map(name.fullmatch, part[1:21]))
    assert part[21] == "  and 11 more"
    assert len([line for line in part if line.endswith("in hold")]) == 1


def test_greenlets_at_rest_are_only_counted(peer: Peer) -> None:
    peer.call("echo", 1)
    assert any(part[0].startswith("greenlets at rest until another request comes: ") for part in dumped())


def test_other_greenlets_have_their_names_and_no_params() -> None:
    def wait(secret: str) -> None:
        event.wait()

    event = Event()
    one = gevent.spawn(wait, "s3cret")
    one.name = "waiter"
    others = [gevent.spawn(lambda: event.wait()) for _ in range(3)]
    gevent.sleep(0)
    parts = dumped()
    assert any(line.endswith("in wait") for line in part_with("Greenlet waiter", parts))
    part_with("  3 x Greenlet", parts)
    assert "s3cret" not in str(parts)
    event.set()
    one.join()
    gevent.joinall(others)


def test_whoever_asks_is_shown_as_what_runs_in_its_thread(service: gmprpc.Service, peer: Peer) -> None:
    parts: list[list[str]] = []

    @service.method
    def look() -> None:
        parts.extend(dumped())

    peer.call("look", msgid=3)
    host, port = peer.socket.getsockname()
    (running,) = [part for part in parts if part[0].endswith(f", in request 3 of look from {host}:{port}")]
    assert running[0].startswith("thread ")
    assert any(line.endswith("in look") for line in running)
    assert "gmprpc/stacks.py" not in str(running)


def test_native_threads_are_shown() -> None:
    pool = ThreadPool(1)
    ready, go = threading.Event(), threading.Event()

    def wait_in_thread() -> None:
        ready.set()
        go.wait()

    task = pool.spawn(wait_in_thread)
    try:
        ready.wait()
        parts = dumped()
        assert any(any(line.endswith("in wait_in_thread") for line in part) for part in parts if "thread" in part[0])
    finally:
        go.set()
        task.get()
        pool.kill()


def test_a_thread_may_ask() -> None:
    pool = ThreadPool(1)
    try:
        parts = pool.spawn(dumped).get()
    finally:
        pool.kill()
    assert parts
    part_with("the main greenlet of its thread", parts)


APP = """
import time
import gevent
import gmprpc

native_sleep = gevent.monkey.get_original("time", "sleep")
service = gmprpc.Service()
begun = gevent.event.Event()

@service.method
def wait():
    gevent.sleep(1000)

@service.method
def spin():
    print("it spins", file=__import__("sys").stderr, flush=True)
    while True:
        pass

@service.method
def stick():
    print("it sticks", file=__import__("sys").stderr, flush=True)
    native_sleep(1000)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "app.py").write_text(APP)
    with serving("--app-dir", tmp_path, "app:service") as served:
        try:
            yield served
        finally:
            served.kill(signal.SIGKILL)  # It may not be able to hear anything else.


def connected(served: Any) -> Peer:
    host, _, port = served.addresses[0].rpartition(":")
    return Peer.connect((host, int(port)))


def test_usr1_shows_what_a_quiet_server_waits_for(served: Any) -> None:
    with connected(served) as peer:
        peer.send([0, 5, "wait", []])
        peer.call("$/health")
        served.kill(signal.SIGUSR1)
        served.expect(rf"^process {served.pid} at ")
        served.expect(r"^request 5 of wait from 127\.0\.0\.1:\d+$")
        served.expect(r"in wait$")
        served.expect(r"^thread .*, in Hub$")
        assert peer.call("$/health", msgid=6) == [1, 6, None, "SERVING"]
        served.kill(signal.SIGUSR1)  # As often as one likes.
        served.expect(r"^request 5 of wait ")
    assert result_of(served.addresses[0], "$/health") == "SERVING"


def test_usr1_shows_what_blocks_the_hub(served: Any) -> None:
    with connected(served) as peer:
        peer.send([0, 5, "spin", []])
        served.expect("it spins")
        served.kill(signal.SIGUSR1)
        served.expect(r"^thread .*, in request 5 of spin from 127\.0\.0\.1:\d+$")
        served.expect(r"in spin$")


def test_usr1_shows_what_blocks_the_hub_in_c(served: Any) -> None:
    with connected(served) as peer:
        peer.send([0, 5, "stick", []])
        served.expect("it sticks")
        served.kill(signal.SIGUSR1)
        served.expect(r"most recent call first")
        served.expect(r"in stick$")


def test_nobody_has_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", fail)
    stacks._write("x")
