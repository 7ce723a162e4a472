"""The weather of the soak: what befalls lines and servers, at random, and how often each thing did."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent

from tests.counting import CountingServer
from tests.proxy import Flow, Line, Proxy

#: How many bytes pass in one direction until something happens, on average. Picked so that it is many times a second.
_MEAN_PEACE = 200_000

#: Seconds between what befalls a server, or all lines of a proxy, at least and at most.
_PEACE = (1.0, 4.0)


class Weather:
    """That of some servers, each behind a proxy of its own; has no effect before `storm`."""

    def __init__(self, servers: list[CountingServer], proxies: list[Proxy], source: random.Random) -> None:
        #: How often which fault has happened.
        self.counts: Counter[str] = Counter()
        self._servers = servers
        self._proxies = proxies
        self._source = source
        self._is_over = True

    @contextmanager
    def storm(self) -> Iterator[None]:
        """Let faults happen; at the end everything is up, and no line is left that has known any."""
        self._is_over = False
        for proxy in self._proxies:
            proxy.plan = self._plan
        storms = gevent.spawn(self._storm)
        try:
            yield
        finally:
            self._is_over = True
            storms.join()
            for proxy in self._proxies:
                proxy.plan = None
                proxy.reset_all()
        storms.get()

    # To lines.

    def _plan(self, line: Line) -> None:
        """Give a new line its first fault, which may be early: in the first call already."""
        flow = self._source.choice([line.requests, line.answers])
        position = self._position() // self._source.choice([1, 1000])
        if self._source.random() < 0.1:
            flow.between_messages(position, lambda flow: self._happen(flow, "garbage", Flow.insert))
        else:
            self._plan_at(flow, position)

    def _plan_at(self, flow: Flow, position: int) -> None:
        name, fault = self._source.choice(_FAULTS)
        flow.at(position, lambda flow: self._happen(flow, name, fault))

    def _happen(self, flow: Flow, name: str, fault: Callable[[Flow], Any]) -> None:
        if self._is_over:
            return
        self.counts[name] += 1
        fault(flow)
        if not flow.line.is_over:  # It goes on, to the next one.
            flow = self._source.choice([flow.line.requests, flow.line.answers])
            self._plan_at(flow, flow.position + self._position())

    def _position(self) -> int:
        return int(self._source.expovariate(1 / _MEAN_PEACE))

    # To servers.

    def _storm(self) -> None:
        """See that something happens now and then."""
        while True:
            end = self._source.uniform(*_PEACE)
            while end > 0 and not self._is_over:
                gevent.sleep(0.05)
                end -= 0.05
            if self._is_over:
                return
            number = self._source.randrange(len(self._servers))
            (befall,) = self._source.choices([self._kill, self._restart, self._refuse, self._reset_all], [3, 1, 1, 1])
            befall(self._servers[number], self._proxies[number])

    def _kill(self, server: CountingServer, proxy: Proxy) -> None:
        self.counts["server killed"] += 1
        server.kill()
        gevent.sleep(self._source.choice([0, 0, 0.2]))
        server.start()

    def _restart(self, server: CountingServer, proxy: Proxy) -> None:
        self.counts["server restarted"] += 1
        server.stop()
        server.start()

    def _refuse(self, server: CountingServer, proxy: Proxy) -> None:
        self.counts["connections refused"] += 1
        proxy.refuse()
        proxy.reset_all()
        gevent.sleep(self._source.uniform(0, 0.5))
        proxy.listen()

    def _reset_all(self, server: CountingServer, proxy: Proxy) -> None:
        self.counts["all reset"] += 1
        proxy.reset_all()


def _for_a_while(begin: Callable[[Flow], Any], end: Callable[[Flow], Any], seconds: float) -> Callable[[Flow], None]:
    def happen(flow: Flow) -> None:
        begin(flow)
        gevent.spawn_later(seconds, end, flow)

    return happen


#: What befalls a flow. What was swallowed leaves calls waiting that won't be answered, so that the line ends soon.
_FAULTS: tuple[tuple[str, Callable[[Flow], Any]], ...] = (
    ("reset", Flow.reset),
    ("cut", Flow.cut),
    ("half-close", _for_a_while(Flow.half_close, Flow.reset, 0.5)),
    ("swallow", _for_a_while(Flow.swallow, Flow.reset, 0.1)),
    ("stall", _for_a_while(Flow.stall, Flow.go_on, 0.05)),
    ("delay", lambda flow: flow.delay(0.02)),
    ("lag", _for_a_while(lambda flow: flow.lag(0.002), Flow.go_on, 0.1)),
    ("throttle", _for_a_while(lambda flow: flow.throttle(200_000), Flow.go_on, 0.1)),
)
