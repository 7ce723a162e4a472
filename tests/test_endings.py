"""How connections and servers end: half-closes, the graceful stop, signals; nothing that was received is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import msgpack
import pytest
from gevent.event import Event

import gmprpc

from .helpers import Peer, wait_until

pack = msgpack.packb

# Half-closes.


def test_after_a_half_close_everything_received_is_answered(service: gmprpc.Service, server: gmprpc.Server) -> None:
    go = Event()
    replies: list[gmprpc.Reply] = []

    @service.method
    def slow(number: int) -> int:
        go.wait()
        return number

    service.reg_cb(later=lambda reply: replies.append(reply))
    service.register(lambda: "x" * 1_000_000, "large")
    with Peer.connect(server.address) as peer:
        peer.send([0, 30, "later", []])
        peer.send(*([0, number, "slow", [number]] for number in range(20)))
        peer.send(*([0, number, "large", []] for number in range(20, 30)))
        peer.shutdown()
        wait_until(lambda: replies)
        assert not replies[0].cancelled()
        go.set()
        gevent.spawn(replies.pop().result, "deferred")
        answers = peer.receive_rest()
    assert sorted(answer[1] for answer in answers) == list(range(31))
    assert all(answer[2] is None for answer in answers)


def test_the_end_amid_a_message_is_an_error_but_what_came_before_is_answered(service: gmprpc.Service) -> None:
    errors: list[Exception] = []
    ended = Event()

    def on_error(connection: gmprpc.Connection, exc: Exception) -> None:
        errors.append(exc)
        ended.set()

    with gmprpc.Server(("127.0.0.1", 0), service, on_error=on_error) as server, Peer.connect(server.address) as peer:
        peer.send_bytes(pack([0, 1, "echo", ["whole"]]) + b"\x94\x00\x02")
        peer.shutdown()
        assert peer.receive_rest() == [[1, 1, None, "whole"]]
        ended.wait()
    assert isinstance(errors[0], gmprpc.ConnectionClosed)


# Stopping.


def test_stop_answers_everything_that_has_been_received(service: gmprpc.Service, server: gmprpc.Server) -> None:
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=lambda reply: replies.append(reply))
    peers = [Peer.connect(server.address) for _ in range(10)]
    for peer in peers:
        peer.send([0, 1, "hold", ["held"]], [0, 2, "later", []])
    wait_until(lambda: server.statistics()["in_flight"] == 20)
    # Sent and not yet read when the server is told to stop.
    for peer in peers:
        peer.send([0, 3, "echo", ["unread"]])
    late = Peer.connect(server.address)
    late.send([0, 3, "echo", ["not accepted yet"]])
    stopping = gevent.spawn(server.stop)
    wait_until(lambda: not server.started)
    with pytest.raises(ConnectionRefusedError):
        Peer.connect(server.address)
    assert late.receive_rest() == [[1, 3, None, "not accepted yet"]]
    for reply in replies:
        reply.result("deferred")
    service.methods["release"]()
    expected = [[1, 1, None, "held"], [1, 2, None, "deferred"], [1, 3, None, "unread"]]
    for peer in peers:
        assert sorted(peer.receive_rest()) == expected
    for peer in [*peers, late]:
        peer.close()
    assert stopping.get() == 0
    assert not server.connections


def test_stop_closes_quiet_connections_at_once(server: gmprpc.Server, peer: Peer) -> None:
    peer.call("echo", 1)
    stopping = gevent.spawn(server.stop)
    assert peer.receive_rest() == []
    peer.close()
    assert stopping.get() == 0


def test_stop_cuts_what_is_still_at_work_at_the_deadline_and_says_how_many(
    server: gmprpc.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with Peer.connect(server.address) as peer:
        peer.send(*([0, number, "hold", [number]] for number in range(5)))
        wait_until(lambda: server.statistics()["in_flight"] == 5)
        assert server.stop(0.05) == 5
        assert peer.receive_rest() == []
    assert "5 requests were cut" in caplog.text
    assert server.stop() == 0


def test_stop_may_be_called_by_a_handler_which_is_still_answered(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    service.register(server.stop, "stop")
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "stop", []])
        assert peer.receive_rest() == [[1, 1, None, 0]]
    wait_until(lambda: not server.connections)


def test_stop_may_be_called_by_a_hook(service: gmprpc.Service) -> None:
    stopped: list[int] = []
    server = gmprpc.Server(("127.0.0.1", 0), service, on_eof=lambda connection: stopped.append(server.stop()))
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    Peer.connect(server.address).close()
    serving.get()
    assert stopped == [0]


def test_a_stop_of_which_the_caller_loses_patience_goes_on(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "hold", ["held"]])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
            server.stop()
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    serving.get()


def test_serve_forever_returns_when_the_server_is_stopped(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    server.stop()
    serving.join()
    assert serving.successful()


def test_handlers_of_signals_are_as_before_after_serve_forever(service: gmprpc.Service) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    server = gmprpc.Server(("127.0.0.1", 0), service)

    def stop_when_started() -> None:
        wait_until(lambda: server.started)
        server.stop()

    gevent.spawn(stop_when_started)
    server.serve_forever()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_close_stops_accepting_and_leaves_connections_alone(server: gmprpc.Server, peer: Peer) -> None:
    peer.call("echo", 1)
    address = server.address
    server.close()
    with pytest.raises(ConnectionRefusedError):
        Peer.connect(address)
    assert peer.call("echo", 2) == [1, 0, None, 2]


PROGRAM = """
import gevent, gmprpc
server = gmprpc.Server(("127.0.0.1", 0))

@server.method
def slow(value):
    print("begun", flush=True)
    gevent.sleep(float(value))
    return value

@server.method
def bad():
    raise KeyboardInterrupt

server.start()
print(server.server_port, flush=True)
server.serve_forever()
print("stopped", flush=True)
"""


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_program_and_loses_no_call(program: subprocess.Popen[str], signum: signal.Signals) -> None:
    with Peer.connect(("127.0.0.1", int(line_of(program)))) as peer:
        # A handler's own KeyboardInterrupt is nothing but an error.
        assert peer.call("bad") == [1, 0, "KeyboardInterrupt", None]
        peer.send(*([0, number, "slow", ["0.2"]] for number in range(100)))
        for _ in range(100):
            assert line_of(program) == "begun"
        program.send_signal(signum)
        assert sorted(answer[1] for answer in peer.receive_rest()) == list(range(100))
    assert line_of(program) == "stopped"
    assert program.wait(10) == 0


def test_a_second_sigint_stops_at_once(program: subprocess.Popen[str]) -> None:
    with Peer.connect(("127.0.0.1", int(line_of(program)))) as peer:
        peer.send([0, 1, "slow", ["1000"]])
        assert line_of(program) == "begun"
        program.send_signal(signal.SIGINT)
        # Accepting has ended: the first one has been heard.
        wait_until(lambda: not is_listening(peer.socket.getpeername()))
        program.send_signal(signal.SIGINT)
        assert peer.receive_rest() == []
    assert line_of(program) == "stopped"
    assert program.wait(10) == 0


def test_signals_are_heard_where_each_greenlet_is_made_to_look_like_a_thread() -> None:
    patched = "from gevent import monkey; monkey.patch_all()" + PROGRAM.replace(
        "server.serve_forever()", "gevent.spawn(server.serve_forever).join()"
    )
    with subprocess.Popen([sys.executable, "-c", patched], stdout=subprocess.PIPE, text=True) as process:
        with Peer.connect(("127.0.0.1", int(line_of(process)))) as peer:
            peer.send([0, 1, "slow", ["0.1"]])
            assert line_of(process) == "begun"
            process.terminate()
            assert peer.receive_rest() == [[1, 1, None, "0.1"]]
        assert line_of(process) == "stopped"
        assert process.wait(10) == 0


def is_listening(address: Any) -> bool:
    try:
        Peer.connect(address).close()
    except ConnectionError:
        return False
    return True
