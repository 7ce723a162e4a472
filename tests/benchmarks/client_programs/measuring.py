"""What the client programs share: their options, the loops that call, and what was found, as a line of JSON.

It runs in every library's environment, one with Python 3.8 among them, and so knows the standard library alone. A call
costs each library the same besides: one reading of the clock, one comparison and one append.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from array import array
from collections import deque
from time import perf_counter
from typing import Any, Callable, Mapping  # noqa: UP035  Python 3.8 can't subscript those of collections.abc.

#: The modes, each with its number of callers, or of calls in flight where there is one caller.
CALLERS = {"blocking": 1, "greenlets": 100, "async": 64}

#: What is echoed: twelve bytes, as the load generator sends.
PAYLOAD = "twelve bytes"

Call = Callable[[str], Any]


def parse_options() -> argparse.Namespace:
    """What the program is asked to do: ``port``, ``mode``, ``callers``, ``warmup`` and ``seconds``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=CALLERS, required=True)
    parser.add_argument("--callers", type=int, help="how many, or how many calls in flight; default: the mode's own")
    parser.add_argument("--warmup", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    if options.callers is None:
        options.callers = CALLERS[options.mode]
    return options


class Record:
    """What the callers found, all of them together."""

    def __init__(self) -> None:
        #: The seconds that each call with the right answer took.
        self.latencies = array("d")
        #: How many calls had a wrong answer or none.
        self.errors = 0
        self.first_error = ""
        self._lock = threading.Lock()  # Callers may be threads.

    def note_error(self, error: Exception) -> None:
        """Count a call that went wrong."""
        with self._lock:
            self.errors += 1
            if not self.first_error:
                text = f"{type(error).__name__}: {error}"
                self.first_error = " ".join(text.split())[:300]


class WrongAnswer(Exception):
    """The server answered something else than it was to echo."""


# Runs a mode with so many callers for so many seconds.
Mode = Callable[[int, float, Record], None]


def one_caller(call: Call) -> Mode:
    """A single caller, who waits for each answer before the next call."""

    def run(callers: int, seconds: float, record: Record) -> None:
        assert callers == 1
        _call_in_turn(call, perf_counter() + seconds, record)

    return run


def callers_in_greenlets(call: Call) -> Mode:
    """Callers in greenlets, each like :func:`one_caller`."""
    import gevent  # Not every library's environment has it.

    def run(callers: int, seconds: float, record: Record) -> None:
        end = perf_counter() + seconds
        greenlets = [gevent.spawn(_call_in_turn, call, end, record) for _ in range(callers)]
        gevent.joinall(greenlets, raise_error=True)

    return run


def callers_in_threads(call: Call) -> Mode:
    """Callers in threads, each like :func:`one_caller`."""

    def run(callers: int, seconds: float, record: Record) -> None:
        end = perf_counter() + seconds
        threads = [threading.Thread(target=_call_in_turn, args=(call, end, record)) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def calls_ahead(begin: Call, finish: Callable[[Any], Any]) -> Mode:
    """A single caller with many calls in flight: whenever the oldest has its answer, it begins another.

    ``begin`` starts a call and returns what ``finish`` waits for and takes the answer from.
    """

    def run(callers: int, seconds: float, record: Record) -> None:
        append = record.latencies.append
        in_flight: deque[Any] = deque()
        now = perf_counter()
        end = now + seconds
        for _ in range(callers):
            in_flight.append((now, begin(PAYLOAD)))
        while in_flight:
            begun, pending = in_flight.popleft()
            try:
                answer = finish(pending)
                if answer != PAYLOAD:
                    raise WrongAnswer(answer)
            except Exception as exc:
                record.note_error(exc)
                now = perf_counter()
            else:
                now = perf_counter()
                append(now - begun)
            if now < end:
                in_flight.append((now, begin(PAYLOAD)))

    return run


def measure(options: argparse.Namespace, modes: Mapping[str, Mode | str]) -> None:
    """Run the mode that is asked for, first to warm up, and print what was found.

    A mode that is a text can't be had of the library; the text says why.
    """
    mode = modes[options.mode]
    if isinstance(mode, str):
        print(json.dumps({"failure": f"not supported: {mode}"}))
        return
    mode(options.callers, options.warmup, Record())
    record = Record()
    cpu_before, before = time.process_time(), perf_counter()
    mode(options.callers, options.seconds, record)
    seconds, cpu = perf_counter() - before, time.process_time() - cpu_before
    latencies = sorted(record.latencies)
    found = {
        "calls": len(latencies),
        "errors": record.errors,
        "first_error": record.first_error,
        "seconds": round(seconds, 6),
        "calls_per_second": round(len(latencies) / seconds, 1),
        "p50_us": percentile_us(latencies, 50),
        "p99_us": percentile_us(latencies, 99),
        "p999_us": percentile_us(latencies, 99.9),
        "client_cpu_seconds": round(cpu, 3),
    }
    print(json.dumps(found))


def _call_in_turn(call: Call, end: float, record: Record) -> None:
    append = record.latencies.append
    begun = perf_counter()
    while begun < end:
        try:
            answer = call(PAYLOAD)
            if answer != PAYLOAD:
                raise WrongAnswer(answer)
        except Exception as exc:
            record.note_error(exc)
            begun = perf_counter()
        else:
            now = perf_counter()
            append(now - begun)
            begun = now  # The end of one call is the beginning of the next.


def percentile_us(ordered: list[float], percent: float) -> float:
    """The latency that so many percent of the calls didn't exceed; 0 if there were none."""
    if not ordered:
        return 0.0
    rank = -int(-len(ordered) * percent // 100)
    return round(ordered[max(rank, 1) - 1] * 1e6, 2)
