"""What the system may do wrong: peers that die, resets, logs that can't be written, clocks that jump."""

from __future__ import annotations

import ast
import gc
import io
import logging
import os
import signal
import ssl
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent.event import Event

import gmprpc

from .helpers import Peer, collected, wait_until
from .programs import Program

PACKAGE = Path(gmprpc.__file__).parent

pack = msgpack.packb


def reset(peer: Peer) -> None:
    """End ``peer``'s connection without a goodbye."""
    peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


# Peers that die.

CALLER = """
import socket, sys, time
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(bytes.fromhex(sys.argv[2]))
print("sent", flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("end", [5, None], ids=["amid a request", "amid its call"])
def test_a_client_that_is_killed_costs_nobody_else_anything(
    service: gmprpc.Service, server: gmprpc.Server, end: int | None
) -> None:
    begun, go = Event(), Event()

    @service.method
    def slow() -> str:
        begun.set()
        go.wait()
        return "too late"

    request = pack([0, 1, "slow", []])[:end]
    with Program(sys.executable, "-c", CALLER, str(server.server_port), request.hex()) as caller:
        assert caller.line() == "sent"
        if end is None:
            begun.wait()
        wait_until(lambda: len(server.connections) == 2)
        os.kill(caller.pid, signal.SIGKILL)
        caller.wait()
    go.set()
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["in_flight"] == 1


@pytest.mark.usefixtures("bystander")
def test_a_reset_at_any_byte_of_a_request_hurts_nobody(server: gmprpc.Server) -> None:
    data = pack([0, 1, "echo", ["hello"]])
    for end in range(len(data) + 1):
        peer = Peer.connect(server.address)
        peer.send_bytes(data[:end])
        # Before it has been read, and after.
        if end % 2:
            wait_until(lambda: len(server.connections) == 2)
        reset(peer)
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["in_flight"] == 1


@pytest.mark.usefixtures("bystander")
def test_a_reset_at_any_byte_of_an_answer_hurts_nobody(server: gmprpc.Server) -> None:
    request, answer = pack([0, 1, "echo", ["hello"]]), pack([1, 1, None, "hello"])
    for end in range(len(answer) + 1):
        peer = Peer.connect(server.address)
        peer.send_bytes(request)
        received = b""
        while len(received) < end:
            received += peer.socket.recv(end - len(received))
        assert received == answer[:end]
        reset(peer)
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["in_flight"] == 1


@pytest.mark.usefixtures("bystander")
def test_a_reset_amid_a_large_answer_ends_its_connection(service: gmprpc.Service, server: gmprpc.Server) -> None:
    service.register(lambda: b"x" * 8_000_000, "large")
    for size in (1, 1000, 100_000):
        peer = Peer.connect(server.address)
        peer.send([0, 1, "large", []], [0, 2, "large", []])
        received = 0
        while received < size:
            received += len(peer.socket.recv(size - received))
        reset(peer)
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["in_flight"] == 1


@pytest.mark.usefixtures("bystander")
def test_1000_resets_leave_nothing_behind(server: gmprpc.Server) -> None:
    def census() -> tuple[int, int, int]:
        collected()
        greenlets = sum(isinstance(thing, gevent.Greenlet) and not thing.dead for thing in gc.get_objects())
        return greenlets, len(os.listdir("/proc/self/fd")), threading.active_count()

    request = pack([0, 1, "echo", ["hello"]])

    def connect_and_reset(count: int) -> None:
        for number in range(count):
            peer = Peer.connect(server.address)
            peer.send_bytes(request[: number % (len(request) + 1)])
            reset(peer)
            if not number % 20:
                gevent.sleep(0)
        wait_until(lambda: len(server.connections) == 1 and len(server._greenlets) == 1)

    wait_until(lambda: len(server.connections) == 1)
    connect_and_reset(20)
    before = census()
    connect_and_reset(1000)
    wait_until(lambda: census() <= before)
    assert census() <= before


# Logs that can't be written.


class Full(logging.Handler):
    """A log on a disk without room, which says so."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, os.strerror(28))


class Picky(logging.Filter):
    """A filter that fails."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("no filter")


@pytest.fixture(params=["/dev/full", "a handler that raises", "a filter that raises"])
def broken_log(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """gmprpc's log, which can't be written; what gevent's hub then shows is nobody's concern here."""
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: None)
    loggers = [logging.getLogger(f"gmprpc.{name}") for name in ("client", "connection", "reply", "server", "service")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        monkeypatch.setattr(logger, "propagate", False)
    # Without a buffer, which would want to be written when it is closed.
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        handler: logging.Handler = Full()
        if request.param == "/dev/full":
            handler = logging.StreamHandler(full)
        for logger in loggers:
            if request.param == "a filter that raises":
                monkeypatch.setattr(logger, "filters", [Picky()])
            monkeypatch.setattr(logger, "handlers", [handler])
            logger.manager._clear_cache()  # type: ignore[attr-defined]  # Of who logs at which level.
        yield
        capfd.readouterr()
    for logger in loggers:
        logger.manager._clear_cache()  # type: ignore[attr-defined]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("broken_log", "bystander")
def test_a_log_that_fails_costs_no_answer(service: gmprpc.Service, server: gmprpc.Server, peer: Peer) -> None:
    @service.method(deferred=True)
    def afterwards(reply: gmprpc.Reply) -> None:
        reply.result("answered")
        raise ValueError("afterwards")

    service.reg_cb(later=lambda reply: gevent.spawn(reply.set_exception, ValueError("oops")))
    peer.send([2, "fail", ["oops"]], [2, "nosuch", []], [2, "later", []], [2, "echo", "no array"])
    assert peer.call("fail", "oops") == [1, 0, "ValueError: oops", None]
    assert peer.call("later", msgid=1) == [1, 1, "ValueError: oops", None]
    assert peer.call("afterwards", msgid=2) == [1, 2, None, "answered"]
    assert peer.call("echo", "next", msgid=3) == [1, 3, None, "next"]
    wait_until(lambda: server.statistics()["in_flight"] == 1)


@pytest.mark.usefixtures("broken_log")
@pytest.mark.parametrize("way", ["at once", "later", "by a reply"])
def test_a_log_that_hangs_keeps_no_answer(
    service: gmprpc.Service, server: gmprpc.Server, peer: Peer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    free = Event()
    monkeypatch.setattr(logging.getLogger("gmprpc.connection"), "handle", lambda record: free.wait())

    @service.method
    def bad() -> Any:
        if way == "by a reply":
            reply = gmprpc.Reply()
            gevent.spawn(reply.set_exception, ValueError("no"))
            return reply
        if way == "later":
            gevent.sleep(0.001)
        raise ValueError("no")

    assert peer.call("bad") == [1, 0, "ValueError: no", None]
    assert server.statistics()["in_flight"] == 1  # It waits for the log.
    free.set()
    wait_until(lambda: server.statistics()["in_flight"] == 0)


def test_a_log_that_fails_keeps_no_callback_of_on_cancel_from_being_called(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    told = Event()
    kept: list[gmprpc.Reply] = []

    def keep(reply: gmprpc.Reply) -> None:
        reply.on_cancel(lambda: 1 / 0)
        reply.on_cancel(told.set)
        kept.append(reply)

    service.reg_cb(keep=keep)
    peer = Peer.connect(server.address)
    peer.send([0, 1, "keep", []])
    wait_until(lambda: kept)
    reset(peer)
    told.wait()
    wait_until(lambda: not server.connections)


@pytest.mark.usefixtures("broken_log")
@pytest.mark.parametrize("hook", ["on_accept", "on_dispatch", "on_eof", "on_error"])
def test_a_log_that_fails_leaks_no_connection_whose_hook_has_failed(service: gmprpc.Service, hook: str) -> None:
    options: dict[str, Any] = {hook: lambda *_: 1 / 0}
    with gmprpc.Server(("127.0.0.1", 0), service, **options) as server:
        wait_until(lambda: server.started)
        before = descriptors()
        with Peer.connect(server.address) as peer:
            if hook == "on_dispatch":
                assert peer.call("echo", 1) == [1, 0, "ZeroDivisionError: division by zero", None]
            elif hook == "on_error":
                peer.send_bytes(b"\x94")
            if hook != "on_accept":
                peer.shutdown()
            assert peer.receive_rest() == []
        wait_until(lambda: not server._greenlets)
        assert descriptors() == before


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_fails_leaks_no_connection_whose_handshake_has_failed(service: gmprpc.Service) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with gmprpc.Server(("127.0.0.1", 0), service, ssl_context=context) as server:
        before = descriptors()
        with Peer.connect(server.address) as peer:
            peer.send_bytes(b"GET / HTTP/1.1\r\n\r\n")
            while peer.socket.recv(100):  # The alert that says why.
                pass
        wait_until(lambda: not server._greenlets)
        assert descriptors() == before


@pytest.mark.usefixtures("broken_log")
@pytest.mark.parametrize("data, error", [(b"\xc1", "ProtocolError"), (b"\x94", "ConnectionClosed")])
def test_a_log_that_fails_leaks_no_connection_that_ends_with_an_error(
    service: gmprpc.Service, data: bytes, error: str
) -> None:
    errors: list[str] = []

    def on_error(connection: gmprpc.Connection, exc: Exception) -> None:
        errors.append(type(exc).__name__)

    with gmprpc.Server(("127.0.0.1", 0), service, on_error=on_error) as server:
        before = descriptors()
        with Peer.connect(server.address) as peer:
            peer.send([0, 1, "echo", ["answered"]])
            peer.send_bytes(data)
            peer.shutdown()
            assert peer.receive_rest() == [[1, 1, None, "answered"]]
        wait_until(lambda: not server._greenlets)
        assert descriptors() == before
    assert errors == [error]


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_fails_keeps_no_server_from_stopping(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "hold", ["cut"]])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        assert server.stop(0) == 1
        assert peer.receive_rest() == []
    serving.get(timeout=5)


# Clocks that jump.

#: What tells the time of day, or waits for one.
WALL_CLOCKS = {
    *(f"time.{name}" for name in ("time", "time_ns", "ctime", "gmtime", "localtime", "asctime", "strftime")),
    *(f"datetime.{name}" for name in ("now", "today", "utcnow")),
    *("time.clock_gettime", "date.today", "datetime.datetime.now", "datetime.date.today", "os.times", "hub.loop.now"),
}


def wall_clocks_in(source: str) -> list[str]:
    """What ``source`` uses that follows the clock on the wall, under whatever name it was imported."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            head, dot, rest = ast.unparse(node).partition(".")
            used.append(names.get(head, head) + dot + rest)
    return sorted({name for name in used if name.removeprefix("datetime.") in WALL_CLOCKS or name in WALL_CLOCKS})


MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
# These tell the time, and measure none by it: a method of the demo, the start of a span, the title of a report.
for tells in ("cli/demo.py", "otel.py", "stacks.py"):
    del MODULES[tells]


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_no_module_looks_at_the_clock_on_the_wall(path: Path) -> None:
    assert wall_clocks_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import time\ntime.time()", "from time import time as now\nnow()", "import time as t\nt.time_ns()"]
    + ["import datetime\ndatetime.datetime.now()", "from datetime import datetime\ndatetime.now()"]
    + ["from datetime import date\ndate.today()", "from time import time\nclock = time"],
)
def test_a_look_at_the_clock_on_the_wall_is_found(source: str) -> None:
    assert len(wall_clocks_in(source)) == 1
    assert wall_clocks_in("from time import monotonic, perf_counter\nperf_counter()\nmonotonic()") == []


#: Debian's, from the package `faketime`.
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)

JUMPY = """
import gmprpc, time
service = gmprpc.Service()
service.register(lambda: time.time(), "clock")
impatient = gmprpc.Server(("127.0.0.1", 0), service, read_timeout=0.2)
patient = gmprpc.Server(("127.0.0.1", 0), service, read_timeout=60)
impatient.start()
patient.start()
print(impatient.server_port, patient.server_port, flush=True)
patient.serve_forever()
"""


@pytest.mark.skipif(
    FAKETIME is None and not os.environ.get("GMPRPC_REQUIRE_INTEROP"), reason="Debian's faketime isn't installed"
)
@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_fires_and_delays_no_time_out(tmp_path: Path, days: int) -> None:
    setting = tmp_path / "setting"
    setting.write_text("+0d")
    env = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(setting),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with Program(sys.executable, "-c", JUMPY, env=env) as program:
        impatient, patient = (Peer.connect(("127.0.0.1", int(port))) for port in program.line().split())
        before = patient.call("clock")[3]
        request = pack([0, 1, "clock", []])
        impatient.send_bytes(request[:5])
        patient.send_bytes(request[:5])
        setting.write_text(f"{days:+}d")
        assert impatient.receive_rest() == []
        patient.send_bytes(request[5:])
        assert round((patient.receive()[3] - before) / 3600) == 24 * days
        impatient.close()
        patient.close()
        program.terminate()
        assert program.wait() == 0
