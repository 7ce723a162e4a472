"""Servers from their start to the signal that says stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gevent.event import Event
from gevent.pool import Group

from gmprpc.server import Server
from gmprpc.transport import format_address

from .exits import Unreachable
from .stopping import StopSignals

logger = logging.getLogger("gmprpc.cli")


def start(servers: Sequence[Server]) -> None:
    """Start all or none."""
    for server in servers:
        try:
            with listening_errors(server.address):
                server.start()
        except Unreachable:
            for started in servers:
                started.close()
            raise


@contextmanager
def listening_errors(place: Any) -> Iterator[None]:
    """Turn what listening at ``place`` may raise into the error that ends the program."""
    try:
        yield
    except LookupError as exc:
        raise Unreachable(f"can't listen on {format_address(place)}: {exc.args[0]}.") from exc
    except OSError as exc:
        reason = f"can't listen on {format_address(place)}: {exc.strerror or exc}"
        raise Unreachable(f"{reason}; --bind names another place.") from exc


def serve_until(over: Event, servers: Sequence[Server], signals: StopSignals) -> None:
    """Wait until it is ``over``, or for SIGTERM or SIGINT, then stop all servers together, each in its own time.

    SIGINT, behind which a person is waiting, has no delay, and stops them at once if they were to stop already.
    """
    asked = Event()
    asked.rawlink(lambda _: over.set())
    stops = Group()

    def stop(signum: signal.Signals) -> None:
        is_first = not asked.is_set()
        if not is_first and signum != signal.SIGINT:
            return
        in_flight = sum(server.statistics()["in_flight"] for server in servers)
        delay = 0.0 if signum == signal.SIGINT else max(server.drain_delay for server in servers)
        for server in servers:
            if not delay:
                server.close()  # Now, so that whoever reads the log knows that nobody new can connect.
            stops.spawn(server.stop, None if is_first else 0, delay)
        asked.set()
        timeout = servers[0].stop_timeout
        if is_first and delay:
            logger.info("stopping on %s in %g s, and %g s for what is in flight then", signum.name, delay, timeout)
        elif is_first:
            logger.info("stopping on %s: %d requests in flight, %g s for them", signum.name, in_flight, timeout)

    signals.act_with(stop)
    over.wait()
    stops.join()
    signals.ignore()
