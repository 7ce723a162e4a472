"""What a client does when its server dies, restarts or isn't there yet, when its own process forks, and in odd places.

The server is a process that counts how often it carries out each call: never twice what wasn't said to be idempotent.
"""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event

import gmprpc

from .counting import Begun, CountingServer, begin, outcome
from .helpers import Scripted, collected, wait_until
from .programs import FORKING_PYTHON, Program
from .proxy import Proxy

pytestmark = pytest.mark.usefixtures("_each_call_ends_once")

#: Seconds that no call here may take, so that one that isn't ended shows.
LONG = 10.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CountingServer]:
    """One that runs."""
    with CountingServer(tmp_path) as server:
        yield server


@pytest.fixture
def absent_server(tmp_path: Path) -> Iterator[CountingServer]:
    """One that is still to be started."""
    server = CountingServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def client(server: CountingServer) -> Iterator[gmprpc.Client]:
    with gmprpc.Client(server.address, timeout=LONG, max_retry_interval=0.05) as client:
        yield client
        wait_until(lambda: client.statistics()["pending"] == 0)


def is_lost(outcome: Any, *, sent: bool = True) -> bool:
    """Whether it is that of a call whose connection ended when its request had left, or before."""
    return type(outcome) is gmprpc.ConnectionClosed and outcome.sent is sent


def raised_by(function: Callable[[], Any]) -> BaseException | None:
    """What ``function`` raises."""
    try:
        function()
    except BaseException as exc:
        return exc
    return None


# The server dies, and comes back.


def test_calls_at_work_in_a_server_that_is_killed_are_lost_and_not_made_again(
    server: CountingServer, client: gmprpc.Client
) -> None:
    calls = [call for _ in range(50) for call in begin(server, client, "hold", "never")]
    server.wait_begun(*(call.number for call in calls))
    server.kill()
    assert all(is_lost(call.outcome()) for call in calls)
    # It comes back, and nothing is made up for; the same client goes on.
    server.start()
    number = server.number()
    assert client.call("do", number) == number
    server.wait_quiet(1)
    assert [server.executions(call.number) for call in calls] == [1] * len(calls)


def test_idempotent_calls_at_work_in_a_server_that_is_killed_are_made_again(
    server: CountingServer, client: gmprpc.Client
) -> None:
    calls = [call for _ in range(50) for call in begin(server, client, "pause", 0.3, idempotent=True)]
    server.wait_begun(*(call.number for call in calls))
    server.kill()
    server.start()
    assert [call.outcome() for call in calls] == [call.number for call in calls]
    assert [server.executions(call.number) for call in calls] == [2] * len(calls)


def test_idempotent_calls_end_at_their_deadline_where_the_server_stays_away(
    server: CountingServer, client: gmprpc.Client
) -> None:
    calls = begin(server, client, "hold", "never", idempotent=True, timeout=0.3)
    server.wait_begun(*(call.number for call in calls))
    server.kill()
    for call in calls:
        late = call.outcome()
        assert (type(late), late.timeout) == (gmprpc.CallTimeout, 0.3)
        # It had left once, so it may have been carried out.
        assert late.sent is True
    assert [server.executions(call.number) for call in calls] == [1, 1]


@pytest.mark.parametrize("end", ["timeout", "close", "connect_timeout"])
def test_idempotent_calls_that_a_balancer_cant_make_again_say_that_they_had_left(
    server: CountingServer, end: str
) -> None:
    limits: dict[str, Any] = {} if end == "close" else {end: 0.3}
    balancer = gmprpc.Balancer([server.address], **limits)
    calls = begin(server, balancer, "hold", "never", idempotent=True)
    server.wait_begun(*(call.number for call in calls))
    server.kill()
    wait_until(lambda: not balancer.statistics()["usable_endpoints"])
    later = begin(server, balancer, "hold", "never", idempotent=True)
    if end == "close":
        gevent.sleep(0)
        balancer.close()
    expected = {
        "timeout": gmprpc.CallTimeout,
        "close": gmprpc.ConnectionClosed,
        "connect_timeout": gmprpc.ConnectFailed,
    }
    ended = [call.outcome() for call in calls]
    assert [(type(exc), exc.sent) for exc in ended] == [(expected[end], True)] * 2
    # Unlike those that were made only then.
    assert [call.outcome().sent for call in later] == [False, False]
    balancer.close()


@pytest.mark.parametrize("end", ["close", "connect_timeout", "retry_interval"])
def test_idempotent_calls_that_cant_be_made_again_say_that_they_had_left(server: CountingServer, end: str) -> None:
    options: dict[str, Any] = {"connect_timeout": 0.2} if end == "connect_timeout" else {}
    if end == "retry_interval":
        options["retry_interval"] = None
    client = gmprpc.Client(server.address, **options)
    calls = begin(server, client, "hold", "never", idempotent=True)
    server.wait_begun(*(call.number for call in calls))
    server.kill()
    wait_until(lambda: not client.is_connected)
    later = [] if end == "retry_interval" else begin(server, client, "hold", "never", idempotent=True)
    if end == "close":
        gevent.sleep(0)
        client.close()
    ended = [call.outcome() for call in calls]
    # A dying process may still have somebody in the queue of its listener; that is the second connection then.
    expected = gmprpc.ConnectFailed if end == "connect_timeout" else gmprpc.ConnectionClosed
    assert all(isinstance(closed, expected) and closed.sent is True for closed in ended)
    # Unlike those that were made only then.
    assert all(call.outcome().sent is False for call in later)
    client.close()


def test_a_server_that_stops_in_good_order_answers_first_and_later_calls_wait_for_the_next(
    server: CountingServer, client: gmprpc.Client
) -> None:
    calls = [call for _ in range(10) for call in begin(server, client, "pause", 0.2)]
    server.wait_begun(*(call.number for call in calls))
    server.stop()
    assert [call.outcome() for call in calls] == [call.number for call in calls]
    wait_until(lambda: not client.is_connected)
    later = [call for _ in range(10) for call in begin(server, client, "do")]
    gevent.sleep(0)
    server.start()
    assert [call.outcome() for call in later] == [call.number for call in later]
    assert [server.executions(call.number) for call in calls + later] == [1] * 40


def test_a_client_outlives_many_servers(server: CountingServer, client: gmprpc.Client) -> None:
    for end in (server.kill, server.stop, server.kill):
        number = server.number()
        assert client.call("do", number) == number
        end()
        wait_until(lambda: not client.is_connected)  # What is sent before it knows is lost.
        waiting = begin(server, client, "do")
        server.start()
        assert [call.outcome() for call in waiting] == [call.number for call in waiting]
        assert [server.executions(call.number) for call in waiting] == [1, 1]


# The server isn't there yet.


def test_a_client_may_start_before_its_server(absent_server: CountingServer) -> None:
    server = absent_server
    failures: list[Exception] = []
    client = gmprpc.Client(server.address, max_retry_interval=0.05, on_error=lambda client, exc: failures.append(exc))
    calls = [call for _ in range(10) for call in begin(server, client, "do")]
    notified = server.number()
    notifying = gevent.spawn(client.notify, "do", notified)
    # It has tried more than once in vain.
    wait_until(lambda: len(failures) >= 2)
    assert all(type(failure) is gmprpc.ConnectFailed for failure in failures)
    server.start()
    assert [call.outcome() for call in calls] == [call.number for call in calls]
    notifying.get()
    server.wait_begun(notified)
    assert [server.executions(call.number) for call in calls] == [1] * 20
    assert server.executions(notified) == 1
    client.close()


def test_a_call_waits_for_an_absent_server_for_as_long_as_it_may_and_no_longer(absent_server: CountingServer) -> None:
    server = absent_server
    client = gmprpc.Client(server.address, connect_timeout=0.1, max_retry_interval=0.02)
    for call in begin(server, client, "do", timeout=0.05):
        late = call.outcome()
        assert (type(late), late.timeout, late.sent) == (gmprpc.CallTimeout, 0.05, False)
        assert type(late.__cause__) is gmprpc.ConnectFailed
    # Without a timeout of its own, for connect_timeout.
    for call in begin(server, client, "do"):
        failed = call.outcome()
        assert (type(failed), failed.sent) == (gmprpc.ConnectFailed, False)
    assert type(outcome(client.notify, "do", server.number())) is gmprpc.ConnectFailed
    assert type(outcome(client.connect)) is gmprpc.ConnectFailed
    # None of them is carried out once the server is there.
    server.start()
    number = server.number()
    assert client.call("do", number, timeout=LONG) == number
    server.wait_quiet(1)
    assert not any(server.executions(earlier) for earlier in range(100_000, number))
    client.close()


def test_a_client_that_doesnt_retry_fails_at_the_first_attempt(absent_server: CountingServer) -> None:
    client = gmprpc.Client(absent_server.address, timeout=LONG, retry_interval=None)
    for call in begin(absent_server, client, "do"):
        failed = call.outcome()
        assert type(failed) is gmprpc.ConnectFailed
        assert isinstance(failed.__cause__, ConnectionRefusedError)
    # A later call is another attempt.
    absent_server.start()
    number = absent_server.number()
    assert client.call("do", number) == number
    client.close()


# Forks.

FORKER = """
import os, sys
import gevent, gmprpc
from gevent import monkey
if "patched" in sys.argv:
    monkey.patch_all()

port, number = map(int, sys.argv[1:3])
client = gmprpc.Client(("127.0.0.1", port), timeout=8, max_retry_interval=0.05)
who = "parent"

def tell(line):
    sys.stdout.write(line + "\\n")  # In one piece, also where nothing is buffered: there are two who write.
    sys.stdout.flush()

def say(what, call, *params, **options):
    try:
        result = call(*params, **options)
    except gmprpc.ConnectionClosed as exc:
        result = f"{type(exc).__name__} sent={exc.sent}"
    tell(f"{who} {what} {result}")

blocked = gevent.spawn(say, "blocked", client.call, "hold", number, "fork")
pending = client.call_async("hold", number + 1, "fork")
again = client.call_async("hold", number + 2, "fork", idempotent=True)
gevent.sleep(0)
if "absent" not in sys.argv:
    client.call("do", number + 3)  # All of them have arrived.
pid = os.fork()
if pid == 0:
    who = "child"
    blocked.join()
    say("pending", pending.get)
    say("again", again.get)
    if "absent" not in sys.argv:
        say("call", client.call, "do", number + 4)
        say("call_async", client.call_async("do", number + 5).get)
        client.close()
    tell("child done")
    os._exit(0)
tell("forked")
os.waitpid(pid, 0)
if "absent" in sys.argv:
    tell("waiting")  # The server comes only now: it must be the parent that reaches it.
else:
    client.call("release", "fork")
blocked.join()
say("pending", pending.get)
say("again", again.get)
say("call", client.call, "do", number + 6)
client.close()
"""


@pytest.mark.parametrize("kind", ["plain", "patched"])
def test_after_a_fork_in_mid_call_the_parent_goes_on_and_the_child_begins_anew(
    server: CountingServer, kind: str
) -> None:
    numbers = [server.number() for _ in range(7)]
    with Program(*FORKING_PYTHON, "-c", FORKER, str(server.address[1]), str(numbers[0]), kind) as program:
        said = sorted(program.lines())
        assert program.wait() == 0
    lost = "ConnectionClosed sent=True"
    assert said == [
        f"child again {lost}",
        f"child blocked {lost}",
        f"child call {numbers[4]}",
        f"child call_async {numbers[5]}",
        "child done",
        f"child pending {lost}",
        "forked",
        f"parent again {numbers[2]}",
        f"parent blocked {numbers[0]}",
        f"parent call {numbers[6]}",
        f"parent pending {numbers[1]}",
    ]
    server.wait_quiet()
    assert [server.executions(number) for number in numbers] == [1] * 7


@pytest.mark.parametrize("kind", ["plain", "patched"])
def test_calls_that_wait_for_a_connection_when_their_process_forks_are_the_parents_alone(
    absent_server: CountingServer, kind: str
) -> None:
    server = absent_server
    numbers = [server.number() for _ in range(7)]
    address = str(server.address[1])
    with Program(*FORKING_PYTHON, "-c", FORKER, address, str(numbers[0]), kind, "absent") as program:
        said: list[str] = []
        while not said or said[-1] != "waiting":
            said.append(program.line())
            assert said[-1], said
        lost = "ConnectionClosed sent=False"
        assert sorted(said) == [
            f"child again {lost}",
            f"child blocked {lost}",
            "child done",
            f"child pending {lost}",
            "forked",
            "waiting",
        ]
        server.start()
        server.wait_begun(*numbers[:3])
        server.release("fork")
        assert sorted(program.lines()) == [
            f"parent again {numbers[2]}",
            f"parent blocked {numbers[0]}",
            f"parent call {numbers[6]}",
            f"parent pending {numbers[1]}",
        ]
        assert program.wait() == 0
    server.wait_quiet()
    assert [server.executions(number) for number in numbers] == [1, 1, 1, 0, 0, 0, 1]


FORKER_WITH_THREADS = """
import os, stat, sys, threading
import gevent, gmprpc

port, number = map(int, sys.argv[1:3])
client = gmprpc.Client(("127.0.0.1", port), timeout=8)
client.call("do", number)

def work(number):
    client.call("do", number)
    if number % 2:
        gevent.get_hub().destroy(destroy_loop=True)

for each in range(1, 5):
    thread = threading.Thread(target=work, args=(number + each,))
    thread.start()
    thread.join()
pid = os.fork()
if pid == 0:
    sockets = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                sockets.append(descriptor)
        except OSError:
            pass  # That of the directory.
    print(f"sockets: {sockets}", flush=True)
    print(f"call: {client.call('do', number + 5)}", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(f"call: {client.call('do', number + 6)}", flush=True)
"""


def test_a_fork_after_threads_have_ended_leaves_every_connection_to_the_parent(server: CountingServer) -> None:
    numbers = [server.number() for _ in range(7)]
    with Program(*FORKING_PYTHON, "-c", FORKER_WITH_THREADS, str(server.address[1]), str(numbers[0])) as program:
        assert program.lines() == ["sockets: []", f"call: {numbers[5]}", f"call: {numbers[6]}"]
        assert program.wait() == 0
    server.wait_quiet()
    assert [server.executions(number) for number in numbers] == [1] * 7


# Threads.


class Thread(threading.Thread):
    """Runs ``target`` with a hub of its own, which it destroys as gevent wants it; `result` waits in this hub."""

    def __init__(self, target: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = target
        self._result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as exc:
            self._result = exc
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    def result(self) -> Any:
        """What it returned or raised."""
        wait_until(lambda: not self.is_alive())
        self.join()
        return self._result


def test_two_native_threads_share_a_client_each_with_a_connection_of_its_own(
    server: CountingServer, client: gmprpc.Client
) -> None:
    may_end = threading.Event()

    def work() -> None:
        for _ in range(50):
            calls = begin(server, client, "do")
            assert [call.outcome() for call in calls] == [call.number for call in calls]

    def work_and_wait() -> bool:
        work()
        return may_end.wait(LONG)

    threads = [Thread(work_and_wait) for _ in range(2)]
    work()
    server.wait_quiet(3)
    may_end.set()
    assert [thread.result() for thread in threads] == [True, True]
    # With a thread its connection ends.
    server.wait_quiet(1)
    last = server.number()
    assert all(server.executions(number) == 1 for number in range(100_000, last))


def test_threads_whose_connections_are_reset_lose_nothing_but_what_was_under_way(server: CountingServer) -> None:
    with Proxy(server.address) as proxy:
        client = gmprpc.Client(proxy.address, timeout=LONG, max_retry_interval=0.01)
        outcomes: dict[int, Any] = {}
        is_over = False

        def work() -> bool:
            while not is_over:
                calls = begin(server, client, "do")
                outcomes.update((call.number, call.outcome()) for call in calls)
            return True

        threads = [Thread(work) for _ in range(2)]
        for number in range(20):
            wait_until(lambda: sum(not line.is_over and line.answers.position > 0 for line in proxy.lines) == 2)
            if number % 2:
                proxy.line.reset()
            else:
                proxy.reset_all()
        is_over = True
        assert [thread.result() for thread in threads] == [True, True]
        client.close()
    server.wait_quiet()
    for number, found in outcomes.items():
        assert found == number or is_lost(found), found
        assert server.executions(number) == 1 or (is_lost(found) and server.executions(number) == 0)
    assert sum(found == number for number, found in outcomes.items()) >= 20


# Closing.


def test_close_ends_each_call_once_wherever_it_is(server: CountingServer) -> None:
    client = gmprpc.Client(server.address, timeout=LONG, max_pending=10)
    at_work = [call for _ in range(5) for call in begin(server, client, "hold", "never")]
    server.wait_begun(*(call.number for call in at_work))
    # No more may be pending: these wait, or are queued.
    waiting = begin(server, client, "do")
    notified = server.number()
    notifying = gevent.spawn(outcome, client.notify, "do", notified)
    gevent.sleep(0)
    closing = [gevent.spawn(client.close) for _ in range(2)]
    assert all(is_lost(call.outcome()) for call in at_work)
    assert all(is_lost(call.outcome(), sent=False) for call in waiting)
    assert is_lost(notifying.get(), sent=False)
    gevent.joinall(closing, raise_error=True)
    assert client.statistics()["pending"] == 0
    assert is_lost(outcome(client.call, "do", server.number()), sent=False)
    # Open again, it makes up for nothing.
    number = server.number()
    assert client.connect().call("do", number) == number
    client.close()
    assert [server.executions(call.number) for call in at_work] == [1] * 10
    assert [server.executions(call.number) for call in waiting] == [0, 0]


def test_close_ends_the_calls_that_wait_for_an_absent_server(absent_server: CountingServer) -> None:
    client = gmprpc.Client(absent_server.address, timeout=LONG)
    calls = begin(absent_server, client, "do", idempotent=True)
    notifying = gevent.spawn(outcome, client.notify, "do", absent_server.number())
    connecting = gevent.spawn(outcome, client.connect)
    gevent.sleep(0.01)
    client.close()
    assert all(is_lost(call.outcome(), sent=False) for call in calls)
    assert is_lost(notifying.get(), sent=False)
    assert is_lost(connecting.get(), sent=False)


@pytest.mark.parametrize("place", ["hub", "link", "handler", "on_error", "thread"])
def test_close_may_be_called_anywhere_and_ends_the_calls(server: CountingServer, place: str) -> None:
    own = gmprpc.Service()
    closed: list[Any] = []
    client: gmprpc.Client

    def close(*_: Any) -> None:
        closed.append(raised_by(client.close))

    with Proxy(server.address) as proxy:
        client = gmprpc.Client(proxy.address, service=own, timeout=LONG, max_retry_interval=0.01, on_error=close)
        own.register(close, "close")
        calls = begin(server, client, "hold", "never")
        server.wait_begun(*(call.number for call in calls))
        if place == "hub":
            gevent.get_hub().loop.run_callback(close)
        elif place == "link":
            client.call_async("do", server.number()).rawlink(close)
        elif place == "handler":
            assert is_lost(outcome(client.call, "ask_back", server.number(), "close"))
        elif place == "on_error":
            proxy.reset_all()
        else:
            assert Thread(close).result() is None
        assert all(is_lost(call.outcome()) for call in calls)
        wait_until(lambda: closed)
        assert closed[0] is None
        assert is_lost(outcome(client.call, "do", server.number()), sent=False)
        server.release("never")
        wait_until(lambda: not proxy.lines)
        client.close()


# Calls from odd places.


def test_a_callback_of_the_loop_may_call_async_and_is_told_that_it_cant_block(
    server: CountingServer, client: gmprpc.Client
) -> None:
    number = server.number()
    found: list[Any] = []

    def call() -> None:
        try:
            client.call("do", server.number())
        except RuntimeError as exc:
            found.append(exc)
        found.append(client.call_async("do", number))

    for begin_call in (
        lambda: gevent.get_hub().loop.run_callback(call),
        lambda: client.call_async("do", server.number()).rawlink(lambda _: call()),
        lambda: gevent.get_hub().loop.timer(0).start(call),
    ):
        found.clear()
        kept = begin_call()  # A timer that nobody has is closed.
        wait_until(lambda: len(found) == 2)
        del kept
        refused, pending = found
        assert "call_async" in str(refused)
        assert pending.get() == number
        assert server.executions(number) == 1
        number = server.number()


def test_a_callback_of_the_loop_may_call_async_before_there_is_a_connection(absent_server: CountingServer) -> None:
    client = gmprpc.Client(absent_server.address, timeout=LONG, max_retry_interval=0.05)
    number = absent_server.number()
    found: list[Any] = []

    def call() -> None:
        try:
            client.call("do", absent_server.number())
        except RuntimeError as exc:
            found.append(exc)
        found.append(client.call_async("do", number))

    gevent.get_hub().loop.run_callback(call)
    wait_until(lambda: len(found) == 2)
    absent_server.start()
    assert found[1].get() == number
    client.close()


def test_calls_from_links_of_calls_follow_each_other_through_a_restart(
    server: CountingServer, client: gmprpc.Client
) -> None:
    outcomes: list[Any] = []
    done = Event()

    def go_on(pending: Any) -> None:
        outcomes.append(outcome(pending.get_nowait))
        if len(outcomes) == 100:
            done.set()
        else:
            client.call_async("do", server.number(), idempotent=True).rawlink(go_on)

    first = server.number()
    client.call_async("do", first, idempotent=True).rawlink(go_on)
    wait_until(lambda: len(outcomes) > 10)
    server.kill()
    server.start()
    done.wait()
    assert outcomes == list(range(first, first + 100))


def test_on_error_may_call_and_waits_for_the_next_connection(server: CountingServer) -> None:
    outcomes: list[Any] = []

    def on_error(client: gmprpc.Client, exc: Exception) -> None:
        number = server.number()
        outcomes.append((number, outcome(client.call, "do", number)))

    with (
        Proxy(server.address) as proxy,
        gmprpc.Client(proxy.address, timeout=LONG, max_retry_interval=0.01, on_error=on_error) as client,
    ):
        number = server.number()
        assert client.call("do", number) == number
        proxy.reset_all()
        wait_until(lambda: outcomes)
        # Also where the attempt to connect has failed.
        proxy.refuse()
        proxy.reset_all()
        gevent.sleep(0.05)
        proxy.listen()
        wait_until(lambda: len(outcomes) >= 3)
        number = server.number()
        assert client.call("do", number) == number
    assert all(found == number for number, found in outcomes)


@pytest.mark.parametrize("hook", ["before_connect", "after_connect"])
def test_a_hook_that_would_wait_for_its_own_connection_is_told_so(server: CountingServer, hook: str) -> None:
    def call(client: gmprpc.Client, sock: Any) -> None:
        client.call("do", server.number())

    hooks: dict[str, Any] = {hook: call}
    client = gmprpc.Client(server.address, timeout=LONG, **hooks)
    with pytest.raises(RuntimeError, match="a hook can't call"):
        client.call("do", server.number())
    client.close()


def test_a_method_of_the_client_may_call_the_server_during_a_call(server: CountingServer) -> None:
    own = gmprpc.Service()
    client: gmprpc.Client

    @own.method
    def inner(depth: int, way: str) -> Any:
        number = server.number()
        params = (number,) if depth == 0 else (number, "inner", depth - 1, way)
        method = "do" if depth == 0 else "ask_back"
        if way == "connection":
            found = gmprpc.current_call().connection.call(method, *params)
        elif way == "client":
            found = client.call(method, *params)
        else:
            found = client.call_async(method, *params).get()
        return [number, *found] if depth else [found]

    with gmprpc.Client(server.address, service=own, timeout=LONG) as client:
        for way in ("connection", "client", "call_async"):
            number = server.number()
            found = client.call("ask_back", number, "inner", 10, way)
            assert found == list(range(number + 1, number + 12))
            assert all(server.executions(each) == 1 for each in [number, *found])


def test_nested_calls_on_a_connection_that_is_reset_end_on_both_sides(server: CountingServer) -> None:
    own = gmprpc.Service()
    inner: list[Begun] = []
    client: gmprpc.Client

    @own.method
    def back() -> Any:
        inner.extend(begin(server, client, "hold", "nested"))
        return [call.outcome() and None for call in inner]

    with (
        Proxy(server.address) as proxy,
        gmprpc.Client(proxy.address, service=own, timeout=LONG, max_retry_interval=0.01) as client,
    ):
        outer = begin(server, client, "ask_back", "back")
        wait_until(lambda: len(inner) == 4)
        server.wait_begun(*(call.number for call in inner))
        proxy.reset_all()
        assert all(is_lost(call.outcome()) for call in outer)
        assert all(is_lost(call.outcome()) for call in inner)
        number = server.number()
        assert client.call("do", number) == number
        server.release("nested")
        server.wait_quiet(1)
        assert [server.executions(call.number) for call in outer + inner] == [1] * 6


# Nothing is left behind.


def census() -> tuple[int, int, int]:
    """How many greenlets, descriptors and threads there are."""
    collected()
    greenlets = sum(isinstance(thing, gevent.Greenlet) and not thing.dead for thing in gc.get_objects())
    return greenlets, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("way", ["call", "call_async"])
@pytest.mark.parametrize("is_told", [False, True])
def test_1000_time_outs_in_a_row_leave_nothing_behind(scripted: Scripted, way: str, is_told: bool) -> None:
    with gmprpc.Client(scripted.address, timeout=0.0005, cancel_on_timeout=is_told) as client:
        peer = scripted.accept()

        def time_out(count: int) -> None:
            for number in range(count):
                call = client.call if way == "call" else client.call_async("never", number).get
                late = outcome(call, "never", number) if way == "call" else outcome(call)
                assert type(late) is gmprpc.CallTimeout

        time_out(20)
        before = census()
        time_out(1000)
        assert client.statistics()["pending"] == 0
        wait_until(lambda: census() <= before)
        # Each request has left, and its answer comes too late.
        msgids = []
        while len(msgids) < 1020:
            kind, *message = peer.receive()
            if kind == 0:
                msgids.append(message[0])
        assert len(set(msgids)) == 1020
        peer.send(*([1, msgid, None, "late"] for msgid in msgids))
        wait_until(lambda: client.statistics()["late_answers"] == 1020)
        assert client.is_connected
        wait_until(lambda: census() <= before)


def test_1000_calls_that_time_out_before_there_is_a_connection_leave_nothing_behind(
    absent_server: CountingServer,
) -> None:
    client = gmprpc.Client(absent_server.address, max_retry_interval=0.01)

    def time_out(count: int) -> None:
        for number in range(count):
            if number % 2:
                late = outcome(client.call, "do", absent_server.number(), timeout=0.0005)
            else:
                late = outcome(client.call_async("do", absent_server.number(), timeout=0.0005).get)
            assert (type(late), late.sent) == (gmprpc.CallTimeout, False)

    time_out(20)
    before = census()
    time_out(1000)
    assert client.statistics()["pending"] == 0
    wait_until(lambda: census() <= before)
    client.close()


def test_threads_that_destroy_their_hubs_leave_no_buffers_behind(service: gmprpc.Service) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        client = gmprpc.Client(server.address)

        def run_threads(count: int) -> None:
            for number in range(count):
                assert Thread(partial(client.call, "echo", number)).result() == number
            wait_until(lambda: not server.connections)
            collected()

        run_threads(3)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            run_threads(10)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # What is left of gevent's hub, and of the greenlet that can't be ended any more.
        assert after - before < 10 * 30_000


@pytest.mark.parametrize("has_call", [False, True])
def test_10000_connect_close_cycles_leave_nothing_behind(tmp_path: Path, has_call: bool) -> None:
    # Over a unix socket: there is no lack of ports there, with so many in so little time.
    ended = 0
    service = gmprpc.Service()
    service.register(lambda value: value, "echo")
    with gmprpc.Server(f"unix:{tmp_path}/socket", service) as server:
        client = gmprpc.Client(server.address)

        def cycle(count: int) -> None:
            nonlocal ended
            for number in range(count):
                client.connect()
                if has_call:
                    assert client.call("echo", number) == number
                client.close()
                ended += 1

        cycle(20)
        wait_until(lambda: not server.connections)
        before = census()
        cycle(10_000)
        assert client.statistics()["connections"] == ended
        wait_until(lambda: not server.connections)
        wait_until(lambda: census() <= before)
