"""The load of one process, from its connections to its tally; runs in the hub of the thread that makes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.pool import Pool

from .alarm import Alarm
from .lane import Lane
from .plan import Plan
from .ring import Answers, Ring
from .schedule import Schedule
from .tally import Ending, Tally

_SECOND = 1_000_000_000

# So many connections are made at a time: fewer than any server lets wait to be accepted. Picked arbitrarily.
_CONNECTING = 64
# How long whoever breaks it off has to wait for the last answers, at most. Picked arbitrarily.
_INTERRUPTED_TIMEOUT = 1.0
# How often to look whether the server still answers. Picked arbitrarily.
_WATCH_INTERVAL = 0.1


@dataclass
class Result:
    """What the load of one process has come to."""

    ending: Ending
    tally: Tally
    #: For how many seconds calls counted.
    seconds: float
    #: For what part of this time, 1.0 at most, the process had a core, and for what part it had to wait for one.
    busy: float
    waited: float


class Load:
    """Connections on which calls are made, in a closed loop: each that is answered lets the next one begin.

    The calls that count are sent after the warm-up and before the end. Those in flight at the end are waited for.
    """

    def __init__(self, plan: Plan) -> None:
        self.method = plan.method
        self.ring = Ring(plan.body, plan.depth)
        #: What was counted; whoever takes it leaves a new one.
        self.tally = Tally()
        self.begin = sys.maxsize
        self.heard = 0
        self.has_result = False
        self.answers: Answers | None = None
        self.lessons = 0
        self.go_on: Callable[[Lane, int], None] = self._refill

        self._plan = plan
        self._lanes: list[Lane] = []
        self._loop = gevent.get_hub().loop
        self._timers: list[Any] = []
        self._over: AsyncResult[Ending] = AsyncResult()
        self._usage = _Usage()
        # How many calls may still begin, where not only the time tells.
        self._left = sys.maxsize
        # While it stops: why, since when, and how many calls are in flight.
        self._ending: Ending | None = None
        self._end = 0
        self._in_flight = 0

    def connect(self) -> None:
        """Make all connections; raises what making one does."""
        pool = Pool(_CONNECTING)
        failures: list[Exception] = []

        def connect() -> None:
            try:
                if not failures:
                    self._lanes.append(Lane(self, self._plan.open_stream(), self._loop))
            except Exception as exc:  # Or gevent would print it.
                failures.append(exc)

        try:
            for _ in range(self._plan.connections):
                pool.spawn(connect)
            pool.join()
        finally:
            pool.kill()
        if failures:
            self.close()
            raise failures[0]

    def run(self, start: int) -> Result:
        """Make calls from ``start`` on, as `perf_counter_ns` tells the time, until it is over; blocks this greenlet."""
        self._in(max(0, start - perf_counter_ns()) / _SECOND, self._start, start)
        ending = self._over.get()
        assert ending is not None
        for timer in self._timers:
            timer.close()
        if ending is not Ending.INTERRUPTED and (missing := sum(lane.unanswered() for lane in self._lanes)):
            self.tally.fail("no answer", missing)
        self.close()
        seconds = max(0, self._end - self.begin) / _SECOND
        return Result(ending, self.tally, seconds, *self._usage.shares())

    def interrupt(self) -> None:
        """Begin no more calls, and wait only for a moment for those in flight."""
        if self._ending is not Ending.INTERRUPTED:
            self._stop(Ending.INTERRUPTED, _INTERRUPTED_TIMEOUT)

    def close(self) -> None:
        """Close all connections."""
        for lane in self._lanes:
            lane.close()

    # Calls.

    def _start(self, start: int) -> None:
        if self._plan.warm_up:
            self._in(self._plan.warm_up, self._begin)
        else:
            self._begin()
        for lane in self._lanes:
            if self._ending is None:
                self._refill(lane, self._plan.depth)

    def _begin(self) -> None:
        """From now on calls count."""
        self._count_from(perf_counter_ns())
        if self._plan.duration is not None:
            self._in(self._plan.duration, self._stop, Ending.DONE, self._plan.timeout)
        if self._plan.calls is not None:
            self._left = self._plan.calls

    def _count_from(self, begin: int) -> None:
        """Those that begin from then on."""
        self.begin = self.heard = begin
        self.tally.sent = self.tally.received = 0
        self._usage.start()
        if self._plan.duration is None:
            watch = self._loop.timer(_WATCH_INTERVAL, _WATCH_INTERVAL)
            watch.start(self._watch)
            self._timers.append(watch)

    def _refill(self, lane: Lane, count: int) -> None:
        if count > self._left:
            count = self._left
        self._left -= count
        lane.request([perf_counter_ns()] * count)
        if not self._left:
            self._stop(Ending.DONE)

    # The end.

    def _watch(self) -> None:
        """Where the number of calls says when to end: a server that doesn't answer mustn't mean never."""
        if perf_counter_ns() - self.heard > self._plan.timeout * _SECOND:
            self._finish(Ending.STALLED)

    def _stop(self, ending: Ending, timeout: float | None = None) -> None:
        """Begin no more calls; what is in flight has so long, None for as long as there are answers."""
        if self._ending is None:
            self._end = perf_counter_ns()
            self._usage.stop()
        self._ending = ending
        self.go_on = self._drain
        self._in_flight = sum(lane.in_flight for lane in self._lanes)
        self._drain(None, 0)
        if timeout is not None:
            self._in(timeout, lambda: self._finish(Ending.STALLED if ending is Ending.DONE else ending))

    def _drain(self, lane: Lane | None, count: int) -> None:
        self._in_flight -= count
        if not self._in_flight:
            assert self._ending is not None
            self._finish(self._ending)

    def on_lost(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        if self._ending is not None:
            self._drain(lane, lane.in_flight)
        elif not self._lanes:
            self._finish(Ending.LOST)

    def on_unknown_method(self) -> None:
        self._finish(Ending.UNKNOWN_METHOD)

    def _finish(self, ending: Ending) -> None:
        if self._over.ready():
            return
        if self._ending is None:
            self._usage.stop()
        if self._ending is None or (self._plan.duration is None and ending is not Ending.INTERRUPTED):
            # It isn't the time that has said when to end: it was at the last answer.
            self._end = self.heard
        self._over.set(ending)

    def _in(self, seconds: float, callback: Callable[..., None], *args: Any) -> None:
        """Call back after so many seconds."""
        timer = self._loop.timer(seconds)
        timer.start(callback, *args, update=True)  # The loop's idea of now may be a little old.
        self._timers.append(timer)


class OpenLoop(Load):
    """Connections on which calls are made at a rate, whether the server keeps up or not.

    Each call begins when it should be sent. What has to wait, since as much is in flight as may be, is late for its
    caller all the same: leaving that out is called coordinated omission.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.go_on = self._catch_up
        self._schedule: Schedule
        self._alarm = Alarm(self._loop, self._on_due)
        self._released = 0
        # True while calls that are due have to wait for room.
        self._is_full = False
        self._turn = 0

    def close(self) -> None:
        super().close()
        self._alarm.close()

    def _start(self, start: int) -> None:
        self._schedule = Schedule(self._plan, start)
        self._alarm.set(self._schedule.time(0))
        if self._schedule.end is not None:
            self._in((self._schedule.end - perf_counter_ns()) / _SECOND, self._on_end)

    def _on_due(self) -> None:
        if self._ending is None and not self._is_full:
            self._release(perf_counter_ns())

    def _catch_up(self, lane: Lane, count: int) -> None:
        if self._is_full:
            self._release(perf_counter_ns())

    def _release(self, now: int) -> None:
        """Send what is due, as far as there is room."""
        schedule = self._schedule
        due = schedule.due(now)
        if due > schedule.first and self.begin > schedule.begin:
            self._count_from(schedule.begin)
            self._released = max(self._released, schedule.first)  # What the warm-up has left isn't made up for.
        if not self._is_full and due > self._released >= schedule.first:
            # Of several the first, which is the most late, stands for all.
            self.tally.record_late(now - schedule.time(self._released), due - self._released)
        self._is_full = False
        while (count := due - self._released) > 0:
            if (lane := self._roomy_lane()) is None:
                self._is_full = True
                return
            count = min(count, ceil(count / len(self._lanes)), self._plan.depth - lane.in_flight)
            lane.request([schedule.time(self._released + number) for number in range(count)])
            self._released += count
        if self._released < schedule.calls:
            self._alarm.set(schedule.time(self._released))
        elif schedule.end is None:
            self._stop(Ending.DONE)

    def _roomy_lane(self) -> Lane | None:
        """The next one in turn that has room for a call."""
        for _ in self._lanes:
            self._turn = (self._turn + 1) % len(self._lanes)
            if (lane := self._lanes[self._turn]).in_flight < self._plan.depth:
                return lane
        return None

    def _on_end(self) -> None:
        """The time is over."""
        if self._ending is None:
            self._release(perf_counter_ns())
            if missing := self._schedule.calls - self._released:
                self.tally.fail("not sent: as many were in flight as may be", missing)
            self._stop(Ending.DONE, self._plan.timeout)
            assert self._schedule.end is not None
            self._end = self._schedule.end


class _Usage:
    """What this process has of the machine."""

    def __init__(self) -> None:
        self._begin: tuple[int, int, int] | None = None
        self._end = (1, 0, 0)

    def start(self) -> None:
        """From now on."""
        self._begin = self._now()

    def stop(self) -> None:
        """Until now."""
        self._end = self._now()

    def shares(self) -> tuple[float, float]:
        """For what part of the time it had a core, and for what part it waited for one."""
        begin = self._begin or self._end
        seconds, busy, waited = (end - start for start, end in zip(begin, self._end, strict=True))
        return (busy / seconds, waited / seconds) if seconds else (0.0, 0.0)

    def _now(self) -> tuple[int, int, int]:
        try:
            # Linux tells it: how long it ran, how long it was ready to run, and how often; in nanoseconds.
            waited = int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            waited = 0
        return perf_counter_ns(), process_time_ns(), waited


def load_of(plan: Plan) -> Load:
    """What makes the load of ``plan``, one process's part."""
    return Load(plan) if plan.rate is None else OpenLoop(plan)
