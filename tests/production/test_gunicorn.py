"""Several processes under a real gunicorn: what serves, what its signals do, and that nothing which came is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
import trustme

import gmprpc
from gmprpc import tls
from tests.helpers import Peer, is_listening, wait_until
from tests.programs import DEADLINE, Program

from . import gunicorn as programs
from .gunicorn import Fleet, change_app, make_app
from .load import PROGRAMS, Load

#: Start it: ``start(*options, app="app:service", settings="", activated=None)``, ``settings`` being gunicorn's.
Start = Callable[..., Fleet]

ANY_PORT = ("-b", "127.0.0.1:0")


@pytest.fixture
def home(directory: Path) -> Path:
    """Where the application is."""
    make_app(directory)
    return directory


@pytest.fixture
def start_gunicorn(home: Path) -> Iterator[Start]:
    """Start gunicorn itself."""
    with ExitStack() as stack:

        def start(*options: Any, app: str = "app:service", settings: str = "", **how: Any) -> Fleet:
            return stack.enter_context(Fleet(*programs.gunicorn(home, *options, *settings.split(), app=app), **how))

        yield start


@pytest.fixture
def start_workers(home: Path) -> Iterator[Start]:
    """Start `gmprpc serve --workers`."""
    with ExitStack() as stack:

        def start(
            *options: Any,
            app: str = "app:service",
            settings: str = "",
            env: Mapping[str, str] | None = None,
            **how: Any,
        ) -> Fleet:
            env = {"GUNICORN_CMD_ARGS": settings, **(env or {})}
            return stack.enter_context(Fleet(*programs.serve(home, *options, app=app), env=env, **how))

        yield start


@pytest.fixture(params=["gunicorn", "serve"])
def start(request: pytest.FixtureRequest) -> Start:
    """Start either."""
    start: Start = request.getfixturevalue({"gunicorn": "start_gunicorn", "serve": "start_workers"}[request.param])
    return start


def call(fleet: Fleet, method: str, *params: Any) -> Any:
    """One call, over a connection of its own."""
    with gmprpc.Client(fleet.addresses[0]) as client:
        return client.call(method, *params, timeout=DEADLINE)


def address_of(fleet: Fleet) -> tuple[str, int]:
    host, port = fleet.addresses[0].split(":")
    return host, int(port)


def begin(fleet: Fleet, home: Path, method: str, name: str) -> gevent.Greenlet:
    """A call that is at work by now, and ends when `end` says so."""
    greenlet = gevent.spawn(call, fleet, method, name)
    wait_until((home / f"{name}.begun").exists)
    return greenlet


def end(home: Path, name: str) -> None:
    (home / f"{name}.end").touch()


# What serves.


def test_two_workers_serve_at_every_place(start: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start("-w", "2", *ANY_PORT, "-b", f"unix:{path}")
    assert len(fleet.wait_serving(2)) == 2
    for address in fleet.addresses:
        with gmprpc.Client(address) as client:
            assert client.call("pid") in fleet.children
            assert client.call("patched")
            assert client.call("$/health") == "SERVING"
    assert fleet.addresses[1] == f"unix:{path}"
    fleet.terminate()
    assert fleet.wait() == 0
    assert not path.exists()


def test_the_keywords_of_a_server_count_for_each_worker(start_gunicorn: Start) -> None:
    fleet = start_gunicorn(*ANY_PORT, app="app:server")
    with gmprpc.Client(fleet.addresses[0]) as client:
        assert client.call("dispatched") == ["dispatched"]
        with pytest.raises(gmprpc.RemoteError, match="internal error"):
            client.call("fail")


def test_what_gunicorn_is_told_of_connections_and_tls_counts(start_gunicorn: Start, home: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(home / "ca")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(home / "cert")
    client_cert = authority.issue_cert("client").private_key_and_cert_chain_pem
    client_cert.write_to_path(home / "client")
    fleet = start_gunicorn(
        *ANY_PORT,
        *("--certfile", home / "cert", "--ca-certs", home / "ca", "--cert-reqs", "2"),
        "--worker-connections=1",
    )
    address = fleet.addresses[0].replace("127.0.0.1", "localhost")

    def connect(context: Any) -> gmprpc.Client:
        return gmprpc.Client(address, ssl_context=context, retry_interval=None)

    context = tls.client_context(home / "ca", certfile=home / "client")
    with connect(context) as client:
        assert client.call("pid") in fleet.children
        with pytest.raises(gmprpc.ConnectionClosed), connect(context) as one_too_many:
            one_too_many.call("pid")
    with pytest.raises(gmprpc.ConnectionClosed), connect(tls.client_context(home / "ca")) as stranger:
        stranger.call("pid")


def test_what_gunicorn_is_told_of_proxies_and_its_log_counts(start_gunicorn: Start) -> None:
    fleet = start_gunicorn(*ANY_PORT, "--proxy-protocol", "v1", "--access-logfile", "-", "--error-logfile", "-")
    with Peer.connect(address_of(fleet)) as peer:
        peer.send_bytes(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 4423\r\n")
        assert peer.call("version") == [1, 0, None, 1]
    assert re.fullmatch(r"\[.+\] \[\d+\] \[INFO\] 192\.0\.2\.1:1234 version 0 ok .* ms", fleet.line_with(" version "))


def test_the_options_of_serve_count_for_each_worker(start_workers: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start_workers(
        *("-w", "1", "-b", f"unix:{path}", "--no-patch", "--hide-errors", "--no-introspection", "--socket-mode", "600"),
        *("--access-log", "--log-format", "json"),
    )
    assert json.loads(fleet.line_with("Booting worker"))["logger"] == "gunicorn.error"
    assert path.stat().st_mode & 0o777 == 0o600
    with gmprpc.Client(fleet.addresses[0]) as client:
        assert not client.call("patched")
        with pytest.raises(gmprpc.MethodNotFound):
            client.call("$/list")
        with pytest.raises(gmprpc.RemoteError, match="internal error"):
            client.call("fail")
    assert json.loads(fleet.line_with('"gmprpc.access"'))["method"] == "patched"


def test_a_worker_serves_the_demo_too(home: Path) -> None:
    with Fleet("gmprpc", "serve", "-w", "1", *ANY_PORT) as fleet:
        assert call(fleet, "sum", 1, 2) == 3


def test_each_worker_may_have_a_socket_of_its_own(start: Start, reserve: Callable[[], Any]) -> None:
    address = "{}:{}".format(*reserve())
    fleet = start("-w", "2", "-b", address, settings="--reuse-port")
    fleet.addresses = [address]  # The master listens nowhere.
    assert len(fleet.wait_serving(2)) == 2
    fleet.terminate()
    assert fleet.wait() == 0


def test_the_sockets_of_systemd_are_served(start: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start("-w", "2", activated=path)
    assert [address.split(":")[0] for address in fleet.addresses] == ["127.0.0.1", "unix"]
    for _ in range(2):
        fleet.wait_serving(2)
        for address in fleet.addresses:
            with gmprpc.Client(address) as client:
                assert client.call("version") == 1
        fleet.kill(signal.SIGHUP)
    fleet.terminate()
    assert fleet.wait() == 0
    assert path.exists()  # It is systemd's.


def test_the_sockets_of_systemd_may_be_named_with_others(start_workers: Start, home: Path) -> None:
    fleet = start_workers("-w", "1", *("-b", "fd://4", "-b", "fd://3", *ANY_PORT), activated=home / "socket")
    assert len(fleet.addresses) == 3
    for address in fleet.addresses:
        with gmprpc.Client(address) as client:
            assert client.call("version") == 1


# What doesn't.


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """What became of a program that ends by itself."""
    options = {"capture_output": True, "timeout": DEADLINE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(programs.python("-m", *command), encoding="utf-8", check=False, **options)


def test_a_wsgi_application_is_refused(home: Path) -> None:
    process = run(*programs.gunicorn(home, *ANY_PORT, app="app:wsgi"))
    assert process.returncode == 4
    assert "wsgi is no gmprpc.Service or gmprpc.Server" in process.stderr
    assert "gunicorn -k gevent" in process.stderr
    assert "Traceback" not in process.stderr


def test_what_cannot_be_loaded_ends_all_with_one_line_that_says_why(home: Path) -> None:
    process = run(*programs.serve(home, "-w", "2", "-b", f"unix:{home}/socket", app="app:not_there"))
    assert process.returncode == 3
    assert "Error: no 'not_there' in module 'app'; what can be served there: service, server." in process.stderr
    assert "Traceback" not in process.stderr
    assert not (home / "socket").exists()


def test_where_another_server_listens_it_says_so_at_once(home: Path) -> None:
    path = home / "socket"
    with gmprpc.Server(f"unix:{path}"):
        process = run(*programs.serve(home, "-w", "1", *ANY_PORT, "-b", f"unix:{path}"))
        assert process.returncode == 3
        (line,) = process.stderr.splitlines()
        assert f"can't listen on unix:{path}: another server listens there" in line
        with gmprpc.Client(f"unix:{path}") as client:
            assert client.call("$/health") == "SERVING"


def test_gunicorn_says_what_is_wrong_with_its_arguments(home: Path) -> None:
    process = run(
        *programs.serve(home, "-w", "1", *ANY_PORT), env={**os.environ, "GUNICORN_CMD_ARGS": "--no-such-thing"}
    )
    assert process.returncode == 2
    assert "GUNICORN_CMD_ARGS: error: unrecognized arguments: --no-such-thing" in process.stderr


# Signals.


def test_a_signal_shows_what_each_worker_is_at_work_on(start_gunicorn: Start, home: Path) -> None:
    fleet = start_gunicorn("-w", "1", *ANY_PORT)
    pending = begin(fleet, home, "begin", "a")
    fleet.kill(signal.SIGUSR1)
    fleet.line_with("request 0 of begin")
    end(home, "a")
    assert pending.get() == "a"


def test_a_stop_answers_what_is_in_flight(start: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start("-w", "2", "-b", f"unix:{path}")
    calls = [begin(fleet, home, "begin", "a"), begin(fleet, home, "defer", "b")]
    fleet.terminate()
    wait_until(lambda: not path.exists())
    assert not any(pending.ready() for pending in calls)
    end(home, "a")
    end(home, "b")
    assert [pending.get() for pending in calls] == ["a", "b"]
    assert fleet.wait() == 0


def test_what_is_in_flight_for_too_long_is_cut_before_gunicorn_kills(start_workers: Start, home: Path) -> None:
    fleet = start_workers("-w", "1", *ANY_PORT, "--graceful-timeout", "2")
    pending = begin(fleet, home, "begin", "a")
    fleet.terminate()
    with pytest.raises(gmprpc.ConnectionClosed):
        pending.get()
    lines = fleet.lines()
    assert any("1 requests were cut after" in line for line in lines), lines
    assert fleet.wait() == 0


def test_a_delay_is_for_those_who_have_to_learn_that_nobody_serves_any_more(start_workers: Start) -> None:
    fleet = start_workers("-w", "1", *ANY_PORT, "--drain-delay", "3", "--graceful-timeout", "2")
    old = fleet.wait_serving(1)
    with gmprpc.Client(fleet.addresses[0]) as client:
        assert client.call("pid") == old[0]
        fleet.kill(signal.SIGHUP)  # Now there is somebody.
        wait_until(lambda: client.call("pid", idempotent=True, timeout=DEADLINE) != old[0])
        assert client.call("$/health") == "SERVING"
        fleet.terminate()
        wait_until(lambda: client.call("$/health") == "NOT_SERVING")
        assert call(fleet, "$/health") == "NOT_SERVING"  # Whoever comes now is still served.
        pending = client.call_async("begin", "never ends")
        with pytest.raises(gmprpc.ConnectionClosed):  # Which gunicorn has left it the time to say.
            pending.get()
    lines = fleet.lines()
    assert any("1 requests were cut after 2 s" in line for line in lines), lines
    assert fleet.wait() == 0


def test_a_process_that_a_method_forks_off_holds_nothing_open(start_gunicorn: Start) -> None:
    fleet = start_gunicorn("-w", "1", *ANY_PORT)
    with gmprpc.Client(fleet.addresses[0]) as client:
        child = client.call("fork")
        try:
            fleet.terminate()
            wait_until(fleet.has_ended)
            assert not is_listening(address_of(fleet))
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_quick_stop_cuts_what_is_in_flight(
    start_gunicorn: Start, home: Path, signum: signal.Signals, is_stopping: bool
) -> None:
    fleet = start_gunicorn(*ANY_PORT)
    pending = begin(fleet, home, "begin", "a")
    if is_stopping:
        fleet.terminate()
        fleet.line_with("Handling signal: term")
    fleet.kill(signum)
    with pytest.raises(gmprpc.ConnectionClosed):
        pending.get()
    assert fleet.wait() == 0


def test_workers_may_become_more_and_fewer(start_gunicorn: Start, home: Path) -> None:
    fleet = start_gunicorn("-w", "1", *ANY_PORT)
    (first,) = fleet.wait_serving(1)
    pending = begin(fleet, home, "begin", "a")
    fleet.kill(signal.SIGTTIN)
    assert len(fleet.wait_serving(2)) == 2
    fleet.kill(signal.SIGTTOU)  # The oldest one goes, when it has answered.
    end(home, "a")
    assert pending.get() == "a"
    fleet.wait_serving(1, but=[first])


def test_a_reload_serves_the_new_code(start: Start, home: Path) -> None:
    fleet = start("-w", "2", *ANY_PORT, "-b", f"unix:{home}/socket")
    old = fleet.wait_serving(2)
    pending = begin(fleet, home, "begin", "a")
    change_app(home, "VERSION = 1", "VERSION = 2")
    fleet.kill(signal.SIGHUP)
    wait_until(lambda: len(set(old) & set(fleet.children)) == 1)
    end(home, "a")
    assert pending.get() == "a"
    fleet.wait_serving(2, but=old)
    for address in fleet.addresses:  # The file of the socket is there, too.
        with gmprpc.Client(address) as client:
            assert client.call("version") == 2


def test_whoever_is_at_work_on_the_application_sees_what_is_wrong_with_it(start_workers: Start, home: Path) -> None:
    fleet = start_workers("-w", "1", *ANY_PORT, settings="--reload")
    assert call(fleet, "version") == 1

    def touch_on_and_on() -> None:  # Gunicorn looks every second, and takes what it sees at first for unchanged.
        while True:
            (home / "app.py").touch()
            gevent.sleep(0.1)

    def change(before: str, after: str) -> None:
        change_app(home, before, after)
        touching = gevent.spawn(touch_on_and_on)
        fleet.line_with("modified")
        touching.kill()
        fleet.line_with("Booting worker")

    change("VERSION = 1", "VERSION = 2x")
    with pytest.raises(gmprpc.RemoteError, match="the application can't be loaded: SyntaxError: invalid decimal"):
        call(fleet, "version")
    assert call(fleet, "$/health") == "NOT_SERVING"
    change("VERSION = 2x", "VERSION = 2")
    assert call(fleet, "version") == 2


def test_old_workers_serve_until_a_new_one_does(start_gunicorn: Start, home: Path) -> None:
    fleet = start_gunicorn("-w", "2", *ANY_PORT)
    old = fleet.wait_serving(2)
    change_app(home, "VERSION = 1", "VERSION = 2\\nwhile not (HERE / 'load').exists(): gevent.sleep(0.01)")
    with gmprpc.Client(fleet.addresses[0]) as client:
        fleet.kill(signal.SIGHUP)
        wait_until(lambda: len(fleet.children) == 4)
        for _ in range(2):  # Also those who come now.
            assert client.call("version") == call(fleet, "version") == 1
            gevent.sleep(0.5)  # Long after gunicorn has stopped the old ones.
        (home / "load").touch()
        fleet.wait_serving(2, but=old)
        assert call(fleet, "version") == 2


def test_a_worker_that_has_carried_out_enough_calls_is_replaced(start_workers: Start) -> None:
    fleet = start_workers("-w", "1", *ANY_PORT, settings="--max-requests 10")
    (first,) = fleet.wait_serving(1)
    with gmprpc.Client(fleet.addresses[0]) as client:
        assert client.call("$/health") == "SERVING"
        wait_until(lambda: client.call("pid", idempotent=True, timeout=DEADLINE) != first)
    fleet.line_with("Autorestarting worker after 10 calls.")
    fleet.wait_serving(1, but=[first])


@pytest.mark.parametrize("settings", ["", "--preload"])
def test_a_worker_says_what_blocks_its_hub(start_workers: Start, home: Path, settings: str) -> None:
    fleet = start_workers("-w1", *ANY_PORT, "--max-blocking-time=0.1", settings=f"--timeout 3 {settings}")
    fleet.wait_serving(1)
    pending = gevent.spawn(call, fleet, "block")
    assert "WARNING gmprpc.hub: request 0 of block from 127.0.0.1:" in fleet.line_with("blocks the hub, for ")
    with pytest.raises((gmprpc.ConnectionClosed, gmprpc.RemoteError)):
        pending.get()


def test_a_worker_whose_hub_is_blocked_is_replaced(start_gunicorn: Start, home: Path) -> None:
    fleet = start_gunicorn("-w", "1", *ANY_PORT, "--timeout", "1")
    (blocked,) = fleet.wait_serving(1)
    pending = gevent.spawn(call, fleet, "block")
    with pytest.raises((gmprpc.ConnectionClosed, gmprpc.RemoteError)):
        pending.get()
    fleet.wait_serving(1, but=[blocked])


def test_a_worker_that_stops_shows_that_it_lives(start_gunicorn: Start, home: Path) -> None:
    fleet = start_gunicorn(*ANY_PORT, "--timeout", "1")
    (worker,) = fleet.wait_serving(1)
    pending = begin(fleet, home, "begin", "a")
    fleet.kill(signal.SIGTTIN)
    os.kill(worker, signal.SIGTERM)
    gevent.sleep(3)  # Three times as long as it may go without a sign of life.
    assert worker in fleet.children
    end(home, "a")
    assert pending.get() == "a"


def test_a_master_that_is_told_to_execute_itself_anew_hands_its_sockets_on(start: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start("-w", "1", "-b", f"unix:{path}")
    (old,) = fleet.wait_serving(1)
    fleet.kill(signal.SIGUSR2)
    fleet.line_with("Listening at: ")
    wait_until(lambda: len(fleet.children) == 2)
    (master,) = set(fleet.children) - {old}
    wait_until(lambda: call(fleet, "pid") != old)
    fleet.terminate()
    wait_until(fleet.has_ended)
    assert path.exists()
    assert call(fleet, "pid") != old
    fleet.line_with("Master has been promoted.")
    os.kill(master, signal.SIGTERM)
    fleet.lines()
    wait_until(lambda: not path.exists())


def test_a_stop_while_workers_boot_is_a_good_end(start: Start, home: Path) -> None:
    path = home / "socket"
    fleet = start("-w", "2", "-b", f"unix:{path}")
    fleet.line_with("Booting worker")
    fleet.terminate()
    assert fleet.wait() == 0
    assert not path.exists()


#: What applications may do while they are imported.
IMPORTING = {
    "sleeps": "(HERE / 'importing').touch(); time.sleep(1000)",
    "computes in a greenlet": """
(HERE / "importing").touch()
gevent.spawn(lambda: all(True for _ in iter(int, 1))).join()
""",
    "makes something else of a signal": """
try:
    (HERE / "importing").touch()
    time.sleep(1000)
except BaseException as exc:
    raise ImportError("it can't be had") from exc
""",
    "makes nothing of a signal": """
try:
    (HERE / "importing").touch()
    time.sleep(1000)
except BaseException:
    pass
""",
}


@pytest.mark.parametrize("what", IMPORTING)
def test_a_stop_while_workers_load_the_application_is_a_good_end(start_workers: Start, home: Path, what: str) -> None:
    change_app(home, "VERSION = 1", lambda _: f"VERSION = 1\n{IMPORTING[what]}")
    path = home / "socket"
    fleet = start_workers("-w", "1", "-b", f"unix:{path}")
    wait_until((home / "importing").exists)
    fleet.terminate()
    assert fleet.wait() == 0
    assert not path.exists()


def test_a_stop_while_gunicorn_is_configured_is_a_good_end(home: Path) -> None:
    path, config = home / "socket", home / "config.py"
    config.write_text("import time; print('configuring', flush=True); time.sleep(1000)")
    env = {"GUNICORN_CMD_ARGS": f"-c {config}"}
    with Program(*programs.python("-m", *programs.serve(home, "-w", "1", "-b", f"unix:{path}")), env=env) as program:
        program.line_with("configuring")
        program.terminate()
        assert program.wait() == 0
    assert not path.exists()


# Under load: 200 calls a second by clients that never retry.


@pytest.fixture
def load(home: Path) -> Iterator[Load]:
    """The load, for ``counted:service``."""
    (home / "counted.py").write_text((PROGRAMS / "counted.py").read_text() + "\n\nservice.register(os.getpid, 'pid')\n")
    load = Load(home)
    yield load
    load.close()


@contextmanager
def calling(load: Load, fleet: Fleet) -> Iterator[list[gmprpc.Client]]:
    """Meanwhile ten clients call; they have announced themselves."""
    with ExitStack() as stack:
        clients = [stack.enter_context(gmprpc.Client(fleet.addresses[0], draining=True)) for _ in range(10)]
        with load.by(clients):
            yield clients


def assert_each_was_carried_out_once(load: Load) -> None:
    assert load.failed == []
    assert load.executions(load.made) == {1}


@pytest.fixture
def loaded(request: pytest.FixtureRequest, load: Load, reserve: Callable[[], Any]) -> Fleet:
    """Two workers for the load."""
    address = "{}:{}".format(*reserve())
    start: Start = request.getfixturevalue("start_workers" if request.param == "serve" else "start_gunicorn")
    settings = "--reuse-port" if "socket" in request.param else ""
    fleet = start("-w", "2", "-b", address, app="counted:service", settings=settings, env=load.env)
    fleet.addresses = [address]
    return fleet


@pytest.mark.parametrize(
    "loaded, seconds",
    [("gunicorn", 30), ("gunicorn with a socket for each worker", 8), ("serve", 8)],
    indirect=["loaded"],
)
def test_no_call_fails_while_all_workers_are_replaced_three_times(loaded: Fleet, load: Load, seconds: int) -> None:
    with calling(load, loaded):
        for quarter in range(1, 4):
            old = loaded.wait_children(2)
            load.wait(quarter * seconds / 4)
            loaded.kill(signal.SIGHUP)
            loaded.wait_children(2, but=old)
        load.wait(seconds)
    assert_each_was_carried_out_once(load)
    assert len(load.made) >= 200 * seconds * 0.9  # It had to wait for this machine now and then.


def test_no_call_fails_while_workers_are_replaced_that_have_carried_out_enough(
    start_workers: Start, load: Load
) -> None:
    settings = "--max-requests 200 --max-requests-jitter 50"
    fleet = start_workers("-w", "2", *ANY_PORT, app="counted:service", settings=settings, env=load.env)
    first = fleet.wait_children(2)
    with calling(load, fleet):
        load.wait(5)
        fleet.wait_children(2, but=first)
    assert_each_was_carried_out_once(load)


def test_a_worker_that_is_killed_takes_only_the_calls_with_it_that_were_in_flight_on_it(
    start_gunicorn: Start, load: Load
) -> None:
    fleet = start_gunicorn("-w", "2", *ANY_PORT, app="counted:service", env=load.env)
    fleet.wait_serving(2)
    with calling(load, fleet) as clients, ExitStack() as stack:
        workers = [client.call("pid") for client in clients]
        victim = workers[0]
        while set(workers) == {victim}:
            clients.append(stack.enter_context(gmprpc.Client(fleet.addresses[0])))
            workers.append(clients[-1].call("pid"))
        # Besides the load each client has a call in flight, for longer than it takes to kill a worker.
        numbers = [load.number() for _ in clients]
        held = [client.call_async("pause", number, 3) for client, number in zip(clients, numbers, strict=True)]
        wait_until(lambda: all(load.ledger[number] for number in numbers))
        os.kill(victim, signal.SIGKILL)
        for call in held:
            call.wait()
        fleet.wait_serving(2, but=[victim])
        load.wait(5)
    lost = [client for client, worker in zip(clients, workers, strict=True) if worker == victim]
    assert lost == [client for client, call in zip(clients, held, strict=True) if not call.successful()]
    for error in [call.exception for call in held if not call.successful()] + [call.error for call in load.failed]:
        assert isinstance(error, gmprpc.ConnectionClosed)
        assert error.sent
    assert {made.client for made in load.failed} <= set(lost)
    assert load.executions(load.failed) <= {0, 1}
    assert load.executions(load.succeeded) == {1}
