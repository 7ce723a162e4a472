"""Gunicorn with workers of gmprpc's, started by itself or by ``gmprpc serve --workers``, and what they serve."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gmprpc
from tests.helpers import wait_until
from tests.programs import FORKING_PYTHON, Program

APP = '''
import os
import pathlib
import time

import gevent
import gmprpc
from gevent import monkey

HERE = pathlib.Path(__file__).parent
VERSION = 1
DISPATCHED = []

service = gmprpc.Service()
server = gmprpc.Server(
    "unix:/not/there",
    service,
    hide_errors=True,
    on_dispatch=lambda connection, message: DISPATCHED.append(message[2]),
    socket_mode=0o600,
)


@service.method
def pid():
    return os.getpid()


@service.method
def version():
    return VERSION


@service.method
def patched():
    return monkey.is_module_patched("socket")


@service.method
def dispatched():
    return DISPATCHED


@service.method
def fail():
    raise ValueError("a secret")


@service.method
def begin(name):
    """Says in a file that it has begun, and answers when there is another file."""
    (HERE / f"{name}.begun").touch()
    while not (HERE / f"{name}.end").exists():
        gevent.sleep(0.01)
    return name


@service.method(deferred=True)
def defer(reply, name):
    """The same, without a greenlet of its own."""
    gevent.spawn(lambda: reply.result(begin(name)))


@service.method
def block():
    """Blocks the hub, for ever."""
    (HERE / "block.begun").touch()
    while True:
        sum(range(1000))


@service.method
def fork():
    """Starts a process that lives on, with nothing to say; answers its pid."""
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        monkey.get_original("time", "sleep")(60)
        os._exit(0)
    return pid


def wsgi(environ, start_response):
    return []


def make():
    return service
'''


#: Starts a program as systemd does whose unit has a socket at any port, and one at the path that it is given.
ACTIVATE = """
import os
import socket
import sys

path, *command = sys.argv[1:]
for number, (family, address) in enumerate([(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path)], 3):
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()
    if listener.fileno() != number:
        os.dup2(listener.detach(), number)
    os.set_inheritable(number, True)
    listener.detach()
os.environ |= {"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid())}
os.execv(command[0], command)
"""


class Fleet(Program):
    """Gunicorn, its master and its workers, from the moment on when it listens; ``with`` ends it.

    With ``activated``, the path of a unix socket, the sockets that it listens at are opened for it.
    """

    def __init__(
        self, *command: str | Path, env: Mapping[str, str] | None = None, activated: Path | None = None
    ) -> None:
        activate = () if activated is None else (sys.executable, "-c", ACTIVATE, activated)
        super().__init__(*activate, *FORKING_PYTHON, "-m", *command, env=env)
        places = self.line_with("Listening at: ")
        #: Where it listens, each as a client takes it.
        self.addresses = [
            place if place.startswith("unix:") else place.removeprefix("http://").removeprefix("https://")
            for place in places.partition("Listening at: ")[2].split()[0].split(",")
        ]

    def kill(self, signum: signal.Signals) -> None:
        """Send the master a signal."""
        os.kill(self.pid, signum)

    @property
    def children(self) -> list[int]:
        """The processes of the workers, those that are about to end among them."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def wait_children(self, number: int, *, but: Collection[int] = ()) -> list[int]:
        """Wait until there are so many workers, none of ``but`` among them; returns their pids."""
        wait_until(lambda: len(self.children) == number and not set(self.children) & set(but))
        return self.children

    def wait_serving(self, number: int, *, but: Collection[int] = ()) -> list[int]:
        """Wait until so many workers serve, none of ``but`` among them, and no others are there; returns their pids."""
        serving: set[int] = set()

        def all_serve() -> bool:
            children = set(self.children)
            if len(children) != number or children & set(but):
                return False
            serving.intersection_update(children)
            with gmprpc.Client(self.addresses[0]) as client:
                serving.add(client.call("pid", timeout=5))
            return serving == children

        wait_until(all_serve)
        return sorted(serving)


def gunicorn(directory: Path, *options: str | Path, app: str = "app:service") -> list[Any]:
    """The command that runs ``app``, which is in ``directory``, in gunicorn."""
    worker = ("-k", "gmprpc.gunicorn.Worker")
    return ["gunicorn", *worker, "--no-control-socket", "--pythonpath", directory, *options, app]


def serve(directory: Path, *options: str | Path, app: str = "app:service") -> list[Any]:
    """The command that runs it in ``gmprpc serve``."""
    return ["gmprpc", "serve", "--app-dir", directory, *options, app]


def make_app(directory: Path) -> None:
    """Write the application."""
    (directory / "app.py").write_text(APP, encoding="utf-8")


def change_app(directory: Path, before: str, after: str | Callable[[re.Match[str]], str]) -> None:
    """Change it; what has been compiled of it must not be taken for the new one, even within the same second."""
    path = directory / "app.py"
    source = path.read_text(encoding="utf-8")
    assert re.search(before, source)
    path.write_text(re.sub(before, after, source), encoding="utf-8")
    for compiled in (directory / "__pycache__").glob("app.*"):
        compiled.unlink()


def python(*arguments: str | Path) -> list[Any]:
    """A command that ends by itself."""
    return [sys.executable, *arguments]
