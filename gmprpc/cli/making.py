"""The one place where the options of ``serve`` become a server: for a single process, and for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gmprpc.server import Server
from gmprpc.service import Service

from . import certificates, limits, logs, otel, peers, stopping


def make_server(service: Service, settings: Mapping[str, Any], listener: Any = None) -> Server:
    """The server of ``service`` that the options in ``settings``, each by its name, describe.

    Without a ``listener`` it listens nowhere: it serves a stream, or is told later where.
    """
    server = Server(
        listener,
        service,
        **limits.keywords(settings, listener),
        **peers.keywords(settings),
        **certificates.keywords(settings),
        **stopping.keywords(settings),
    )
    logs.apply(settings, server)
    otel.apply(settings, server)
    return server
