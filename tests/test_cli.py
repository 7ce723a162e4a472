"""The command line, as it is typed: real processes, their output, their exit codes, and signals."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent import socket

import gmprpc

from .commands import ANY_PORT, GMPRPC, Served, assert_fails, assert_misused, result_of, run, serving
from .programs import DEADLINE, Program

APP = '''
import socket
import ssl
import threading

import gmprpc
from gevent import monkey

service = gmprpc.Service()
server = gmprpc.Server(("127.0.0.1", 0), service)
not_callable = 5

happened = threading.Event()
log = []


@service.method
def wait_until_it_happens():
    happened.wait()


@service.method
def let_it_happen():
    happened.set()


@service.method
def append(value):
    log.append(value)
    return log


@service.method
def ask(port):
    """What the test says, over a connection that tells it that the question is being asked."""
    with socket.create_connection(("127.0.0.1", port)) as test:
        return test.recv(100).decode()


@service.method
def shake_hands(certificate, authority):
    """Both ends of a TLS connection in one process: they have to take turns."""
    near, far = socket.socketpair()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(certificate)
    ended = threading.Event()

    def be_server():
        with server_context.wrap_socket(far, server_side=True) as tls:
            tls.sendall(b"hello")
            ended.wait()

    thread = threading.Thread(target=be_server)
    thread.start()
    client_context = ssl.create_default_context(cafile=authority)
    with client_context.wrap_socket(near, server_hostname="localhost") as tls:
        hello = tls.recv(5)
    ended.set()
    thread.join()
    return hello


@service.method
def patched():
    return sorted(name for name in ("time", "socket", "threading", "ssl") if monkey.is_module_patched(name))


@service.method
def fail(error):
    raise gmprpc.ErrorResponse(error)


def make_service():
    return service


class Namespace:
    service = service
'''

try:
    OWN_VERSION: str | None = version("gmprpc")
except PackageNotFoundError:
    OWN_VERSION = None


@pytest.fixture(scope="session")
def app_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module `app` is."""
    directory = tmp_path_factory.mktemp("app")
    (directory / "app.py").write_text(APP, encoding="utf-8")
    return directory


@contextmanager
def serving_app(app_dir: Path, *args: str, **kwargs: Any) -> Iterator[Served]:
    with serving("--app-dir", app_dir, *args, "app:service", **kwargs) as served:
        yield served


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of the demo."""
    with serving() as served:
        yield served.addresses[0]


@pytest.fixture(scope="module")
def app(app_dir: Path) -> Iterator[str]:
    """The address at which `app` is served."""
    with serving_app(app_dir) as served:
        yield served.addresses[0]


class Listener:
    """A server that says just what the test wants; or a number for a question, for the method `ask` of the app."""

    def __init__(self) -> None:
        self._socket = socket.socket()  # gevent's, which `create_server` wouldn't make.
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.port: int = self._socket.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def accept(self) -> socket.socket:
        connection, _ = self._socket.accept()
        return connection

    def answer(self, data: bytes) -> None:
        """Answer the first thing that the next one says with ``data``, and hang up."""

        def serve() -> None:
            with self.accept() as connection:
                connection.recv(1000)
                connection.sendall(data)

        gevent.spawn(serve)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


# The program.


def test_bare_command_serves_demo_and_says_what_to_type_next() -> None:
    with Served(env={"GMPRPC_BIND": ANY_PORT}) as served:
        command = served.expect(" call ").strip()
        assert command == f"python -m gmprpc call {served.addresses[0]} sum 1 2 3"
        python, *args = shlex.split(command)
        assert python == "python"
        process = subprocess.run([sys.executable, "-P", *args], capture_output=True, check=True, timeout=DEADLINE)
        assert (process.stdout, process.stderr) == (b"6\n", b"")


def test_bare_command_listens_on_a_port_of_its_own_by_default() -> None:
    process = run("serve", "--help")
    assert "default: (127.0.0.1:4423)" in " ".join(process.stdout.split())


@pytest.mark.parametrize("wildcard, shown", [("0.0.0.0:0", "127.0.0.1:"), ("[::]:0", "'[::1]:")])
def test_what_to_type_next_names_an_address_that_can_be_called(wildcard: str, shown: str) -> None:
    if wildcard.startswith("[") and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with serving(binds=(wildcard,)) as served:
        assert f" call {shown}" in served.expect(" call ")


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["call"], ["notify"], ["list"], ["describe"], ["health"], ["bench"]]
)
def test_help_fits_and_is_no_error(command: list[str]) -> None:
    process = run(*command, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("Usage: python -m gmprpc")
    assert max(map(len, process.stdout.splitlines())) <= 80


@pytest.mark.skipif(OWN_VERSION is None, reason="gmprpc is not installed, and has no version to show")
def test_version_is_shown() -> None:
    assert run("--version").stdout == f"python -m gmprpc, version {OWN_VERSION}\n"


def test_application_without_serve_says_how_to_serve_it() -> None:
    process = run("app:service", "-b", "unix:a b")
    assert_fails(process, 2, "type: python -m gmprpc serve app:service -b 'unix:a b'")


def test_address_without_call_says_how_to_call_it() -> None:
    assert_fails(run("127.0.0.1:4423", "echo"), 2, "type: python -m gmprpc call 127.0.0.1:4423 echo")


def test_unknown_command_is_misuse() -> None:
    assert_misused(run("dance"), "dance")


# serve: what, and where.


@pytest.mark.parametrize(
    "params, result",
    [
        (["echo", "hello"], "hello"),
        (["echo"], None),
        (["echo", "1", "2"], [1, 2]),
        (["sum", "1", "2", "-3.5"], -0.5),
        (["sleep", "0"], 0),
        (["later", "0", "now"], "now"),
    ],
)
def test_demo_has_methods_to_try(demo: str, params: list[str], result: Any) -> None:
    assert result_of(demo, *params) == result


def test_time_of_the_demo_is_a_timestamp(demo: str) -> None:
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", result_of(demo, "time")["$timestamp"])


@pytest.mark.parametrize("name", ["service", "server", "Namespace.service"])
def test_attribute_may_be_a_service_or_a_server(app_dir: Path, name: str) -> None:
    with serving("--app-dir", app_dir, f"app:{name}") as served:
        assert result_of(served.addresses[0], "append", "1") == [1]


def test_factory_makes_the_service(app_dir: Path) -> None:
    with serving("--app-dir", app_dir, "--factory", "app:make_service") as served:
        assert result_of(served.addresses[0], "append", "1") == [1]


def test_module_is_looked_for_in_the_current_directory(app_dir: Path) -> None:
    process = run("serve", "app:nothing", cwd=app_dir)
    assert_fails(process, 3, "no 'nothing' in module 'app'")


def test_each_bind_serves_the_one_service(app_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving_app(app_dir, binds=(ANY_PORT, f"unix:{path}")) as served:
        tcp, unix = served.addresses
        assert unix == f"unix:{path}"
        with gmprpc.Client(tcp) as one, gmprpc.Client(unix) as other:
            assert one.call("append", 1) == [1]
            assert other.call("append", 2) == [1, 2]


def test_environment_has_a_name_for_each_bind_and_limit(app_dir: Path, tmp_path: Path) -> None:
    env = {
        "GMPRPC_BIND": f"{ANY_PORT} unix:{tmp_path}/socket",
        "GMPRPC_MAX_MESSAGE_SIZE": "100",
        "GMPRPC_MAX_CONCURRENCY": "1",
        "GMPRPC_HIDE_ERRORS": "yes",
        "GMPRPC_GRACEFUL_TIMEOUT": "7",
    }
    with Served("serve", "--app-dir", app_dir, "app:service", listeners=2, env=env) as served:
        with gmprpc.Client(served.addresses[0]) as client, gmprpc.Client(served.addresses[1]) as other:
            with pytest.raises(gmprpc.ConnectionClosed):
                client.call("append", "x" * 100)
            with pytest.raises(gmprpc.RemoteError, match="internal error"):
                client.call("ask", "no number")

            # One request at a time: the second is read when the first is done.
            pending = [client.call_async("wait_until_it_happens"), client.call_async("append", "second")]
            other.call("append", "first")
            other.call("let_it_happen")
            assert pending[0].get() is None
            assert pending[1].get() == ["first", "second"]
        served.terminate()
        served.expect("stopping on SIGTERM: 0 requests in flight, 7 s for them")


@pytest.mark.parametrize("by_option", [True, False])
def test_time_limits_reach_the_connections(by_option: bool) -> None:
    limits = {"idle-timeout": "0.01"}, {"read-timeout": "0.01"}
    for limit, data in zip(limits, (b"", b"\x94\x00"), strict=True):
        ((name, value),) = limit.items()
        options = [f"--{name}={value}"] if by_option else []
        env = {} if by_option else {f"GMPRPC_{name.upper().replace('-', '_')}": value}
        with Served("serve", *options, "-b", ANY_PORT, env=env) as served:
            host, port = served.addresses[0].split(":")
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(data)
                assert sock.recv(1) == b""


def test_limits_of_connections_and_answers_reach_the_server(app_dir: Path) -> None:
    options = ["--max-connections=1", "--max-unsent-size=1", "--reply-timeout=0.05"]
    with serving_app(app_dir, *options) as served, gmprpc.Client(served.addresses[0]) as client:
        with pytest.raises(gmprpc.RemoteError, match=r"no answer within 0\.05 s"):
            client.call("wait_until_it_happens")
        host, port = served.addresses[0].split(":")
        with socket.create_connection((host, int(port))) as sock:
            assert sock.recv(1) == b""
        served.expect(r"refused: there are max_connections \(1\)")


@pytest.mark.parametrize("by_option", [True, False])
def test_without_introspection_callers_are_not_told_what_there_is(by_option: bool) -> None:
    options, env = (["--no-introspection"], {}) if by_option else ([], {"GMPRPC_NO_INTROSPECTION": "1"})
    with serving(*options, env=env) as served, gmprpc.Client(served.addresses[0]) as client:
        for params in (["$/list"], ["$/describe", "echo"]):
            with pytest.raises(gmprpc.MethodNotFound):
                client.call(*params)
        assert client.call("$/health") == "SERVING"


def test_the_file_of_a_unix_socket_is_made_as_the_options_say(app_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    options = ["--socket-mode=600", f"--socket-user={os.getuid()}"]
    with serving_app(app_dir, *options, binds=(f"unix:{path}", ANY_PORT)):
        assert path.stat().st_mode & 0o777 == 0o600
    process = run("serve", "-b", f"unix:{path}", env={**os.environ, "GMPRPC_SOCKET_GROUP": "no such group"})
    assert_fails(process, 3, f"can't listen on unix:{path}: no such group: 'no such group'")
    assert_misused(run("serve", "--socket-mode=rw"), "'rw' are no permissions: give an octal number, as in 660")


def test_option_outweighs_environment(app_dir: Path) -> None:
    with (
        serving_app(app_dir, "--max-message-size", "200", env={"GMPRPC_MAX_MESSAGE_SIZE": "100"}) as served,
        gmprpc.Client(served.addresses[0]) as client,
    ):
        assert client.call("append", "x" * 100) == ["x" * 100]


def test_descriptor_of_a_listening_socket_is_served() -> None:
    # As systemd does it.
    activate = (
        "import os, socket, sys\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "os.dup2(listener.fileno(), 3)\n"
        "os.set_inheritable(3, True)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    with Program(sys.executable, "-c", activate, *GMPRPC, "serve", "-b", "fd://3") as served:
        address = served.line().removeprefix("listening on ")
        assert result_of(address, "echo", "hello") == "hello"


def test_descriptor_that_does_not_listen_is_said_in_one_line() -> None:
    with socket.socket() as sock:
        descriptor = sock.fileno()
        process = run("serve", "-b", f"fd://{descriptor}", pass_fds=[descriptor])
    assert_fails(process, 3, f"can't listen on fd://{descriptor}: that socket doesn't listen")


def test_port_in_use_is_said_in_one_line(demo: str) -> None:
    assert_fails(run("serve", "-b", demo), 3, f"can't listen on {demo}: Address already in use", "--bind")


@pytest.mark.parametrize(
    "bind, reason",
    [
        ("192.0.2.1:4423", "Cannot assign requested address"),
        ("unix:/nowhere/socket", "No such file or directory"),
        ("unix:/dev/null", "a file that is no socket is in the way"),
        (f"unix:{'x' * 200}", "too long"),
        ("fd://99", "Bad file descriptor"),
        ("fd://0", "Socket operation on non-socket"),
    ],
)
def test_place_that_cannot_be_had_is_said_in_one_line(bind: str, reason: str) -> None:
    assert_fails(run("serve", "-b", bind), 3, f"can't listen on {bind}", reason)


def test_bind_that_fails_takes_the_others_along(demo: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert_fails(run("serve", "-b", f"unix:{path}", "-b", demo), 3, demo)
    assert not path.exists()


@pytest.mark.parametrize("bind", ["4423", "localhost", "localhost:http", "127.0.0.1:99999", "unix:", "fd://x", "a:-1"])
def test_bind_that_is_no_address_is_misuse(bind: str) -> None:
    assert_misused(run("serve", "-b", bind), f"{bind!r} is no address: give HOST:PORT, unix:PATH or fd://N")


@pytest.mark.parametrize(
    "option", ["--graceful-timeout=nan", "--graceful-timeout=-1", "--max-concurrency=0", "--max-message-size=1MB"]
)
def test_limit_that_is_none_is_misuse(option: str) -> None:
    assert_misused(run("serve", option), option.partition("=")[0], option.partition("=")[2])


# serve: loading.


@pytest.mark.parametrize(
    "args, words",
    [
        (["nowhere:service"], ["no module 'nowhere' in", "--app-dir"]),
        (["app.nowhere:service"], ["no module 'app.nowhere' in"]),
        (["app:nothing"], ["no 'nothing' in module 'app'; what can be served there: service, server"]),
        (["json:nothing"], ["no 'nothing' in module 'json'; it has no Service and no Server"]),
        (["app:not_callable"], ["is no gmprpc.Service or gmprpc.Server, but of type int."]),
        (["app:make_service"], ["but of type function; if it makes one, add --factory"]),
        (["--factory", "app:not_callable"], ["can't be called: leave --factory out"]),
        (["--factory", "builtins:dict"], ["but of type dict."]),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(app_dir: Path, args: list[str], words: list[str]) -> None:
    assert_fails(run("serve", "--app-dir", app_dir, *args), 3, *words)


@pytest.mark.parametrize(
    "target, words",
    [
        ("app", ["MODULE:ATTR"]),
        ("app:", ["MODULE:ATTR"]),
        (":service", ["MODULE:ATTR"]),
        ("app:make()", ["MODULE:ATTR"]),
        ("127.0.0.1:4423", ["MODULE:ATTR", "--bind"]),
        ("app.py:service", ["names a file: name the module, app:service"]),
        ("package/app.py", ["names a file: name the module, package.app:service"]),
    ],
)
def test_target_that_names_no_attribute_is_misuse(target: str, words: list[str]) -> None:
    assert_fails(run("serve", target), 2, *words)


@pytest.mark.parametrize(
    "source, words",
    [
        ("\n\nimport not_installed", ["ModuleNotFoundError: No module named 'not_installed'", "broken.py:3)"]),
        ("import json\njson.loads('{')", ["JSONDecodeError: ", "broken.py:2)"]),
        ("def f():\n    raise KeyError('key')\nf()", ["KeyError: 'key'", "broken.py:2)"]),
        ("raise ValueError('two\\nlines')", ["ValueError: two lines", "broken.py:1)"]),
        ("raise AssertionError", ["can't be loaded: AssertionError (", "broken.py:1)"]),
        ("x = 1\n  y = 2", ["IndentationError: unexpected indent", "broken.py:2)"]),
        ("import sys\nsys.exit('usage')", ["SystemExit: usage", "broken.py:2)"]),
    ],
)
def test_application_that_fails_is_said_in_one_line_with_the_place(
    tmp_path: Path, source: str, words: list[str]
) -> None:
    (tmp_path / "broken.py").write_text(source, encoding="utf-8")
    assert_fails(run("serve", "--app-dir", tmp_path, "broken:service"), 3, "broken:service can't be loaded", *words)


def test_factory_that_fails_is_said_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make():\n    return 1 / 0", encoding="utf-8")
    process = run("serve", "--app-dir", tmp_path, "--factory", "broken:make")
    assert_fails(process, 3, "ZeroDivisionError: division by zero", "broken.py:2)")


# serve: monkey-patching.


def test_blocking_calls_of_the_application_let_others_run(app_dir: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "certificate.pem")
    # Any warning would end it: gevent's about a module that was imported too early, above all.
    command = (sys.executable, "-W", "error", *GMPRPC[1:], "serve", "-b", ANY_PORT, "--app-dir", app_dir, "app:service")
    with (
        Program(*command) as served,
        gmprpc.Client(served.line().removeprefix("listening on ")) as client,
    ):
        assert client.call("patched") == ["socket", "ssl", "threading", "time"]
        waiting = client.call_async("wait_until_it_happens")
        client.call("let_it_happen")
        assert waiting.get() is None
        certificates = [str(tmp_path / "certificate.pem"), str(tmp_path / "authority.pem")]
        assert client.call("shake_hands", *certificates) == b"hello"


def test_no_patch_leaves_the_standard_library_alone(app_dir: Path) -> None:
    with serving_app(app_dir, "--no-patch") as served:
        assert result_of(served.addresses[0], "patched") == []


# serve: the end.


def assert_refused(address: str) -> None:
    with pytest.raises(gmprpc.ConnectFailed), gmprpc.Client(address, retry_interval=None):
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_gracefully(app_dir: Path, tmp_path: Path, listener: Listener, signum: signal.Signals) -> None:
    path = tmp_path / "socket"
    with serving_app(app_dir, binds=(ANY_PORT, f"unix:{path}")) as served:
        clients = [gmprpc.Client(address) for address in served.addresses]
        pending = [client.call_async("ask", listener.port) for client in clients]
        with listener.accept() as one, listener.accept() as other:
            served.kill(signum)
            served.expect(f"stopping on {signum.name}: 2 requests in flight, 30 s for them")
            for address in served.addresses:
                assert_refused(address)
            one.sendall(b"answer")
            other.sendall(b"answer")
        assert [call.get() for call in pending] == ["answer", "answer"]
        assert served.wait() == 0
        assert not path.exists()


def test_requests_that_outlast_the_graceful_timeout_are_cut(app_dir: Path, listener: Listener) -> None:
    with serving_app(app_dir, "--graceful-timeout", "0.1") as served:
        pending = gmprpc.Client(served.addresses[0]).call_async("ask", listener.port)
        with listener.accept():
            served.terminate()
            with pytest.raises(gmprpc.ConnectionClosed):
                pending.get()
            assert "1 requests were cut after 0.1 s" in served.expect("cut")
            assert served.wait() == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigint_stops_at_once(app_dir: Path, listener: Listener, first: signal.Signals) -> None:
    with serving_app(app_dir, binds=(ANY_PORT, ANY_PORT)) as served:
        pending = [gmprpc.Client(address).call_async("ask", listener.port) for address in served.addresses]
        with listener.accept(), listener.accept():
            served.kill(first)
            served.expect("stopping")
            served.kill(signal.SIGINT)
            for call in pending:
                with pytest.raises(gmprpc.ConnectionClosed):
                    call.get()
            for _ in pending:
                served.expect("1 requests were cut after 0 s")
            assert served.wait() == 0


def test_second_sigterm_is_no_reason_to_hurry(app_dir: Path, listener: Listener) -> None:
    with serving_app(app_dir) as served:
        pending = gmprpc.Client(served.addresses[0]).call_async("ask", listener.port)
        with listener.accept() as question:
            served.terminate()
            served.expect("stopping")
            served.terminate()
            question.sendall(b"answer")
            assert pending.get() == "answer"
            assert served.wait() == 0


# call.


@pytest.mark.parametrize(
    "params",
    [
        ["-1", "--timeout", "-d", "--", "-h", "--help"],
        ["1", "1.5", "null", "true", "[1, [2]]", '{"a": 1}', '"1"', "text", "", "NaN"],
        ['{"$bytes": "AP8="}', '{"$timestamp": "2025-01-31T12:00:00.5Z"}', '{"$ext": [5, "eA=="]}'],
        ['{"$map": [[1, {"$bytes": ""}], [null, 2]]}', '{"$float": "NaN"}', "é", "日本"],
    ],
)
def test_params_are_json_or_strings_and_come_back_as_they_went(demo: str, params: list[str]) -> None:
    def value_of(param: str) -> Any:
        try:
            return json.loads(param) if param != "NaN" else param
        except ValueError:
            return param

    assert result_of(demo, "echo", *params) == [value_of(param) for param in params]


def test_data_has_all_params(demo: str, tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    file.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert result_of("-d", "[1, 2]", demo, "echo") == [1, 2]
    assert result_of("-d", "[]", demo, "echo") is None
    assert result_of("-d", f"@{file}", demo, "echo") == [1, 2]
    with file.open() as stdin:
        assert result_of("-d", "@-", demo, "echo", stdin=stdin) == [1, 2]


@pytest.mark.parametrize(
    "data, reason",
    [
        ("{}", "an array"),
        ("[", "not JSON"),
        ("1 2", "not JSON"),
        ("@/nowhere", "can't read /nowhere: No such file or directory"),
        ("@/", "can't read /: Is a directory"),
        ('[{"$bytes": "?"}]', "$bytes: not base64"),
    ],
)
def test_data_that_is_no_array_is_misuse(demo: str, data: str, reason: str) -> None:
    assert_misused(run("call", "-d", data, demo, "echo"), reason)


@pytest.mark.parametrize(
    "args, reason",
    [
        (["nowhere", "echo"], "'nowhere' is no address: give HOST:PORT or unix:PATH"),
        (["fd://3", "echo"], "'fd://3' is no address"),
        (["127.0.0..1:4423", "echo"], "'127.0.0..1:4423' is no address"),
        (["127.0.0.1:1"], "METHOD"),
        (["-x", "127.0.0.1:1", "echo"], "-x"),
        (["-d", "[]", "127.0.0.1:1", "echo", "1"], "--data gives all params"),
        (["--timeout", "soon", "127.0.0.1:1", "echo"], "'soon' is no number of seconds"),
        (["127.0.0.1:1", "echo", '{"$bytes": "?"}'], "$bytes: not base64"),
        (["127.0.0.1:1", "echo", str(2**64)], "can't be sent"),
        (["127.0.0.1:1", "echo", '"\\ud800"'], "can't be sent"),
    ],
)
def test_what_cannot_be_called_is_misuse(args: list[str], reason: str) -> None:
    assert_misused(run("call", *args), reason)


@pytest.mark.parametrize(
    "error, shown",
    [
        ("broken", "broken"),
        ("Grüße\nzweite Zeile\t!", "Grüße\nzweite Zeile\t!"),
        ("\x1b[31mred\x9b", "\\x1b[31mred\\x9b"),
        ([0, "E1"], '[0, "E1"]'),
        (False, "false"),
        ({1: 2}, '{"$map": [[1, 2]]}'),
    ],
)
def test_error_answer_is_exit_code_1_and_shown_on_stderr(listener: Listener, error: Any, shown: str) -> None:
    listener.answer(msgpack.packb([1, 0, error, None]))
    process = call_in_greenlet(listener.address, "method")
    assert (process.returncode, process.stdout, process.stderr) == (1, "", f"{shown}\n")


def call_in_greenlet(*args: str, command: str = "call") -> subprocess.CompletedProcess[str]:
    """Like `run`, but the greenlets of this process go on meanwhile."""
    return gevent.get_hub().threadpool.apply(run, (command, *args))


@pytest.mark.parametrize("command", ["call", "describe"])
def test_unknown_method_is_an_error_answer_that_names_the_nearest_ones(app: str, demo: str, command: str) -> None:
    for method, nearest in {
        "ech": "; did you mean: echo?",
        "ECHO": "; did you mean: echo?",
        "lime": "; did you mean: time?",
        "no_such": "",
        "": "",
    }.items():
        process = run(command, demo, method)
        assert (process.returncode, process.stdout) == (1, "")
        assert process.stderr == f'No such method "{method}" found{nearest}\n'
    process = run(command, app, "wait_until_happens")
    assert_fails(process, 1, "; did you mean: wait_until_it_happens, let_it_happen?")


def test_nothing_is_said_of_the_nearest_methods_where_the_server_doesnt_tell() -> None:
    with serving("--no-introspection") as served:
        process = run("call", served.addresses[0], "ech")
        assert (process.returncode, process.stderr) == (1, 'No such method "ech" found\n')


@pytest.mark.parametrize(
    "answer, hint",
    [
        ([1, 1, None, ["method\x1b[2J", "METHOD"]], "; did you mean: METHOD, method\\x1b[2J?"),
        ([1, 1, None, [1, None, ["method"], b"method"]], ""),
        ([1, 1, None, "method"], ""),
        ([1, 1, None, None], ""),
        ([1, 1, [0, "no"], None], ""),
        (None, ""),  # It hangs up.
    ],
)
def test_whatever_a_server_says_of_its_methods_is_only_a_hint(listener: Listener, answer: Any, hint: str) -> None:
    def serve() -> None:
        with listener.accept() as connection:
            connection.recv(1000)
            connection.sendall(msgpack.packb([1, 0, 'No such method "methods" found', None]))
            if answer is not None:
                assert msgpack.unpackb(connection.recv(1000)) == [0, 1, "$/list", []]
                connection.sendall(msgpack.packb(answer))

    server = gevent.spawn(serve)
    process = call_in_greenlet(listener.address, "methods")
    server.get()
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f'No such method "methods" found{hint}\n'


@pytest.mark.parametrize("command", ["call", "notify", "list", "health", "describe"])
def test_nobody_there_is_exit_code_3(command: str, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        args = [] if command in ("list", "health") else ["echo"]
        assert_fails(run(command, address, *args), 3, f"can't connect to {address}: Connection refused", "running?")
    address = f"unix:{tmp_path}/socket"
    assert_fails(run(command, address, *args), 3, f"can't connect to {address}: No such file", "running?")


def test_no_answer_in_time_is_exit_code_4(listener: Listener) -> None:
    process = run("call", "--timeout", "0.1", listener.address, "method")
    assert_fails(process, 4, "no answer to 'method' within 0.1 s; --timeout gives it longer")
    process = run("health", "--timeout", "0.1", listener.address)
    assert_fails(process, 4, "no answer to '$/health' within 0.1 s; --timeout gives it longer")


@pytest.mark.parametrize(
    "answer, reason",
    [
        (b"", "closed before the answer came"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a MessagePack-RPC message"),
        (b"\xc1", "is that a MessagePack-RPC server?"),
        (b"\x94\x01\x00\xc0\xd6\xff", "amid a message"),
        (
            msgpack.packb([1, 0, None, "x" * 100]),
            "exceeds max_message_size (100 bytes); --max-message-size allows more",
        ),
    ],
)
def test_answer_that_makes_no_sense_is_exit_code_5(listener: Listener, answer: bytes, reason: str) -> None:
    listener.answer(answer)
    assert_fails(call_in_greenlet("--max-message-size", "100", listener.address, "method"), 5, reason)


def test_result_that_is_nested_too_deeply_is_exit_code_5(listener: Listener) -> None:
    listener.answer(b"\x94\x01\x00\xc0" + b"\x91" * 1000 + b"\xc0")
    assert_fails(call_in_greenlet(listener.address, "method"), 5, "nested too deeply")


def test_result_is_pretty_on_a_terminal_only(demo: str) -> None:
    assert run("call", demo, "echo", '{"a": [1]}').stdout == '{"a": [1]}\n'
    terminal, stdout = pty.openpty()
    try:
        process = run("call", demo, "echo", '{"a": [1]}', capture_output=False, stdout=stdout)
        assert process.returncode == 0
        assert os.read(terminal, 1000).decode().split("\r\n") == ["{", '  "a": [', "    1", "  ]", "}", ""]
    finally:
        os.close(terminal)
        os.close(stdout)


def test_result_is_utf8_whatever_the_locale(demo: str) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert result_of(demo, "echo", '"\\u00e9"', env=env) == "é"


# list, describe, health.


def test_methods_are_listed(demo: str) -> None:
    process = run("list", demo)
    assert (process.returncode, process.stdout, process.stderr) == (0, "echo\nlater\nsleep\nsum\ntime\n", "")


def test_a_method_is_described(demo: str, app: str) -> None:
    process = run("describe", demo, "later")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == (
        "later(seconds, value=...)\n"
        "    Answers ``value`` after so many seconds, in the style of AnyEvent::MPRPC: no handler waits meanwhile.\n"
    )
    assert run("describe", app, "append").stdout == "append(value)\n"


def test_health_is_one_word_and_the_exit_code(demo: str, service: gmprpc.Service) -> None:
    process = run("health", demo)
    assert (process.returncode, process.stdout, process.stderr) == (0, "SERVING\n", "")
    with gmprpc.Server(("127.0.0.1", 0), service) as server:
        server.is_healthy = False
        process = call_in_greenlet(f"127.0.0.1:{server.server_port}", command="health")
        assert (process.returncode, process.stdout, process.stderr) == (1, "NOT_SERVING\n", "")


@pytest.mark.parametrize("command", ["list", "describe", "health"])
def test_a_server_without_built_in_methods_is_exit_code_1(listener: Listener, command: str) -> None:
    method = f"$/{command}"
    listener.answer(msgpack.packb([1, 0, f'No such method "{method}" found', None]))
    args = ["echo"] if command == "describe" else []
    process = call_in_greenlet(listener.address, *args, command=command)
    assert_fails(process, 1, f"""No such method "{method}" found; this server doesn't tell""")


@pytest.mark.parametrize("command", ["list", "describe", "health"])
@pytest.mark.parametrize("result", [None, 5, "five", ["five", 5], {"name": "five", "signature": 5, "doc": ""}])
def test_what_makes_no_sense_is_exit_code_5(listener: Listener, command: str, result: Any) -> None:
    listener.answer(msgpack.packb([1, 0, None, result]))
    args = ["echo"] if command == "describe" else []
    process = call_in_greenlet(listener.address, *args, command=command)
    if command == "health" and isinstance(result, str):  # A word that is unknown here.
        assert (process.returncode, process.stdout) == (1, "five\n")
    else:
        assert_fails(process, 5, f"the answer to $/{command} makes no sense")


def test_nothing_of_it_is_anything_that_a_terminal_would_act_on(listener: Listener) -> None:
    for command, args, result, shown in (
        ("list", [], ["a\nb", "\x1b[2J"], "a\\nb\n\\x1b[2J\n"),
        ("describe", ["f"], {"name": "f", "signature": "(\t)", "doc": "\r"}, "f(\\t)\n    \\r\n"),
        ("health", [], "\x07", "\\x07\n"),
    ):
        listener.answer(msgpack.packb([1, 0, None, result]))
        assert call_in_greenlet(listener.address, *args, command=command).stdout == shown


def assert_interrupt_is_quiet(listener: Listener, *args: str | Path) -> None:
    """SIGINT ends the command, once it has connected to the listener, without a word."""
    process = subprocess.Popen(
        [*GMPRPC, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with listener.accept() as connection:
        connection.recv(1000)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == 130


def test_ctrl_c_ends_a_call_quietly(listener: Listener) -> None:
    assert_interrupt_is_quiet(listener, "call", listener.address, "method")


@pytest.mark.parametrize("options", [[], ["--no-patch"]])
def test_ctrl_c_ends_loading_quietly(tmp_path: Path, listener: Listener, options: list[str]) -> None:
    source = (
        "import socket\n"
        f"connection = socket.create_connection(('127.0.0.1', {listener.port}))\n"
        "connection.sendall(b'!')\n"
        "connection.recv(1)\n"
    )
    (tmp_path / "slow.py").write_text(source, encoding="utf-8")
    assert_interrupt_is_quiet(listener, "serve", *options, "--app-dir", tmp_path, "slow:service")


def test_reader_that_has_enough_is_no_error_to_speak_of(demo: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = run("call", demo, "echo", "x", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


# notify.


def test_notification_has_left_when_the_command_ends(listener: Listener, tmp_path: Path) -> None:
    # More than the kernel holds for a peer that doesn't read yet.
    params = ["x" * 10_000_000]
    file = tmp_path / "params.json"
    file.write_text(json.dumps(params), encoding="utf-8")
    command = gevent.spawn(call_in_greenlet, "-d", f"@{file}", listener.address, "method", command="notify")
    received = bytearray()
    with listener.accept() as connection:
        while data := connection.recv(65536):
            received += data
    assert msgpack.unpackb(bytes(received)) == [2, "method", params]
    process = command.get()
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_notification_that_cannot_leave_in_time_is_exit_code_4(listener: Listener, tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    file.write_text(json.dumps(["x" * 10_000_000]), encoding="utf-8")
    process = run("notify", "--timeout", "0.1", "-d", f"@{file}", listener.address, "method")
    assert_fails(process, 4, "not sent within 0.1 s", "--timeout")


def test_notification_is_not_answered(app: str) -> None:
    process = run("notify", app, "append", "notified")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert result_of(app, "append", "called") == ["notified", "called"]


@pytest.mark.parametrize("args", [["nowhere", "echo"], ["-d", "{}", "127.0.0.1:1", "echo"]])
def test_what_cannot_be_notified_is_misuse(args: list[str]) -> None:
    assert_misused(run("notify", *args))
