"""Load from several processes: each is forked off, makes its part, and tells how it went; this one has no hub."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from time import perf_counter_ns
from typing import Any, TypeAlias

import gevent
from gevent.event import AsyncResult

from .load import Load, Result, load_of
from .plan import Plan
from .tally import Tally

#: Called with what has been counted since the last time, or with None while calls don't count yet.
OnProgress: TypeAlias = Callable[[Tally | None], None]

# How often the processes say what they have counted, in seconds. More often would cost them time.
_PROGRESS_INTERVAL = 0.5
# How long the processes have until all of them begin at the same time. Picked arbitrarily.
_HEAD_START = 0.02

_READ = 1
_SECOND = 1_000_000_000


class WorkerDied(Exception):
    """One of the processes has ended before its time."""


class _Ready:
    """This process has its connections."""


@dataclass(frozen=True)
class _Go:
    """All are connected: begin at this time."""

    start: int


class _Stop:
    """Somebody has broken it off."""


def run(plan: Plan, processes: int, on_progress: OnProgress | None = None) -> list[Result]:
    """Make the load of ``plan`` from so many processes; returns what each of them has come to.

    SIGINT ends it early, a second one at once, with KeyboardInterrupt.

    Raises:
        ConnectFailed: one of them couldn't make its connections, or whatever else ``plan.open_stream`` has raised.
        WorkerDied: one of them has ended.
    """
    # Forked, so that each has what `plan` holds, whatever that is. In this process is no thread, and no hub yet.
    context = multiprocessing.get_context("fork")
    with _interrupts() as interrupts:
        workers: list[Any] = []
        connections: list[Connection] = []
        try:
            for part in plan.parts(processes):
                ours, theirs = context.Pipe()
                connections.append(ours)
                worker = context.Process(
                    target=_work, args=(part, theirs, [*connections], on_progress is not None), daemon=True
                )
                worker.start()
                theirs.close()
                workers.append(worker)
            return _Crew(connections, interrupts, on_progress).results()
        finally:
            for connection in connections:
                connection.close()  # Whoever is left ends by that.
            for worker in workers:
                worker.join()


class _Crew:
    """The processes, seen from the one that has started them."""

    def __init__(self, connections: list[Connection], interrupts: Connection, on_progress: OnProgress | None) -> None:
        self._connections = connections
        self._interrupts = interrupts
        self._on_progress = on_progress or (lambda _: None)
        self._ready = 0
        self._is_interrupted = False
        # What each has told on the way, and in the end.
        self._told = {connection: Tally() for connection in connections}
        self._results: dict[Connection, Result] = {}

    def results(self) -> list[Result]:
        while len(self._results) < len(self._connections):
            left = [connection for connection in self._connections if connection not in self._results]
            for source in wait([*left, self._interrupts]):
                assert isinstance(source, Connection)
                if source is self._interrupts:
                    self._interrupt()
                else:
                    self._take(source)
        return [self._results[connection] for connection in self._connections]

    def _interrupt(self) -> None:
        self._interrupts.recv_bytes()
        if self._is_interrupted or self._ready < len(self._connections):
            raise KeyboardInterrupt
        self._is_interrupted = True
        self._tell(_Stop())

    def _take(self, source: Connection) -> None:
        try:
            message = source.recv()
        except (EOFError, ConnectionError):
            raise WorkerDied("a process that makes the load has died") from None
        if isinstance(message, Result):
            self._on_progress(message.tally)
            message.tally.add(self._told[source])
            self._results[source] = message
        elif isinstance(message, Tally):
            self._on_progress(message)
            self._told[source].add(message)
        elif isinstance(message, tuple):
            error, cause = message
            raise error from cause
        elif message is None:
            self._on_progress(None)
        elif isinstance(message, _Ready):
            self._ready += 1
            if self._ready == len(self._connections):
                self._tell(_Go(perf_counter_ns() + round(_HEAD_START * _SECOND)))

    def _tell(self, message: Any) -> None:
        for connection in self._connections:
            if connection not in self._results:
                with suppress(ConnectionError):  # It has ended: what it has said last is still to be read.
                    connection.send(message)


@contextmanager
def _interrupts() -> Iterator[Connection]:
    """What can be read from for each SIGINT, instead of a KeyboardInterrupt."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    before = signal.signal(signal.SIGINT, lambda *_: writing.send_bytes(b"\0"))
    try:
        yield reading
    finally:
        signal.signal(signal.SIGINT, before)
        reading.close()
        writing.close()


# In a process that was forked off.


def _work(plan: Plan, crew: Connection, others: list[Connection], shows_progress: bool) -> None:
    """Make the load of ``plan`` when the ``crew`` says so, and tell it how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It comes to all, but one says what to do.
    for connection in others:
        connection.close()  # Or nobody would notice the end of the process that they belong to.
    gevent.reinit()
    _allow_descriptors(plan.connections)
    worker = _Worker(load_of(plan), crew, shows_progress)
    try:
        worker.tell(worker.connect() or worker.run())
    finally:
        worker.close()


class _Worker:
    """A process, seen from itself."""

    def __init__(self, load: Load, crew: Connection, shows_progress: bool) -> None:
        self._load = load
        self._crew = crew
        self._shows_progress = shows_progress
        self._start: AsyncResult[int] = AsyncResult()
        self._loop = gevent.get_hub().loop
        self._ear = self._loop.io(crew.fileno(), _READ)
        self._ear.start(self._hear)

    def connect(self) -> tuple[Exception, BaseException | None] | None:
        """Make the connections; returns why that can't be done, and the cause of it."""
        try:
            self._load.connect()
        except Exception as exc:
            return exc, exc.__cause__  # It travels without.
        return None

    def run(self) -> Result:
        """Wait for the word to begin, and make the load."""
        self.tell(_Ready())
        start = self._start.get()
        assert start is not None
        # Nothing here makes garbage in cycles, and to look for it would take time amid the calls.
        gc.collect()
        gc.freeze()
        gc.disable()
        ticker = self._loop.timer(_PROGRESS_INTERVAL, _PROGRESS_INTERVAL)
        if self._shows_progress:
            ticker.start(self._tell_progress)
        result = self._load.run(start)
        ticker.close()
        return result

    def close(self) -> None:
        """Listen no more."""
        self._ear.close()

    def tell(self, message: Any) -> None:
        """Tell the process that has started this one."""
        try:
            self._crew.send(message)
        except ConnectionError:
            os._exit(1)  # It is gone.

    def _hear(self) -> None:
        try:
            message = self._crew.recv()
        except (EOFError, ConnectionError):
            os._exit(1)
        if isinstance(message, _Go):
            self._start.set(message.start)
        else:
            self._load.interrupt()

    def _tell_progress(self) -> None:
        if self._load.begin > perf_counter_ns():
            self.tell(None)
            return
        tally, self._load.tally = self._load.tally, Tally()
        self.tell(tally)


def _allow_descriptors(connections: int) -> None:
    """As many as the system lets us have, if so many connections need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 100  # What else is open. Picked arbitrarily.
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
