"""HAProxy as a program of a test: run with a configuration made of the example, and asked how it sees its servers."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
from gevent import socket

from tests.programs import Program

#: The configuration that users are shown.
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "haproxy.cfg"

#: Where a configuration has the socket that is asked.
ADMIN_SOCKET = "/run/haproxy/admin.sock"


def configuration(bind: tuple[str, int], servers: Mapping[str, Any]) -> str:
    """The example, with addresses of this test's own; of its servers only those are left that are among ``servers``."""
    text = EXAMPLE.read_text(encoding="utf-8")
    text, binds = re.subn(r"bind 0\.0\.0\.0:4423", "bind {}:{}".format(*bind), text)
    assert binds == 1

    def server(match: re.Match[str]) -> str:
        name = match[1]
        return "server {} {}:{}".format(name, *servers[name]) if name in servers else ""

    text, count = re.subn(r"\bserver (\w+) 10\.0\.0\.\d:4423", server, text)
    assert count == 3
    return text


def serve_arguments(bind: tuple[str, int], app: str) -> list[str]:
    """What the example says to serve with, with an address and a service of this test's own."""
    (command,) = re.findall(r"^# +gmprpc serve (.+)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)
    own = {"module:service": app, "10.0.0.1:4423": "{}:{}".format(*bind), "10.0.0.9": "127.0.0.1"}
    arguments = shlex.split(command)
    assert own.keys() <= set(arguments)
    return [own.get(argument, argument) for argument in arguments]


class HAProxy(Program):
    """An HAProxy in the foreground, a master and its worker; what it logs to its standard output is its output."""

    def __init__(self, executable: str, configuration: str, directory: Path) -> None:
        assert ADMIN_SOCKET in configuration
        self._admin = directory / "admin.sock"
        file = directory / "haproxy.cfg"
        file.write_text(configuration.replace(ADMIN_SOCKET, str(self._admin)), encoding="utf-8")
        self._master = directory / "master.sock"
        super().__init__(executable, "-W", "-db", "-S", self._master, "-f", file)

    def wait_ready(self) -> None:
        """Wait until it listens everywhere, and the master heeds signals."""
        self.line_with("Loading success")
        # The master executes itself anew then, and signals get lost meanwhile.
        while True:
            with suppress(OSError):
                if _ask(self._master, "show proc"):
                    break
            gevent.sleep(0.01)

    def workers(self) -> set[str]:
        """The processes that have connections."""
        return set(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())

    def reload(self) -> None:
        """Have a new worker take over; the one that is there goes when its last connection has."""
        os.kill(self.pid, signal.SIGUSR2)
        self.wait_ready()

    def ask(self, command: str) -> str:
        """What it answers to a command on its admin socket."""
        return _ask(self._admin, command)

    def statuses(self) -> dict[str, str]:
        """How it sees each server: "UP", "DOWN", or on the way there, "UP 1/2" say."""
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").splitlines())
        return {row["svname"]: row["status"] for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")}

    def wait_for(self, **statuses: str) -> None:
        """Wait until it sees the servers that are named so."""
        while not statuses.items() <= self.statuses().items():
            gevent.sleep(0.02)


def _ask(path: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(command.encode() + b"\n")
        sock.shutdown(socket.SHUT_WR)  # A master would wait for another command.
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer.decode(errors="replace")  # It repeats what a check was answered.
