"""A server in a process of its own that counts how often each call is carried out, and the calls of clients to it.

What it counts outlives it, also when it is killed: that no call is carried out twice can be told at the end.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

import gevent
from gevent import socket

import gmprpc

from .helpers import Peer, wait_until
from .programs import Program

_PROGRAM = Path(__file__).parent / "soak" / "programs" / "server.py"


class Ledger:
    """A byte for each of ``size`` numbered calls, in a file that every process may map into its memory.

    A program without this module writes it with ``ledger = mmap.mmap(file.fileno(), 0)`` and ``ledger[number] += 1``.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, number: int) -> int:
        """What stands there for the call ``number``."""
        return self._bytes[number]

    def snapshot(self) -> bytes:
        """What stands there for each call, now."""
        return self._bytes[:]

    def close(self) -> None:
        """Close it; the file stays."""
        self._bytes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CountingServer:
    """The server, which may be started, killed and started again at one address; ``with`` starts and ends it."""

    def __init__(self, directory: Path, size: int = 200_000) -> None:
        #: How often each call has been carried out, or begun to be.
        self.ledger = Ledger(directory / "ledger", size)
        self._log = directory / "log"
        self._log.touch()
        # Beyond 65,535 each takes as many bytes as the other.
        self._numbers = count(100_000)
        # Nobody else is given the port while no server runs: it is bound, but nobody listens.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        #: Where it is, or will be.
        self.address: tuple[str, int] = self._reservation.getsockname()
        self._program: Program | None = None

    def number(self) -> int:
        """A number for another call."""
        return next(self._numbers)

    def executions(self, number: int) -> int:
        """How often the call ``number`` has been carried out, or begun to be."""
        return self.ledger[number]

    def wait_begun(self, *numbers: int) -> None:
        """Wait until each of the calls is at work, or done."""
        wait_until(lambda: all(self.ledger[number] for number in numbers))

    def statistics(self) -> dict[str, int]:
        """What the server says of itself, without what asking adds."""
        with Peer.connect(self.address) as peer:
            statistics: dict[str, int] = peer.call("statistics")[3]
        return statistics | {name: statistics[name] - 1 for name in ("open_connections", "in_flight")}

    def wait_quiet(self, connections: int = 0) -> None:
        """Wait until so many connections are left, and everything that came is carried out."""

        def is_quiet() -> bool:
            statistics = self.statistics()
            return (statistics["open_connections"], statistics["in_flight"]) == (connections, 0)

        wait_until(is_quiet)

    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    def release(self, gate: str = "") -> None:
        """Let the calls of ``hold`` go on that wait at ``gate``."""
        with Peer.connect(self.address) as peer:
            assert peer.call("release", gate) == [1, 0, None, None]

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        assert self._program is None
        options = ["--ledger", str(self.ledger.path), "--log", str(self._log), "--port", str(self.address[1])]
        self._program = Program(sys.executable, _PROGRAM, *options)
        if (line := self._program.line()) != str(self.address[1]):
            raise AssertionError("\n".join(["the server doesn't start:", line, *self._program.lines()]))

    def stop(self) -> None:
        """Have it stop in good order, and wait for that."""
        assert self._program is not None
        self._program.terminate()
        assert self._program.wait() == 0
        self._end()

    def kill(self) -> None:
        """Have it die at once."""
        assert self._program is not None
        os.kill(self._program.pid, signal.SIGKILL)
        assert self._program.wait() == -signal.SIGKILL
        self._end()

    def _end(self) -> None:
        if self._program is not None:
            program, self._program = self._program, None
            program.__exit__()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one, and give the address away."""
        try:
            if self._program is not None:
                os.kill(self._program.pid, signal.SIGKILL)  # It may still have held calls.
                self._end()
        finally:
            self._reservation.close()
            self.ledger.close()


def outcome(call: Callable[..., Any], *params: Any, **options: Any) -> Any:
    """What ``call`` returns, or the error of gmprpc that it raises."""
    try:
        return call(*params, **options)
    except (gmprpc.RPCError, gmprpc.CallCancelled) as exc:
        return exc


class Begun(NamedTuple):
    """A call that is under way."""

    number: int
    #: Waits for it.
    outcome: Callable[[], Any]


def begin(server: CountingServer, client: Any, method: str, *params: Any, **options: Any) -> list[Begun]:
    """Two calls: one for which a greenlet is blocked, and one that is pending."""
    blocked, pending = server.number(), server.number()
    caller = gevent.spawn(outcome, client.call, method, blocked, *params, **options)
    call = client.call_async(method, pending, *params, **options)
    return [Begun(blocked, caller.get), Begun(pending, partial(outcome, call.get))]
