"""``--metrics-bind``: what an operator asks over HTTP, ``/metrics``, ``/livez`` and ``/readyz``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from gmprpc import workermetrics
from gmprpc.server import Server
from gmprpc.transport import format_address, makes_file

from . import parameters
from .exits import Unreachable
from .parameters import option

if TYPE_CHECKING:
    from gmprpc.admin import AdminServer  # At run time it isn't imported where nobody asks for it.

options = option(
    "--metrics-bind",
    type=parameters.bind,
    metavar="ADDRESS",
    help="Answer /metrics, /livez and /readyz over HTTP at HOST:PORT, unix:PATH or fd://N; nowhere by default.",
)


@contextmanager
def served(settings: Mapping[str, Any], servers: Sequence[Server]) -> Iterator[AdminServer | None]:
    """Meanwhile answer there for ``servers``, which haven't started yet, if the options in ``settings`` say so."""
    bind = settings["metrics_bind"]
    if bind is None:
        yield None
        return
    with ExitStack() as stack:
        with _errors(bind):
            # Not before the standard library is patched, and not where it may be missing.
            from gmprpc.prometheus import admin_server

            admin = stack.enter_context(admin_server(bind, *servers))
        yield admin


def prepare_for_workers(settings: Mapping[str, Any]) -> None:
    """Open the place, if the options name one, for workers that will be forked off."""
    if (bind := settings["metrics_bind"]) is None:
        return
    with _errors(bind):
        workermetrics.prepare(format_address(bind))
    _tell(workermetrics.place())


def tell(admin: AdminServer | None) -> None:
    """Tell where the metrics are, if they are anywhere."""
    if admin is not None:
        _tell(admin.address)


def _tell(address: Any) -> None:
    place = format_address(address)
    click.echo(f"metrics at {place if makes_file(place) else f'http://{place}/metrics'}", err=True)


@contextmanager
def _errors(bind: Any) -> Iterator[None]:
    try:
        yield
    except ImportError as exc:
        raise Unreachable("--metrics-bind needs prometheus-client: pip install 'gmprpc[metrics]'.") from exc
    except OSError as exc:
        reason = f"can't listen on {format_address(bind)}: {exc.strerror or exc}"
        raise Unreachable(f"{reason}; --metrics-bind names another place.") from exc
