"""At random: whatever happens to calls, their handlers and their connections, each that starts ends just once."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult

import gmprpc
from gmprpc import Outcome

from .helpers import Peer, collected, wait_until

#: Rounds of each peer; so many peers at a time.
ROUNDS = 12
PEERS = 4


class Bookkeeper:
    """An observer that dawdles now and then, and keeps books."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.started = 0
        self.ended: Counter[int] = Counter()
        self.outcomes: Counter[Outcome] = Counter()

    def call_started(self, call: gmprpc.Call) -> int:
        if self._dice.random() < 0.1:
            gevent.sleep(0.001)  # Killed or cancelled here it hasn't started.
        self.started += 1
        return self.started

    def call_ended(self, call: gmprpc.Call, outcome: Outcome, *rest: Any) -> None:
        _, token, _ = rest
        self.ended[token] += 1
        self.outcomes[outcome] += 1
        if self._dice.random() < 0.05:
            gevent.sleep(0.001)


class Chaos:
    """Methods of which nobody knows what they will do, and what becomes of what they leave behind."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.promises: list[Any] = []
        self.results: list[AsyncResult] = []  # Nothing tells when nobody has one any more.
        self.service = gmprpc.Service()
        for method in (self.answer, self.fail, self.later, self.child, self.hang_up, self.again):
            self.service.register(method)
        self.service.register(self.defer, deferred=True)
        self.service.register(self.thread, threadpool=True)
        self.methods = [*self.service.methods, "$/health", "nonsense"]

    def dawdle(self) -> None:
        """Wait, or not; and do as one is told, or not."""
        try:
            gevent.sleep(self.dice.choice([0, 0.001, 0.005]))
        except gmprpc.CallCancelled:
            if self.dice.random() < 0.5:
                raise

    def answer(self) -> Any:
        self.dawdle()
        return self.dice.choice([1, "x" * 100_000, object()])

    def fail(self) -> None:
        self.dawdle()
        kind = self.dice.choice([ValueError, TypeError, SystemExit, gevent.GreenletExit, gmprpc.CallCancelled])
        raise self.dice.choice([kind(), gmprpc.ErrorResponse("no")])

    def stumble(self) -> None:
        self.dawdle()
        raise ValueError

    def later(self) -> AsyncResult:
        result = AsyncResult()
        self.results.append(result)
        self.promises.append(result)
        self.dawdle()
        return result

    def again(self) -> Any:
        return self.dice.choice(self.promises) if self.promises else None

    def child(self) -> gevent.Greenlet:
        child = gevent.spawn(self.answer if self.dice.random() < 0.5 else self.stumble)
        self.promises.append(child)
        return child

    def defer(self, reply: gmprpc.Reply | None) -> None:
        self.dawdle()
        if reply is not None and self.dice.random() < 0.3:
            reply.result(1)
        elif reply is not None:
            self.promises.append(reply)
        if self.dice.random() < 0.2:
            raise ValueError

    def thread(self) -> None:
        if self.dice.random() < 0.2:
            raise ValueError

    def hang_up(self) -> Any:
        connection = gmprpc.current_call().connection
        if self.dice.random() < 0.2:
            self.dice.choice([connection.close, connection.abort, connection.finish])()
        return self.later() if self.dice.random() < 0.5 else None

    def keep_promises(self) -> None:
        """Complete, forget or kill what was left behind, one thing after the other."""
        while True:
            gevent.sleep(0.001)
            if self.promises:
                self.complete(self.promises.pop(self.dice.randrange(len(self.promises))))

    def complete(self, promise: Any) -> None:
        """Do something about ``promise``."""
        if isinstance(promise, gevent.Greenlet):
            if self.dice.random() < 0.3:
                promise.kill(block=False)
            return
        completions: list[Callable[[], Any]] = [
            lambda: promise.set(1),
            lambda: promise.set(object()),
            lambda: promise.set_exception(ValueError()),
            lambda: promise.set_exception(gmprpc.ErrorResponse("no")),
            lambda: None,
        ]
        completion = self.dice.choice(completions)
        if isinstance(promise, gmprpc.Reply) and self.dice.random() < 0.3:
            threading.Thread(target=suppressing(completion)).start()
        else:
            suppressing(completion)()

    def attack(self, address: Any) -> None:
        """Call, cancel, and leave in every way."""
        for _ in range(ROUNDS):
            with suppress(OSError, EOFError), Peer.connect(address) as peer:
                for _ in range(self.dice.randrange(1, 8)):
                    peer.send(*(self.message() for _ in range(self.dice.randrange(1, 12))))
                    gevent.sleep(self.dice.choice([0, 0.001, 0.005]))
                self.dice.choice([peer.reset, peer.shutdown, peer.close])()

    def message(self) -> list[Any]:
        """A request, a notification, or that one isn't wanted any more."""
        msgid, method = self.dice.randrange(10), self.dice.choice(self.methods)
        params = [1] * (self.dice.random() < 0.1)
        return self.dice.choice([[0, msgid, method, params], [2, method, params], [2, "$/cancel", [msgid]]])


def suppressing(completion: Callable[[], Any]) -> Callable[[], None]:
    """``completion``, of what may have been answered already."""

    def complete() -> None:
        with suppress(gmprpc.AlreadyAnswered):
            completion()

    return complete


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(4))
def test_each_call_that_starts_ends_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "gmprpc")  # What it kept would keep replies, of handlers that have failed.
    monkeypatch.setattr(gevent.get_hub(), "print_exception", lambda *_: None)  # Of the greenlets that fail.
    dice = random.Random(seed)
    chaos, bookkeeper = Chaos(dice), Bookkeeper(dice)
    server = gmprpc.Server(
        ("127.0.0.1", 0),
        chaos.service,
        observers=[bookkeeper],
        reply_timeout=[None, 0.004][seed % 2],
        max_concurrency=[256, 5][seed // 2],
        reuse_greenlets=bool(seed),
    )
    with server:
        keeper = gevent.spawn(chaos.keep_promises)
        gevent.joinall([gevent.spawn(chaos.attack, server.address) for _ in range(PEERS)], raise_error=True)
        keeper.kill()

        def is_over() -> bool:
            # What was promised to notifications is still to come, whoever has hung up.
            while chaos.results:
                chaos.results.pop().set(None)
            chaos.promises.clear()
            collected()
            return sum(bookkeeper.ended.values()) >= bookkeeper.started

        wait_until(is_over)
    assert bookkeeper.ended == dict.fromkeys(range(1, bookkeeper.started + 1), 1)
    assert bookkeeper.outcomes.keys() >= set(Outcome) - {Outcome.EXPIRED}
