"""A TCP proxy that does, on command, what networks and dying peers do; it knows nothing of what goes through it.

It runs in the hub of whoever makes it. Each connection is a :class:`Line` with two flows, ``requests`` from client to
server and ``answers`` back. What is done to a flow is done when an exact number of bytes has passed, as with
``flow.at(7, Flow.reset)``, or now, as with ``flow.reset()``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from typing import Any, Self

import gevent
import msgpack
from gevent import socket
from gevent.event import Event

_READ_SIZE = 65536

#: The one byte that MessagePack never uses.
GARBAGE = b"\xc1"


class Flow:
    """One direction of a connection."""

    def __init__(self, line: Line, source: socket.socket, sink: socket.socket) -> None:
        self.line = line
        #: So many bytes have been passed on; what was inserted doesn't count.
        self.position = 0
        self._source = source
        self._sink = sink
        self._faults: list[tuple[int, int, Callable[[Flow], Any]]] = []
        self._numbers = count()  # Of two faults at one position the one that was planned first comes first.
        self._going = Event()
        self._going.set()
        self._is_swallowing = False
        self._delay = 0.0
        self._latency = 0.0
        self._rate: float | None = None
        # To know where messages end, if somebody wants to know that.
        self._unpacker: msgpack.Unpacker | None = None
        self._faults_between: list[tuple[int, int, Callable[[Flow], Any]]] = []

    # What is to be done later.

    def at(self, position: int, action: Callable[[Flow], Any]) -> None:
        """Have ``action(flow)`` called when so many bytes have been passed on; for 0, when the first byte comes."""
        heappush(self._faults, (position, next(self._numbers), action))

    def between_messages(self, position: int, action: Callable[[Flow], Any]) -> None:
        """Have ``action(flow)`` called at the end of the message that has the byte at ``position``.

        To be said before the flow begins. What flows has to be MessagePack.
        """
        self._unpacker = self._unpacker or msgpack.Unpacker(max_buffer_size=0)
        heappush(self._faults_between, (position, next(self._numbers), action))

    # What is done now.

    def cut(self) -> None:
        """End the connection in good order: both sides hear the end, and what they still say is thrown away."""
        self.line.cut()

    def reset(self) -> None:
        """Reset the connection, on both sides."""
        self.line.reset()

    def half_close(self) -> None:
        """The receiver hears the end, what the sender still says is thrown away; the other direction goes on."""
        self._is_swallowing = True
        with suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)

    def swallow(self) -> None:
        """Throw away all that comes from now on, but for the end."""
        self._is_swallowing = True

    def stall(self) -> None:
        """Neither read nor pass on any more: the buffers of the kernel fill up, and then the sender's."""
        self._going.clear()

    def go_on(self) -> None:
        """End a `stall`, a `lag` and a `throttle`.

        Not a `swallow`: what came behind the gap would be out of step, and mean anything.
        """
        self._latency = 0.0
        self._rate = None
        self._going.set()

    def insert(self, data: bytes = GARBAGE) -> None:
        """Pass on ``data`` in between."""
        with suppress(OSError):
            self._sink.sendall(data)

    def delay(self, seconds: float) -> None:
        """Pass on what comes next ``seconds`` later."""
        self._delay = seconds

    def lag(self, seconds: float) -> None:
        """Pass on whatever comes from now on ``seconds`` later, one piece after the other."""
        self._latency = seconds

    def throttle(self, rate: float) -> None:
        """Pass on no more than ``rate`` bytes per second from now on."""
        self._rate = rate

    # Its life.

    def run(self) -> None:
        """Pass everything on until the sender has said its last word."""
        try:
            while data := self._source.recv(_READ_SIZE):
                if self._unpacker is not None:
                    self._find_messages(data)
                self._pass_on(data)
                self._going.wait()
            self._going.wait()
        except OSError:
            self.line.reset()  # What one side has done the other shall see.
        else:
            with suppress(OSError):
                self._sink.shutdown(socket.SHUT_WR)

    def _pass_on(self, data: bytes) -> None:
        while data:
            self._act()
            self._going.wait()
            if seconds := self._delay + self._latency:
                self._delay = 0.0
                gevent.sleep(seconds)
            if self._is_swallowing or self.line.is_over:
                return
            size = len(data)
            if self._faults:
                size = min(size, self._faults[0][0] - self.position)
            if self._rate is not None:
                size = min(size, max(1, int(self._rate / 100)))
                gevent.sleep(size / self._rate)
            self._sink.sendall(data[:size])
            self.position += size
            data = data[size:]
        self._act()

    def _act(self) -> None:
        while self._faults and self._faults[0][0] <= self.position and not self.line.is_over:
            heappop(self._faults)[2](self)

    def _find_messages(self, data: bytes) -> None:
        """Give what is to happen between messages its exact position, where ``data`` has the end of one."""
        assert self._unpacker is not None
        self._unpacker.feed(data)
        while self._faults_between:
            try:
                self._unpacker.skip()
            except msgpack.OutOfData:
                return
            while self._faults_between and self._faults_between[0][0] < self._unpacker.tell():
                self.at(self._unpacker.tell(), heappop(self._faults_between)[2])
        self._unpacker = None


class Line:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        #: True once both sides are closed.
        self.is_over = False
        #: From the client to the server.
        self.requests = Flow(self, client, server)
        #: From the server to the client.
        self.answers = Flow(self, server, client)
        self._sockets = (client, server)

    def cut(self) -> None:
        """End in good order: both sides hear the end, and what they still say is thrown away."""
        self.requests.half_close()
        self.answers.half_close()

    def reset(self) -> None:
        """Reset the connection on both sides."""
        if not self.is_over:
            self.is_over = True
            for sock in self._sockets:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

    def run(self) -> None:
        """Pass on what is said until both have said their last word."""
        flows = [gevent.spawn(flow.run) for flow in (self.requests, self.answers)]
        try:
            gevent.joinall(flows)
        finally:
            gevent.killall(flows)
            self.is_over = True
            for sock in self._sockets:
                sock.close()


class Proxy:
    """Passes on whatever comes to the server at ``target``; ``with`` ends it.

    A connection that can't be made there is reset. ``buffer_size`` is for the kernel's buffers, so that they are soon
    full where that is wanted.
    """

    def __init__(self, target: Any, *, buffer_size: int | None = None) -> None:
        #: Where the server is; connections that come from now on go there.
        self.target = target
        #: Called with each new line, before anything passes: ``lambda line: line.requests.at(7, Flow.reset)``.
        self.plan: Callable[[Line], Any] | None = None
        #: Those that there are now.
        self.lines: list[Line] = []
        #: How many there were since the beginning, each with its plan.
        self.count = 0
        self._buffer_size = buffer_size
        self._lives: set[Any] = set()
        self._listener: Any = None
        self._accepting: Any = None
        self._port = 0
        self.listen()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the same one also after `refuse` and `listen`."""
        return "127.0.0.1", self._port

    @property
    def line(self) -> Line:
        """The one that was made last, of those that there are."""
        return self.lines[-1]

    def listen(self) -> None:
        """Accept connections, again after `refuse`."""
        assert self._listener is None
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._buffer_size is not None:  # Those of the connections are as large.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_size)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_size)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(1024)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._accepting = gevent.spawn(self._accept, listener)

    def refuse(self) -> None:
        """Refuse connections; those that there are go on."""
        if self._listener is not None:
            self._accepting.kill()
            self._listener.close()
            self._listener = None

    def reset_all(self) -> None:
        """Reset every connection that there is."""
        for line in list(self.lines):
            line.reset()

    def close(self) -> None:
        """End everything."""
        self.refuse()
        self.reset_all()
        gevent.killall(list(self._lives))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            life = gevent.spawn(self._run, client)
            self._lives.add(life)
            life.rawlink(self._lives.discard)

    def _run(self, client: socket.socket) -> None:
        server = socket.socket()
        line = Line(client, server)
        try:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._buffer_size is not None:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_size)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_size)
            server.connect(self.target)
        except OSError:
            line.reset()
            return
        except BaseException:
            line.reset()
            raise
        self.count += 1
        self.lines.append(line)
        try:
            if self.plan is not None:
                self.plan(line)
            if not line.is_over:
                line.run()
        finally:
            self.lines.remove(line)
