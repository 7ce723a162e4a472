"""Greenlets that sleep for a millisecond, over and over, and nothing else: what gevent allows of handlers that do so.

It is run by ``python -m`` in gmprpc's environment, on the core of the servers, and prints a line of JSON with the keys
of a server's run, in which a sleep is a call. The first greenlet alone reads the clock, so that the others only sleep.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from time import perf_counter

import gevent

from .client_programs.measuring import percentile_us

SECONDS = 0.001


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--greenlets", type=int, required=True)
    parser.add_argument("--warmup", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()

    is_over = False
    count = 0
    latencies: list[float] = []

    def sleep() -> None:
        nonlocal count
        while not is_over:
            gevent.sleep(SECONDS)
            count += 1

    def sleep_with_clock() -> None:
        nonlocal count
        while not is_over:
            begun = perf_counter()
            gevent.sleep(SECONDS)
            latencies.append(perf_counter() - begun)
            count += 1

    resident_before = _peak_size()
    greenlets = [gevent.spawn(sleep_with_clock), *(gevent.spawn(sleep) for _ in range(options.greenlets - 1))]
    gevent.sleep(options.warmup)
    count = 0
    latencies.clear()
    begun, cpu_before = perf_counter(), time.process_time()
    gevent.sleep(options.seconds)
    calls, seconds, cpu = count, perf_counter() - begun, time.process_time() - cpu_before
    is_over = True
    gevent.joinall(greenlets, raise_error=True)
    ordered = sorted(latencies)
    found = {
        "seconds": round(seconds, 6),
        "calls": calls,
        "calls_per_second": round(calls / seconds, 1),
        "p50_us": percentile_us(ordered, 50),
        "p99_us": percentile_us(ordered, 99),
        "p999_us": percentile_us(ordered, 99.9),
        "errors": 0,
        "unanswered": 0,
        "lost_connections": 0,
        "silent_connections": 0,
        "first_error": "",
        "is_complete": True,
        "server_cpu_ms_per_1000_calls": cpu * 1e6 / calls if calls else None,
        "resident_before": resident_before,
        "resident_under_load": _peak_size(),
    }
    print(json.dumps(found))


def _peak_size() -> int:
    """The most bytes of memory that were resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
