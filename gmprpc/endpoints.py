"""Endpoints to choose from, and what is known of each; this module knows no socket, no clock and no greenlet."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .backoff import Backoff

# So many calls in a row without any answer, and the endpoint is taken for dead.
MAX_TIMEOUTS = 3


class Endpoint:
    """One place that calls can go to while it is usable; to begin with it isn't."""

    __slots__ = (
        "_late_answers",
        "address",
        "backoff",
        "client",
        "error",
        "is_gone",
        "is_usable",
        "is_suspect",
        "pending",
        "returns",
        "timeouts",
    )

    def __init__(self, address: Any, client: Any, backoff: Backoff) -> None:
        self.address = address
        self.client = client
        #: How long to wait before it is probed; longer and longer, until it answers a call.
        self.backoff = backoff
        #: How many calls wait for its answer.
        self.pending = 0
        self.is_usable = False
        #: True when it isn't in the list any more: it gets no new calls.
        self.is_gone = False
        #: How many times it has become usable. Calls from before the last time say nothing of it any more.
        self.returns = 0
        #: How many calls in a row have had no answer in time.
        self.timeouts = 0
        self._late_answers = 0
        #: True when there is anything for an answer to make good.
        self.is_suspect = False
        #: Why it isn't usable, or wasn't last.
        self.error: Exception | None = None

    def answered(self) -> None:
        """It has answered a call, be it with an error; to be told only if it :attr:`is_suspect`."""
        self.timeouts = 0
        if self.is_usable:  # Or else what is left of earlier calls would make the probes ever faster.
            self.is_suspect = False
            self.backoff.reset()

    def timed_out(self, late_answers: int) -> bool:
        """It hasn't answered a call in time; says whether it is to be taken for dead.

        Its client has had so many ``late_answers`` by now: one that is only slow gets no better by sending its calls to
        the others, which may be as slow.
        """
        if late_answers != self._late_answers:
            self._late_answers = late_answers
            self.timeouts = 0
        self.timeouts += 1
        self.is_suspect = True
        return self.timeouts >= MAX_TIMEOUTS


class Endpoints:
    """Those that there are, by their addresses; and of these the usable ones."""

    def __init__(self, make: Callable[[Any], Endpoint], random: Callable[[], float] = randomness.random) -> None:
        self._make = make
        self._random = random
        self._all: dict[Any, Endpoint] = {}
        self._usable: list[Endpoint] = []

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    @property
    def usable(self) -> list[Endpoint]:
        """The usable ones; a copy."""
        return list(self._usable)

    def choose(self) -> Endpoint | None:
        """Of two usable ones, at random, the one with fewer calls pending; None if none is usable.

        (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001. To take the least busy one of all
        would send everybody to the same, a newcomer, at once.)
        """
        usable = self._usable
        number = len(usable)
        if number < 2:
            return usable[0] if usable else None
        first = int(self._random() * number)
        second = int(self._random() * (number - 1))
        if second >= first:
            second += 1
        one, other = usable[first], usable[second]
        return other if other.pending < one.pending else one

    def update(self, addresses: Iterable[Any]) -> tuple[list[Endpoint], list[Endpoint]]:
        """Let there be an endpoint for each of ``addresses`` and no other; returns those that came and that went.

        An address that is named twice counts once.
        """
        wanted = dict.fromkeys(addresses)
        new = [self._make(address) for address in wanted if address not in self._all]  # First: it may fail.
        gone = [endpoint for address, endpoint in self._all.items() if address not in wanted]
        for endpoint in gone:
            self.take_out(endpoint)
            endpoint.is_gone = True
            del self._all[endpoint.address]
        self._all.update({endpoint.address: endpoint for endpoint in new})
        return new, gone

    def put_in(self, endpoint: Endpoint) -> None:
        """Let ``endpoint``, which was not usable, be chosen."""
        endpoint.is_usable = True
        endpoint.returns += 1
        endpoint.timeouts = 0
        self._usable.append(endpoint)

    def take_out(self, endpoint: Endpoint) -> None:
        """Let ``endpoint`` be chosen no more; nothing happens if it isn't usable."""
        if endpoint.is_usable:
            endpoint.is_usable = False
            self._usable.remove(endpoint)
