"""An honest client: it calls in rounds, checks every answer, and says at the end how that went.

It is a process of its own, so that what it measures is the server's doing; it knows nothing but msgpack. SIGTERM ends
it after its round. With ``--hold`` it has two calls in flight all along, which are answered when it asks for that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import ssl
import sys
import time
from typing import Any

import msgpack

PAUSE = 0.001
TIMEOUT = 30.0

# Until the server has set up what it needs for each kind of call, once.
WARM_UP_ROUNDS = 100


class Client:
    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.socket = sock
        self.random = random.Random(seed)
        self.unpacker = msgpack.Unpacker(max_buffer_size=0)
        #: By msgid: the error and the result that an answer has to have.
        self.expected: dict[int, tuple[Any, Any]] = {}
        self.next_msgid = 0
        self.latencies: list[float] = []
        self.calls = self.notifications = 0
        self.faults: list[str] = []

    def request(self, method: str, *params: Any, error: Any = None, result: Any = None) -> bytes:
        msgid = self.next_msgid
        self.next_msgid = (msgid + 1) % 2**32
        self.expected[msgid] = error, result
        self.calls += 1
        data: bytes = msgpack.packb([0, msgid, method, params])
        return data

    def mixed(self) -> bytes:
        """A request or notification of any kind."""
        kind = self.random.random()
        number = self.random.getrandbits(32)
        if kind < 0.6:
            return self.request("echo", number, result=number)
        if kind < 0.7:
            value = bytes([number & 0xFF]) * self.random.randrange(16 * 1024)
            return self.request("echo", value, result=value)
        if kind < 0.78:
            return self.request("pause", PAUSE, number, result=number)
        if kind < 0.86:
            return self.request("later", PAUSE, number, result=number)
        if kind < 0.88:
            nested = {"list": [number] * 200, "text": "ä" * 2000, "nothing": None}
            return self.request("echo", nested, result=nested)
        if kind < 0.885:
            return self.request("large", 64 * 1024, result=b"x" * 64 * 1024)
        if kind < 0.91:
            return self.request("fail", "as told", error="as told")
        if kind < 0.93:
            return self.request("nosuch", number, error='No such method "nosuch" found')
        self.notifications += 1
        return bytes(msgpack.packb([2, "count", [""]]))

    def round(self, size: int) -> None:
        """``size`` calls and notifications at once, the first of which is timed; wait for all answers."""
        held = len(self.expected)
        first = self.next_msgid
        number = self.random.getrandbits(32)
        data = self.request("echo", number, result=number) + b"".join(self.mixed() for _ in range(size - 1))
        begin = time.perf_counter()
        self.socket.sendall(data)
        while len(self.expected) > held:
            for message in self.receive():
                if message[1] == first:
                    self.latencies.append(time.perf_counter() - begin)
                self.check(message)

    def receive(self) -> Any:
        data = self.socket.recv(256 * 1024)
        if not data:
            raise EOFError("the server closed the connection")
        self.unpacker.feed(data)
        return self.unpacker

    def check(self, message: Any) -> None:
        kind, msgid, error, result = message
        expected = self.expected.pop(msgid, None)
        if kind != 1 or (error, result) != expected:
            self.faults.append(f"{str(message)[:100]} instead of {str(expected)[:100]}")

    def report(self) -> dict[str, Any]:
        self.latencies.sort()
        count = len(self.latencies)
        return {
            "calls": self.calls,
            "notifications": self.notifications,
            "lost": len(self.expected),
            "wrong": len(self.faults),
            "first_fault": self.faults[0] if self.faults else None,
            "timed": count,
            "p50_ms": self.latencies[count // 2] * 1000 if count else None,
            "p99_ms": self.latencies[count * 99 // 100] * 1000 if count else None,
            "max_ms": self.latencies[-1] * 1000 if count else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--calls", type=int, help="end after so many; otherwise at SIGTERM")
    parser.add_argument("--round", type=int, default=3, help="of how many calls a round is")
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trust", help="a PEM file: speak TLS")
    options = parser.parse_args()

    is_told_to_end = False

    def end(*_: Any) -> None:
        nonlocal is_told_to_end
        is_told_to_end = True

    signal.signal(signal.SIGTERM, end)
    sock: socket.socket = socket.create_connection(("127.0.0.1", options.port), timeout=TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if options.trust is not None:
        sock = ssl.create_default_context(cafile=options.trust).wrap_socket(sock, server_hostname="localhost")
    client = Client(sock, options.seed)
    gate = f"gate of {os.getpid()}"
    try:
        held = [client.request("hold", gate, number, result=number) for number in range(2 * options.hold)]
        sock.sendall(b"".join(held))
        for _ in range(WARM_UP_ROUNDS if options.hold else 1):
            client.round(options.round)
        client.latencies.clear()
        print("ready", flush=True)
        said = time.monotonic()
        while not is_told_to_end and (options.calls is None or client.calls < options.calls):
            client.round(options.round)
            if options.pause:
                time.sleep(options.pause)
            if time.monotonic() > said + 5:
                said = time.monotonic()
                print(f"{client.calls} calls", flush=True)
        if len(client.expected) != len(held):
            client.faults.append("a call that was held has been answered")
        if options.hold:
            sock.sendall(client.request("release", gate))
        while client.expected:
            for message in client.receive():
                client.check(message)
    except (OSError, EOFError, ValueError, TypeError) as exc:
        client.faults.append(f"{type(exc).__name__}: {exc}")
    print(json.dumps(client.report()), flush=True)
    sys.exit(1 if client.faults else 0)


if __name__ == "__main__":
    main()
