"""Addresses, the sockets that they name, and who is at their other end."""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from gmprpc import transport
from gmprpc.dialing import connect
from gmprpc.exceptions import ConnectFailed
from gmprpc.transport import (
    UnixPeer,
    file_identity,
    format_address,
    open_listener,
    parse_address,
    peer_of,
    remove_stale,
)

from .helpers import is_closed, listening, needs_ipv6

# Addresses.


@pytest.mark.parametrize(
    "address, place",
    [
        ("127.0.0.1:4423", ("127.0.0.1", 4423)),
        ("localhost:0", ("localhost", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:4423", ("::1", 4423)),
        ("[fe80::1%lo]:4423", ("fe80::1%lo", 4423)),
        (":4423", ("127.0.0.1", 4423)),
        ("bücher.example:4423", ("bücher.example", 4423)),
        (("127.0.0.1", 4423), ("127.0.0.1", 4423)),
        (["127.0.0.1", 4423], ("127.0.0.1", 4423)),
        (("::1", 4423, 0, 0), ("::1", 4423)),
        ("unix:/tmp/s", "unix:/tmp/s"),
        ("unix:relative", "unix:relative"),
        ("unix:/with:4423", "unix:/with:4423"),
    ],
)
def test_an_address_names_one_place(address: Any, place: Any) -> None:
    assert parse_address(address) == place


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", "localhost:x", "localhost:-1", "localhost:65536", "localhost:99999999999"]
    + ["localhost:4 4", "localhost:٤", "localhost:²", "unix:", "[::1]", 4423, None, (), ("localhost",), b"localhost:1"]
    + [("localhost", "4423"), ("localhost", None), (None, 4423), (5, 4423), "a..b:4423", ("x" * 64, 4423)],
)
def test_what_names_no_place_is_an_error_that_says_what_would(address: Any) -> None:
    with pytest.raises(ValueError, match=r"is no address: give HOST:PORT, \(host, port\) or unix:PATH"):
        parse_address(address)


@pytest.mark.parametrize("address", [("localhost", 65536), ("localhost", -1), ("localhost", True)])
def test_a_port_in_a_tuple_has_its_bounds_too(address: Any) -> None:
    with pytest.raises(ValueError):
        parse_address(address)


@pytest.mark.parametrize("address", ["::1", "fe80::1", "2001:db8::4423", "[::1:80", "::1]:80"])
def test_ipv6_without_brackets_is_no_address(address: str) -> None:
    with pytest.raises(ValueError):
        parse_address(address)


def test_the_scope_of_an_ipv6_address_is_kept() -> None:
    assert parse_address(("fe80::1", 4423, 0, 1)) in (("fe80::1%1", 4423), ("fe80::1", 4423, 0, 1))


@pytest.mark.parametrize(
    "address, text",
    [
        (("127.0.0.1", 4423), "127.0.0.1:4423"),
        (("::1", 4423), "[::1]:4423"),
        (("::1", 4423, 0, 0), "[::1]:4423"),
        ("unix:/tmp/s", "unix:/tmp/s"),
        (None, "None"),
        ("", ""),
        (("", 4423), ":4423"),
        ((), "()"),
    ],
)
def test_an_address_is_shown_as_it_is_typed(address: Any, text: str) -> None:
    assert format_address(address) == text
    if text[-4:] == "4423":
        assert format_address(parse_address(text)).endswith(text)


# Listening.


@pytest.fixture
def listener() -> Iterator[Any]:
    """A TCP socket that listens."""
    with listening(("127.0.0.1", 0)) as sock:
        yield sock


def answers(listener: Any, address: Any) -> bool:
    """Whether who connects to ``address`` gets to ``listener``."""
    with connect(address) as sock:
        accepted, _ = listener.accept()
        with accepted:
            sock.sendall(b"x")
            return bool(accepted.recv(1) == b"x")


@pytest.mark.parametrize("form", [("127.0.0.1", 0), "127.0.0.1:0"], ids=repr)
def test_an_address_is_bound_and_listened_on(form: Any) -> None:
    with open_listener(form) as listener:
        assert answers(listener, listener.getsockname())


@needs_ipv6
@pytest.mark.parametrize("form", [0, ("", 0), "[::1]:0", ("::1", 0)], ids=repr)
def test_ipv6_and_a_port_alone_are_bound(form: Any) -> None:
    with open_listener(form) as listener:
        assert answers(listener, ("::1", listener.getsockname()[1]))


def test_a_socket_is_handed_through(listener: Any) -> None:
    assert open_listener(listener) is listener


def test_a_socket_that_blocks_does_so_no_more() -> None:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as blocking:
        assert open_listener(blocking) is blocking
        with pytest.raises(BlockingIOError):
            blocking.accept()


def test_a_port_that_is_in_use_is_an_error(listener: Any) -> None:
    with pytest.raises(OSError) as caught:
        open_listener(listener.getsockname())
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_can_be_bound_again_at_once() -> None:
    with open_listener(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with connect(address):
            accepted, _ = listener.accept()
            accepted.close()  # The side that closes first keeps the port waiting.
    with open_listener(address) as listener:
        assert listener.getsockname() == address


@pytest.mark.parametrize("listener", ["localhost:x", "nowhere"])
def test_a_listener_that_is_no_address_is_an_error(listener: str) -> None:
    with pytest.raises(ValueError):
        open_listener(listener)


def test_a_unix_socket_is_bound(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    with open_listener(address) as listener:
        assert listener.getsockname() == f"{tmp_path}/s"
        assert answers(listener, address)


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    open_listener(address).close()
    assert (tmp_path / "s").is_socket()
    with pytest.raises(ConnectFailed):
        connect(address)
    with open_listener(address) as listener:
        assert answers(listener, address)


def test_a_live_socket_file_is_left_alone(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    with open_listener(address) as listener:
        with pytest.raises(OSError, match="another server listens there") as caught:
            open_listener(address)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.filename == f"{tmp_path}/s"
        probe, _ = listener.accept()
        with probe:
            assert probe.recv(1) == b""
        assert answers(listener, address)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "directory"])
def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "s")
    with pytest.raises(OSError, match="a file that is no socket is in the way") as caught:
        open_listener(f"unix:{tmp_path}/s")
    assert caught.value.errno == errno.EADDRINUSE
    assert (tmp_path / "s").exists()


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        open_listener(f"unix:{tmp_path}/nothing/s")


def test_a_file_that_vanishes_meanwhile_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_listener(f"unix:{tmp_path}/s").close()
    real = socket.socket.connect

    def connect_late(self: Any, address: Any) -> Any:
        (tmp_path / "s").unlink()
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_late)
    remove_stale(f"{tmp_path}/s")
    remove_stale(f"{tmp_path}/s")


def test_a_live_server_that_is_swamped_is_alive(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as swamped, stdlib_socket.socket(stdlib_socket.AF_UNIX) as first:
        swamped.bind(path)
        swamped.listen(0)
        first.connect(path)
        with gevent.Timeout(0.2), pytest.raises(OSError, match="another server listens there"):
            remove_stale(path)


def test_a_socket_file_that_may_not_be_written_to_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(stdlib_socket.socket):  # To root, as whom tests may run, nothing is.
        def connect_ex(self, address: Any, /) -> int:
            return errno.EACCES

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        monkeypatch.setattr(transport, "RawSocket", Forbidden)
        with pytest.raises(PermissionError, match="Permission denied"):
            open_listener(f"unix:{path}")
        assert path.exists()


def test_who_connects_where_the_system_tells_nothing_is_known_by_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("socket.SO_PEERCRED", raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours, "") == UnixPeer("unix:")
        assert str(peer_of(ours, "")) == "unix:"


def test_who_connects_over_tcp_is_known_by_the_address(tcp_sockets: tuple[Any, Any]) -> None:
    assert peer_of(tcp_sockets[0], ("127.0.0.1", 5)) == ("127.0.0.1", 5)


def test_a_unix_socket_needs_a_path() -> None:
    with pytest.raises(ValueError):
        open_listener("unix:").close()


def test_a_listening_descriptor_is_taken_over(listener: Any) -> None:
    fd = os.dup(listener.fileno())
    with open_listener(f"fd://{fd}") as taken:
        assert taken.fileno() == fd
        assert taken.family == socket.AF_INET
        assert answers(taken, listener.getsockname())
    assert is_closed(fd)


def test_a_descriptor_that_does_not_listen_is_left_alone(sockets: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="that socket doesn't listen"):
        open_listener(f"fd://{sockets[0].fileno()}")
    assert not is_closed(sockets[0].fileno())
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(OSError) as caught:
            open_listener(f"fd://{file.fileno()}")
        assert caught.value.errno == errno.ENOTSOCK
    with pytest.raises(OSError) as caught:
        open_listener("fd://99999")
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("listener", ["fd://", "fd://x", "fd://-1", "fd://1.0", "fd:// 3", "fd://³"])
def test_a_descriptor_is_a_number(listener: str) -> None:
    with pytest.raises(ValueError):
        open_listener(listener)


def test_the_identity_of_a_file_is_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.touch()
    second.touch()
    identity = file_identity(str(first))
    assert identity is not None
    assert file_identity(str(first)) == identity
    assert file_identity(str(second)) not in (identity, None)
    second.replace(first)
    assert file_identity(str(first)) not in (identity, None)
    assert file_identity(str(second)) is None
