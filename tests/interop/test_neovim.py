"""Neovim, which speaks MessagePack-RPC both ways on every connection: it answers us, and it calls us."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gevent.event import AsyncResult
from gevent.queue import Queue
from msgpack import ExtType

import gmprpc
from tests.programs import DEADLINE, Program


@dataclass(frozen=True)
class Neovim:
    """A headless Neovim that listens at two addresses."""

    program: Program
    unix: str
    tcp: str


@pytest.fixture
def neovim(require_peer: Callable[[str, Any], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neovim]:
    nvim = shutil.which("nvim")
    require_peer("Neovim (nvim)", nvim)
    home = tmp_path_factory.mktemp("nvim")  # A short name: the path of a unix socket has about 100 bytes.
    socket_file = home / "socket"
    with Program(
        *(nvim or "nvim", "--clean", "-n", "--headless", "--listen", socket_file),
        *("-c", r'call chansend(v:stderr, serverstart("127.0.0.1:0") .. "\n")'),
        env={"HOME": str(home), "TMPDIR": str(home), "XDG_RUNTIME_DIR": str(home), "LC_ALL": "C.UTF-8"},
    ) as program:
        yield Neovim(program, f"unix:{socket_file}", program.line())
    assert not socket_file.exists()


@pytest.fixture
def client(neovim: Neovim, service: gmprpc.Service) -> Iterator[gmprpc.Client]:
    """A client of Neovim, which Neovim may call, too."""
    with gmprpc.Client(neovim.tcp, service=service, timeout=DEADLINE) as client:
        yield client


# We call Neovim.


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_neovim_answers(neovim: Neovim, transport: str) -> None:
    with gmprpc.Client(getattr(neovim, transport), timeout=DEADLINE) as client:
        assert client.call("nvim_eval", "6 * 7") == 42
        assert client.proxy.nvim_eval("'grüße'") == "grüße"
        client.call("nvim_buf_set_lines", 0, 0, -1, True, ["one", "two"])
        assert client.call("nvim_buf_get_lines", 0, 0, -1, True) == ["one", "two"]


def test_api_info_tells_channel_and_functions(client: gmprpc.Client) -> None:
    channel, info = client.call("nvim_get_api_info")
    assert isinstance(channel, int)
    assert "nvim_buf_set_lines" in {function["name"] for function in info["functions"]}
    assert info["types"].keys() >= {"Buffer", "Window", "Tabpage"}


def test_values_come_back_as_they_were_sent(client: gmprpc.Client) -> None:
    values = [None, True, -(2**63), 2**63 - 1, 0.5, "", "grüße", "x" * 300_000, [], [1, [2, [3]]], {"a": {"b": [None]}}]
    client.call("nvim_set_var", "values", values)
    assert client.call("nvim_get_var", "values") == values


def test_buffer_is_an_ext_type_that_can_be_sent_back(client: gmprpc.Client) -> None:
    buffer = client.call("nvim_create_buf", True, False)
    _, info = client.call("nvim_get_api_info")
    assert isinstance(buffer, ExtType)
    assert buffer.code == info["types"]["Buffer"]["id"]
    assert buffer in client.call("nvim_list_bufs")
    client.call("nvim_buf_set_lines", buffer, 0, -1, True, ["only here"])
    assert client.call("nvim_buf_get_lines", buffer, 0, -1, True) == ["only here"]
    assert client.call("nvim_buf_get_lines", 0, 0, -1, True) == [""]


def test_error_of_neovim_is_an_array_of_kind_and_text(client: gmprpc.Client) -> None:
    _, info = client.call("nvim_get_api_info")
    kinds = {name: kind["id"] for name, kind in info["error_types"].items()}
    with pytest.raises(gmprpc.RemoteError) as raised:
        client.call("nvim_buf_get_lines", 0, 5, 6, True)
    assert raised.value.error == [kinds["Validation"], "Index out of bounds"]
    with pytest.raises(gmprpc.RemoteError, match="E117: Unknown function: nope"):
        client.call("nvim_eval", "nope()")
    with pytest.raises(gmprpc.RemoteError, match="Invalid method: nope"):
        client.call("nope")
    assert client.call("nvim_eval", "1") == 1


def test_text_that_is_not_utf8_costs_only_its_own_call(client: gmprpc.Client, neovim: Neovim) -> None:
    with pytest.raises(gmprpc.ProtocolError, match="utf-8"):
        client.call("nvim_eval", r'"\xff"')
    assert client.call("nvim_eval", "1") == 1

    lenient = {"unicode_errors": "surrogateescape"}
    with gmprpc.Client(
        neovim.tcp, packer_options=lenient, unpacker_options=lenient, timeout=DEADLINE
    ) as lenient_client:
        assert lenient_client.call("nvim_eval", r'"\xff"') == "\udcff"
        lenient_client.call("nvim_set_var", "text", "\udcff")
        assert lenient_client.call("nvim_eval", r'g:text ==# "\xff"') == 1


def test_many_calls_in_flight_get_their_own_answers(client: gmprpc.Client, neovim: Neovim) -> None:
    with gmprpc.Client(neovim.unix, timeout=DEADLINE) as other:
        calls = [each.call_async("nvim_eval", f"{number} * 2") for number in range(200) for each in (client, other)]
        assert [call.get() for call in calls] == [number * 2 for number in range(200) for _ in range(2)]


def test_neovim_is_notified(client: gmprpc.Client) -> None:
    for number in range(10):
        client.notify("nvim_set_var", "number", number)
    assert client.call("nvim_get_var", "number") == 9


def test_call_ends_when_neovim_quits(client: gmprpc.Client, neovim: Neovim) -> None:
    with pytest.raises(gmprpc.ConnectionClosed):
        client.call("nvim_command", "qall!")
    assert neovim.program.wait() == 0


# Neovim calls us.


@pytest.fixture(params=["made by Neovim", "made by us"])
def channel(request: pytest.FixtureRequest, client: gmprpc.Client, server: gmprpc.Server) -> int:
    """Neovim's number of a connection on which it may call ``service``: that of our server, or that of our client."""
    if request.param == "made by us":
        return client.call("nvim_get_api_info")[0]
    address = f"127.0.0.1:{server.server_port}"
    return client.call("nvim_call_function", "sockconnect", ["tcp", address, {"rpc": True}])


@pytest.fixture
def rpcrequest(client: gmprpc.Client, channel: int) -> Callable[..., Any]:
    """Has Neovim call a method of ours on ``channel`` and wait for the answer, which is passed on to us."""
    return lambda *request: client.call("nvim_call_function", "rpcrequest", [channel, *request])


def call_back(method: str, *params: Any) -> Any:
    """What a handler does to call Neovim, which waits for that handler's answer."""
    return gmprpc.current_call().connection.call(method, *params, timeout=DEADLINE)


def test_neovim_gets_results(rpcrequest: Callable[..., Any]) -> None:
    assert rpcrequest("add", 1, 2) == 3
    for value in (None, -1, "grüße", "x" * 300_000, {"a": [1.5, True]}):
        assert rpcrequest("echo", value) == value


def test_neovim_gets_errors(rpcrequest: Callable[..., Any], service: gmprpc.Service) -> None:
    @service.method
    def fail_as_neovim_does() -> None:
        raise gmprpc.ErrorResponse([0, "of no special kind"])

    with pytest.raises(gmprpc.RemoteError, match="ValueError: on purpose"):
        rpcrequest("fail", "on purpose")
    with pytest.raises(gmprpc.RemoteError, match='No such method "nope" found'):
        rpcrequest("nope")
    with pytest.raises(gmprpc.RemoteError, match="of no special kind"):
        rpcrequest("fail_as_neovim_does")
    assert rpcrequest("add", 1, 2) == 3


def test_neovim_notifies(client: gmprpc.Client, channel: int, service: gmprpc.Service) -> None:
    notes: Queue[Any] = Queue()
    service.register(lambda *params: notes.put(params), "note")
    client.call("nvim_call_function", "rpcnotify", [channel, "note"])
    client.call("nvim_call_function", "rpcnotify", [channel, "note", 1, "two"])
    assert [notes.get(timeout=DEADLINE) for _ in range(2)] == [(), (1, "two")]


def test_handler_calls_neovim_back(rpcrequest: Callable[..., Any], service: gmprpc.Service) -> None:
    @service.method
    def shout(text: str) -> Any:
        return call_back("nvim_call_function", "toupper", [text]) + "!"

    assert rpcrequest("shout", "hello") == "HELLO!"


def test_calls_nest(rpcrequest: Callable[..., Any], channel: int, service: gmprpc.Service) -> None:
    """Neovim waits for us, we wait for Neovim, Neovim waits for us... all of it on one connection."""

    @service.method
    def factorial(number: int) -> Any:
        if number == 0:
            return 1
        return number * call_back("nvim_call_function", "rpcrequest", [channel, "factorial", number - 1])

    assert rpcrequest("factorial", 10) == 3628800


def test_many_calls_back_in_flight_while_neovim_waits(rpcrequest: Callable[..., Any], service: gmprpc.Service) -> None:
    @service.method
    def widths(words: list[str]) -> Any:
        connection = gmprpc.current_call().connection
        calls = [connection.call_async("nvim_strwidth", word, timeout=DEADLINE) for word in words]
        return [call.get() for call in calls]

    assert rpcrequest("widths", ["x" * number for number in range(100)]) == list(range(100))


def test_server_sees_that_neovim_closes_its_channel(client: gmprpc.Client, server: gmprpc.Server) -> None:
    channel = client.call("nvim_call_function", "sockconnect", ["tcp", f"127.0.0.1:{server.server_port}", {"rpc": 1}])
    assert client.call("nvim_call_function", "rpcrequest", [channel, "add", 1, 2]) == 3
    (connection,) = server.connections
    client.call("nvim_call_function", "chanclose", [channel])
    assert connection.wait(DEADLINE)
    assert connection.error is None


def test_neovim_starts_a_program_and_calls_it(client: gmprpc.Client) -> None:
    program = [sys.executable, "-P", "-m", "gmprpc", "serve", "--stdio"]
    channel = client.call("nvim_call_function", "jobstart", [program, {"rpc": True}])
    assert client.call("nvim_call_function", "rpcrequest", [channel, "sum", 1, 2, 3]) == 6
    assert client.call("nvim_call_function", "rpcrequest", [channel, "echo", "x" * 300_000]) == "x" * 300_000
    client.call("nvim_call_function", "chanclose", [channel])
    assert client.call("nvim_call_function", "jobwait", [[channel], int(DEADLINE * 1000)]) == [0]


def test_neovim_is_started_and_called_over_its_standard_streams_and_calls_back(
    require_peer: Callable[[str, Any], None], service: gmprpc.Service, tmp_path: Path
) -> None:
    nvim = shutil.which("nvim")
    require_peer("Neovim (nvim)", nvim)
    env = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "LC_ALL": "C.UTF-8"}
    command = [nvim, "--clean", "-n", "--embed", "--headless"]
    with gmprpc.Client.popen(command, popen_options={"env": env}, service=service, timeout=DEADLINE) as client:
        assert client.call("nvim_eval", "6 * 7") == 42
        channel, _ = client.call("nvim_get_api_info")
        assert client.call("nvim_call_function", "rpcrequest", [channel, "add", 1, 2]) == 3
        with pytest.raises(gmprpc.ConnectionClosed):
            client.call("nvim_command", "cquit 5")
        with pytest.raises(gmprpc.ConnectFailed, match="exited with status 5"):
            client.call("nvim_eval", "1")


def test_neovim_tells_what_changes_in_a_buffer(client: gmprpc.Client, service: gmprpc.Service) -> None:
    changed: AsyncResult[Any] = AsyncResult()

    @service.method
    def nvim_buf_lines_event(buffer: Any, _tick: int, first: int, last: int, lines: list[str], _more: bool) -> None:
        changed.set((buffer, first, last, lines))

    buffer = client.call("nvim_get_current_buf")
    assert client.call("nvim_buf_attach", buffer, False, {}) is True
    client.call("nvim_buf_set_lines", buffer, 0, -1, True, ["one", "two"])
    assert changed.get(timeout=DEADLINE) == (buffer, 0, 1, ["one", "two"])
