"""The field of a siege: the server in its process, what the kernel says of it, and the bystander.

It knows of no trial. Linux only: what is measured is read from ``/proc``.
"""

from __future__ import annotations

import json
import os
import signal
import ssl as stdlib_ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import gevent
import trustme
from gevent import socket, ssl

from tests.benchmarks.participants import Participant
from tests.benchmarks.processes import Workshop
from tests.helpers import Peer
from tests.programs import Program

from .report import Row, below, failure

_PROGRAMS = Path(__file__).parent / "programs"
SERVER = Participant("the server", str(_PROGRAMS / "server.py"))

#: The bar for the bystander's p99: made for the floods, and elsewhere there is less to bear.
P99_BAR = 0.05

#: Seconds in which everything has to be as it was, after whatever it was.
RECOVERY = 3.0

#: Seconds after which what a server only holds to be quicker next time has been given back.
QUIET = 2.5


class SiegeError(Exception):
    """A figure can't be had."""


class Target:
    """The server that is laid siege to, and a connection to ask it how it is."""

    def __init__(self, workshop: Workshop, *arguments: str, trust: Path | None = None) -> None:
        self._trust = trust
        self.process = workshop.start(SERVER, *arguments)
        try:
            self.port = self.process.port
            self._log_start = 0
            self._control = self.connect()
            self.is_ended = False
            # What is set up once, with the first call and the first large message, isn't an attacker's doing.
            self.ask("echo", b"x" * 64 * 1024)
            self.census()
        except BaseException:
            self.process.end()
            raise

    def connect(self, receive_size: int | None = None) -> Peer:
        """A new connection; its kernel's receive buffer is of ``receive_size`` bytes if that is given."""
        sock = socket.socket()
        if receive_size is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_size)
        sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._trust is not None:
            context = ssl.SSLContext(stdlib_ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self._trust)
            sock = context.wrap_socket(sock, server_hostname="localhost")
        return Peer(sock)

    def connect_plainly(self) -> Peer:
        """A new connection on which nothing has been said yet, not even where the server speaks TLS."""
        return Peer(socket.create_connection(("127.0.0.1", self.port)))

    # What the server says.

    def ask(self, method: str, *params: Any) -> Any:
        """The result of a call on a connection of our own."""
        _, _, error, result = self._control.call(method, *params)
        if error is not None:
            raise SiegeError(f"{method} was answered by the error {error!r}")
        return result

    def census(self) -> dict[str, int]:
        """How many descriptors, greenlets and threads the server has, when its garbage has been collected."""
        result: dict[str, int] = self.ask("census")
        return result

    def peak_census(self) -> dict[str, int]:
        """The most there is of everything, over a while: the bystander's requests are now more, now fewer."""
        counts = [self.census() for _ in range(10)]
        return {name: max(count[name] for count in counts) for name in counts[0]}

    def statistics(self) -> dict[str, int]:
        """The server's own figures."""
        result: dict[str, int] = self.ask("statistics")
        return result

    def counted(self, what: str = "") -> int:
        """How many notifications of ``what`` have been carried out."""
        result: int = self.ask("counted", what)
        return result

    def blocks(self) -> int:
        """How many pieces of memory Python's objects take: what leaks shows here first."""
        result: int = self.ask("blocks")
        return result

    def remember_log(self) -> None:
        """`new_log` is about what is logged from now on."""
        self._log_start = len(self.process.log())

    def new_log(self) -> list[str]:
        """The lines that have been logged since."""
        return self.process.log()[self._log_start :].splitlines()

    # What the kernel says.

    def resident_size(self) -> int:
        """Bytes of resident memory, now."""
        return self.process.resident_size()

    def reset_peak(self) -> None:
        """`peak_size` is about what comes from now on."""
        self.process.reset_peak_size()

    def peak_size(self) -> int:
        """The most bytes of resident memory that there were at any moment."""
        return self.process.peak_size()

    def cpu_seconds(self) -> float:
        """CPU time that all threads have used."""
        return self.process.cpu_seconds()

    def unread_size(self) -> int:
        """Bytes that have arrived for the server and that it hasn't read."""
        return sum(int(queues[4].partition(":")[2], 16) for queues in self._sockets())

    def _sockets(self) -> Iterator[list[str]]:
        """The server's ends of its connections, as ``/proc/net/tcp`` has them."""
        local = f"0100007F:{self.port:04X}"
        established = "01"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == local and fields[3] == established:
                yield fields

    # Waiting.

    def wait_read(self) -> None:
        """Wait until everything that was sent to the server has been read and carried out."""
        wait_for(lambda: self.unread_size() == 0, "everything is read")
        self.ask("echo", 1)

    def wait_idle(self, seconds: float = 0.5) -> None:
        """Wait until the server does next to nothing any more."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            gevent.sleep(seconds)
            if self.cpu_seconds() - before < 0.2 * seconds:
                return
        raise SiegeError("the server was still busy after 60 s")

    def wait_alone(self, others: int = 2, seconds: float = 30.0) -> None:
        """Wait until there are ``others`` connections: usually this program's own and the bystander's."""
        wait_for(lambda: self.statistics()["open_connections"] == others, "the connections are gone", seconds)

    def recovery(self, before: dict[str, int]) -> tuple[float, dict[str, int]]:
        """After how many seconds there is no more of anything than ``before``, and what there is at the end."""
        begin = time.monotonic()
        while True:
            now = self.census()
            took = time.monotonic() - begin
            if all(now[name] <= before[name] for name in now) or took > 2 * RECOVERY:
                return took, now
            gevent.sleep(0.05)

    def recovery_row(self, what: str, before: dict[str, int]) -> Row:
        """Whether there are as many of everything as ``before``, soon."""
        took, now = self.recovery(before)
        differences = [f"{now[name]} {name} for {before[name]}" for name in now if now[name] > before[name]]
        if differences:
            return Row(
                what, ", ".join(differences), "as before", is_passed=False, details={"before": before, "now": now}
            )
        return below(what, took, RECOVERY, "s", before=before, now=now)

    # The end.

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process."""
        os.kill(self.process.pid, signum)

    def wait_ended(self, seconds: float) -> int | None:
        """The exit status, or None if the process runs on for so long."""
        deadline = time.monotonic() + seconds
        while (status := self.process.status) is None and time.monotonic() < deadline:
            gevent.sleep(0.01)
        return status

    def complaints(self) -> Iterator[Row]:
        """Rows for what nobody may bring about, if it has come about."""
        log = self.process.log()
        if "Traceback" in log:
            lines = log[log.index("Traceback") :].splitlines()
            yield Row("tracebacks in the log", f"{log.count('Traceback')}: {lines[-1]}", "= 0", is_passed=False)
        if (status := self.process.status) is not None:
            yield failure("the server", f"ended with status {status}{self.process.last_words()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self.process.end()


class Client:
    """A process of ``programs/client.py``."""

    def __init__(self, target: Target, *options: object, trust: Path | None = None) -> None:
        secrecy = [] if trust is None else ["--trust", str(trust)]
        command = [sys.executable, str(_PROGRAMS / "client.py"), str(target.port), *map(str, options), *secrecy]
        self._program = Program(*command)
        if (line := self._program.line()) != "ready":
            self._program.__exit__()
            raise SiegeError(f"the client isn't ready: {line}")

    def report(self) -> dict[str, Any]:
        """What it found; waits until it has done all its calls."""
        while not (line := self._program.line()).startswith("{"):
            if not line.endswith(" calls"):
                raise SiegeError(f"the client failed: {' '.join([line, *self._program.lines()])}")
        result: dict[str, Any] = json.loads(line)
        return result

    def end(self) -> dict[str, Any]:
        """Have it end; what it found."""
        self._program.terminate()
        return self.report()

    def kill(self) -> None:
        """Have it die at once."""
        os.kill(self._program.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._program.__exit__()


class Bystander(Client):
    """A client that keeps calling while others lay siege; it has two calls in flight all along."""

    def row(self, p99_bar: float | None = P99_BAR) -> Row:
        """How it fared; this ends it."""
        found = self.end()
        if found["wrong"] or found["lost"]:
            figure = f"{found['wrong']} wrong, {found['lost']} lost: {found['first_fault']}"
            return Row("bystander", figure, "0 wrong, 0 lost", is_passed=False, details=found)
        figure = f"p50 {found['p50_ms']:.2f} p99 {found['p99_ms']:.2f} max {found['max_ms']:.1f} ms"
        what = f"bystander: 0 of {found['calls']:,} calls wrong or lost"
        if p99_bar is None or found["timed"] < 100:  # Of fewer, it would be no p99.
            return Row(what, figure, "0 wrong, 0 lost", details=found)
        return Row(f"{what}; its p99", figure, f"< {p99_bar * 1000:.0f} ms", found["p99_ms"] < p99_bar * 1000, found)


class Field:
    """Where trials take place; ``is_short`` asks for their short form."""

    def __init__(self, workshop: Workshop, directory: Path, *, is_short: bool) -> None:
        self.workshop = workshop
        self.is_short = is_short
        self._directory = directory

    def choose(self, long: int, short: int) -> int:
        """A number for the form that is asked for."""
        return short if self.is_short else long

    @contextmanager
    def besieged(
        self, *arguments: object, is_secret: bool = False, pause: float = 0.001
    ) -> Iterator[tuple[Target, Bystander]]:
        """A new server, and a bystander of it who pauses for so many seconds between its calls."""
        trust = None
        options = [str(argument) for argument in arguments]
        if is_secret:
            trust, certificate = self._certificates()
            options += ["--certificate", str(certificate)]
        with (
            Target(self.workshop, *options, trust=trust) as target,
            Bystander(target, "--hold", "--pause", pause, trust=trust) as bystander,
        ):
            yield target, bystander

    def _certificates(self) -> tuple[Path, Path]:
        """The files of an authority to trust, and of a certificate for localhost."""
        trust, certificate = self._directory / "trust.pem", self._directory / "certificate.pem"
        if not trust.exists():
            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(trust))
            authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        return trust, certificate


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait until ``condition`` is true.

    Raises:
        SiegeError: it isn't within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SiegeError(f"waited {seconds:g} s until {what}")
        gevent.sleep(0.01)


def reset(peer: Peer) -> None:
    """Close with an RST instead of a FIN."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def is_closed_by_server(peer: Peer, seconds: float = 5.0) -> bool:
    """Whether the stream ends within ``seconds``, in whatever way; what still comes is thrown away."""
    with gevent.Timeout(seconds, False):  # type: ignore[arg-type]  # The stubs don't know of False.
        try:
            while peer.socket.recv(65536):
                pass
        except OSError:
            pass
        return True
    return False
