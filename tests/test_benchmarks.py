"""The benchmarks run and measure what they say they do; how fast anything is doesn't matter here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgpack
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "tests" / "benchmarks"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("server", ["gmprpc", "floor", "c-echo", "aio-msgpack-rpc"])
def test_every_answer_of_every_server_is_right(server: str, tmp_path: Path) -> None:
    if server == "aio-msgpack-rpc" and importlib.util.find_spec("aio_msgpack_rpc") is None:
        pytest.skip("aio-msgpack-rpc isn't installed")
    path = tmp_path / "runs.json"
    options = ["--rounds", 1, "--seconds", 0.1, "--shapes", "1x64", "4x1-64k", "--servers", server, "--json", path]
    done = run(sys.executable, "-m", "tests.benchmarks", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server in done.stdout
    runs = json.loads(path.read_text())["runs"]
    assert [(taken["server"], taken["shape"]) for taken in runs] == [(server, "1x64"), (server, "4x1-64k")]
    for taken in runs:
        assert taken["calls"] > 0
        assert taken["is_complete"]
        assert not any(
            taken[fault] for fault in ("errors", "unanswered", "lost_connections", "silent_connections", "first_error")
        )


def test_memory_of_idle_connections_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    options = ["--connections", 10, "--quiet", 0, "--servers", "gmprpc", "--json", path]
    done = run(sys.executable, "-m", "tests.benchmarks.memory", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(path.read_text())["resident_bytes"]["gmprpc"]["quiet"] > 0


@pytest.fixture(scope="module")
def load_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("load") / "load"
    done = run("cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", program, BENCHMARKS / "load.c")
    assert done.returncode == 0, done.stderr
    return program


def result_of_answer(load_generator: Path, answer: bytes) -> dict[str, Any]:
    """What the load generator makes of a server that answers the first request with ``answer`` and hangs up."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            unpacker = msgpack.Unpacker()
            while next(unpacker, None) is None:
                unpacker.feed(connection.recv(4096))
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        done = run(load_generator, "--port", listener.getsockname()[1], "--payload-bytes", 3, "--warmup", 0)
        thread.join()
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert not result["is_complete"]
    return result


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (msgpack.packb([1, 0, "no", None]), "error answer: <94><01><00><a2>no<c0>"),
        (msgpack.packb([1, 0, None, "abd"]), "wrong result: <94><01><00><c0><a3>abd"),
        (msgpack.packb([1, 0, None, {"abc": [b"abc", 1.5, -70000]}]), "wrong result: <94><01><00><c0><81>"),
        (msgpack.packb([1, 7, None, "abc"]), "msgid that is not outstanding: <94><01><07>"),
        (msgpack.packb([0, 0, "echo", ["abc"]]), "not a response: <94><00>"),
        (msgpack.packb("abc"), "not a response: <a3>abc"),
        (b"\xc1", "not MessagePack: <c1>"),
    ],
)
def test_load_generator_reports_a_wrong_answer(load_generator: Path, answer: bytes, complaint: str) -> None:
    result = result_of_answer(load_generator, answer)
    assert result["errors"] == 1
    assert result["first_error"].startswith(complaint)


@pytest.mark.parametrize("answer", [b"", msgpack.packb([1, 0, None, "abc"])[:-1]])
def test_load_generator_reports_a_call_without_an_answer(load_generator: Path, answer: bytes) -> None:
    result = result_of_answer(load_generator, answer)
    assert result["errors"] == 0
    assert result["unanswered"] == result["lost_connections"] == result["silent_connections"] == 1
    assert result["first_error"] == "connection lost: closed by the server"


@pytest.mark.parametrize("msgid", [b"\x00", b"\xcc\x00", b"\xcd\x00\x00", b"\xce\x00\x00\x00\x00"])
@pytest.mark.parametrize("result", [b"\xa3abc", b"\xd9\x03abc", b"\xda\x00\x03abc", b"\xc4\x03abc"])
def test_load_generator_takes_a_right_answer_in_any_width(load_generator: Path, msgid: bytes, result: bytes) -> None:
    found = result_of_answer(load_generator, b"\x94\x01" + msgid + b"\xc0" + result)
    assert found["errors"] == 0
    assert found["silent_connections"] == 0
