"""Servers that are restarted, and killed, behind HAProxy, while clients call through it and never retry."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import gmprpc
from tests.helpers import wait_until
from tests.programs import Program

from .haproxy import HAProxy, configuration, serve_arguments
from .load import PROGRAMS, Load

Address = tuple[str, int]


class Fleet:
    """Three servers, each a `gmprpc serve` of the counting service, behind HAProxy."""

    def __init__(
        self,
        start_serve: Callable[..., Program],
        start_haproxy: Callable[[str], HAProxy],
        reserve: Callable[[], Address],
        env: dict[str, str],
    ) -> None:
        self._start_serve = start_serve
        self._env = env
        self._addresses = {name: reserve() for name in "abc"}
        #: The servers by their names.
        self.servers = {name: self._serve(name) for name in self._addresses}
        #: Where HAProxy listens.
        self.address = reserve()
        text = configuration(self.address, self._addresses)
        # A fifth of the time, so that a restart takes two seconds instead of six.
        assert text.count("inter 1s") == 1
        self.haproxy = start_haproxy(text.replace("inter 1s", "inter 200ms"))
        self.haproxy.wait_for(**dict.fromkeys(self.servers, "UP"))

    def restart(self, name: str) -> None:
        """Stop a server, as a supervisor would, start it again, and wait until HAProxy uses it."""
        self.servers[name].terminate()
        assert self.servers[name].wait() == 0
        self.start(name)

    def start(self, name: str) -> None:
        """Start a server that has ended, and wait until HAProxy uses it."""
        self.servers[name] = self._serve(name)
        self.haproxy.wait_for(**{name: "UP"})

    def _serve(self, name: str) -> Program:
        arguments = serve_arguments(self._addresses[name], "counted:service")
        # Also a fifth.
        arguments[arguments.index("--drain-delay") + 1] = "1"
        return self._start_serve(*arguments, "--app-dir", PROGRAMS, env=self._env)


@pytest.fixture
def load(directory: Path) -> Iterator[Load]:
    """200 calls a second by clients that have announced themselves and never retry; where, is for the test to say."""
    load = Load(directory)
    yield load
    load.close()


@pytest.fixture
def fleet(
    start_serve: Callable[..., Program],
    start_haproxy: Callable[[str], HAProxy],
    reserve: Callable[[], Address],
    load: Load,
) -> Fleet:
    return Fleet(start_serve, start_haproxy, reserve, load.env)


@pytest.fixture
def clients(fleet: Fleet) -> Iterator[list[gmprpc.Client]]:
    """Ten, of all three servers."""
    with ExitStack() as stack:
        yield [stack.enter_context(gmprpc.Client(fleet.address, draining=True)) for _ in range(10)]


def test_no_call_fails_while_each_server_is_restarted_three_times(
    fleet: Fleet, load: Load, clients: list[gmprpc.Client]
) -> None:
    with load.by(clients):
        for name in 3 * list(fleet.servers):
            fleet.restart(name)
        load.wait(30)
    assert load.failed == []
    assert load.executions(load.made) == {1}
    assert len(load.made) >= 200 * 30 * 0.95  # It had to wait for this machine now and then.


def test_of_a_server_that_is_killed_only_the_calls_fail_that_were_in_flight_on_it(
    fleet: Fleet, load: Load, clients: list[gmprpc.Client]
) -> None:
    with load.by(clients):
        load.wait(2)
        # Besides the load each client has a call in flight, for longer than it takes to kill a server.
        numbers = [load.number() for _ in clients]
        held = [client.call_async("pause", number, 3) for client, number in zip(clients, numbers, strict=True)]
        wait_until(lambda: all(load.ledger[number] for number in numbers))
        victim = fleet.servers["a"]
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        for call in held:
            call.wait()
        fleet.start("a")
        load.wait(9)
    lost = [client for client, call in zip(clients, held, strict=True) if not call.successful()]
    assert 0 < len(lost) < len(clients)
    for error in [call.exception for call in held if not call.successful()] + [call.error for call in load.failed]:
        assert isinstance(error, gmprpc.ConnectionClosed)
        assert error.sent
    for made in load.failed:
        assert made.client in lost
        # Nobody has called on that connection who could have known that it was lost.
        assert made.began_at < min(other.ended_at for other in load.failed if other.client is made.client)
    assert load.executions(load.failed) <= {0, 1}
    assert load.executions(load.succeeded) == {1}
