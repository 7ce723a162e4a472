"""The load generator tells right answers from wrong ones, whatever it speaks; how fast it is doesn't matter here.

Its servers are scripted with bytes, so that nothing has to be installed but a C compiler.
"""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest

SOURCES = Path(__file__).parent / "benchmarks" / "load"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def load_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("load") / "load"
    sources = sorted(SOURCES.glob("*.c"))
    done = run("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, *sources)
    assert done.returncode == 0, done.stderr
    return program


class Stream:
    """What a scripted server has of its only connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            assert more, "the load generator hung up"
            data += more
        return data

    def write(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hang_up(self) -> None:
        """Say no more, and let the load generator say what it has to."""
        self._socket.shutdown(socket.SHUT_WR)
        while self._socket.recv(65536):
            pass


def found(load_generator: Path, serve: Callable[[Stream], None], *options: Any, connections: int = 1) -> dict[str, Any]:
    """What the load generator finds at a server that hangs up after ``serve``; its payload is ``abc``."""

    def serve_once() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            stream = Stream(connection)
            serve(stream)
            stream.hang_up()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(connections) as executor:
        listener.settimeout(20)
        serving = [executor.submit(serve_once) for _ in range(connections)]
        options = ("--port", listener.getsockname()[1], "--payload-bytes", 3, "--warmup", 0, *options)
        done = run(load_generator, *options, "--connections", connections)
        assert done.returncode == 0, done.stderr
        for future in serving:
            future.result()
    result: dict[str, Any] = json.loads(done.stdout)
    assert not result["is_complete"]
    assert result["lost_connections"] == connections
    return result


def test_an_unknown_dialect_is_refused_with_a_list_of_the_known(load_generator: Path) -> None:
    done = run(load_generator, "--dialect", "pidgin", "--port", 1)
    assert done.returncode == 2
    assert "msgpack-rpc" in done.stderr


# MessagePack-RPC


def answer_msgpack_rpc(answer: bytes, *, method: str = "echo", msgid: int = 0) -> Callable[[Stream], None]:
    """Answer one request, which has to be this one, with these bytes."""

    def serve(stream: Stream) -> None:
        request = stream.read(3 + 4 + 1 + len(method) + 1 + 1 + 3)
        assert msgpack.unpackb(request) == [0, msgid, method, ["abc"]]
        stream.write(answer)

    return serve


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (msgpack.packb([1, 0, "no", None]), "error answer: <94><01><00><a2>no<c0>"),
        (msgpack.packb([1, 0, "no", "abc"]), "error answer: <94><01><00><a2>no<a3>abc"),
        (msgpack.packb([1, 0, None, "abd"]), "wrong result: <94><01><00><c0><a3>abd"),
        (msgpack.packb([1, 0, None, "abcd"]), "wrong result: <94><01><00><c0><a4>abcd"),
        (msgpack.packb([1, 0, None, {"abc": [b"abc", 1.5, -70000]}]), "wrong result: <94><01><00><c0><81>"),
        (msgpack.packb([1, 7, None, "abc"]), "id that is not outstanding: <94><01><07>"),
        (msgpack.packb([1, -1, None, "abc"]), "not a response: <94><01><ff>"),
        (msgpack.packb([0, 0, "echo", ["abc"]]), "not a response: <94><00>"),
        (msgpack.packb("abc"), "not a response: <a3>abc"),
        (b"\xc1", "not MessagePack: <c1>"),
    ],
)
def test_msgpack_rpc_reports_a_wrong_answer(load_generator: Path, answer: bytes, complaint: str) -> None:
    result = found(load_generator, answer_msgpack_rpc(answer))
    assert result["errors"] == 1
    assert result["first_error"].startswith(complaint)


def test_a_second_answer_to_a_call_is_reported(load_generator: Path) -> None:
    result = found(load_generator, answer_msgpack_rpc(2 * msgpack.packb([1, 0, None, "abc"])))
    assert result["errors"] == 1
    assert result["first_error"].startswith("id that is not outstanding: <94><01><00>")


@pytest.mark.parametrize("answer", [b"", msgpack.packb([1, 0, None, "abc"])[:-1]])
def test_msgpack_rpc_reports_a_call_without_an_answer(load_generator: Path, answer: bytes) -> None:
    result = found(load_generator, answer_msgpack_rpc(answer))
    assert result["errors"] == 0
    assert result["unanswered"] == result["silent_connections"] == 1
    assert result["first_error"] == "connection lost: closed by the server"


@pytest.mark.parametrize("msgid", [b"\x00", b"\xcc\x00", b"\xcd\x00\x00", b"\xce\x00\x00\x00\x00"])
@pytest.mark.parametrize("result", [b"\xa3abc", b"\xd9\x03abc", b"\xda\x00\x03abc", b"\xc4\x03abc"])
def test_msgpack_rpc_takes_a_right_answer_in_any_width(load_generator: Path, msgid: bytes, result: bytes) -> None:
    outcome = found(load_generator, answer_msgpack_rpc(b"\x94\x01" + msgid + b"\xc0" + result))
    assert outcome["errors"] == 0
    assert outcome["silent_connections"] == 0


def test_msgpack_rpc_calls_the_method_it_is_told_to(load_generator: Path) -> None:
    answer = msgpack.packb([1, 0, None, "abc"])
    assert found(load_generator, answer_msgpack_rpc(answer, method="repeat"), "--method", "repeat")["errors"] == 0


def test_a_run_ends_in_time_when_every_answer_is_wrong(load_generator: Path) -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            unpacker = msgpack.Unpacker()
            while data := connection.recv(65536):
                unpacker.feed(data)
                connection.sendall(b"".join(msgpack.packb([1, msgid, "no", None]) for _, msgid, _, _ in unpacker))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:
        listener.settimeout(20)
        serving = executor.submit(serve, listener)
        done = run(load_generator, "--port", listener.getsockname()[1], "--warmup", 0, "--seconds", 0.01)
        serving.result()
    result = json.loads(done.stdout)
    assert result["is_complete"]
    assert result["errors"] > result["calls"] == 0


def test_percentiles_are_reported(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        for msgid in range(10):
            answer_msgpack_rpc(msgpack.packb([1, msgid, None, "abc"]), msgid=msgid)(stream)

    result = found(load_generator, serve)
    assert result["calls"] > 0
    assert 0 < result["p50_us"] <= result["p99_us"] <= result["p999_us"] <= result["max_us"]


# zerorpc

ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16 + 1 + 31)
ZMTP_READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"


def read_zmtp_frame(stream: Stream) -> tuple[int, bytes]:
    """The flags and the body of a short frame."""
    flags, size = stream.read(2)
    return flags, stream.read(size)


def read_zerorpc_event(stream: Stream) -> Any:
    assert read_zmtp_frame(stream) == (1, b"")
    flags, event = read_zmtp_frame(stream)
    assert flags == 0
    return msgpack.unpackb(event)


def zerorpc_event(name: str, args: Any, **header: Any) -> bytes:
    event: bytes = msgpack.packb([{"message_id": b"another", "v": 3, **header}, name, args])
    return b"\x01\x00\x00" + bytes([len(event)]) + event


def shake_hands_for_zerorpc(stream: Stream, greeting: bytes = ZMTP_GREETING, ready: bytes = ZMTP_READY) -> None:
    assert stream.read(64) == b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
    stream.write(greeting)
    assert read_zmtp_frame(stream) == (4, b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER")
    stream.write(ready)


def answer_zerorpc(answer: Callable[[bytes], bytes]) -> Callable[[Stream], None]:
    """Answer the first request with what ``answer`` makes of its message_id."""

    def serve(stream: Stream) -> None:
        shake_hands_for_zerorpc(stream)
        header, name, args = read_zerorpc_event(stream)
        assert (header["v"], name, args) == (3, "echo", ["abc"])
        assert len(header["message_id"]) == 32
        stream.write(answer(header["message_id"]))

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        lambda message_id: zerorpc_event("OK", ["abc"], response_to=message_id),
        lambda message_id: zerorpc_event("OK", [b"abc"], response_to=message_id, more={"of": ["it"]}),
        lambda message_id: zerorpc_event("OK", ["abc"], response_to=message_id.decode()),
        # A long frame.
        lambda message_id: zerorpc_event("OK", ["abc"], response_to=message_id).replace(b"\0\0", b"\0\2" + bytes(7), 1),
    ],
)
def test_zerorpc_takes_a_right_answer(load_generator: Path, answer: Callable[[bytes], bytes]) -> None:
    result = found(load_generator, answer_zerorpc(answer), "--dialect", "zerorpc")
    assert result["errors"] == result["silent_connections"] == 0


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (lambda message_id: zerorpc_event("OK", ["abd"], response_to=message_id), "wrong result: <93>"),
        (lambda message_id: zerorpc_event("OK", ["abc", "abc"], response_to=message_id), "wrong result: <93>"),
        (lambda message_id: zerorpc_event("OK", "abc", response_to=message_id), "wrong result: <93>"),
        (lambda message_id: zerorpc_event("ERR", ["E", "no", ""], response_to=message_id), "error answer: <93>"),
        (lambda message_id: zerorpc_event("STREAM", ["abc"], response_to=message_id), "not an answer: <93>"),
        (lambda message_id: zerorpc_event("OK", ["abc"], response_to=32 * b"0" + message_id), "not an event of a call"),
        (lambda message_id: zerorpc_event("OK", ["abc"], response_to=b"1" + message_id[1:]), "id that is not outstand"),
        (lambda message_id: zerorpc_event("OK", ["abc"], response_to=message_id[:-1] + b"1"), "id that is not outstan"),
        (lambda message_id: zerorpc_event("OK", ["abc"], response_to=b"z" + message_id[1:]), "id that is not outstand"),
        (lambda message_id: zerorpc_event("OK", ["abc"]), "not an event of a call: <93>"),
        (lambda message_id: b"\1\0\0\1\xc1", "not an event of a call: <c1>"),
        (lambda message_id: b"\1\0\0\0", "not an event of a call: "),
        (lambda message_id: zerorpc_event("OK", ["abc"], response_to=message_id)[2:], "not an event of a call: <93>"),
        (lambda message_id: b"\x80\0", "not a frame: <80><00>"),
        (lambda message_id: b"\4\6\5ERROR", "unexpected command: <05>ERROR"),
    ],
)
def test_zerorpc_reports_a_wrong_answer(load_generator: Path, answer: Callable[[bytes], bytes], complaint: str) -> None:
    result = found(load_generator, answer_zerorpc(answer), "--dialect", "zerorpc")
    assert result["errors"] == 1
    assert result["first_error"].startswith(complaint)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request", ZMTP_GREETING.replace(b"NULL", b"PLAIN")[:64]])
def test_zerorpc_reports_a_server_that_speaks_another_language(load_generator: Path, greeting: bytes) -> None:
    def serve(stream: Stream) -> None:
        stream.write(greeting)

    result = found(load_generator, serve, "--dialect", "zerorpc")
    assert result["errors"] == 1
    assert result["first_error"].startswith("not a greeting of ZMTP 3 without security: ")
    assert result["unanswered"] == 0


@pytest.mark.parametrize("ready", [b"", ZMTP_READY[:-1]])
def test_a_connection_that_never_gets_ready_is_silent(load_generator: Path, ready: bytes) -> None:
    result = found(load_generator, lambda stream: shake_hands_for_zerorpc(stream, ready=ready), "--dialect", "zerorpc")
    assert result["silent_connections"] == 1
    assert result["first_error"] == "connection lost: closed by the server"


def test_an_event_before_ready_is_reported(load_generator: Path) -> None:
    early = zerorpc_event("OK", ["abc"], response_to=32 * b"0")[2:]
    result = found(load_generator, lambda stream: shake_hands_for_zerorpc(stream, ready=early), "--dialect", "zerorpc")
    assert result["errors"] == 1
    assert result["first_error"].startswith("an event before READY: ")


def test_heartbeats_and_pings_of_zerorpc_are_answered_while_a_call_lasts(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        shake_hands_for_zerorpc(stream)
        message_id = read_zerorpc_event(stream)[0]["message_id"]
        for _ in range(2):
            stream.write(zerorpc_event("_zpc_hb", [0], response_to=message_id))
            header, *event = read_zerorpc_event(stream)
            assert (header["v"], header["response_to"], event) == (3, message_id, ["_zpc_hb", [0]])
        stream.write(b"\x04\x0a\x04PING\x00\x00why")
        assert read_zmtp_frame(stream) == (4, b"\x04PONGwhy")
        stream.write(zerorpc_event("OK", ["abc"], response_to=message_id))

    result = found(load_generator, serve, "--dialect", "zerorpc")
    assert result["errors"] == result["silent_connections"] == 0


def test_calls_of_all_connections_have_different_ids_in_zerorpc(load_generator: Path) -> None:
    """The server keeps them in one table."""
    ids = []

    def serve(stream: Stream) -> None:
        shake_hands_for_zerorpc(stream)
        ids.extend(read_zerorpc_event(stream)[0]["message_id"] for _ in range(2))

    found(load_generator, serve, "--dialect", "zerorpc", "--in-flight", 2, connections=2)
    assert len(set(ids)) == 4


# RPyC

ROOT = b"\x12\x08\x0e\x08a.Server\x16\x0512345\x16\x06123456"
FUNCTION = b"\x12\x08\x0e\x0ea.b.c.function\x51\x52"
FIRST_SEQ = b"\x16\x0810000000"


def rpyc_frame(data: bytes, *, is_compressed: bool = False) -> bytes:
    if is_compressed:
        data = zlib.compress(data)
    return len(data).to_bytes(4, "big") + bytes([is_compressed]) + data + b"\n"


def read_rpyc_frame(stream: Stream) -> bytes:
    size = int.from_bytes(stream.read(4), "big")
    flag, *data, flusher = stream.read(1 + size + 1)
    assert (flag, flusher) == (0, ord("\n"))
    return bytes(data)


def introduce_rpyc(stream: Stream) -> None:
    """Give the client the root object and its function."""
    assert read_rpyc_frame(stream) == b"\x01\x11\x50\x11\x53\x11\x51\x02"
    stream.write(rpyc_frame(b"\x02\x11\x50\x11\x54" + ROOT))
    get_attribute = b"\x01\x11\x51\x11\x54\x11\x52\x11\x11\x53" + ROOT
    assert read_rpyc_frame(stream) == get_attribute + b"\x11\x51\x08\x0decho"
    stream.write(rpyc_frame(b"\x02\x11\x51\x11\x54" + FUNCTION))


def answer_rpyc(answer: bytes) -> Callable[[Stream], None]:
    """Answer the first request with these bytes."""

    def serve(stream: Stream) -> None:
        introduce_rpyc(stream)
        call = b"\x01\x11" + FIRST_SEQ + b"\x11\x57\x11\x52\x12\x11\x53" + FUNCTION
        assert read_rpyc_frame(stream) == call + b"\x11\x51\x10\x08\x0cabc" + b"\x11\x51\x02"
        stream.write(answer)

    return serve


@pytest.mark.parametrize("is_compressed", [False, True])
def test_rpyc_takes_a_right_answer(load_generator: Path, is_compressed: bool) -> None:
    answer = rpyc_frame(b"\x02\x11" + FIRST_SEQ + b"\x11\x51\x08\x0cabc", is_compressed=is_compressed)
    result = found(load_generator, answer_rpyc(answer), "--dialect", "rpyc")
    assert result["errors"] == result["silent_connections"] == 0


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (rpyc_frame(b"\x02\x11" + FIRST_SEQ + b"\x11\x51\x08\x0cabd"), "wrong result: <02><11><16>"),
        (rpyc_frame(b"\x02\x11" + FIRST_SEQ + b"\x11\x51\x0cabc"), "wrong result: <02><11><16>"),
        (rpyc_frame(b"\x02\x11" + FIRST_SEQ + b"\x11\x54" + ROOT), "wrong result: <02><11><16>"),
        (rpyc_frame(b"\x02\x11" + FIRST_SEQ), "wrong result: <02><11><16>"),
        (rpyc_frame(b"\x03\x11" + FIRST_SEQ + b"\x51"), "error answer: <03><11><16>"),
        (rpyc_frame(b"\x03\x11" + FIRST_SEQ + bytes(9000), is_compressed=True), "error answer: <03><11><16>"),
        (rpyc_frame(b"\x02\x11\x16\x0810000001\x11\x51\x08\x0cabc"), "id that is not outstanding: <02>"),
        (rpyc_frame(b"\x02\x11\x50\x11\x51\x08\x0cabc"), "id that is not outstanding: <02>"),
        (rpyc_frame(b"\x02\x11\x16\x0a10000000"), "not an answer: <02><11><16>"),
        (rpyc_frame(b"\x02\x11\x16\x081000000x"), "not an answer: <02><11><16>"),
        (rpyc_frame(b"\x01\x11\x50\x11\x51\x11\x51\x02"), "not an answer: <01><11>"),
        (rpyc_frame(b""), "not an answer: "),
        (rpyc_frame(b"\x02\x11" + FIRST_SEQ)[:-1] + b"\r", "not a frame: <00><00>"),
        (b"\0\0\0\3\1abc\n", "not a frame: <00><00>"),
        (b"HTTP/1.1 400 Bad Request", "not a frame: HTTP"),
    ],
)
def test_rpyc_reports_a_wrong_answer(load_generator: Path, answer: bytes, complaint: str) -> None:
    result = found(load_generator, answer_rpyc(answer), "--dialect", "rpyc")
    assert result["errors"] == 1
    assert result["first_error"].startswith(complaint)


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (b"\x03\x11\x50\x51", "no reference to the method: <03>"),
        (b"\x02\x11\x50\x11\x51\x08\x0cabc", "no reference to the method: <02>"),
        (b"\x02\x11\x51\x11\x54" + ROOT, "no reference to the method: <02>"),
        (b"\x02\x11\x50\x11\x54" + 500 * b"\x51", "no reference to the method: <02>"),
        (b"what?", "not an answer: what?"),
    ],
)
def test_rpyc_reports_a_server_that_has_no_such_method(load_generator: Path, answer: bytes, complaint: str) -> None:
    result = found(load_generator, lambda stream: stream.write(rpyc_frame(answer)), "--dialect", "rpyc")
    assert result["errors"] == result["silent_connections"] == 1
    assert result["first_error"].startswith(complaint)


def test_rpyc_reports_a_call_without_an_answer(load_generator: Path) -> None:
    result = found(load_generator, answer_rpyc(rpyc_frame(b"\x02\x11" + FIRST_SEQ)[:-1]), "--dialect", "rpyc")
    assert result["errors"] == 0
    assert result["unanswered"] == result["silent_connections"] == 1


# gRPC

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 5, 6, 7, 8
END_STREAM, END_HEADERS, PADDED, PRIORITY = 0x01, 0x04, 0x08, 0x20
ACK = END_STREAM
HEADER_TABLE_SIZE, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME = 1, 3, 4, 5

#: What requests begin with: the first on a connection, and all others.
FIRST_HEADERS = (
    b"\x83\x86\x40\x05:path\x0a/Echo/echo\x40\x0a:authority\x09127.0.0.1"
    b"\x40\x02te\x08trailers\x40\x0ccontent-type\x10application/grpc"
)
OTHER_HEADERS = b"\x83\x86\xc1\xc0\xbf\xbe"

MESSAGE = b"\x00\x00\x00\x00\x03abc"
#: ``:status: 200``, which is static, and a ``grpc-status`` that has to be remembered.
STATUS_200 = b"\x88"
GRPC_STATUS_0 = b"\x40\x0bgrpc-status\x010"
GRPC_STATUS_8 = b"\x40\x0bgrpc-status\x018"


def http2_frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + number.to_bytes(4, "big") + payload


def http2_settings(*settings: tuple[int, int]) -> bytes:
    return http2_frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings))


def read_http2_frame(stream: Stream) -> tuple[int, int, int, bytes]:
    """Its type, its flags, the number of its stream, and its payload."""
    header = stream.read(9)
    return header[3], header[4], int.from_bytes(header[5:], "big"), stream.read(int.from_bytes(header[:3], "big"))


def read_http2_preface(stream: Stream) -> None:
    assert stream.read(24) == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert read_http2_frame(stream)[0] == SETTINGS
    assert read_http2_frame(stream)[0] == WINDOW_UPDATE


def open_http2(stream: Stream, *settings: tuple[int, int]) -> None:
    read_http2_preface(stream)
    stream.write(http2_settings(*settings))
    assert read_http2_frame(stream) == (SETTINGS, ACK, 0, b"")


def read_grpc_request(stream: Stream, number: int) -> None:
    headers = FIRST_HEADERS if number == 1 else OTHER_HEADERS
    assert read_http2_frame(stream) == (HEADERS, END_HEADERS, number, headers)
    assert read_http2_frame(stream) == (DATA, END_STREAM, number, MESSAGE)


def grpc_answer(number: int, headers: bytes = STATUS_200, trailers: bytes = GRPC_STATUS_0) -> bytes:
    return (
        http2_frame(HEADERS, END_HEADERS, number, headers)
        + http2_frame(DATA, 0, number, MESSAGE)
        + http2_frame(HEADERS, END_HEADERS | END_STREAM, number, trailers)
    )


def answer_grpc(answer: bytes) -> Callable[[Stream], None]:
    """Answer the first request with these bytes."""

    def serve(stream: Stream) -> None:
        open_http2(stream)
        read_grpc_request(stream, 1)
        stream.write(answer)

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        grpc_answer(1),
        grpc_answer(1, trailers=b"\x00\x0bgrpc-status\x010"),
        grpc_answer(1, trailers=b"\x10\x0bgrpc-status\x010"),
        # In Huffman's code.
        grpc_answer(1, trailers=b"\x40\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f\x81\x07\x00\x0cgrpc-message\x00"),
        # Remembered before it is used; by its name, and as a whole.
        grpc_answer(1, headers=STATUS_200 + GRPC_STATUS_8 + b"\x40\x01a\x01b", trailers=b"\x7f\x00\x010"),
        grpc_answer(1, headers=STATUS_200 + GRPC_STATUS_0 + b"\x40\x01a\x01b", trailers=b"\xbf"),
        # Behind a header so large that none is remembered, and a table that was empty for a moment.
        grpc_answer(1, headers=b"\x40\x01a\x7f\xa1\x1f" + 4128 * b"b", trailers=b"\x20\x3f\xe1\x1f" + GRPC_STATUS_0),
        # In parts, with padding, with a priority.
        http2_frame(HEADERS, END_HEADERS | PRIORITY | PADDED, 1, b"\x02" + bytes(5) + STATUS_200 + bytes(2))
        + http2_frame(DATA, 0, 1, MESSAGE[:4])
        + http2_frame(DATA, 0, 1)
        + http2_frame(DATA, PADDED, 1, b"\x01" + MESSAGE[4:] + b"\x00")
        + http2_frame(HEADERS, END_HEADERS | END_STREAM, 1, GRPC_STATUS_0),
        # Among frames that don't matter: one of an unknown type, and what may come late.
        http2_frame(99, 0, 0, b"?") + grpc_answer(1) + http2_frame(RST_STREAM, 0, 1, bytes(4)),
        grpc_answer(1) + http2_frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1") + http2_frame(PING, ACK, 0, bytes(8)),
    ],
)
def test_grpc_takes_a_right_answer(load_generator: Path, answer: bytes) -> None:
    result = found(load_generator, answer_grpc(answer), "--dialect", "grpc")
    assert (result["errors"], result["silent_connections"], result["unanswered"]) == (0, 0, 1)


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (grpc_answer(1).replace(b"abc", b"abd"), "wrong result: <00><00><00><00><03>abd"),
        (grpc_answer(1).replace(b"\0\0\0\0\3abc", b"\1\0\0\0\3abc"), "wrong result: <01><00><00><00><03>abc"),
        (
            http2_frame(HEADERS, END_HEADERS | END_STREAM, 1, STATUS_200 + GRPC_STATUS_0),
            "wrong result: too short",
        ),
        (http2_frame(DATA, 0, 1, b"d") + grpc_answer(1), "wrong result: d"),
        (http2_frame(DATA, 0, 1, MESSAGE) + grpc_answer(1), "wrong result: <00><00><00><00><03>abc"),
        (grpc_answer(1, trailers=GRPC_STATUS_8), "error answer: @<0b>grpc-status<01>8"),
        (http2_frame(HEADERS, END_HEADERS | END_STREAM, 1, STATUS_200 + GRPC_STATUS_8), "error answer: <88>@"),
        (http2_frame(HEADERS, END_HEADERS | END_STREAM, 1, STATUS_200), "an end without a status: <88>"),
        (http2_frame(DATA, END_STREAM, 1, MESSAGE), "an end without a status: <00>"),
        (http2_frame(HEADERS, END_HEADERS | END_STREAM, 3, GRPC_STATUS_0), "id that is not outstanding: @"),
        (http2_frame(DATA, 0, 3, MESSAGE), "id that is not outstanding: <00>"),
        (grpc_answer(1) + http2_frame(DATA, 0, 1, MESSAGE), "id that is not outstanding: <00>"),
        (http2_frame(RST_STREAM, 0, 1, b"\0\0\0\7"), "stream reset: <00><00><04><03>"),
        (http2_frame(GOAWAY, 0, 0, bytes(8)), "unexpected frame: <00><00><08><07>"),
        (http2_frame(PUSH_PROMISE, 0, 1, bytes(8)), "unexpected frame: <00><00><08><05>"),
        (http2_frame(HEADERS, 0, 1, STATUS_200), "headers that can't be followed: <88>"),
        (http2_frame(HEADERS, END_HEADERS, 1, b"\x80"), "headers that can't be followed: <80>"),
        (http2_frame(HEADERS, END_HEADERS, 1, b"\xbe"), "headers that can't be followed: <be>"),
        (http2_frame(HEADERS, END_HEADERS, 1, b"\xff"), "headers that can't be followed: <ff>"),
        (http2_frame(HEADERS, END_HEADERS, 1, b"\x40\x01"), "headers that can't be followed: @<01>"),
        (http2_frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f"), "headers that can't be followed: ?"),
        (http2_frame(HEADERS, END_HEADERS, 1, GRPC_STATUS_0 + b"\x20\xbe"), "headers that can't be followed: @"),
        (http2_frame(HEADERS, PADDED, 1), "not a frame: <00><00><00><01><08>"),
        (http2_frame(DATA, PADDED, 1, b"\x02a"), "not a frame: <00><00><02><00><08>"),
        (http2_frame(PING, 0, 0, b"why"), "not a frame: <00><00><03><06>"),
        (http2_frame(WINDOW_UPDATE, 0, 0, b"\x01"), "not a frame: <00><00><01><08>"),
        (http2_settings((MAX_FRAME, 0)), "impossible size of frames: <00><05>"),
        (http2_settings((HEADER_TABLE_SIZE, 100)), "too small a table of headers: <00><01>"),
        (b"HTTP/1.1 400 Bad Request", "not a frame: HTTP/1.1"),
    ],
)
def test_grpc_reports_a_wrong_answer(load_generator: Path, answer: bytes, complaint: str) -> None:
    result = found(load_generator, answer_grpc(answer), "--dialect", "grpc")
    assert result["errors"] == 1
    assert result["first_error"].startswith(complaint)


def test_a_header_that_the_table_has_no_room_for_any_more_can_not_be_referred_to(load_generator: Path) -> None:
    large = b"\x40\x01a\x7f\xa1\x1e" + 4000 * b"b"
    headers = STATUS_200 + GRPC_STATUS_0 + large
    assert found(load_generator, answer_grpc(grpc_answer(1, headers, b"\xbf")), "--dialect", "grpc")["errors"] == 0
    headers += b"\x40\x01c\x01d"
    result = found(load_generator, answer_grpc(grpc_answer(1, headers, b"\xc0")), "--dialect", "grpc")
    assert result["first_error"].startswith("headers that can't be followed: <c0>")


def test_headers_of_unknown_size_end_the_connection_when_they_may_fill_the_table(load_generator: Path) -> None:
    """Of Huffman's code only what matters is understood."""
    headers = 2 * (b"\x40\x01a\xff\x81\x13" + 2560 * b"\xff")
    result = found(load_generator, answer_grpc(grpc_answer(1, headers)), "--dialect", "grpc")
    assert result["first_error"].startswith("headers that can't be followed: @<01>a")


def test_grpc_calls_follow_one_another_on_new_streams(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream)
        for number in (1, 3, 5):
            read_grpc_request(stream, number)
        # In an order of the server's own. The status that the first of them has to remember is that of all.
        for number, trailers in ((5, GRPC_STATUS_0), (1, b"\xbe"), (3, b"\xbe")):
            stream.write(grpc_answer(number, trailers=trailers))
        for number in (7, 9, 11):
            read_grpc_request(stream, number)

    result = found(load_generator, serve, "--dialect", "grpc", "--in-flight", 3)
    assert (result["errors"], result["unanswered"]) == (0, 3)


def test_grpc_calls_the_method_it_is_told_to(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream)
        assert read_http2_frame(stream)[3] == FIRST_HEADERS.replace(b"\x0a/Echo/echo", b"\x0c/Echo/repeat")

    found(load_generator, serve, "--dialect", "grpc", "--method", "repeat")


def test_http2_has_to_begin_with_settings(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        read_http2_preface(stream)
        stream.write(http2_frame(PING, 0, 0, bytes(8)))

    result = found(load_generator, serve, "--dialect", "grpc")
    assert result["errors"] == result["silent_connections"] == 1
    assert result["first_error"].startswith("not a frame: <00><00><08><06>")


def test_pings_and_settings_of_http2_are_answered_while_a_call_lasts(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream)
        read_grpc_request(stream, 1)
        stream.write(http2_frame(PING, 0, 0, b"is there") + http2_settings((MAX_STREAMS, 1)))
        assert read_http2_frame(stream) == (PING, ACK, 0, b"is there")
        assert read_http2_frame(stream) == (SETTINGS, ACK, 0, b"")
        stream.write(grpc_answer(1))

    result = found(load_generator, serve, "--dialect", "grpc")
    assert result["errors"] == result["silent_connections"] == 0


def test_no_more_streams_are_opened_than_the_server_allows(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream, (MAX_STREAMS, 2))
        read_grpc_request(stream, 1)
        read_grpc_request(stream, 3)
        # It has sent nothing else, or the answer to this ping would come behind it.
        stream.write(http2_frame(PING, 0, 0, bytes(8)))
        assert read_http2_frame(stream)[0] == PING
        stream.write(grpc_answer(3))
        read_grpc_request(stream, 5)
        stream.write(http2_settings((MAX_STREAMS, 3)))
        assert read_http2_frame(stream)[0] == SETTINGS
        read_grpc_request(stream, 7)

    result = found(load_generator, serve, "--dialect", "grpc", "--in-flight", 3)
    assert (result["errors"], result["unanswered"]) == (0, 3)


def test_a_message_goes_as_far_as_the_window_of_its_stream(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream, (INITIAL_WINDOW, 3))
        assert read_http2_frame(stream)[0] == HEADERS
        assert read_http2_frame(stream) == (DATA, 0, 1, MESSAGE[:3])
        stream.write(http2_frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\2"))
        assert read_http2_frame(stream) == (DATA, 0, 1, MESSAGE[3:5])
        # A change for all streams is one for those that are open, too: one byte more.
        stream.write(http2_settings((INITIAL_WINDOW, 4)))
        assert {read_http2_frame(stream), read_http2_frame(stream)} == {
            (SETTINGS, ACK, 0, b""),
            (DATA, 0, 1, MESSAGE[5:6]),
        }
        stream.write(http2_frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\2"))
        assert read_http2_frame(stream) == (DATA, END_STREAM, 1, MESSAGE[6:])
        stream.write(grpc_answer(1))

    result = found(load_generator, serve, "--dialect", "grpc")
    assert result["errors"] == result["silent_connections"] == 0


def test_messages_go_as_far_as_the_window_of_the_connection_in_frames_of_limited_size(load_generator: Path) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream, (INITIAL_WINDOW, 1_000_000))
        assert read_http2_frame(stream)[0] == HEADERS
        frames = [read_http2_frame(stream) for _ in range(4)]
        assert [len(payload) for *_, payload in frames] == [16384, 16384, 16384, 16383]
        stream.write(http2_settings((MAX_FRAME, 20000)) + http2_frame(WINDOW_UPDATE, 0, 0, b"\0\1\0\0"))
        assert read_http2_frame(stream)[0] == SETTINGS
        frames += [read_http2_frame(stream) for _ in range(2)]
        assert [len(payload) for *_, payload in frames[4:]] == [20000, 100_005 - 65535 - 20000]
        assert [flags for _, flags, *_ in frames] == [0, 0, 0, 0, 0, END_STREAM]
        message = b"".join(payload for *_, payload in frames)
        assert message == b"\0" + (100_000).to_bytes(4, "big") + (b"abcdefghijklmnopqrstuvwxyz" * 4000)[:100_000]
        stream.write(grpc_answer(1).replace(http2_frame(DATA, 0, 1, MESSAGE), http2_frame(DATA, 0, 1, message)))

    result = found(load_generator, serve, "--dialect", "grpc", "--payload-bytes", 100_000)
    assert result["errors"] == result["silent_connections"] == 0


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_message_that_is_answered_early_is_not_sent_to_the_end(load_generator: Path, is_reset: bool) -> None:
    def serve(stream: Stream) -> None:
        open_http2(stream, (INITIAL_WINDOW, 3))
        for number in (1, 3):
            assert read_http2_frame(stream)[::2] == (HEADERS, number)
            assert read_http2_frame(stream) == (DATA, 0, number, MESSAGE[:3])
            if is_reset:
                stream.write(http2_frame(RST_STREAM, 0, number, bytes(4)))
            else:
                stream.write(http2_frame(HEADERS, END_HEADERS | END_STREAM, number, STATUS_200 + GRPC_STATUS_8))
                assert read_http2_frame(stream) == (RST_STREAM, 0, number, b"\0\0\0\x08")

    result = found(load_generator, serve, "--dialect", "grpc")
    assert (result["errors"], result["unanswered"]) == (2, 1)


def test_the_server_gets_back_what_it_has_used_of_the_window(load_generator: Path) -> None:
    size = 2**20 - 5

    def serve(stream: Stream) -> None:
        open_http2(stream, (INITIAL_WINDOW, 2**30), (MAX_FRAME, 2**20))
        stream.write(http2_frame(WINDOW_UPDATE, 0, 0, b"\x20\0\0\0"))
        assert read_http2_frame(stream)[0] == HEADERS
        message = b""
        while len(message) < 2**20:
            message += read_http2_frame(stream)[3]
        stream.write(grpc_answer(1).replace(http2_frame(DATA, 0, 1, MESSAGE), http2_frame(DATA, 0, 1, message)))
        assert read_http2_frame(stream) == (WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4, "big"))

    result = found(load_generator, serve, "--dialect", "grpc", "--payload-bytes", size)
    assert result["errors"] == result["silent_connections"] == 0
