"""Calling: values, errors, time-outs, sharing, and what every call ends in when the connection does."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event
from gevent.threadpool import ThreadPool

import gmprpc

from .helpers import Peer, Scripted, wait_until
from .programs import FORKING_PYTHON, Program

# Calling.


def test_a_call_returns_the_result(client: gmprpc.Client) -> None:
    assert client.call("add", 1, 2) == 3
    assert client.call("echo", {"a": [1, None, True, 2.5, b"bytes", "text"]}) == {
        "a": [1, None, True, 2.5, b"bytes", "text"]
    }


def test_a_timestamp_travels_as_an_aware_datetime(client: gmprpc.Client) -> None:
    now = datetime.datetime.now(datetime.UTC)
    assert client.call("echo", now) == now


def test_the_proxy_calls_dotted_names(server: gmprpc.Server, client: gmprpc.Client) -> None:
    server.register(pow, "math.pow")
    assert client.proxy.math.pow(2, 10) == 1024
    assert client.proxy.echo("hello") == "hello"
    with pytest.raises(TypeError, match="name a method"):
        client.proxy()
    with pytest.raises(AttributeError):
        client.proxy.__wrapped__  # noqa: B018
    assert repr(client.proxy.math.pow) == "<Proxy math.pow>"


def test_errors_are_remote_errors_with_the_object_as_sent(server: gmprpc.Server, client: gmprpc.Client) -> None:
    @server.method
    def refuse(error: Any) -> None:
        raise gmprpc.ErrorResponse(error)

    for error in ("no", 0, False, "", {"code": 5}):
        with pytest.raises(gmprpc.RemoteError) as caught:
            client.call("refuse", error)
        assert caught.value.error == error
        assert caught.value.method == "refuse"
        assert type(caught.value) is gmprpc.RemoteError
    assert str(caught.value) == "{'code': 5}"


def test_method_not_found_is_exactly_the_text_for_that_method(server: gmprpc.Server, client: gmprpc.Client) -> None:
    with pytest.raises(gmprpc.MethodNotFound) as caught:
        client.call("nosuch")
    assert caught.value.method == "nosuch"

    @server.method
    def relay() -> None:
        raise gmprpc.ErrorResponse('No such method "other" found')

    with pytest.raises(gmprpc.RemoteError) as relayed:
        client.call("relay")
    assert not isinstance(relayed.value, gmprpc.MethodNotFound)


@pytest.mark.parametrize("value", [object(), 2**64, {1, 2}])
def test_params_that_cant_be_packed_raise_at_once_and_send_nothing(client: gmprpc.Client, value: Any) -> None:
    for call in (client.call, client.call_async, client.notify):
        with pytest.raises((TypeError, OverflowError)):
            call("echo", value)
    assert client.call("echo", "next") == "next"
    assert client.statistics()["pending"] == 0


def test_greenlets_share_one_connection_with_calls_in_flight_at_once(
    server: gmprpc.Server, client: gmprpc.Client
) -> None:
    @server.method
    def late(number: int) -> int:
        gevent.sleep(0.001 * (number % 5))
        return number

    greenlets = [gevent.spawn(client.call, "late", number) for number in range(100)]
    gevent.joinall(greenlets)
    assert [greenlet.value for greenlet in greenlets] == list(range(100))
    assert server.statistics()["connections"] == 1


def test_call_async_goes_on_and_get_waits(client: gmprpc.Client) -> None:
    calls = [client.call_async("add", number, 1) for number in range(50)]
    assert [call.get() for call in calls] == list(range(1, 51))
    failing = client.call_async("fail", "oops")
    assert failing.method == "fail"
    with pytest.raises(gmprpc.RemoteError, match="ValueError: oops"):
        failing.get()


def test_a_time_out_of_get_leaves_the_call_pending(client: gmprpc.Client) -> None:
    call = client.call_async("hold", 1)
    with pytest.raises(gevent.Timeout):
        call.get(timeout=0.01)
    client.call("release")
    assert call.get() == 1


def test_a_pending_call_can_be_cancelled_and_its_answer_is_dropped(client: gmprpc.Client) -> None:
    call = client.call_async("hold", 1)
    assert call.cancel() is True
    assert call.cancel() is False
    with pytest.raises(gmprpc.CallCancelled):
        call.get()
    assert client.statistics()["pending"] == 0
    client.call("release")
    wait_until(lambda: client.statistics()["late_answers"] == 1)


def test_a_notification_arrives_and_brings_no_answer(server: gmprpc.Server, client: gmprpc.Client) -> None:
    arrived: list[Any] = []
    server.register(lambda *params: arrived.append(params), "log")
    client.notify("log", "hello", 1)
    assert client.call("echo", 1) == 1
    assert arrived == [("hello", 1)]


def test_a_notification_sent_just_before_close_arrives(server: gmprpc.Server) -> None:
    arrived: list[int] = []
    server.register(lambda data: arrived.append(len(data)), "log")
    with gmprpc.Client(server.address) as client:
        for _ in range(3):
            client.notify("log", b"x" * 900_000)
    wait_until(lambda: len(arrived) == 3)


def test_what_a_program_sends_before_it_ends_arrives(server: gmprpc.Server) -> None:
    arrived: list[str] = []
    server.register(arrived.append, "log")
    program = f"""
import os, gmprpc
client = gmprpc.Client(("127.0.0.1", {server.server_port}))
client.call("echo", 1)
client.notify("log", "first")
client.notify("log", "second")
if os.fork() == 0:
    raise SystemExit  # What is the parent's to send is not sent twice.
os.wait()
"""
    with Program(*FORKING_PYTHON, "-c", program) as process:
        assert process.wait() == 0
    wait_until(lambda: not server.connections)
    assert arrived == ["first", "second"]


def test_call_in_the_hub_is_refused_instead_of_blocking_it(client: gmprpc.Client) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.call("echo", 1)
        except RuntimeError as exc:
            caught.append(exc)

    gevent.get_hub().loop.run_callback(call)
    wait_until(lambda: caught)
    assert "call_async" in str(caught[0])


def test_a_connection_belongs_to_its_thread(client: gmprpc.Client) -> None:
    pool = ThreadPool(1)
    with pytest.raises(RuntimeError, match="another thread"):
        pool.apply(client.connection.call, ("echo", 1))
    pool.kill()
    assert client.call("echo", 1) == 1


def test_a_result_that_cant_be_decoded_costs_its_own_call_only(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address) as client:
        first, second = client.call_async("a"), client.call_async("b")
        peer = scripted.accept()
        peer.receive(), peer.receive()
        peer.send_bytes(b"\x94\x01\x00\xc0\xa2\xff\xfe" + b"\x94\x01\x01\xc0\x05")
        assert second.get() == 5
        with pytest.raises(gmprpc.ProtocolError, match="can't be decoded"):
            first.get()


# Time-outs.


def test_a_call_times_out_and_its_late_answer_is_dropped(client: gmprpc.Client) -> None:
    with pytest.raises(gmprpc.CallTimeout) as caught:
        client.call("hold", 1, timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.method, caught.value.timeout) == ("hold", 0.01)
    assert client.statistics()["pending"] == 0
    late = client.call_async("hold", 2, timeout=0.01)
    with pytest.raises(gmprpc.CallTimeout):
        late.get()
    client.call("release")
    wait_until(lambda: client.statistics()["late_answers"] == 2)
    assert client.call("echo", "in step") == "in step"


def test_the_clients_time_out_holds_where_a_call_says_nothing(server: gmprpc.Server) -> None:
    with gmprpc.Client(server.address, timeout=0.01) as client:
        with pytest.raises(gmprpc.CallTimeout):
            client.call("hold", 1)
        with pytest.raises(gmprpc.CallTimeout):
            client.call_async("hold", 1).get()
        waiting = gevent.spawn(client.call, "hold", 2, timeout=None)
        gevent.sleep(0.02)
        client.call("release", timeout=5)
        assert waiting.get() == 2


def test_a_gevent_time_out_or_a_kill_frees_the_slot_and_leaves_the_stream_in_step(client: gmprpc.Client) -> None:
    with suppress(gevent.Timeout), gevent.Timeout(0.01):
        client.call("hold", 1)
    killed = gevent.spawn(client.call, "hold", 2)
    wait_until(lambda: client.statistics()["pending"] == 1)
    killed.kill()
    assert client.statistics()["pending"] == 0
    client.call("release")
    assert client.call("echo", "in step") == "in step"


def test_a_stray_switch_is_no_answer(client: gmprpc.Client) -> None:
    caller = gevent.spawn(client.call, "hold", "answer")
    wait_until(lambda: client.statistics()["pending"] == 1)
    gevent.get_hub().loop.run_callback(caller.switch, "stray")
    gevent.sleep(0)
    client.call("release")
    assert caller.get() == "answer"


def test_connecting_times_out(scripted: Scripted) -> None:
    # A server that accepts and says nothing to a TLS client.
    import ssl

    client = gmprpc.Client(scripted.address, ssl_context=ssl.create_default_context(), connect_timeout=0.05)
    with pytest.raises(gmprpc.ConnectFailed, match=r"no connection within 0.05 s"):
        client.call("echo", 1)
    with pytest.raises(gmprpc.CallTimeout):
        client.call("echo", 1, timeout=0.01)


@pytest.mark.parametrize("timeout", ["5", -1, float("nan")])
def test_a_time_out_that_is_none_is_refused_before_anything_is_sent(client: gmprpc.Client, timeout: Any) -> None:
    for call in (client.call, client.call_async):
        with pytest.raises(ValueError, match="timeout has to be None or a number of seconds"):
            call("echo", 1, timeout=timeout)
    assert client.statistics()["pending"] == 0


def test_a_time_out_counts_from_the_call_and_not_from_the_last_turn_of_the_loop(client: gmprpc.Client) -> None:
    client.call("echo", 1)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    assert client.call("echo", 2, timeout=0.25) == 2
    assert client.call_async("echo", 3, timeout=0.25).get() == 3


# Connecting.


def test_making_a_client_does_no_io_and_the_first_call_connects(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address)
    assert not client.is_connected
    assert server.statistics()["connections"] == 0
    assert client.call("echo", 1) == 1
    assert client.is_connected
    client.close()


def test_calls_made_before_the_connection_is_up_are_sent_in_order(service: gmprpc.Service) -> None:
    order: list[int] = []
    service.register(lambda number: order.append(number), "note")
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        client = gmprpc.Client(server.address)
        calls = [client.call_async("note", number) for number in range(10)]
        late = client.call_async("hold", 1, timeout=0.02)
        given_up = client.call_async("note", 99)
        given_up.cancel()
        assert client.statistics()["pending"] == 11
        waiting = [gevent.spawn(client.call, "echo", number) for number in range(3)]
        gevent.joinall(waiting)
        for call in calls:
            call.get()
        assert order == list(range(10))
        assert [greenlet.value for greenlet in waiting] == [0, 1, 2]
        with pytest.raises(gmprpc.CallTimeout):
            late.get()
        assert server.statistics()["connections"] == 1
        client.call("release")
        client.close()


def free_address() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()


def test_where_nobody_listens_every_call_fails_as_connect_failed() -> None:
    errors: list[Exception] = []
    client = gmprpc.Client(free_address(), retry_interval=None, on_error=lambda client, exc: errors.append(exc))
    queued = client.call_async("echo", 1)
    with pytest.raises(gmprpc.ConnectFailed) as caught:
        client.call("echo", 1)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert caught.value.sent is False
    with pytest.raises(gmprpc.ConnectFailed):
        queued.get()
    with pytest.raises(gmprpc.ConnectFailed):
        client.notify("log")
    wait_until(lambda: len(errors) == 2)


def test_the_hooks_see_the_socket_before_and_after_it_connects(server: gmprpc.Server) -> None:
    seen: list[Any] = []

    def before(client: gmprpc.Client, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        seen.append(client)

    def after(client: gmprpc.Client, sock: socket.socket) -> None:
        seen.append(sock.getpeername())

    with gmprpc.Client(server.address, before_connect=before, after_connect=after) as client:
        assert client.call("echo", 1) == 1
        assert seen == [client, server.address]


def test_it_connects_to_unix_sockets(service: gmprpc.Service, tmp_path: Path) -> None:
    with (
        gmprpc.Server(f"unix:{tmp_path}/socket", service) as server,
        gmprpc.Client(server.address) as client,
    ):
        assert client.call("echo", 1) == 1


@pytest.mark.parametrize("address", ["nonsense", 5, "", "unix:", ("host",), None, "host:port"])
def test_what_is_no_address_is_refused_at_once(address: Any) -> None:
    with pytest.raises(ValueError, match="is no address"):
        gmprpc.Client(address)


def test_a_call_after_the_connection_was_lost_connects_anew(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address) as client:
        first = scripted.accept()
        first.close()
        wait_until(lambda: not client.is_connected)
        call = gevent.spawn(client.call, "hello")
        second = scripted.accept()
        _, msgid, method, _ = second.receive()
        assert method == "hello"
        second.send([1, msgid, None, "again"])
        assert call.get() == "again"


def test_a_closed_client_calls_no_more_until_it_is_connected_again(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address)
    client.call("echo", 1)
    client.close()
    client.close()
    for call in (client.call, client.call_async, client.notify):
        with pytest.raises(gmprpc.ConnectionClosed, match="the client is closed"):
            call("echo", 1)
    with client:
        assert client.call("echo", 2) == 2


def test_close_while_connecting_ends_the_calls_that_wait(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address)
    queued = client.call_async("echo", 1)
    waiting = gevent.spawn(client.call, "echo", 1)
    gevent.sleep(0)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        queued.get()
    with pytest.raises(gmprpc.ConnectionClosed):
        waiting.get()


def test_close_ends_a_call_that_waits_for_a_connection_at_once(service: gmprpc.Service) -> None:
    never = Event()
    client = gmprpc.Client(free_address(), before_connect=lambda client, sock: never.wait())
    waiting = gevent.spawn(client.call, "echo", 1)
    gevent.sleep(0)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed, match="the client was closed"):
        waiting.get()


def test_close_closes_a_connection_of_old_that_still_answers_something(scripted: Scripted) -> None:
    service = gmprpc.Service()
    never = Event()
    service.register(lambda: never.wait(), "never")
    client = gmprpc.Client(scripted.address, service=service).connect()
    first = scripted.accept()
    first.send([0, 1, "never", []])
    first.shutdown()
    old = client.connection
    assert old is not None
    wait_until(lambda: not client.is_connected)
    client.connect()
    scripted.accept().close()
    client.close()
    assert old.is_closed
    assert first.receive_rest() == []


@pytest.mark.parametrize("exc", [gevent.Timeout(1), gevent.GreenletExit("x"), SystemExit(1), ValueError("x")], ids=repr)
def test_a_hook_that_raises_fails_the_calls_that_wait(server: gmprpc.Server, exc: BaseException) -> None:
    def hook(client: gmprpc.Client, sock: socket.socket) -> None:
        raise exc

    client = gmprpc.Client(server.address, before_connect=hook)
    for _ in range(2):
        with pytest.raises((gmprpc.ConnectFailed, ValueError)):
            client.call("echo", 1)


def test_a_hook_that_calls_is_told_that_it_cant(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address, after_connect=lambda client, sock: client.call("login"))
    with pytest.raises(RuntimeError, match="a hook can't call"):
        client.call("echo", 1)


# The end of the connection.


def reset(peer: Peer) -> None:
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    peer.close()


@pytest.mark.parametrize(
    "end, cause",
    [
        (Peer.close, None),
        (Peer.shutdown, None),
        (reset, gmprpc.ConnectionClosed),
        (lambda peer: peer.send_bytes(b"\xc1"), gmprpc.ProtocolError),
        (lambda peer: peer.send_bytes(b"\x94\x01") or peer.shutdown(), gmprpc.ConnectionClosed),
    ],
    ids=["close", "half-close", "reset", "garbage", "amid a message"],
)
def test_every_pending_call_ends_when_the_connection_ends(
    scripted: Scripted, end: Callable[[Peer], Any], cause: type[Exception] | None
) -> None:
    errors: list[Exception] = []
    with gmprpc.Client(scripted.address, on_error=lambda client, exc: errors.append(exc)) as client:
        peer = scripted.accept()
        blocked = [gevent.spawn(client.call, "never") for _ in range(5)]
        pending = [client.call_async("never") for _ in range(5)]
        for _ in range(10):
            peer.receive()
        end(peer)
        waiting: list[Any] = [*blocked, *pending]
        for call in waiting:
            with pytest.raises(gmprpc.ConnectionClosed) as caught:
                call.get()
            assert caught.value.sent is True
            assert type(caught.value.__cause__) is (cause or type(None))
        assert client.statistics()["pending"] == 0
        wait_until(lambda: client.connection is not None and client.connection.is_closed)
        peer.close()
    wait_until(lambda: len(errors) == (cause is not None))


def test_close_ends_the_calls_that_wait(server: gmprpc.Server) -> None:
    client = gmprpc.Client(server.address).connect()
    blocked = gevent.spawn(client.call, "hold", 1)
    pending = client.call_async("hold", 2)
    wait_until(lambda: server.statistics()["in_flight"] == 2)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        blocked.get()
    with pytest.raises(gmprpc.ConnectionClosed):
        pending.get()
    # The server goes on with its handlers, and drops their answers.
    server.service.methods["release"]()
    wait_until(lambda: not server.connections)


def test_a_request_that_had_not_left_goes_out_on_the_next_connection_unseen(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address) as client:
        peer = scripted.accept()
        # More than the kernel takes: what follows waits.
        first = client.call_async("large", b"x" * 20_000_000)
        second = client.call_async("behind")
        blocked = gevent.spawn(client.call, "blocked")
        gevent.sleep(0)
        reset(peer)
        with pytest.raises(gmprpc.ConnectionClosed) as caught:
            first.get()
        assert caught.value.sent is True
        peer = scripted.accept()
        for _ in range(2):
            _, msgid, method, _ = peer.receive()
            peer.send([1, msgid, None, method])
        assert second.get() == "behind"
        assert blocked.get() == "blocked"
        assert client.statistics()["pending"] == 0


def test_answers_for_nobody_are_counted_and_harm_nobody(scripted: Scripted) -> None:
    with gmprpc.Client(scripted.address) as client:
        peer = scripted.accept()
        call = client.call_async("echo")
        _, msgid, _, _ = peer.receive()
        peer.send([1, 12345, None, "nobody"], [1, msgid, None, "yes"], [1, msgid, None, "twice"])
        assert call.get() == "yes"
        wait_until(lambda: client.statistics()["late_answers"] == 2)
        assert client.is_connected


def test_more_calls_than_both_sides_can_buffer_are_all_answered(client: gmprpc.Client) -> None:
    # Neither side may stop reading because the other one doesn't.
    calls = [client.call_async("echo", b"x" * 65_536) for _ in range(500)]
    assert all(call.get() == b"x" * 65_536 for call in calls)
    calls = [client.call_async("echo", number) for number in range(50_000)]
    assert [call.get() for call in calls] == list(range(50_000))


# Both directions.


def test_the_server_calls_back_at_any_depth(service: gmprpc.Service, server: gmprpc.Server) -> None:
    own = gmprpc.Service()

    def bounce(depth: int) -> list[int]:
        if depth == 0:
            return [0]
        result: list[int] = gmprpc.current_call().connection.call("bounce", depth - 1)
        return [depth, *result]

    service.register(bounce)
    own.register(bounce)
    with gmprpc.Client(server.address, service=own) as client:
        assert client.call("bounce", 50) == list(range(50, -1, -1))
        # Beyond max_concurrency there is an error, and no deadlock.
        with pytest.raises(gmprpc.RemoteError, match="too many requests in flight"):
            client.call("bounce", 2000)
        assert client.call("echo", "next") == "next"


def test_the_server_notifies_its_clients(service: gmprpc.Service, server: gmprpc.Server) -> None:
    heard = Event()
    own = gmprpc.Service()
    own.register(lambda text: heard.set(), "news")
    with gmprpc.Client(server.address, service=own) as client:
        client.call("echo", 1)
        for connection in server.connections:
            connection.notify("news", "hello")
        heard.wait()


def test_a_client_without_methods_answers_that_it_has_none(service: gmprpc.Service, client: gmprpc.Client) -> None:
    service.register(lambda: gmprpc.current_call().connection.call("question"), "ask")
    with pytest.raises(gmprpc.RemoteError, match='No such method "question" found'):
        client.call("ask")


def test_a_method_of_the_client_may_call_the_server_while_it_stops(
    service: gmprpc.Service, server: gmprpc.Server
) -> None:
    begun = Event()

    @service.method
    def talk() -> list[str]:
        begun.set()
        connection = gmprpc.current_call().connection
        return [connection.call("say", number) for number in range(3)]

    own = gmprpc.Service()
    go = Event()
    own.register(lambda number: go.wait() and f"word {number}", "say")
    with gmprpc.Client(server.address, service=own) as client:
        talking = client.call_async("talk")
        begun.wait()
        stopping = gevent.spawn(server.stop)
        gevent.sleep(0.01)
        go.set()
        assert talking.get() == ["word 0", "word 1", "word 2"]
        assert stopping.get() == 0
