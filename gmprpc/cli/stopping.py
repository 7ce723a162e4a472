"""How ``serve`` stops: the options that say what happens then, and the signals that say when."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gevent

from . import parameters
from .parameters import option, options_of

options = options_of(
    option(
        "--graceful-timeout",
        type=parameters.seconds,
        default=30.0,
        metavar="SECONDS",
        help="Time for what is in flight when a signal says stop.",
    ),
    option(
        "--drain-delay",
        type=parameters.seconds,
        default=0.0,
        metavar="SECONDS",
        help="Go on for so long when SIGTERM says stop, and say that this isn't serving.",
    ),
    option(
        "--max-connection-age",
        type=parameters.positive_seconds,
        metavar="SECONDS",
        help="Part with each connection after so long, 10 % more or less; never by default.",
    ),
)


def keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say to a :class:`gmprpc.Server`."""
    return {
        "stop_timeout": settings["graceful_timeout"],
        "drain_delay": settings["drain_delay"],
        "max_connection_age": settings["max_connection_age"],
    }


class StopRequested(SystemExit):
    """A signal says stop, and there is nothing to stop yet."""


class StopSignals:
    """SIGTERM and SIGINT, over the whole life of the program, each part of which SIGTERM ends with status 0.

    At first SIGTERM raises :exc:`StopRequested` wherever the program is at that moment: to import an application may
    take any time, in which the loop doesn't run. SIGINT is Python's own until :meth:`leave_to_loop`.
    """

    def __init__(self) -> None:
        self._is_early = True
        self._noted: list[signal.Signals] = []
        self._act: Callable[[signal.Signals], Any] | None = None
        signal.signal(signal.SIGTERM, self._strike)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Leave the ``with`` by :exc:`StopRequested` if SIGTERM has come, whoever in there has made what of it."""
        try:
            yield
        finally:
            if self._noted:
                self.ignore()
                raise StopRequested(0)

    def leave_to_loop(self) -> None:
        """Raise nothing from now on, since there is something to be cleaned up; :meth:`act_with` says what happens."""
        self._is_early = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(signum, self._note, signum)

    @staticmethod
    def ignore() -> None:
        """It ends anyway: in its last moments Python would let SIGTERM kill it."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def act_with(self, act: Callable[[signal.Signals], Any]) -> None:
        """Have ``act(signum)`` called, in a greenlet, for each that comes, and for those that have come since then."""
        self._act = act
        for signum in self._noted:
            gevent.spawn(act, signum)

    def _strike(self, signum: int, _frame: object) -> None:
        if self._is_early:
            self._noted.append(signal.Signals(signum))
            raise StopRequested(0)
        gevent.spawn(self._note, signal.Signals(signum))  # It has struck just before the loop took over.

    def _note(self, signum: signal.Signals) -> None:
        if self._act is None:
            self._noted.append(signum)
        else:
            self._act(signum)
