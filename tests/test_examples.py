"""Each program in examples/ runs as it stands, and does what its docstring says."""

from __future__ import annotations

import ast
import http.client
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from gevent.event import Event

import gmprpc

from .programs import DEADLINE, Program

EXAMPLES = Path(__file__).parent.parent / "examples"
PRODUCTION = Path(__file__).parent / "production"
ANY_PORT = "127.0.0.1:0"


def example(name: str, *args: str | Path) -> Program:
    return Program(sys.executable, EXAMPLES / name, *args)


@contextmanager
def serving(name: str, *args: str | Path) -> Iterator[str]:
    """Run an example that serves, until the end of the `with`; gives what it says after "listening on"."""
    with example(name, *args) as program:
        said = program.line()
        assert said.startswith("listening on "), [said, *program.lines()]
        yield said.removeprefix("listening on ")
        program.terminate()
        assert [line for line in program.lines() if '"GET / HTTP/1.1" 200' not in line] == []
        assert program.wait() == 0


def output_of(name: str, *args: str | Path) -> list[str]:
    """What an example says that ends by itself."""
    with example(name, *args) as program:
        lines = program.lines()
        assert program.wait() == 0, lines
    return lines


def docstring_of(name: str) -> str:
    return ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))) or ""


def output_of_command_in(name: str, method: str, address: str) -> str:
    """What an example's docstring says to type to call ``method`` prints, with ``address`` for its own."""
    params = re.findall(rf"``python -m gmprpc call \S+ {method}([^`]*)``", docstring_of(name))
    assert len(params) == 1
    with Program(sys.executable, "-m", "gmprpc", "call", address, method, *shlex.split(params[0])) as program:
        lines = program.lines()
        assert program.wait() == 0, lines
    return "\n".join(lines)


def client_of(address: str) -> gmprpc.Client:
    return gmprpc.Client(address, timeout=DEADLINE)


def test_server() -> None:
    with serving("server.py", ANY_PORT) as address, client_of(address) as client:
        assert client.call("echo", "hello") == "hello"
        assert client.call("echo", "hello", "world") == ["hello", "world"]
        assert client.call("echo") is None
        assert client.call("sum", 1, 2, 3) == 6


def test_client() -> None:
    with serving("server.py", ANY_PORT) as address:
        assert output_of("client.py", address) == ["hello", "6", "[0, 2, 4, 6, 8]"]


def test_balancer() -> None:
    assert output_of("balancer.py") == ["first second", "second", "first is back"]


def test_deferred_reply() -> None:
    with serving("deferred_reply.py", ANY_PORT) as address, client_of(address) as first, client_of(address) as second:
        first.notify("next_event")
        waiting = [first.call_async("next_event") for _ in range(3)]
        with pytest.raises(gmprpc.MethodNotFound):
            first.call("a_method_that_is_asked_for_after_them")
        assert second.call("publish", "hello") == 3
        assert [call.get(timeout=DEADLINE) for call in waiting] == ["hello"] * 3
        assert output_of_command_in("deferred_reply.py", "publish", address) == "0"


def test_blocking_handler() -> None:
    """Three requests wait inside their handlers; another one on the same connection is answered meanwhile."""
    all_wait = Event()
    release = Event()
    params_of_all = []

    def add_up(*numbers: int) -> int:
        params_of_all.append(numbers)
        if len(params_of_all) == 3:
            all_wait.set()
        release.wait(DEADLINE)
        return sum(numbers)

    upstream = gmprpc.Server(("127.0.0.1", 0))
    upstream.register(add_up, "sum")
    with (
        upstream,
        serving("blocking_handler.py", ANY_PORT, f"127.0.0.1:{upstream.server_port}") as address,
        client_of(address) as client,
    ):
        calls = [client.call_async("average", *numbers) for numbers in ([1, 2, 6], [5], [1, 2])]
        assert all_wait.wait(DEADLINE)
        with pytest.raises(gmprpc.MethodNotFound):
            client.call("a_method_that_is_asked_for_meanwhile")
        assert not any(call.ready() for call in calls)
        release.set()
        assert [call.get(timeout=DEADLINE) for call in calls] == [3, 5, 1.5]
        assert output_of_command_in("blocking_handler.py", "average", address) == "3.0"


def test_callback() -> None:
    assert output_of("callback.py") == [
        "Install gevent?",
        "gevent is installed.",
        "Install grpcio?",
        "Install msgpack?",
        "msgpack is installed.",
        "done",
    ]


def test_reconnecting() -> None:
    assert output_of("reconnecting.py") == ["sent: False", "this is the second server", "this is the third server"]


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "example.sock"
    with serving("unix_socket.py", path) as address, client_of(address) as client:
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IRWXU
        assert client.call("add", 1, 2) == 3
        assert output_of_command_in("unix_socket.py", "add", address) == "3"
    assert not path.exists()


def test_login() -> None:
    assert output_of("login.py") == ["somebody", "not authenticated"]


def test_tls(tmp_path: Path) -> None:
    _, command = docstring_of("tls.py").split("::\n")
    if shutil.which("openssl"):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    else:  # The program is tested all the same.
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
        for pem in (*certificate.cert_chain_pems, authority.cert_pem):
            pem.write_to_path(tmp_path / "cert.pem", append=True)
    assert output_of("tls.py", tmp_path / "cert.pem", tmp_path / "key.pem") == ["3"]


def test_wsgi_application() -> None:
    with serving("wsgi_application.py", ANY_PORT, ANY_PORT) as addresses:
        web_address, rpc_address = addresses.split(" and ")
        with client_of(rpc_address) as client:
            assert client.call("visits") == 0
            for visit in 1, 2:
                web = http.client.HTTPConnection(web_address, timeout=DEADLINE)
                web.request("GET", "/")
                assert web.getresponse().read() == b"Welcome!\n"
                web.close()
                assert client.call("visits") == visit
        assert output_of_command_in("wsgi_application.py", "visits", rpc_address) == "2"


def test_each_example_is_tested() -> None:
    examples = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    others = examples - {f"{name}.py" for name in tests - {"each_example_is_tested"}}
    # Those that need programs to run beside them.
    in_production = "".join(path.read_text(encoding="utf-8") for path in PRODUCTION.glob("*.py"))
    assert {name for name in others if f'"{name}"' not in in_production} == set()
