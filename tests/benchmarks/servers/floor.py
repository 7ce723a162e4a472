"""What gevent, msgpack and the kernel cost by themselves: a watcher's callback that answers in the hub.

There is no greenlet, no check, no limit and no feature, so this is no server; nobody who uses gevent gets below it.
"""

from __future__ import annotations

import socket
from typing import Any

import gevent
import msgpack
from gevent.event import Event

READ, WRITE = 1, 2

loop = gevent.get_hub().loop
pack = msgpack.Packer().pack
unpackb = msgpack.unpackb

# One for all connections: what is read is decoded before anybody else reads. `recv` would make a bytes object of the
# full size for each message first, and beyond 128 KiB glibc maps and unmaps memory for it, at twice the cost of a call.
buffer = memoryview(bytearray(256 * 1024))


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.recv_into, self.send = sock.recv_into, sock.send
        self.sock = sock
        self.unpacker: Any = None
        self.unsent = b""
        self.reader = loop.io(sock.fileno(), READ)
        self.writer = loop.io(sock.fileno(), WRITE)
        self.reader.start(self.on_message)

    def on_message(self) -> None:
        """As long as every read is exactly one message, nothing is quicker than ``unpackb``."""
        data = buffer[: self.recv_into(buffer)]
        try:
            _, msgid, _, params = unpackb(data)
        except ValueError:  # Several messages, a part of one, or the end.
            self.unpacker = msgpack.Unpacker()
            self.reader.stop()
            self.reader.start(self.on_stream)
            self.answer_all(data)
        else:
            self.write(pack((1, msgid, None, params[0])))

    def on_stream(self) -> None:
        self.answer_all(buffer[: self.recv_into(buffer)])

    def answer_all(self, data: memoryview) -> None:
        if not data:
            self.close()
            return
        self.unpacker.feed(data)
        self.write(b"".join([pack((1, msgid, None, params[0])) for _, msgid, _, params in self.unpacker]))

    def write(self, data: bytes) -> None:
        if self.unsent:
            self.unsent += data
        elif (sent := self.send(data)) < len(data):
            self.unsent = data[sent:]
            self.writer.start(self.on_writable)

    def on_writable(self) -> None:
        self.unsent = self.unsent[self.send(self.unsent) :]
        if not self.unsent:
            self.writer.stop()

    def close(self) -> None:
        self.reader.close()
        self.writer.close()
        self.sock.close()


def accept() -> None:
    sock, _ = listener.accept()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Connection(sock)


listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
listener.setblocking(False)
acceptor = loop.io(listener.fileno(), READ)
acceptor.start(accept)
print(listener.getsockname()[1], flush=True)
Event().wait()
