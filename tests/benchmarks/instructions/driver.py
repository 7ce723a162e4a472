"""The program whose instructions are counted: calls through gmprpc in one process and one thread.

``python -P driver.py DIRECTORY CASE...``: each case runs in processes forked off, so that none finds a heap that
another has left. Each warms up, then plays a small number of calls, and a large one; before, between and after it calls
`mark`, by which whoever counts can tell the two apart. One line of JSON for each process tells its number and those of
the calls. DIRECTORY is for sockets.

The other side is played by `Peer` in the same loop, with bytes that were encoded before: nearly everything that is
counted is gmprpc's, gevent's and msgpack's. All goes through unix sockets, which deliver at once, in the thread that
sends; TCP may do so a little later, and then the loop goes round once more.

It imports nothing of the tests: it has to run wherever gmprpc is installed.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import count, product, repeat
from pathlib import Path
from socket import AF_UNIX, SO_RCVBUF, SO_SNDBUF, SOCK_STREAM, SOL_SOCKET, socket, socketpair
from typing import Any, NamedTuple

import gevent
import msgpack
from gevent.hub import Hub
from greenlet import getcurrent, greenlet

import gmprpc
from gmprpc import connection, sweeper

#: Called between two measurements: a function of the C library that nothing else here calls.
mark = os.getppid

SMALL = "twelve bytes"
LARGE = b"x" * 65536

# More than any exchange needs, on either side.
_BUFFER_SIZE = 256 * 1024

# Each case runs in so many processes, each with its things in other places in memory: one may have bad luck.
_LAYOUTS = 3

_READ = 1

# Under a meter everything takes fifty times as long: no pause is made because of the time, and nothing is waited for,
# which would take as many instructions as there is time.
_TIMES = (
    (connection, "_BATCH_TIME", 1e6),
    (connection, "_STREAK_TIME", 1e6),
    (connection, "_SPIN_TIME", 0.0),
    (sweeper.Sweeper, "_INTERVAL", 1e6),
)

# What one side has to hear, all of it, and says then.
Exchange = tuple[bytes, bytes]


class Peer:
    """One end of a connection, played from a script, in callbacks of the loop, with as little work as can be."""

    def __init__(self, sock: socket) -> None:
        for option in (SO_SNDBUF, SO_RCVBUF):
            sock.setsockopt(SOL_SOCKET, option, _BUFFER_SIZE)
        sock.setblocking(False)
        # (`recv` would allocate all that it is ready to take: how much work that is depends on what lies in the heap.)
        self._buffer = bytearray(_BUFFER_SIZE)
        self._view = self._rest = memoryview(self._buffer)
        self._missing = 0
        self._recv_into = sock.recv_into
        self._expected = self._answer = b""
        self._script: Iterator[Exchange] = iter(())
        self._on_end: Callable[[], Any] = int
        #: Sends what it is given, which has to go at once.
        self.say = sock.sendall
        self._watcher: Any = gevent.get_hub().loop.io(sock.fileno(), _READ)
        self._watcher.start(self._on_readable)

    def play(self, script: Iterator[Exchange], on_end: Callable[[], Any]) -> None:
        """Go through ``script``, then call ``on_end``; returns at once."""
        self._script = script
        self._on_end = on_end
        self._turn_page()

    def _on_readable(self) -> None:
        size = self._recv_into(self._rest)
        if size != self._missing:
            self._hear_part(size)
            return
        if not self._buffer.startswith(self._expected):
            heard = bytes(self._view[: len(self._expected)])
            raise AssertionError(f"heard {heard[:100]!r} and not {self._expected[:100]!r}")
        if self._answer:
            self.say(self._answer)
        self._turn_page()

    def _hear_part(self, size: int) -> None:
        if not size or size > self._missing:
            raise AssertionError(f"heard {size} bytes and not {self._missing}: {bytes(self._rest[: min(size, 100)])!r}")
        self._rest = self._rest[size:]
        self._missing -= size

    def _turn_page(self) -> None:
        try:
            self._expected, self._answer = next(self._script)
        except StopIteration:
            self._missing = 0
            self._on_end()
        else:
            self._rest = self._view
            self._missing = len(self._expected)


class Case(NamedTuple):
    """Something to measure."""

    #: Sets it up; what it returns plays so many rounds.
    prepare: Callable[[], Callable[[int], Any]]
    #: Calls in each round.
    calls_at_once: int
    #: So many rounds are played until Python has adapted its code to what it does, and msgids are of one length.
    warm_up: int
    #: So many are counted: the difference is free of what it takes to begin and to end.
    few: int
    many: int
    #: The case like it that gmprpc has no part in, unless this is one.
    reference: str | None = None


# Servers.


def serving(
    connections: int, in_flight: int, method: str = "echo", payload: Any = SMALL
) -> Callable[[], Callable[[int], Any]]:
    """Calls to a server: ``in_flight`` at once, in one piece, on each of ``connections``."""

    def prepare() -> Callable[[int], Any]:
        service = gmprpc.Service()

        @service.method
        def echo(value: Any) -> Any:
            return value

        @service.method
        def block(value: Any) -> Any:
            gevent.sleep(0)
            return value

        server = gmprpc.Server("unix:server", service)
        server.start()
        peers = []
        for _ in range(connections):
            sock = socket(AF_UNIX, SOCK_STREAM)
            sock.connect("server")
            peers.append(Peer(sock))
        return playing(peers, *exchange(in_flight, method, payload))

    return prepare


def exchange(in_flight: int, method: str, payload: Any, first_msgid: int = 0) -> tuple[bytes, bytes]:
    """``in_flight`` requests, all in one piece, and the responses."""
    msgids = range(first_msgid, first_msgid + in_flight)
    request = b"".join(msgpack.packb([0, msgid, method, [payload]]) for msgid in msgids)
    return request, b"".join(msgpack.packb([1, msgid, None, payload]) for msgid in msgids)


def playing(peers: list[Peer], request: bytes, response: bytes) -> Callable[[int], None]:
    """What has each of ``peers`` say ``request`` again and again, each time that ``response`` has come."""

    def play(rounds: int) -> None:
        main = getcurrent()
        playing = set(range(len(peers)))

        def end(number: int) -> None:
            playing.remove(number)
            if not playing:
                main.switch()

        for number, peer in enumerate(peers):
            script = iter([*repeat((response, request), rounds - 1), (response, b"")])
            peer.play(script, lambda number=number: end(number))  # type: ignore[misc]
            peer.say(request)
        gevent.get_hub().switch()

    return play


# Clients.


def calling(callers: int, call: Callable[[gmprpc.Client, int], Any]) -> Callable[[], Callable[[int], Any]]:
    """Calls of a client, ``callers`` at once; ``call(client, rounds)`` makes as many times as many and checks them."""

    def prepare() -> Callable[[int], Any]:
        with socket(AF_UNIX, SOCK_STREAM) as listener:
            listener.bind("listener")
            listener.listen()
            client = gmprpc.Client("unix:listener").connect()
            peer = Peer(listener.accept()[0])
        first_msgids = count(0, callers)

        def play(rounds: int) -> None:
            peer.play(iter([exchange(callers, "echo", SMALL, next(first_msgids)) for _ in range(rounds)]), int)
            call(client, rounds)

        return play

    return prepare


def call_blocking(client: gmprpc.Client, rounds: int) -> None:
    call = client.call
    for _ in range(rounds):
        check(call("echo", SMALL))


def call_in_greenlets(client: gmprpc.Client, rounds: int) -> None:
    greenlets = [gevent.spawn(call_blocking, client, rounds) for _ in range(100)]
    gevent.joinall(greenlets, raise_error=True)


def call_async(client: gmprpc.Client, rounds: int) -> None:
    for _ in range(rounds):
        for call in [client.call_async("echo", SMALL) for _ in range(64)]:
            check(call.get())


def check(answer: Any) -> None:
    if answer != SMALL:
        raise AssertionError(f"wrong answer: {answer!r}")


# The reference.


class Echo:
    """The least that a server can be which runs calls in a greenlet: a little of everything that gmprpc uses."""

    def __init__(self, sock: socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)
        self._packer = msgpack.Packer()
        self._methods: dict[str, Callable[..., Any]] = {"echo": lambda value: value}
        self._answers: list[bytes] = []
        self._message: Any = None
        self._greenlet = greenlet(self._answer_calls, gevent.get_hub())
        self._watcher: Any = gevent.get_hub().loop.io(sock.fileno(), _READ)
        self._watcher.start(self._on_readable)

    def _on_readable(self) -> None:
        self._unpacker.feed(self._buffer[: self._socket.recv_into(self._buffer)])
        for message in self._unpacker:
            self._message = message
            self._greenlet.switch()
        self._socket.send(b"".join(self._answers))
        self._answers.clear()

    def _answer_calls(self) -> None:
        hub: Any = gevent.get_hub()
        while True:
            _, msgid, method, params = self._message
            self._answers.append(self._packer.pack([1, msgid, None, self._methods[method](*params)]))
            greenlet.switch(hub)


_echoes = []


def echoing(in_flight: int, payload: Any = SMALL) -> Callable[[], Callable[[int], Any]]:
    """Calls to an `Echo`, ``in_flight`` at once."""

    def prepare() -> Callable[[int], Any]:
        ours, peers = socketpair()
        _echoes.append(Echo(ours))
        return playing([Peer(peers)], *exchange(in_flight, "echo", payload))

    return prepare


CASES = {
    "server-1x1": Case(serving(1, 1), 1, 200, 20, 120, "reference-1x16"),
    "server-1x64": Case(serving(1, 64), 64, 16, 1, 9, "reference-1x16"),
    "server-50x16": Case(serving(50, 16), 800, 2, 1, 3, "reference-1x16"),
    "server-1x1-64k": Case(serving(1, 1, payload=LARGE), 1, 100, 10, 60, "reference-1x1-64k"),
    "server-1x16-blocking": Case(serving(1, 16, "block"), 16, 20, 2, 22, "reference-1x16"),
    "client-blocking": Case(calling(1, call_blocking), 1, 300, 20, 120, "reference-1x16"),
    "client-100-greenlets": Case(calling(100, call_in_greenlets), 100, 10, 1, 7, "reference-1x16"),
    "client-async-64": Case(calling(64, call_async), 64, 16, 1, 9, "reference-1x16"),
    "reference-1x16": Case(echoing(16), 16, 20, 2, 22),
    "reference-1x1-64k": Case(echoing(1, payload=LARGE), 1, 100, 10, 60),
}


def plug_holes() -> None:
    """Fill the holes that the heap has by now: which there are depends on the length of every path.

    Stacks of greenlets are laid aside in chunks of a size for which malloc does up to 400 instructions more or less,
    according to what lies beside the hole that it finds. From now on all comes from the end of the heap.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes = [ctypes.c_size_t]
    malloc.restype = ctypes.c_size_t
    end = max(malloc(100_000) for _ in range(8))  # Not so much that it would lie elsewhere.
    for size in range(8192, 0, -16):
        while malloc(size) < end:
            pass


_wasted = []


def shuffle_types(layout: int) -> None:
    """Have Python's cache of attributes of types begin anew, with other places for all: as many ways as numbers.

    The place is found from the name's address and the number of a version that each type gets when it is asked first.
    Two attributes that fall on the same place cost 600 instructions at every use.
    """
    for _ in range(layout * 37):
        _wasted.append(type("Wasted", (), {}))
        getattr(_wasted[-1], "attribute", None)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(object))


def run(case: Case) -> tuple[int, int]:
    """Play ``case`` between marks; returns the two numbers of calls."""
    play = case.prepare()
    play(case.warm_up)
    gc.collect()
    gc.freeze()  # What there is now isn't looked at again.
    plug_holes()  # What was set up, and is gone, has left some, too.
    play(case.few)  # What is allocated for good from now on lies behind the plugs.
    for rounds in (case.few, case.many):
        mark()
        play(rounds)
        gc.collect()  # What the calls have left in cycles is their doing.
    mark()
    return case.few * case.calls_at_once, case.many * case.calls_at_once


def fingerprint() -> dict[str, str]:
    """What decides on the number of instructions and isn't gmprpc."""
    packages = {name: importlib.metadata.version(name) for name in ("gevent", "greenlet", "msgpack")}
    is_optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "python": platform.python_version(),
        "compiler": platform.python_compiler(),
        "optimizations": "on" if is_optimized else "off",
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        **packages,
    }


def main(directory: Path, names: list[str]) -> None:
    """Run the cases ``names``, each in a process of its own."""
    for owner, name, seconds in _TIMES:
        if not hasattr(owner, name):
            raise AssertionError(f"{owner!r} has no {name} any more: what depends on the time now?")
        setattr(owner, name, seconds)
    Hub.SYSTEM_ERROR = (Exception,)  # What fails in the loop ends the program.
    gc.disable()  # When it strikes depends on everything that was allocated before.
    print(json.dumps({"gmprpc": str(Path(gmprpc.__file__).parent), "fingerprint": fingerprint()}), flush=True)
    plug_holes()
    for name, layout in product(names, range(_LAYOUTS)):
        if (pid := os.fork()) == 0:
            try:
                shuffle_types(layout)
                place = directory / name / str(layout)
                place.mkdir(parents=True)
                os.chdir(place)  # Where the path of a socket, the name alone, is never too long.
                few, many = run(CASES[name])
                print(json.dumps({"case": name, "pid": os.getpid(), "few": few, "many": many}), flush=True)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
