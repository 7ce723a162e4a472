"""The option of ``serve`` for OpenTelemetry; what it measures with is set up elsewhere, by the environment mostly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from gmprpc.server import Server

from .exits import Unreachable
from .parameters import option, options_of

logger = logging.getLogger("gmprpc.cli")

options = options_of(
    option(
        "--otel",
        is_flag=True,
        help="Make OpenTelemetry spans and metrics of the calls, with the providers that opentelemetry-instrument or "
        "the application sets up.",
    ),
)


def apply(settings: Mapping[str, Any], server: Server) -> None:
    """Have ``server`` measured if the options say so."""
    if not settings["otel"]:
        return
    # Only when it is wanted: not everybody has it.
    try:
        from gmprpc.otel import instrument
    except ImportError as exc:
        raise Unreachable("--otel needs OpenTelemetry: pip install 'gmprpc[otel]'.") from exc
    instrument(server)
    _look_for_providers()


@cache
def _look_for_providers() -> None:
    """Say once if there is nobody to tell."""
    from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider

    if isinstance(get_tracer_provider(), ProxyTracerProvider):
        logger.warning(
            "--otel makes no spans: no tracer provider is set; opentelemetry-instrument sets one, or the application"
        )
