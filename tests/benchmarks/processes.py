"""The programs that take part: building them, starting them on a core, putting load on them.

It knows nothing of tables and statistics. Linux only: the load generator uses epoll, and cores are picked by
``sched_setaffinity``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import gmprpc

HERE = Path(__file__).parent

# Seconds for what takes a moment: starting an interpreter, connecting, giving up on a server that is stuck. Beyond them
# something is wrong.
_PATIENCE = 30.0


class BenchmarkError(Exception):
    """A program that takes part can't be built, started or measured."""


@dataclass(frozen=True)
class Shape:
    """A shape of load: how many connections, how many calls in flight on each, and the size of what is echoed."""

    connections: int
    in_flight: int
    payload_size: int = 12
    #: How many times as fast as the peer gmprpc is to be on one shared core.
    bar: float | None = None

    @property
    def name(self) -> str:
        """``50x16``, and ``4x1-64k`` when the payload isn't small."""
        size = f"-{self.payload_size // 1024}k" if self.payload_size >= 1024 else ""
        return f"{self.connections}x{self.in_flight}{size}"


@dataclass(frozen=True)
class Server:
    """A program that has a method ``echo`` and prints the port on which it listens."""

    name: str
    #: Its file: in ``servers/``, if the path isn't absolute.
    source: str
    #: The distribution that it can't do without.
    package: str | None = None
    #: Not of this project: it may lose calls, as long as that is said.
    is_peer: bool = False

    def is_installed(self) -> bool:
        """Whether it can be started at all."""
        return self.package is None or importlib.util.find_spec(self.package.replace("-", "_")) is not None

    def version(self) -> str | None:
        """The version of its package."""
        if self.package == "gmprpc":
            return gmprpc.__version__
        return self.package and importlib.metadata.version(self.package)


_LARGE_CALL = Shape(1, 1, payload_size=300_000)

GMPRPC = Server("gmprpc", "gmprpc_server.py", "gmprpc")
PEER = Server("aio-msgpack-rpc", "aio_msgpack_rpc_server.py", "aio-msgpack-rpc", is_peer=True)
FLOOR = Server("floor", "floor.py")
C_ECHO = Server("c-echo", "c_echo.c")
SERVERS = {server.name: server for server in (FLOOR, GMPRPC, PEER, C_ECHO)}


class Workshop:
    """Has a directory for what is built; ``with`` removes it.

    Raises:
        BenchmarkError: something is missing: Linux, a C compiler, a second core.
    """

    def __init__(self, cores: int) -> None:
        if not sys.platform.startswith("linux"):
            raise BenchmarkError("the benchmarks need Linux, for epoll and sched_setaffinity")
        available = sorted(os.sched_getaffinity(0))
        if cores > len(available):
            raise BenchmarkError(f"a core each needs 2 cores, and only {len(available)} may be used here")
        #: The core of the server.
        self.server_core = available[0]
        #: The core of the load generator, which may be the same.
        self.load_core = available[cores - 1]
        self._known: set[Server] = set()
        self._directory = tempfile.TemporaryDirectory(prefix="gmprpc-bench-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def build(self, source: Path) -> Path:
        """The program made from a C source, compiled when it is first asked for."""
        program = Path(self._directory.name, source.stem)
        if not program.exists():
            compiler = shutil.which("cc")
            if compiler is None:
                raise BenchmarkError(
                    f"there is no C compiler: {source.name} has to be built with `cc` (Debian: apt-get install gcc "
                    "libc6-dev)"
                )
            done = subprocess.run(
                [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", program, source],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise BenchmarkError(f"cc can't build {source.name}:\n{done.stderr.rstrip()}")
        return program

    @cached_property
    def load_generator(self) -> Path:
        """The program made from ``load.c``."""
        return self.build(HERE / "load.c")

    def start(self, server: Server, *arguments: str) -> RunningServer:
        """Start ``server`` on its core, with ``arguments``, and wait until it listens."""
        source = HERE / "servers" / server.source
        command = [str(self.build(source))] if source.suffix == ".c" else [sys.executable, str(source)]
        if server not in self._known:
            # The second start is the one to measure, as it is for users: who compiles modules has a different heap.
            self._known.add(server)
            self.start(server, *arguments).end()
        with on_core(self.server_core):
            return RunningServer(server.name, [*command, *arguments], self._environment)

    @cached_property
    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(self._directory.name, "bytecode"))
        # The gmprpc that this program imports is the one that is measured, be it installed or the work tree.
        path = [str(Path(gmprpc.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        return environment

    def measure(self, server: Server, shape: Shape, seconds: float, *, fresh: bool = False) -> dict[str, Any]:
        """What the load generator found at a new process of ``server``; see the end of ``load.c`` for the keys.

        A process for each measurement: what a server did in another shape, or where its memory happens to lie, must not
        tell in all rounds.

        Unless it is to be ``fresh``, it has to echo one large message first. glibc maps and unmaps memory for every
        block beyond 128 KiB until it has seen one of them freed. Servers that offer a larger buffer to every `recv`, as
        asyncio does, take up to twice as long for a call until then, and whether that was so at start is a matter of
        what was imported. A server in use has seen such a block.
        """
        with self.start(server) as running:
            if not fresh:
                self._put_load(running, _LARGE_CALL, 0, 0)
            result = self._put_load(running, shape, seconds / 4, seconds)
            running.check()
        return result

    def _put_load(self, running: RunningServer, shape: Shape, warmup: float, seconds: float) -> dict[str, Any]:
        options = {
            "--port": running.port,
            "--connections": shape.connections,
            "--in-flight": shape.in_flight,
            "--payload-bytes": shape.payload_size,
            "--warmup": warmup,
            "--seconds": seconds,
        }
        command = [str(self.load_generator)]
        for option, value in options.items():
            command += [option, str(value)]
        try:
            with on_core(self.load_core):
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=warmup + seconds + _PATIENCE, check=False
                )
        except subprocess.TimeoutExpired:
            raise BenchmarkError("the load generator didn't come to an end") from None
        if done.returncode:
            raise BenchmarkError(f"the load generator failed: {done.stderr.strip()}{running.last_words()}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


class RunningServer:
    """The process of a server that listens; ``with`` ends it.

    Raises:
        BenchmarkError: it didn't start.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._name = name
        # A file takes whatever it writes; a pipe that nobody reads would block it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  Closed by `end`.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid
        try:
            #: Where it listens.
            self.port = self._read_port()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def check(self) -> None:
        """Raise BenchmarkError if the process has ended."""
        if self._process.poll() is not None:
            raise BenchmarkError(f"{self._name} ended with status {self._process.returncode}{self.last_words()}")

    @property
    def status(self) -> int | None:
        """The exit status, negative for the signal that killed it; None while it runs."""
        return self._process.poll()

    def resident_size(self) -> int:
        """The bytes of its memory that are resident now."""
        return self.memory("VmRSS")

    def memory(self, figure: str) -> int:
        """One of the sizes, in bytes, that ``/proc/PID/status`` has."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{figure}:"):
                return int(line.split()[1]) * 1024
        raise BenchmarkError("the server has no resident memory: it has ended")

    def log(self) -> str:
        """What it has written to standard error."""
        # At an offset, so that the process goes on where it was: the two share one position in the file.
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    def last_words(self) -> str:
        """The end of what it has written to standard error, in brackets, or nothing."""
        text = self.log().strip()
        return f" (it wrote: {text[-1000:]})" if text else ""

    def end(self) -> None:
        """Stop the process, by force if it doesn't react."""
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        # The line comes in one piece, so whoever has its beginning has it all.
        if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
            raise BenchmarkError(f"{self._name} didn't say within {_PATIENCE:g} s where it listens")
        line = self._process.stdout.readline()
        if not line.strip().isdecimal():
            raise BenchmarkError(f"{self._name} didn't start{self.last_words()}")
        return int(line)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes that are started here stay on ``core``, from their first instruction on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
