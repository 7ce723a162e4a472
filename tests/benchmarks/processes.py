"""The programs that take part: building them, starting them on a core, putting load on them.

It knows nothing of tables and statistics. Linux only: the load generator uses epoll, and cores are picked by
``sched_setaffinity``.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import gmprpc

from .environments import Absence, Environments
from .machine import own_versions
from .participants import Participant

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

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

    @property
    def name(self) -> str:
        """``50x16``, and ``4x1-64k`` when the payload isn't small."""
        size = f"-{self.payload_size // 1024}k" if self.payload_size >= 1024 else ""
        return f"{self.connections}x{self.in_flight}{size}"


# One message of 300 kB, for a server that is to be in use: see `Workshop.measure`.
_LARGE_CALL = Shape(1, 1, payload_size=300_000)


class Workshop:
    """Has a directory for what is built; ``with`` removes it.

    Peers run in the environments of ``environments``, everybody else with the interpreter that runs this.

    Raises:
        BenchmarkError: it isn't Linux.
    """

    def __init__(self, environments: Environments | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise BenchmarkError("the benchmarks need Linux, for epoll and sched_setaffinity")
        #: The cores that there are for this, first the one of the servers.
        self.cores = sorted(os.sched_getaffinity(0))
        self._directory = tempfile.TemporaryDirectory(prefix="gmprpc-bench-")
        #: Those of the peers.
        self.environments = environments or Environments(Path(self._directory.name, "peers"))
        self._known: set[tuple[str, ...]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    @property
    def server_core(self) -> int:
        """The core of every server."""
        return self.cores[0]

    def other_core(self, cores: int) -> int:
        """The core of whoever talks to a server: the server's own when the two share one core."""
        if cores > len(self.cores):
            raise BenchmarkError(f"a core each needs {cores} cores, and only {len(self.cores)} may be used here")
        return self.cores[cores - 1]

    # Building.

    def build(self, name: str, *sources: Path) -> Path:
        """The program ``name``, made from C sources when it is first asked for."""
        program = Path(self._directory.name, name)
        if not program.exists():
            compiler = shutil.which("cc")
            if compiler is None:
                raise BenchmarkError(
                    f"there is no C compiler: {name} has to be built with `cc` (Debian: apt-get install gcc libc6-dev)"
                )
            options = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
            done = subprocess.run(
                [compiler, *options, "-o", program, *sources], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BenchmarkError(f"cc can't build {name}:\n{done.stderr.rstrip()}")
        return program

    @cached_property
    def load_generator(self) -> Path:
        """The program made from ``load/``."""
        return self.build("load", *sorted((HERE / "load").glob("*.c")))

    # Running.

    def start(self, participant: Participant, *arguments: str) -> RunningServer:
        """Start the server of ``participant`` on its core, with ``arguments``, and wait until it listens.

        Raises:
            BenchmarkError: it can't be built, isn't installed, or doesn't listen.
        """
        source = HERE / "servers" / participant.server
        program = [self.build(source.stem, source)] if source.suffix == ".c" else [self._python(participant), source]
        command = [*map(str, program), *arguments]
        if tuple(command) not in self._known:
            # The second start is the one to measure, as it is for users: who compiles modules has a different heap.
            self._known.add(tuple(command))
            self.start(participant, *arguments).end()
        with on_core(self.server_core):
            return RunningServer(participant.name, command, self._environment(participant))

    def run(self, participant: Participant, *arguments: object, core: int, seconds: float) -> dict[str, Any]:
        """What ``participant``'s interpreter prints as JSON on its last line, given ``arguments``, on ``core``.

        It runs in the project's directory, so that ``-m tests.benchmarks.clients`` is found. It may take ``seconds``,
        and what a start takes.

        Raises:
            BenchmarkError: it failed, or took longer.
        """
        command = [str(self._python(participant)), *map(str, arguments)]
        return self._output(participant.name, command, self._environment(participant), core, seconds)

    def measure(
        self,
        participant: Participant,
        shape: Shape,
        seconds: float,
        *,
        cores: int = 1,
        fresh: bool = False,
        method: str = "echo",
        arguments: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What the load generator found at a new process of ``participant``, and what that used meanwhile.

        The figures of one run, as the JSON has them. ``cores`` is 1 if the two share one, and 2 if they don't.

        A process for each measurement: what a server did in another shape, or where its memory happens to lie, must not
        tell in all rounds.

        Unless it is to be ``fresh``, it has to echo one large message first. glibc maps and unmaps memory for every
        block beyond 128 KiB until it has seen one of them freed. Servers that offer a larger buffer to every `recv`, as
        asyncio does, take up to twice as long for a call until then, and whether that was so at start is a matter of
        what was imported. A server in use has seen such a block.

        Raises:
            BenchmarkError: there are no figures.
        """
        core = self.other_core(cores)
        with self.start(participant, *arguments) as running:
            if not fresh:
                self._put_load(running, participant, _LARGE_CALL, 0, 0, core, "echo")
            resident_before = running.resident_size()
            running.reset_peak_size()
            cpu_before = running.cpu_seconds()
            result = self._put_load(running, participant, shape, seconds / 4, seconds, core, method)
            running.check()
            cpu = running.cpu_seconds() - cpu_before
            answered = result.pop("answered")  # Those of the warm-up, too.
            result["server_cpu_ms_per_1000_calls"] = cpu * 1e6 / answered if answered else None
            result["resident_before"] = resident_before
            result["resident_under_load"] = running.peak_size()
        return result

    @contextmanager
    def hold(
        self, running: RunningServer, participant: Participant, connections: int, *, cores: int = 1
    ) -> Iterator[None]:
        """Hold idle connections to a server for a while; each has made a call, and its answer was right.

        Raises:
            BenchmarkError: not all of them could be made, or the server hasn't kept them.
        """
        command = self._load_command(running, participant) + [f"--connections={connections}", "--hold"]
        with on_core(self.other_core(cores)):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            if is_held := bool(process.stdout.readline()):
                try:
                    yield
                finally:
                    process.stdin.close()
            reason = process.stderr.read().strip()
        if process.returncode or not is_held:
            raise BenchmarkError(f"{reason}{running.last_words()}")

    def _load_command(self, running: RunningServer, participant: Participant) -> list[str]:
        return [str(self.load_generator), f"--port={running.port}", f"--dialect={participant.dialect}"]

    def _put_load(
        self,
        running: RunningServer,
        participant: Participant,
        shape: Shape,
        warmup: float,
        seconds: float,
        core: int,
        method: str,
    ) -> dict[str, Any]:
        command = self._load_command(running, participant) + [
            f"--method={method}",
            f"--connections={shape.connections}",
            f"--in-flight={shape.in_flight}",
            f"--payload-bytes={shape.payload_size}",
            f"--warmup={warmup}",
            f"--seconds={seconds}",
        ]
        try:
            return self._output("the load generator", command, dict(os.environ), core, warmup + seconds)
        except BenchmarkError as exc:
            raise BenchmarkError(f"{exc}{running.last_words()}") from None

    def _output(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], core: int, seconds: float
    ) -> dict[str, Any]:
        try:
            with on_core(core):
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=seconds + _PATIENCE,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{name} didn't come to an end") from None
        if done.returncode:
            raise BenchmarkError(f"{name} failed: {done.stderr.strip()[-1000:]}")
        try:
            result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            raise BenchmarkError(f"{name} printed no figures: {done.stdout[-1000:]!r}") from None
        return result

    def versions(self, participant: Participant) -> dict[str, str]:
        """What runs when ``participant`` does.

        Raises:
            BenchmarkError: it isn't installed.
        """
        if participant.server.endswith(".c"):
            return {}
        if not participant.has_environment:
            return own_versions()
        try:
            return self.environments.versions(participant)
        except Absence as absence:
            raise BenchmarkError(str(absence)) from absence

    def _python(self, participant: Participant) -> Path:
        try:
            return self.environments.python(participant)
        except Absence as absence:
            raise BenchmarkError(str(absence)) from absence

    def _environment(self, participant: Participant) -> dict[str, str]:
        """The variables for a process of ``participant``."""
        without = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME"}
        environment = {name: value for name, value in os.environ.items() if name not in without}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(self._directory.name, "bytecode"))
        if not participant.has_environment:
            # The gmprpc that this program imports is the one that is measured, be it installed or the work tree.
            path = [str(Path(gmprpc.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(path)
        return environment


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

    def peak_size(self) -> int:
        """The most of them that there were at any moment since `reset_peak_size`."""
        return self.memory("VmHWM")

    def reset_peak_size(self) -> None:
        """`peak_size` is about what comes from now on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """CPU time that it has used, in all its threads, those that have ended too."""
        # The clock of another process, as clock_getcpuclockid(3) finds it: to the nanosecond, where /proc has ticks.
        return time.clock_gettime(~self.pid << 3 | 2)

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
