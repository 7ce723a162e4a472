"""What tests of connections share: a peer that is scripted with bytes, and ways to wait without waiting for time."""

from __future__ import annotations

import gc
import os
import socket as stdlib_socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, Self

import gevent
import msgpack
import pytest
from gevent import socket
from gevent.socket import wait_read

from gmprpc.streams import Stream


class Peer:
    """One end of a stream that knows nothing of gmprpc: it says what it is told to, and shows what it hears."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)

    @classmethod
    def connect(cls, address: Any) -> Self:
        """A peer connected to ``address``, as a server's ``address`` gives it."""
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(address.removeprefix("unix:"))
            return cls(sock)
        return cls(socket.create_connection(address[:2]))

    def send(self, *messages: Any) -> None:
        """Send each message, all in one piece."""
        self.send_bytes(b"".join(map(msgpack.packb, messages)))

    def send_bytes(self, data: bytes) -> None:
        """Send ``data`` as it is."""
        self.socket.sendall(data)

    def receive(self) -> Any:
        """The next message; EOFError if the stream ends first."""
        for message in self._messages():
            return message
        raise EOFError

    def receive_rest(self) -> list[Any]:
        """Every message up to the end of the stream, which has to be a proper one."""
        return list(self._messages())

    def call(self, method: str, *params: Any, msgid: int = 0) -> Any:
        """The response to one request."""
        self.send([0, msgid, method, list(params)])
        return self.receive()

    def shutdown(self) -> None:
        """Say no more, but still listen."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close."""
        self.socket.close()

    def reset(self) -> None:
        """Close as a process that crashes does, without a proper end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _messages(self) -> Iterator[Any]:
        while True:
            yield from self._unpacker
            if not (data := self.socket.recv(65536)):
                return
            self._unpacker.feed(data)


def listening(address: Any, family: int = socket.AF_INET) -> Any:
    """A socket that listens; gevent's, as those of its `create_server` aren't."""
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen()
    return sock


class Scripted:
    """A server whose every byte the test decides on; it may go, and come back at the same address."""

    def __init__(self) -> None:
        self._peers: list[Peer] = []
        self.address: Any = ("127.0.0.1", 0)
        self.come_back()
        self.address = self._listener.getsockname()

    def accept(self) -> Peer:
        """The server's end of the next connection."""
        self._peers.append(Peer(self._listener.accept()[0]))
        return self._peers[-1]

    def hang_up_on_everybody(self) -> None:
        """Accept each connection and close it at once; never returns."""
        while True:
            self.accept().close()

    def go(self) -> None:
        """Listen no more."""
        self._listener.close()

    def come_back(self) -> None:
        """Listen again."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self.address)
        self._listener.listen()

    def close(self) -> None:
        """Close everything."""
        for peer in self._peers:
            peer.close()
        self._listener.close()


def receive(stream: Stream) -> bytes:
    """What ``stream`` receives next, waited for in the way of a connection."""
    while True:
        try:
            return stream.recv()
        except BlockingIOError:
            wait_read(stream.fileno())


def receive_all(stream: Stream) -> bytes:
    """All that ``stream`` receives, up to its proper end."""
    data = b""
    while piece := receive(stream):
        data += piece
    return data


def fill(stream: Stream) -> int:
    """Send until nothing goes any more; how much that was."""
    total = 0
    while True:
        try:
            total += stream.send(b"f" * 50_000)
        except BlockingIOError:
            return total


def has_ipv6() -> bool:
    """Whether this machine can talk to itself by IPv6."""
    try:
        with stdlib_socket.create_server(("::1", 0), family=stdlib_socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def is_closed(fd: int) -> bool:
    """Whether ``fd`` is no descriptor any more."""
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def wait_until(condition: Callable[[], Any]) -> None:
    """Let everything else run until ``condition`` is true: for what gives no event; the test's deadline ends it."""
    while not condition():
        gevent.sleep(0.001)


def is_listening(address: Any) -> bool:
    """Whether somebody accepts connections at ``address``."""
    try:
        Peer.connect(address).close()
    except ConnectionError:
        return False
    return True


def collected() -> None:
    """Collect what is only held by cycles."""
    for _ in range(3):
        gc.collect()
