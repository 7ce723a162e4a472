"""The one place where the options of ``serve`` become a server: for a single process, and for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gmprpc.server import Server
from gmprpc.service import Service

from . import certificates, limits, logs, otel, peers, stopping


def make_server(app: Service | Server, settings: Mapping[str, Any], listener: Any = None) -> Server:
    """The server of the service ``app`` that the options in ``settings``, each by its name, describe.

    If ``app`` is a server it is one of the same service, which lets in whom that one lets in: to have forgotten that
    would be no small thing. Without a ``listener`` it listens nowhere: it serves a stream, or is told later where.
    """
    server = Server(
        listener,
        app.service if isinstance(app, Server) else app,
        authenticate=app.authenticate if isinstance(app, Server) else None,
        **limits.keywords(settings, listener),
        **peers.keywords(settings),
        **certificates.keywords(settings),
        **stopping.keywords(settings),
    )
    logs.apply(settings, server)
    otel.apply(settings, server)
    return server
