"""The options of ``serve`` for what it logs, and how; all of it goes to standard error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import click

from gmprpc.accesslog import AccessLog
from gmprpc.accesslog import logger as access_logger
from gmprpc.blocking import report_blocking
from gmprpc.log import JSONFormatter
from gmprpc.server import Server

from . import parameters
from .parameters import option, options_of

options = options_of(
    option(
        "--access-log",
        is_flag=True,
        help="Log each call when it has ended: peer, method, msgid, outcome, duration.",
    ),
    option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False),
        default="info",
        help="Log what is at least so grave; --access-log is logged anyway.",
    ),
    option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="Lines for people, or a JSON object on each.",
    ),
    option(
        "--max-blocking-time",
        type=parameters.seconds,
        # Five times gevent's own: also on a machine that has too much to do it's the method that is to blame.
        default=0.5,
        metavar="SECONDS",
        help="Warn of a method that keeps all others waiting for so long; 0 doesn't look.",
    ),
)


def formatter(settings: Mapping[str, Any]) -> logging.Formatter:
    """What gives a line the form that the options say."""
    if settings["log_format"] == "json":
        return JSONFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def configure(settings: Mapping[str, Any]) -> None:
    """Have the log written as the options say, unless the application has an idea of its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(settings))
    logging.basicConfig(level=settings["log_level"].upper(), handlers=[handler])
    if settings["access_log"]:
        access_logger.setLevel(logging.INFO)


def watch(settings: Mapping[str, Any]) -> None:
    """Look from now on whether a method blocks the hub of this thread, as the options say."""
    report_blocking(settings["max_blocking_time"])


def apply(settings: Mapping[str, Any], server: Server) -> None:
    """Have ``server`` do what the options say."""
    if settings["access_log"]:
        server.add_observer(AccessLog())
