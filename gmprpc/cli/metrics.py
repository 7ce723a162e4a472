"""``--metrics-bind``: what an operator asks over HTTP, ``/metrics``, ``/livez`` and ``/readyz``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

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
    try:
        # Not before the standard library is patched, and not where it may be missing.
        from gmprpc.prometheus import admin_server
    except ImportError as exc:
        raise Unreachable("--metrics-bind needs prometheus-client: pip install 'gmprpc[metrics]'.") from exc
    with ExitStack() as stack:
        try:
            admin = stack.enter_context(admin_server(bind, *servers))
        except OSError as exc:
            reason = f"can't listen on {format_address(bind)}: {exc.strerror or exc}"
            raise Unreachable(f"{reason}; --metrics-bind names another place.") from exc
        yield admin


def tell(admin: AdminServer | None) -> None:
    """Tell where the metrics are, if they are anywhere."""
    if admin is not None:
        place = format_address(admin.address)
        click.echo(f"metrics at {place if makes_file(place) else f'http://{place}/metrics'}", err=True)
