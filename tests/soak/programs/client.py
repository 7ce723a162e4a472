"""The clients of the soak: greenlets and two threads that share one client, and check how each of their calls ends.

The end of each call is entered in a ledger of its own, under the call's number: what it was, and that it was one. After
each of four quarters all calls have ended, and a line of JSON says what this process holds then.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event

import gmprpc

QUARTERS = 4
GREENLETS = 40
THREADS = 2
GREENLETS_OF_THREAD = 10

#: How a call may end, as the ledger has it: the first is 1.
ENDS = (
    *("answered", "answered with an error", "late", "late, not sent", "lost", "lost, not sent", "not connected"),
    *("cancelled", "given up", "notified"),
)
ANSWERED, ERROR, LATE, LATE_UNSENT, LOST, LOST_UNSENT, UNCONNECTED, CANCELLED, GIVEN_UP, NOTIFIED = range(
    1, len(ENDS) + 1
)
#: Or shouldn't.
WRONG = 62
TWICE = 63
#: Added to the end of a call that may be made again.
IDEMPOTENT = 64

#: What there is to be as much of at the end of each quarter, and seconds in which what was under way has ended: a
#: farewell takes two at most.
COUNTED = ("descriptors", "greenlets", "threads")
PATIENCE = 3.0

#: Seconds that no call takes, whatever befalls it.
LONG = 30.0


class Soaker:
    """What all workers share."""

    def __init__(self, client: gmprpc.Client | gmprpc.Balancer, ends: mmap.mmap) -> None:
        self.client = client
        self._ends = ends
        #: How many calls have ended; of two threads' some may be missed.
        self.calls = 0
        #: How many pending calls were given an outcome when they had one.
        self.second_ends = 0
        #: The first call that ended as it shouldn't.
        self.first_fault = ""

    # Workers.

    def soak(self, source: random.Random, numbers: range) -> None:
        """Make a call under each of ``numbers``, as many in each greenlet."""
        parts = split(numbers, GREENLETS + THREADS * GREENLETS_OF_THREAD)
        threads = []
        for first in range(GREENLETS, len(parts), GREENLETS_OF_THREAD):
            threads.append(self.work_in_thread(source, parts[first : first + GREENLETS_OF_THREAD]))
        workers = [gevent.spawn(self.work, random.Random(source.random()), part) for part in parts[:GREENLETS]]
        said = time.monotonic()
        while any(thread.is_alive() for thread in threads) or not all(worker.ready() for worker in workers):
            gevent.sleep(0.01)
            if time.monotonic() > said + 5:
                said = time.monotonic()
                say({"so far": self.calls})
        gevent.joinall(workers, raise_error=True)

    def work(self, source: random.Random, numbers: range) -> None:
        """Make a call under each of ``numbers``, of whatever kind."""
        kinds = [
            *(self._call, self._call_async, self._burst, self._notify),
            *(self._run_late, self._cancel, self._give_up, self._nest),
        ]
        weights = [50, 15, 4, 8, 5, 4, 4, 3]
        left = iter(numbers)
        for number in left:
            (kind,) = source.choices(kinds, weights)
            kind(source, number, left)

    def work_in_thread(self, source: random.Random, parts: list[range]) -> threading.Thread:
        """Have a native thread do that, with a greenlet for each of ``parts``.

        It closes nothing, and destroys no hub: that is the client's business when a thread ends.
        """
        sources = [random.Random(source.random()) for _ in parts]

        def run() -> None:
            workers = [gevent.spawn(self.work, *each) for each in zip(sources, parts, strict=True)]
            gevent.joinall(workers, raise_error=True)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    # Kinds of calls.

    def _call(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        method, params, expected = any_request(source, number)
        options = any_options(source)
        self._enter(number, options, expected, lambda: self.client.call(method, *params, **options))

    def _call_async(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        method, params, expected = any_request(source, number)
        options = any_options(source)
        self._enter(number, options, expected, lambda: self.client.call_async(method, *params, **options).get())

    def _burst(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        calls: list[tuple[int, dict[str, Any], Callable[[], Any]]] = []
        for each in [number, *(number for _, number in zip(range(source.randrange(20)), left, strict=False))]:
            options = any_options(source)
            try:
                calls.append((each, options, self.client.call_async("do", each, **options).get))
            except gmprpc.RPCError as exc:
                calls.append((each, options, raising(exc)))
        for each, options, get in calls:
            self._enter(each, options, each, get)

    def _notify(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        self._enter(number, {}, None, lambda: self.client.notify("do", number), NOTIFIED)

    def _run_late(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        options = any_options(source) | {"timeout": source.choice([0.001, 0.005, 0.02])}
        way = source.choice(
            [self.client.call, lambda *params, **options: self.client.call_async(*params, **options).get()]
        )
        self._enter(number, options, number, lambda: way("pause", number, 0.01, **options))

    def _cancel(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        options = any_options(source)

        def call() -> Any:
            pending = self.client.call_async("pause", number, 0.005, **options)
            gevent.sleep(source.choice([0, 0.001, 0.01]))
            pending.cancel()
            return pending.get()

        self._enter(number, options, number, call)

    def _give_up(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        options = any_options(source)

        def call() -> Any:
            with gevent.Timeout(source.choice([0, 0.001, 0.01])):
                return self.client.call("pause", number, 0.005, **options)

        self._enter(number, options, number, call)

    def _nest(self, source: random.Random, number: int, left: Iterator[int]) -> None:
        options = any_options(source)
        self._enter(number, options, number, lambda: self.client.call("ask_back", number, "own", number, **options))

    # How they end.

    def _enter(
        self, number: int, options: dict[str, Any], expected: Any, call: Callable[[], Any], success: int = ANSWERED
    ) -> None:
        """Enter how ``call`` ends, which it has to do in one of the ways that the documentation has."""
        try:
            result = call()
        except gmprpc.CallTimeout as exc:
            if exc.timeout == LONG:  # Nothing that happens here takes so long.
                end = self._fault(number, exc)
            else:
                end = LATE if exc.sent else LATE_UNSENT
        except gmprpc.ConnectFailed as exc:
            end = LOST if exc.sent else UNCONNECTED
        except gmprpc.ConnectionClosed as exc:
            end = LOST if exc.sent else LOST_UNSENT
        except gmprpc.RemoteError as exc:
            # Nested calls share the fate of their connection.
            end = ERROR if exc.error == expected or "ConnectionClosed" in str(exc) else self._fault(number, exc)
        except gmprpc.CallCancelled:
            end = CANCELLED
        except gevent.Timeout:
            end = GIVEN_UP
        except Exception as exc:
            end = self._fault(number, exc)
        else:
            end = success if result == expected else self._fault(number, result)
        if options.get("idempotent"):
            end += IDEMPOTENT
        self.calls += 1
        self._ends[number] = end if self._ends[number] == 0 else TWICE

    def end_again(self, call: Any) -> None:
        """A pending call has been given another outcome."""
        self.second_ends += 1
        self.first_fault = self.first_fault or f"{call!r} has ended twice"

    def _fault(self, number: int, found: Any) -> int:
        self.first_fault = self.first_fault or f"call {number}: {found!r:.300}"
        return WRONG


def any_request(source: random.Random, number: int) -> tuple[str, tuple[Any, ...], Any]:
    """A method, its params, and the result or the error that it has."""
    kind = source.random()
    if kind < 0.7:
        return "do", (number,), number
    if kind < 0.78:
        return "pause", (number, 0.002), number
    if kind < 0.86:
        return "later", (number, 0.002), number
    if kind < 0.93:
        return "fail", (number,), [number, "as told"]
    data = bytes([number & 0xFF]) * source.choice([10, 1000, 20_000, 100_000])
    return "echo", (number, data), data


def any_options(source: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if source.random() < 0.4:
        options["idempotent"] = True
    if source.random() < 0.3:
        options["cancel_on_timeout"] = True
    return options


def raising(exc: Exception) -> Callable[[], Any]:
    def get() -> Any:
        raise exc

    return get


def split(numbers: range, parts: int) -> list[range]:
    """``numbers`` in so many parts that are about as large."""
    bounds = [numbers.start + len(numbers) * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def watch_for_second_ends(soaker: Soaker) -> None:
    """Have every pending call tell when it ends though it has ended."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def end(call: Any, *args: Any) -> None:
            if call.ready():
                soaker.end_again(call)
            function(call, *args)

        return end

    kind: Any = gmprpc.PendingCall
    kind.set = watched(kind.set)
    kind.set_exception = watched(kind.set_exception)


def census() -> dict[str, int]:
    """What this process holds, when its garbage has been collected."""
    for _ in range(3):
        gc.collect()
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
    (size,) = [
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    ]
    return {
        "resident": size,
        "blocks": sys.getallocatedblocks(),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # That of the directory itself.
        # Those of gevent that live: of each thread that has ended gevent keeps a hub, a greenlet that ran its loop, and
        # what waited to be called in it.
        "greenlets": sum(isinstance(thing, gevent.Greenlet) and not thing.dead for thing in gc.get_objects()),
        "threads": threading.active_count(),
    }


def settled_census(first: dict[str, int] | None) -> dict[str, int]:
    """The same, when what was only under way has ended: when there is no more than at ``first``, or after a while."""
    end = time.monotonic() + PATIENCE
    gevent.sleep(0.2)
    now = census()
    while first is not None and any(now[name] > first[name] for name in COUNTED) and time.monotonic() < end:
        gevent.sleep(0.05)
        now = census()
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", help="the file of the ledger")
    parser.add_argument("ports", type=int, nargs="+", help="more than one: balance")
    parser.add_argument("--log", required=True, help="what is logged goes to this file")
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    logging.basicConfig(filename=arguments.log, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    own = gmprpc.Service()
    own.register(lambda value: value, "own")
    options: dict[str, Any] = {"service": own, "timeout": LONG, "connect_timeout": LONG, "max_pending": 32}
    options |= {"retry_interval": 0.01, "max_retry_interval": 0.2}
    addresses = [("127.0.0.1", port) for port in arguments.ports]
    client: gmprpc.Client | gmprpc.Balancer
    if len(addresses) > 1:
        client = gmprpc.Balancer(addresses, **options)
    else:
        # Half of them want to be told before a server lets them go.
        client = gmprpc.Client(addresses[0], draining=arguments.seed % 2 == 1, **options)

    going_on = Event()
    gevent.signal_handler(signal.SIGUSR1, going_on.set)

    def wait() -> None:
        while not going_on.is_set():  # Not `wait`: a loop that only waits for signals has nothing to do.
            gevent.sleep(0.01)
        going_on.clear()

    source = random.Random(arguments.seed)
    with open(arguments.ends, "r+b") as file, mmap.mmap(file.fileno(), 0) as ends:
        soaker = Soaker(client, ends)
        first: dict[str, int] | None = None
        watch_for_second_ends(soaker)
        for numbers in split(range(arguments.calls), QUARTERS):
            soaker.soak(source, numbers)
            say({"ended": numbers.stop})
            wait()  # Until there are no faults any more.
            # As much is open each time.
            while client.statistics()["open_connections"] < len(addresses):
                client.call("statistics", idempotent=True)
                gevent.sleep(0.001)
            now = settled_census(first)
            first = first or now
            say({"census": now, "statistics": client.statistics()})
            wait()
        client.close()
        gevent.sleep(0.01)  # Links of what has ended are called in the next round of the loop.
    faults = {"second_ends": soaker.second_ends, "first_fault": soaker.first_fault}
    say({"census": census(), "statistics": client.statistics(), **faults})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
