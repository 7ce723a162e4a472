"""The command line, for tests: commands that end by themselves, servers while they serve, and what became of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .programs import DEADLINE, Program

#: What is installed, even where the current directory has a `gmprpc` of its own.
GMPRPC = (sys.executable, "-P", "-m", "gmprpc")
#: To bind to.
ANY_PORT = "127.0.0.1:0"

#: An application with a method that blocks the hub; what `serve` imports for its metrics comes from a slow disk.
SLOW_TO_START = """
import sys
import gmprpc
from gevent import monkey

native_sleep = monkey.get_original("time", "sleep")
service = gmprpc.Service()

@service.method
def block():
    native_sleep(0.3)

class SlowDisk:
    def find_spec(self, name, path=None, target=None):
        if name == "gmprpc.prometheus":
            native_sleep(0.3)

sys.meta_path.insert(0, SlowDisk())
"""


class Served(Program):
    """A `gmprpc serve`, from the moment on when it listens."""

    def __init__(self, *args: str | Path, listeners: int = 1, env: Mapping[str, str] | None = None) -> None:
        super().__init__(*GMPRPC, *args, env=env)
        lines = [self.line() for _ in range(listeners)]
        assert all(line.startswith("listening on ") for line in lines), [*lines, *self.lines()]
        #: Where it listens.
        self.addresses = [line.removeprefix("listening on ") for line in lines]

    def kill(self, signum: signal.Signals) -> None:
        """Send the program a signal."""
        os.kill(self.pid, signum)

    def expect(self, pattern: str) -> str:
        """Read on until a line that matches ``pattern``, and return that."""
        while re.search(pattern, line := self.line()) is None:
            if not line and self.has_ended():
                raise AssertionError(f"{self.command} ended without saying {pattern!r}")
        return line


@contextmanager
def serving(
    *args: str | Path, binds: tuple[str, ...] = (ANY_PORT,), env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """A `gmprpc serve` that listens at all ``binds``."""
    options = [option for bind in binds for option in ("-b", bind)]
    with Served("serve", *options, *args, listeners=len(binds), env=env) as served:
        yield served


def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """What became of a `gmprpc` that ends by itself."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": DEADLINE, **options}
    return subprocess.run([*GMPRPC, *args], encoding="utf-8", check=False, **options)


def result_of(*args: str | Path, **options: Any) -> Any:
    """The result that `call` prints."""
    process = run("call", *args, **options)
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)


def assert_fails(process: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    """It failed with ``exit_code``, printed nothing, and said why in one line that has ``words`` in it."""
    assert process.returncode == exit_code, process
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    for word in words:
        assert word in line


def assert_misused(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """It was used wrongly, and said how in the last line, after the usage."""
    assert process.returncode == 2, process
    assert process.stdout == ""
    assert process.stderr.startswith("Usage: ")
    for word in words:
        assert word in process.stderr.splitlines()[-1]
