"""Real programs, for tests: started, listened to until they say what is waited for, and ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import gevent
from gevent.fileobject import FileObjectPosix

#: How long a program may take for anything, in seconds; less than a whole test may take, so that this is what it says.
DEADLINE = 20.0


#: How to run a program that forks: from 3.12 on Python warns of that where there are, or have just been, threads.
FORKING_PYTHON = (sys.executable, "-W", "ignore::DeprecationWarning")


class Program:
    """A process whose output, standard error included, is read by the line; only this greenlet waits for it.

    Leaving the ``with`` ends the process, however the test went. (Not gevent's Popen: its child watcher reaps every
    child of the process, those of other tests too.)
    """

    def __init__(
        self, *command: str | Path, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> None:
        self.command = " ".join(map(str, command))
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                env=None if env is None else {**os.environ, **env},
                pass_fds=pass_fds,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._output = FileObjectPosix(reading, "r", encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def line(self) -> str:
        """The next line of the output, without its end; "" when there is none left."""
        with self._deadline("say anything"):
            return self._output.readline().rstrip()

    def line_with(self, text: str) -> str:
        """The next line that has ``text`` in it; those before it are skipped."""
        said = []
        while text not in (line := self.line()):
            said.append(line)
            if not line and self.has_ended():
                raise AssertionError("\n".join([f"{self.command} never said {text!r}:", *said, *self.lines()]))
        return line

    def has_ended(self) -> bool:
        """Whether the process has."""
        return self._process.poll() is not None

    def lines(self) -> list[str]:
        """All further lines, until the program closes its output, as it does by ending."""
        with self._deadline("end"):
            return self._output.read().splitlines()

    def wait(self) -> int:
        """Wait until the program has ended; returns its exit code, negative for the signal that killed it."""
        self.lines()
        return self._process.wait(DEADLINE)  # Blocks the hub too, but for a moment: the output has ended.

    def terminate(self) -> None:
        """Ask the program to end, with SIGTERM."""
        self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()  # Does nothing if it has been waited for.
            self.wait()
        finally:
            self._process.kill()
            self._process.wait()
            self._output.close()

    def _deadline(self, what: str) -> gevent.Timeout:
        late = AssertionError(f"{self.command} didn't {what} within {DEADLINE:g} s")
        return gevent.Timeout(DEADLINE, late)
