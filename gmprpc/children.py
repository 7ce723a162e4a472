"""A child process that is spoken to over its standard input and output: started, and ended for certain."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import gevent

from .pipes import PipeStream, close_descriptor

# How long a child may take to end, once its standard input has ended; and then to end upon SIGTERM. What is said to a
# socket that is closed has as long.
_PATIENCE = 2.0
# How long one may take that was killed: only what waits for a disk or the like takes any time.
_REAPING_TIMEOUT = 1.0
# How often it looks whether the child has ended, at first and at most. (A watcher for it would be there in the main
# thread only, and reap the children of others.) Picked arbitrarily.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class Command:
    """A program to start and to speak with, where others have an address to connect to."""

    def __init__(self, command: Any, popen_options: Mapping[str, Any]) -> None:
        """See :func:`start`; raises ValueError like it, and for no command at all."""
        if not command:
            raise ValueError("there is no command")
        _check(popen_options)
        self._command = command
        self._popen_options = dict(popen_options)

    def start(self) -> Child:
        """Start it; raises OSError if that can't be."""
        return start(self._command, **self._popen_options)

    def __str__(self) -> str:
        words = [self._command] if isinstance(self._command, (str, bytes, os.PathLike)) else self._command
        return shlex.join(map(os.fsdecode, words))


def start(command: Any, **popen_options: Any) -> Child:
    """Start ``command`` with pipes for its standard input and output; the other ends are the ``stream`` of the result.

    ``command`` and ``popen_options`` go to :class:`subprocess.Popen`. (Where that is patched it is gevent's, which
    starts a process in the main thread only; to end it works anywhere.) Its standard error is ours, unless the options
    say otherwise.

    Raises:
        OSError: it can't be started.
        ValueError: the options would take its standard input or output away from the stream.
    """
    _check(popen_options)
    with ExitStack() as childs, ExitStack() as ours:
        stdin, writing = os.pipe()
        childs.callback(close_descriptor, stdin)
        ours.callback(close_descriptor, writing)
        reading, stdout = os.pipe()
        childs.callback(close_descriptor, stdout)
        ours.callback(close_descriptor, reading)
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, **popen_options)
        ours.pop_all()
    return Child(process, PipeStream(reading, writing))


def _check(popen_options: Mapping[str, Any]) -> None:
    if {"stdin", "stdout"} & popen_options.keys() or popen_options.get("stderr") == subprocess.STDOUT:
        raise ValueError("stdin and stdout are what is spoken over: only stderr may go elsewhere")


class Child:
    """A process, and the stream to speak with it over."""

    def __init__(self, process: subprocess.Popen[Any], stream: PipeStream) -> None:
        #: The process; gevent's Popen in a patched program.
        self.process = process
        #: What it says and hears. Whoever uses it closes it.
        self.stream = stream
        self._parent = os.getpid()

    @property
    def status(self) -> str | None:
        """How the process has ended, in words; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"exited with status {code}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"

    def end(self) -> None:
        """See to it that the process ends, when its stream has been closed; blocks this greenlet.

        It is given two seconds to end by itself, then SIGTERM and two more, then SIGKILL. Killed, this greenlet has no
        patience. Does nothing in a process that was forked off.
        """
        if os.getpid() != self._parent:
            return
        try:
            if not self._has_ended_within(_PATIENCE):
                _send(self.process.terminate)
                self._has_ended_within(_PATIENCE)
        finally:
            if self.process.poll() is None:
                _send(self.process.kill)
                # Not `wait`: that of gevent's Popen never returns in another thread, with gevent 24.10.
                self._has_ended_within(_REAPING_TIMEOUT)

    def _has_ended_within(self, seconds: float) -> bool:
        pause, waited = _FIRST_PAUSE, 0.0
        while self.process.poll() is None:
            if waited >= seconds:
                return False
            gevent.sleep(pause)
            waited += pause
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True


def _send(send: Callable[[], None]) -> None:
    with suppress(OSError):  # It may have ended, or have become somebody else's.
        send()
