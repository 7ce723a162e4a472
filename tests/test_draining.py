"""How servers part with connections so that their clients lose no call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult, Event

import gmprpc

from .helpers import Peer, is_listening, wait_until
from .programs import Program

DRAINING = [2, "$/draining", []]
HEADER = b"PROXY TCP4 192.0.2.7 127.0.0.1 5000 4423\r\n"


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was told to go is looked after as often as can be."""
    monkeypatch.setattr("gmprpc.draining._LOOK_INTERVAL", 0.001)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, quick_looks: None) -> None:
    """And who is quiet then is let go at once."""
    monkeypatch.setattr("gmprpc.draining._QUIET_TIME", 0.01)


@contextmanager
def stopping(server: gmprpc.Server, *args: Any, **options: Any) -> Iterator[Any]:
    """The server stops meanwhile; at the end it has to have stopped."""
    stop = gevent.spawn(server.stop, *args, **options)
    wait_until(lambda: not server.is_serving)
    yield stop
    stop.get()


@contextmanager
def announced_to(server: gmprpc.Server) -> Iterator[Peer]:
    """A peer that has asked for the health of the server."""
    with Peer.connect(server.address) as peer:
        assert peer.call("$/health") == [1, 0, None, "SERVING"]
        yield peer


# The delay.


def test_in_the_delay_everything_goes_on_but_that_the_server_says_it_isnt_serving(
    server: gmprpc.Server, peer: Peer
) -> None:
    assert server.is_serving
    address = server.address
    with stopping(server, drain_delay=30):
        assert peer.call("$/health") == [1, 0, None, "NOT_SERVING"]
        with Peer.connect(server.address) as other:
            assert other.call("echo", 1) == [1, 0, None, 1]
            assert other.call("$/health") == [1, 0, None, "NOT_SERVING"]
        assert peer.call("echo", 2) == [1, 0, None, 2]
        assert server.started
        hasty = gevent.spawn(server.stop, drain_delay=0)
        assert peer.receive() == DRAINING
        peer.close()
        hasty.get()
    assert not is_listening(address)


def test_after_the_delay_accepting_ends(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service, drain_delay=0.02)
    server.start()
    address = server.address
    begun = perf_counter()
    server.stop()
    assert perf_counter() - begun >= 0.02
    assert not is_listening(address)


def test_a_server_that_is_started_in_the_delay_goes_on(server: gmprpc.Server, peer: Peer) -> None:
    with stopping(server, drain_delay=30) as stop:
        server.start()
        assert stop.get() == 0
    assert peer.call("$/health") == [1, 0, None, "SERVING"]
    with stopping(server):
        assert peer.receive() == DRAINING
        peer.close()


def test_who_serves_forever_goes_on_with_a_server_that_is_started_in_the_delay(server: gmprpc.Server) -> None:
    serving = gevent.spawn(server.serve_forever)
    with stopping(server, drain_delay=10):
        server.start()
    gevent.sleep(0.01)
    assert not serving.ready()
    server.stop()
    serving.get()


def test_a_stop_ends_no_handshake_that_came_after_another_start(
    service: gmprpc.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmprpc.draining._HANDSHAKE_GRACE", 0.02)
    begun, release = Event(), Event()

    def busy() -> None:
        begun.set()
        release.wait()

    service.register(busy)
    server = gmprpc.Server(("127.0.0.1", 0), service, proxy_protocol="v1")
    with server, Peer.connect(server.address) as old, Peer.connect(server.address) as slow:
        old.send_bytes(HEADER)
        old.send([0, 1, "busy", []])
        begun.wait()
        wait_until(lambda: len(server._entrance.under_way) == 1)
        earlier = set(server._entrance.under_way)
        stop = gevent.spawn(server.stop, 10)
        wait_until(lambda: not server.started)
        server.start()
        with Peer.connect(server.address) as new:
            wait_until(lambda: server._entrance.under_way - earlier)
            assert slow.receive_rest() == []
            new.send_bytes(HEADER)
            new.send([0, 1, "echo", [1]])
            assert new.receive() == [1, 1, None, 1]
        release.set()
        stop.get()


def test_a_server_that_nobody_can_connect_to_has_no_delay(service: gmprpc.Service, server: gmprpc.Server) -> None:
    server.close()
    server.stop(drain_delay=1000)
    gmprpc.Server(None, service, drain_delay=1000).stop()


@pytest.mark.parametrize("options", [{"drain_delay": -1}, {"drain_delay": None}, {"max_connection_age": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        gmprpc.Server(("127.0.0.1", 0), **options)


SERVER = """
import gevent, gmprpc

server = gmprpc.Server(("127.0.0.1", 0), drain_delay=1000)
server.register(print, "print")
server.start()
gevent.spawn(print, server.server_port, flush=True)  # When signals are handled.
server.serve_forever()
"""


def test_sigterm_waits_for_the_delay_and_sigint_does_not() -> None:
    with Program(sys.executable, "-u", "-c", SERVER) as program:
        with Peer.connect(("127.0.0.1", int(program.line()))) as peer:
            assert peer.call("$/health")[3] == "SERVING"
            program.terminate()
            wait_until(lambda: peer.call("$/health")[3] == "NOT_SERVING")
            assert peer.call("print", "served") == [1, 0, None, None]
            assert program.line() == "served"
            os.kill(program.pid, signal.SIGINT)
            assert peer.receive_rest() in ([], [DRAINING])
        assert program.wait() == 0
    with Program(sys.executable, "-u", "-c", SERVER) as program:
        program.line()
        os.kill(program.pid, signal.SIGINT)
        assert program.wait() == 0


# Those who have announced themselves.


def test_who_has_announced_himself_is_told_and_then_served_until_he_closes(server: gmprpc.Server, peer: Peer) -> None:
    with announced_to(server) as announced, stopping(server):
        assert announced.receive() == DRAINING
        assert peer.receive_rest() == []  # Who hasn't.
        peer.close()
        for number in range(3):
            assert announced.call("echo", number) == [1, 0, None, number]
        announced.send([0, 1, "add", [1, 2]])
        announced.shutdown()
        assert announced.receive_rest() == [[1, 1, None, 3]]
        announced.close()


def test_he_is_told_when_nobody_can_connect_any_more(server: gmprpc.Server) -> None:
    address = server.address
    with announced_to(server) as announced, stopping(server, drain_delay=0.05):
        assert announced.receive() == DRAINING
        assert not is_listening(address)
        announced.close()


def test_an_answer_that_is_deferred_comes_after_he_was_told(service: gmprpc.Service, server: gmprpc.Server) -> None:
    result: AsyncResult[str] = AsyncResult()
    service.register(lambda: result, "later")
    with announced_to(server) as announced:
        announced.send([0, 1, "later", []])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        with stopping(server):
            assert announced.receive() == DRAINING
            announced.shutdown()
            result.set("late")
            assert announced.receive_rest() == [[1, 1, None, "late"]]
            announced.close()


def test_who_announces_himself_in_the_queue_is_told_before_he_is_answered(server: gmprpc.Server) -> None:
    # Nothing of the server runs between these lines: all of them wait in the kernel when it is told to stop.
    peers = [Peer.connect(server.address) for _ in range(20)]
    for peer in peers:
        peer.send([0, 1, "$/health", []], [0, 2, "echo", [3]])
    with stopping(server):
        for peer in peers:
            assert peer.receive_rest() == [DRAINING, [1, 1, None, "NOT_SERVING"], [1, 2, None, 3]]
            peer.close()


def test_nothing_is_kept_of_who_announces_himself_and_goes_before_he_is_heard(service: gmprpc.Service) -> None:
    release, heard = Event(), Event()

    def on_dispatch(connection: gmprpc.Connection, message: Any) -> None:
        release.wait()
        heard.set()

    with gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=on_dispatch) as server:
        with Peer.connect(server.address) as peer:
            peer.send([0, 1, "$/health", []])
            wait_until(lambda: server.statistics()["in_flight"])
            (connection,) = server.connections
            connection.abort()
            wait_until(lambda: not server.connections)
        release.set()
        heard.wait()
        wait_until(lambda: not connection.in_flight)
        assert not server._farewells._announced


def test_who_asks_again_is_told_again_before_he_is_answered(server: gmprpc.Server) -> None:
    with announced_to(server) as announced, stopping(server):
        assert announced.receive() == DRAINING
        announced.send([0, 1, "$/health", []])
        assert [announced.receive(), announced.receive()] == [DRAINING, [1, 1, None, "NOT_SERVING"]]
        announced.close()


@pytest.mark.usefixtures("quick_looks")
def test_who_goes_on_calling_is_told_again(server: gmprpc.Server) -> None:
    with announced_to(server) as announced, stopping(server):
        assert announced.receive() == DRAINING
        announced.send([0, 1, "echo", ["still"]])
        assert [announced.receive(), announced.receive()] == [[1, 1, None, "still"], DRAINING]
        announced.close()


@pytest.mark.usefixtures("impatient")
def test_who_was_told_and_says_nothing_is_let_go_when_he_is_answered(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    with announced_to(server) as quiet, announced_to(server) as busy:
        busy.send([0, 1, "hold", ["held"]])
        wait_until(lambda: server.statistics()["in_flight"] == 1)
        with stopping(server):
            assert quiet.receive_rest() == [DRAINING]
            quiet.close()
            service.methods["release"]()
            answers = busy.receive_rest()
            busy.close()
    assert [answer for answer in answers if answer != DRAINING] == [[1, 1, None, "held"]]
    assert DRAINING in answers


def test_who_goes_on_and_on_is_answered_what_he_has_said_before_the_deadline(server: gmprpc.Server) -> None:
    with announced_to(server) as announced, stopping(server, 0.5) as stop:
        answers = []
        try:
            while True:
                announced.send([0, len(answers), "echo", [1]])
                while (message := announced.receive()) == DRAINING:
                    pass
                answers.append(message)
                gevent.sleep(0.001)
        except (EOFError, OSError):
            pass
        announced.close()
        assert answers == [[1, number, None, 1] for number in range(len(answers))]
        assert stop.get() == 0


def test_what_is_at_work_at_the_deadline_is_cut_and_counted(
    server: gmprpc.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with announced_to(server) as announced:
        announced.send([0, 1, "hold", [None]], [0, 2, "hold", [None]])
        wait_until(lambda: server.statistics()["in_flight"] == 2)
        with stopping(server, 0.05) as stop:
            assert stop.get() == 2
        assert announced.receive_rest() == [DRAINING]
    assert "2 requests were cut after 0.05 s" in caplog.text


def test_many_are_told_at_once(server: gmprpc.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmprpc.draining._AT_ONCE", 2)
    peers = [Peer.connect(server.address) for _ in range(5)]
    for peer in peers:
        peer.call("$/health")
    with stopping(server):
        for peer in peers:
            assert peer.receive() == DRAINING
            peer.close()


# Connections that get old.


@pytest.fixture
def aging(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    """A server whose connections get old when the test says so."""
    with gmprpc.Server(("127.0.0.1", 0), service, max_connection_age=1000, stop_timeout=0.1) as server:
        yield server


def let_time_pass(server: gmprpc.Server) -> None:
    """All connections have reached their age."""
    for connection in server.connections:
        server._farewells._retire(connection)


def test_who_has_announced_himself_is_told_at_the_age_of_his_connection(aging: gmprpc.Server) -> None:
    with announced_to(aging) as announced:
        let_time_pass(aging)
        assert announced.receive() == DRAINING
        assert announced.call("echo", 1) == [1, 0, None, 1]
        announced.shutdown()
        assert announced.receive_rest() == []
    assert aging.is_serving


@pytest.mark.usefixtures("quick_looks")
def test_he_is_let_go_when_he_goes_on_for_too_long(service: gmprpc.Service, aging: gmprpc.Server) -> None:
    with announced_to(aging) as announced:
        announced.send([0, 1, "hold", ["isn't cut"]])
        wait_until(lambda: aging.statistics()["in_flight"])
        (connection,) = aging.connections
        let_time_pass(aging)
        wait_until(lambda: not connection.is_lasting)
        service.methods["release"]()
        assert announced.receive_rest() == [DRAINING, [1, 1, None, "isn't cut"]]


def test_who_has_not_is_let_go_when_nothing_is_at_work_for_him(service: gmprpc.Service, aging: gmprpc.Server) -> None:
    with Peer.connect(aging.address) as idle:
        assert idle.call("echo", 1) == [1, 0, None, 1]
        let_time_pass(aging)
        assert idle.receive_rest() == []


@pytest.mark.usefixtures("quick_looks")
def test_who_has_not_and_is_busy_is_let_go_when_he_is_answered(service: gmprpc.Service, aging: gmprpc.Server) -> None:
    aging._farewells._patience = None
    with Peer.connect(aging.address) as busy:
        busy.send([0, 1, "hold", ["held"]])
        wait_until(lambda: aging.statistics()["in_flight"])
        let_time_pass(aging)
        gevent.sleep(0.01)
        assert busy.call("echo", 1) == [1, 0, None, 1]
        service.methods["release"]()
        assert busy.receive_rest() == [[1, 1, None, "held"]]


@pytest.mark.usefixtures("quick_looks")
def test_who_has_not_is_let_go_in_the_end_when_he_is_always_busy(service: gmprpc.Service, aging: gmprpc.Server) -> None:
    with Peer.connect(aging.address) as peer:
        peer.send([0, 1, "hold", [1]])
        wait_until(lambda: aging.statistics()["in_flight"])
        (connection,) = aging.connections
        let_time_pass(aging)
        wait_until(lambda: not connection.is_lasting)
        service.methods["release"]()
        assert peer.receive_rest() == [[1, 1, None, 1]]


def test_who_announces_himself_when_he_is_too_old_is_told(service: gmprpc.Service, aging: gmprpc.Server) -> None:
    with Peer.connect(aging.address) as peer:
        peer.send([0, 1, "hold", [1]])
        wait_until(lambda: aging.statistics()["in_flight"])
        let_time_pass(aging)
        peer.send([0, 2, "$/health", []])
        assert [peer.receive(), peer.receive()] == [DRAINING, [1, 2, None, "SERVING"]]
        service.methods["release"]()


def test_a_connection_gets_old_by_itself_and_not_when_it_has_ended(service: gmprpc.Service) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service, max_connection_age=0.01) as server:
        with Peer.connect(server.address) as peer:
            assert peer.receive_rest() == []
        with Peer.connect(server.address):
            wait_until(lambda: len(server._farewells._ages) == 1)
        wait_until(lambda: not server._farewells._ages)
    with gmprpc.Server(("127.0.0.1", 0), service, max_connection_age=1000) as server, announced_to(server):
        pass
    assert not server._farewells._announced
