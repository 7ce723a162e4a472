"""How connections and servers end: half-closes, the graceful stop, signals; nothing that was received is lost."""

from __future__ import annotations

import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import msgpack
import pytest
from gevent.event import Event
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, is_listening, wait_until
from .programs import Program

pack = msgpack.packb

# Half-closes.


def ending_at(server: gmprpc.Server, *messages: Any) -> Peer:
    """A peer that says ``messages``, and then no more."""
    peer = Peer.connect(server.address)
    peer.send(*messages)
    peer.shutdown()
    return peer


@pytest.mark.usefixtures("bystander")
def test_after_a_half_close_100_of_100_requests_are_answered(server: gmprpc.Server) -> None:
    with ending_at(server, *([0, number, "echo", [number]] for number in range(100))) as peer:
        assert peer.receive_rest() == [[1, number, None, number] for number in range(100)]


@pytest.mark.usefixtures("bystander")
def test_after_a_half_close_20_of_20_in_flight_are_answered(service: gmprpc.Service, server: gmprpc.Server) -> None:
    go = Event()
    service.register(lambda number: go.wait() and number, "slow")
    with ending_at(server, *([0, number, "slow", [number]] for number in range(20))) as peer:
        wait_until(lambda: server.statistics()["in_flight"] == 21)
        go.set()
        assert sorted(peer.receive_rest()) == [[1, number, None, number] for number in range(20)]


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "slowly"])
def test_after_a_half_close_10_of_10_answers_of_1_mib_arrive(
    service: gmprpc.Service, server: gmprpc.Server, is_slow: bool
) -> None:
    size = 1024 * 1024
    service.register(lambda: b"x" * size, "large")
    with ending_at(server, *([0, number, "large", []] for number in range(10))) as peer:
        if is_slow:
            peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, 65536)
            # Not before everything has come to a halt does the peer begin to read.
            wait_until(lambda: any(connection._backlog for connection in server.connections))
            gevent.sleep(0)
        assert [(answer[1], len(answer[3])) for answer in peer.receive_rest()] == [(n, size) for n in range(10)]


@pytest.mark.usefixtures("bystander")
def test_after_a_half_close_a_deferred_answer_comes_and_isnt_cancelled(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    replies: list[gmprpc.Reply] = []
    service.reg_cb(later=replies.append)
    with ending_at(server, [0, 1, "later", []], [0, 2, "echo", ["at once"]]) as peer:
        assert peer.receive() == [1, 2, None, "at once"]
        assert not replies[0].cancelled()
        replies[0].result("deferred")
        assert peer.receive_rest() == [[1, 1, None, "deferred"]]


@pytest.mark.usefixtures("bystander")
def test_after_a_half_close_a_notification_is_carried_out_before_the_end(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    go = Event()
    service.register(go.wait, "wait")
    with ending_at(server, [2, "wait", []]) as peer:
        wait_until(lambda: server.statistics()["in_flight"] == 2)
        go.set()
        assert peer.receive_rest() == []


@pytest.mark.usefixtures("bystander")
def test_a_half_close_by_both_sides_loses_nothing(service: gmprpc.Service, server: gmprpc.Server) -> None:
    go = Event()
    service.register(lambda: go.wait() and "held", "slow")
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "slow", []])
        wait_until(lambda: server.statistics()["in_flight"] == 2)
        for connection in server.connections:
            if connection.peer == peer.socket.getsockname():
                connection.finish()
        peer.shutdown()
        go.set()
        assert peer.receive_rest() == [[1, 1, None, "held"]]


@pytest.mark.usefixtures("bystander")
def test_a_half_close_at_any_byte_answers_all_that_was_whole(server: gmprpc.Server) -> None:
    first, second = pack([0, 1, "echo", ["first"]]), pack([0, 2, "echo", ["second"]])
    data = first + second
    for end in range(len(data) + 1):
        with Peer.connect(server.address) as peer:
            peer.send_bytes(data[:end])
            peer.shutdown()
            answers = [[1, 1, None, "first"], [1, 2, None, "second"]][: (end >= len(first)) + (end >= len(data))]
            assert peer.receive_rest() == answers
    wait_until(lambda: len(server.connections) == 1)
    assert server.statistics()["failed_connections"] == len(data) - 2  # All but the ends between two messages.


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


def held_call(server: gmprpc.Server) -> Peer:
    """A peer whose call is at work."""
    peer = Peer.connect(server.address)
    peer.send([0, 1, "hold", ["held"]])
    wait_until(lambda: server.statistics()["in_flight"] == 1)
    return peer


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


def test_stop_holds_no_time_against_a_peer_that_isnt_read_any_more(service: gmprpc.Service) -> None:
    ends: list[Exception | None] = []
    server = gmprpc.Server(
        ("127.0.0.1", 0),
        service,
        read_timeout=0.02,
        on_error=lambda connection, exc: ends.append(exc),
        on_eof=lambda connection: ends.append(None),
    )
    server.start()
    with Peer.connect(server.address) as peer:
        peer.send_bytes(pack([0, 1, "hold", ["held"]]) + b"\x94\x00")
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        stopping = gevent.spawn(server.stop)
        gevent.sleep(0.1)  # Several times what the rest of the message would have.
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    stopping.get()
    assert ends == [None]


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


def test_a_stop_of_which_the_caller_loses_patience_goes_on(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with held_call(server) as peer:
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


# Stopping, from anywhere and more than once.


def test_stop_may_be_called_twice_and_at_once_by_many(service: gmprpc.Service, server: gmprpc.Server) -> None:
    with held_call(server) as peer:
        stopping = [gevent.spawn(server.stop) for _ in range(5)]
        wait_until(lambda: not server.started)
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    assert [one.get() for one in stopping] == [0] * 5
    assert server.stop() == 0


def test_a_stop_with_less_patience_cuts_one_with_more_short(server: gmprpc.Server) -> None:
    with held_call(server) as peer:
        patient = gevent.spawn(server.stop, None)
        wait_until(lambda: not server.started)
        assert server.stop(0) == 1
        assert peer.receive_rest() == []
    assert patient.get() == 0  # It was the other one that cut.


@pytest.mark.parametrize("style", ["function", "callback", "notification", "spawned by one"])
def test_stop_may_be_called_by_any_kind_of_handler(service: gmprpc.Service, style: str) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    stopped: list[int] = []

    def stop(*_: Any) -> None:
        stopped.append(server.stop())

    @service.method
    def function() -> str:
        stop()
        return "stopped"

    @service.method(deferred=True)
    def callback(reply: gmprpc.Reply) -> None:
        stop()
        reply.result("stopped")

    service.register(lambda: gevent.spawn(stop) and "stopped", "spawned by one")
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with held_call(server) as other, Peer.connect(server.address) as peer:
        if style == "notification":
            peer.send([2, "function", []])
            assert peer.receive_rest() == []
        else:
            peer.send([0, 1, style, []])
            assert peer.receive_rest() == [[1, 1, None, "stopped"]]
        service.methods["release"]()
        assert other.receive_rest() == [[1, 1, None, "held"]]
    serving.get()
    wait_until(lambda: stopped)
    assert stopped == [0]


@pytest.mark.parametrize("hook", ["on_accept", "on_dispatch", "on_eof", "on_error"])
def test_stop_may_be_called_by_every_hook(service: gmprpc.Service, hook: str) -> None:
    stopped: list[int] = []
    server: gmprpc.Server
    options: dict[str, Any] = {hook: lambda *_: stopped.append(server.stop())}
    server = gmprpc.Server(("127.0.0.1", 0), service, **options)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with Peer.connect(server.address) as peer:
        peer.send([0, 1, "echo", ["answered"]])
        if hook == "on_error":
            peer.send_bytes(b"\xc1")
        peer.shutdown()
        assert peer.receive_rest() == [[1, 1, None, "answered"]]
    serving.get()
    assert stopped[0] == 0


def test_what_is_sent_during_the_stop_is_not_carried_out_and_whole_answers_come(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    with held_call(server) as peer:
        stopping = gevent.spawn(server.stop)
        wait_until(lambda: not server.started)
        (connection,) = server.connections
        wait_until(lambda: not connection._is_reading)
        peer.send(*([0, number, "echo", ["late"]] for number in range(2, 100)))
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    assert stopping.get() == 0


def test_connections_that_wait_to_be_accepted_are_served_at_the_stop(server: gmprpc.Server) -> None:
    # Nothing of the server runs between these lines: all of them wait in the kernel when it is told to stop.
    peers = []
    for number in range(50):
        sock = stdlib_socket.create_connection(server.address)
        sock.sendall(pack([0, number, "echo", [number]]))
        peers.append(Peer(gevent.socket.socket(fileno=sock.detach())))
    assert not server.connections
    assert server.stop() == 0
    for number, peer in enumerate(peers):
        assert peer.receive_rest() == [[1, number, None, number]]
        peer.close()


# Signals.

SIGNALLED = """
import gevent, gmprpc, signal, sys
server = gmprpc.Server(("127.0.0.1", 0))
kept = []

@server.method
def slow(value):
    gevent.sleep(float(value))
    return value

@server.method
def burn():
    end = __import__("time").monotonic() + 0.3
    print("burning", flush=True)
    while __import__("time").monotonic() < end:
        pass
    return "burnt"

@server.method(deferred=True)
def later(reply, value):
    gevent.spawn_later(float(value), reply.result, value)

@server.method
def at_work():
    return server.statistics()["in_flight"] - 1

server.start()
if sys.argv[1] == "python":
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
elif sys.argv[1] == "gevent":
    gevent.signal_handler(signal.SIGTERM, server.stop)
    gevent.signal_handler(signal.SIGINT, server.stop)
print(server.server_port, flush=True)
if sys.argv[1] == "serve_forever":
    server.serve_forever()
else:
    server._stopping.over.wait()
print("stopped", flush=True)
"""


@pytest.fixture(params=["serve_forever", "gevent", "python"])
def signalled(request: pytest.FixtureRequest) -> Iterator[Program]:
    """A program that stops its server when a signal comes, in one of the ways that there are."""
    with Program(sys.executable, "-c", SIGNALLED, request.param) as program:
        yield program


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["slow", "later"])
def test_a_signal_loses_none_of_100_calls_at_work(signalled: Program, signum: signal.Signals, method: str) -> None:
    with Peer.connect(("127.0.0.1", int(signalled.line()))) as peer:
        peer.send(*([0, number, method, ["0.3"]] for number in range(100)))
        assert peer.call("at_work", msgid=1000) == [1, 1000, None, 100]
        os.kill(signalled.pid, signum)
        assert sorted(answer[1] for answer in peer.receive_rest()) == list(range(100))
    assert signalled.lines() == ["stopped"]
    assert signalled.wait() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_strikes_while_a_handler_computes_loses_no_call(
    signalled: Program, signum: signal.Signals
) -> None:
    with Peer.connect(("127.0.0.1", int(signalled.line()))) as peer:
        peer.send([0, 1, "slow", ["0.1"]], [0, 2, "burn", []])
        assert signalled.line() == "burning"
        os.kill(signalled.pid, signum)
        assert sorted(answer[1] for answer in peer.receive_rest()) == [1, 2]
    assert signalled.lines() == ["stopped"]
    assert signalled.wait() == 0


# Stopping from elsewhere, and starting again meanwhile.


def test_stop_may_be_called_where_nothing_can_be_waited_for(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    stopped: list[int] = []
    with held_call(server) as peer:
        gevent.get_hub().loop.run_callback(lambda: stopped.append(server.stop()))  # As a signal's handler may strike.
        wait_until(lambda: not server.started)
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    serving.get()
    assert stopped == [0]


def test_stop_may_be_called_by_another_thread(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with held_call(server) as peer:
        assert ThreadPool(1).apply(server.stop) == 0
        wait_until(lambda: not server.started)
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, "held"]]
    serving.get()


def test_a_server_that_was_never_started_can_be_stopped(service: gmprpc.Service) -> None:
    assert gmprpc.Server(("127.0.0.1", 0), service).stop() == 0


def test_what_is_started_while_a_stop_still_waits_is_left_alone_by_it(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    server.start()
    with Peer.connect(server.address) as first:
        first.send([0, 1, "hold", ["cut"]])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        stopping = gevent.spawn(server.stop, 0.05)
        wait_until(lambda: not server.started)
        serving = gevent.spawn(server.serve_forever)
        wait_until(lambda: server.started)
        with Peer.connect(server.address) as second:
            second.send([0, 2, "hold", ["goes on"]])
            wait_until(lambda: server.statistics()["in_flight"] == 2)
            assert stopping.get() == 1
            assert first.receive_rest() == []
            assert not serving.ready()
            service.methods["release"]()
            assert second.receive() == [1, 2, None, "goes on"]
            server.stop()
    serving.get()
    assert "1 requests were cut" in caplog.text


def test_at_the_deadline_of_a_stop_nobody_lingers(service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmprpc.streams._FAREWELL_TIMEOUT", 1000.0)
    monkeypatch.setattr("gmprpc.draining._ABORT_TIMEOUT", 1000.0)
    server = gmprpc.Server(("127.0.0.1", 0), service)
    server.start()
    with Peer.connect(server.address) as peer:
        peer.send_bytes(b"\xc1")
        assert peer.receive_rest() == []  # It has said goodbye, and waits for the peer's.
        assert server.stop(0.01) == 0
        assert not server._greenlets
