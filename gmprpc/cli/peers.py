"""The options of ``serve`` for its peers: how many of one there may be, and the balancer that tells who it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from gmprpc.proxyprotocol import LOCAL_PROXIES, PROXY_PROTOCOLS

from . import parameters
from .parameters import option, options_of

options = options_of(
    option(
        "--proxy-protocol",
        type=click.Choice(PROXY_PROTOCOLS),
        default="off",
        help="Be told by a balancer in front who has connected to it; auto: or by nobody.",
    ),
    option(
        "--proxy-allow-from",
        type=parameters.proxies,
        default=",".join(LOCAL_PROXIES),
        metavar="NETWORK,...",
        help="The balancers that are believed, and nobody else.",
    ),
    option(
        "--max-connections-per-peer",
        type=click.IntRange(min=1),
        metavar="N",
        help="Connections of one IP address, or user at a unix socket, at each place; no limit by default.",
    ),
)

_NAMES = ("proxy_protocol", "proxy_allow_from", "max_connections_per_peer")


def keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say to a :class:`gmprpc.Server`."""
    return {name: settings[name] for name in _NAMES}
