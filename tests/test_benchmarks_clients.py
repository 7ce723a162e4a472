"""The benchmarks of clients and of growth measure what they say they do; how fast anything is doesn't matter here."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from .benchmarks import clients, growth
from .benchmarks.client_programs.measuring import CALLERS, percentile_us
from .benchmarks.environments import Absence, Environments
from .benchmarks.participants import GMPRPC, PARTICIPANTS, Participant
from .benchmarks.processes import Shape, Workshop
from .benchmarks.rounds import Plan
from .helpers import Peer

BENCHMARKS = Path(__file__).parent / "benchmarks"

# What reports and plots rely on.
CLIENT_KEYS = {"calls_per_second", "p50_us", "p99_us", "p999_us", "calls", "errors", "first_error"}
SERVER_KEYS = CLIENT_KEYS | {
    "unanswered",
    "lost_connections",
    "silent_connections",
    "is_complete",
    "server_cpu_ms_per_1000_calls",
    "resident_before",
    "resident_under_load",
}

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")


class OwnEnvironment(Environments):
    """Makes no environments: peers are what is installed beside gmprpc, if it is."""

    def python(self, participant: Participant) -> Path:
        if participant.is_peer and importlib.util.find_spec(participant.name.replace("-", "_")) is None:
            raise Absence(f"{participant.name} isn't installed")
        return Path(sys.executable)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with Workshop(OwnEnvironment(tmp_path_factory.mktemp("environments"))) as workshop:
        yield workshop


def say_nothing(text: str) -> None:
    pass


# Clients.


@needs_compiler
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("mode", clients.MODES)
def test_every_call_of_a_client_is_answered_rightly_and_counted(workshop: Workshop, mode: str, cores: int) -> None:
    if cores > len(workshop.cores):
        pytest.skip("there is one core only")
    found = clients.figures(workshop, GMPRPC, mode, 0.1, cores=cores)
    assert found.keys() >= CLIENT_KEYS
    assert found["server"] == "c-server"
    assert found["errors"] == 0
    assert found["first_error"] == ""
    assert found["calls"] >= CALLERS[mode]
    assert found["calls"] == pytest.approx(found["calls_per_second"] * found["seconds"], rel=0.01)
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["p999_us"]
    assert found["client_cpu_seconds"] > 0


@pytest.mark.parametrize("mode", clients.MODES)
@pytest.mark.parametrize(
    "expression, complaint, is_ever_right",
    [
        ("value if count % 2 else 'twelve bites'", "WrongAnswer: twelve bites", True),
        ("{}[value]", "RemoteError: ", False),
    ],
)
def test_wrong_answers_and_errors_are_counted_and_not_measured(
    workshop: Workshop, tmp_path: Path, mode: str, expression: str, complaint: str, is_ever_right: bool
) -> None:
    program = tmp_path / "wrong_server.py"
    program.write_text(f"""
import gmprpc

server = gmprpc.Server(("127.0.0.1", 0), hide_errors=True)
count = 0

@server.method
def echo(value):
    global count
    count += 1
    return {expression}

server.start()
print(server.server_port, flush=True)
server.serve_forever()
""")
    with workshop.start(Participant("wrong", str(program))) as running:
        found = clients.call(workshop, GMPRPC, running.port, mode, 0.1, core=workshop.other_core(1))
    assert found["errors"] > 0
    assert found["first_error"].startswith(complaint)
    if is_ever_right:
        assert found["calls"] > 0
    else:
        assert found["calls"] == found["calls_per_second"] == found["p50_us"] == found["p999_us"] == 0


@needs_compiler
def test_clients_are_measured_in_turn_and_who_is_absent_is_named_once(workshop: Workshop) -> None:
    runs = list(clients.measure(workshop, ["gmprpc", "zerorpc"], ["async"], Plan(2, 0.05, (1,)), say_nothing))
    assert [(run["round"], run["subject"]) for run in runs] == [(1, "zerorpc"), (1, "gmprpc"), (2, "gmprpc")]
    for run in runs:
        assert run.items() >= {"kind": "client", "cores": 1, "mode": "async", "callers": 64}.items()
    assert runs[0]["failure"] == "zerorpc isn't installed"
    assert all(run.keys() >= CLIENT_KEYS for run in runs[1:])


def test_each_client_has_a_program_and_a_server() -> None:
    for subject in clients.SUBJECTS:
        server = clients.server_for(PARTICIPANTS[subject])
        assert server == (clients.C_SERVER if subject in ("gmprpc", "mprpc") else PARTICIPANTS[subject])
        assert (BENCHMARKS / "client_programs" / f"{subject}_client.py").is_file()


@pytest.mark.parametrize(
    "path",
    [
        "__init__.py",
        "client_programs/__init__.py",
        "client_programs/measuring.py",
        "client_programs/mprpc_client.py",
        "servers/mprpc_growth_server.py",
    ],
)
def test_what_mprpc_is_measured_with_has_the_syntax_of_its_python(path: str) -> None:
    ast.parse((BENCHMARKS / path).read_text(), feature_version=(3, 8))


def test_percentiles_are_latencies_that_occurred() -> None:
    ordered = [number / 1e6 for number in range(1, 1001)]
    assert [percentile_us(ordered, percent) for percent in (50, 99, 99.9, 100)] == [500, 990, 999, 1000]
    assert percentile_us(ordered[:1], 50) == percentile_us(ordered[:1], 99.9) == 1
    assert percentile_us([], 99) == 0


# The server in C.


@pytest.fixture
def c_server(workshop: Workshop) -> Iterator[Peer]:
    """A connection to it."""
    with workshop.start(clients.C_SERVER) as running, Peer.connect(("127.0.0.1", running.port)) as peer:
        yield peer


MSGIDS = [b"\x00", b"\x7f", b"\xcc\x80", b"\xcd\x01\x00", b"\xce\x00\x01\x00\x00", b"\xce\xff\xff\xff\xff", b"\xcc\x01"]
NAMES = [b"\xa4echo", b"\xd9\x04echo", b"\xda\x00\x04echo", b"\xc4\x04echo"]


@needs_compiler
def test_c_server_returns_msgids_and_params_byte_for_byte(c_server: Peer) -> None:
    values = ["twelve bytes", b"raw", "x" * 70_000, 1.5, -70_000, None, {"a": [1, {"b": [True] * 40}]}, []]
    params = [msgpack.packb(value) for value in values]
    params += [b"\xd9\x03abc", b"\xda\x00\x03abc", b"\xc7\x03\x05abc", b"\xd8\x05" + bytes(16), b"\xcb" + bytes(8)]
    for msgid in MSGIDS:
        for name in NAMES:
            c_server.send_bytes(b"".join(b"\x94\x00" + msgid + name + b"\x91" + param for param in params))
            expected = b"".join(b"\x94\x01" + msgid + b"\xc0" + param for param in params)
            answers = b""
            while len(answers) < len(expected) and (data := c_server.socket.recv(65536)):
                answers += data
            assert answers == expected


@needs_compiler
def test_c_server_waits_for_the_rest_of_a_request(c_server: Peer) -> None:
    request = msgpack.packb([0, 70_000, "echo", [{"a": ["b", 1.5]}]])
    for byte in request:
        c_server.send_bytes(bytes([byte]))
    assert c_server.receive() == [1, 70_000, None, {"a": ["b", 1.5]}]


@needs_compiler
def test_c_server_answers_another_method_with_an_error(c_server: Peer) -> None:
    assert c_server.call("ecko", "twelve bytes", msgid=300) == [1, 300, "no such method", None]
    assert c_server.call("echoes", "twelve bytes", msgid=301) == [1, 301, "no such method", None]


@needs_compiler
@pytest.mark.parametrize(
    "message",
    [
        b"\xc1",
        msgpack.packb("abc"),
        msgpack.packb([0, 1, "echo"]),
        msgpack.packb([2, "echo", [1], None]),
        msgpack.packb([0, "1", "echo", [1]]),
        msgpack.packb([0, -1, "echo", [1]]),
        msgpack.packb([0, 1, 7, [1]]),
        msgpack.packb([0, 1, "echo", []]),
        msgpack.packb([0, 1, "echo", {}]),
        b"\x94\x00\x01\xa4echo\x91\xc1",
    ],
)
def test_c_server_closes_on_what_is_no_request(c_server: Peer, message: bytes) -> None:
    c_server.send_bytes(message)
    assert c_server.receive_rest() == []


# Growth.


@needs_compiler
@pytest.mark.parametrize("subject", ["gmprpc", "aio-msgpack-rpc"])
@pytest.mark.parametrize("axis", growth.AXES)
def test_every_call_is_answered_at_the_far_end_of_an_axis(workshop: Workshop, axis: str, subject: str) -> None:
    value = max(growth.AXES[axis].shapes)
    found = growth.figures(workshop, growth.AXES[axis], subject, value, 0.1)
    if found.get("failure") == f"{subject} isn't installed":
        pytest.skip(found["failure"])
    assert found.keys() >= SERVER_KEYS
    assert found["calls"] > 0
    assert found["is_complete"]
    assert not any(found[fault] for fault in ("errors", "unanswered", "lost_connections", "silent_connections"))


@needs_compiler
def test_growth_is_measured_in_turn_and_who_is_left_out_is_named_once(workshop: Workshop) -> None:
    subjects = ["gmprpc", "mprpc", "floor"]
    axis = replace(growth.AXES["methods"], shapes={1: Shape(1, 64), 5: Shape(1, 64)})
    runs = list(growth.measure(workshop, subjects, [axis], Plan(2, 0.05, (1,)), say_nothing))
    assert [(run["round"], run["value"], run["subject"]) for run in runs] == [
        *[(1, 1, "mprpc"), (1, 1, "gmprpc"), (1, 5, "mprpc"), (1, 5, "gmprpc")],
        *[(2, 1, "gmprpc"), (2, 5, "gmprpc")],
    ]
    for run in runs:
        assert run.items() >= {"kind": "growth", "cores": 1, "axis": "methods", "shape": "1x64"}.items()
        assert run.keys() >= ({"failure"} if run["subject"] == "mprpc" else SERVER_KEYS)


@needs_compiler
def test_handlers_that_block_are_measured_beside_greenlets_that_only_sleep(workshop: Workshop) -> None:
    blocking = growth.AXES["blocking"]
    sleeps = growth.figures(workshop, blocking, growth.BARE_SLEEP, 10, 0.1)
    calls = growth.figures(workshop, blocking, "gmprpc", 10, 0.1)
    assert sleeps.keys() >= SERVER_KEYS
    for found in (sleeps, calls):
        assert found["calls"] > 0
        assert found["p50_us"] > 900
        assert found["calls_per_second"] < 11_000


def test_mprpc_has_its_calls_in_flight_on_connections_of_their_own() -> None:
    shape = growth.AXES["blocking"].shape("mprpc", 800)
    assert (shape.connections, shape.in_flight) == (800, 1)


def test_floor_is_measured_where_it_is_one() -> None:
    payload: Any = growth.AXES["payload"]
    left_out = {size for size in payload.shapes if payload.why_not("floor", size)}
    assert left_out == {1024 * 1024, 10 * 1024 * 1024}
