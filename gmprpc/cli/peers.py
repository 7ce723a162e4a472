"""The options of ``serve`` that say who its peers are: the balancer in front, and what is believed of what it tells."""

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
)

_NAMES = ("proxy_protocol", "proxy_allow_from")


def keywords(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say to a :class:`gmprpc.Server`."""
    return {name: settings[name] for name in _NAMES}
