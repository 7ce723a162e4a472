"""The one place where the options of ``serve`` become a server: for a single process, and for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gmprpc.server import Server
from gmprpc.service import Service

from . import certificates, limits, logs, otel, peers, stopping


def make_server(app: Service | Server, settings: Mapping[str, Any], listener: Any = None) -> Server:
    """The server of the service ``app`` that the options in ``settings``, each by its name, describe.

    If ``app`` is a server it is one of the same service, with the same hooks, and with its TLS unless the options have
    another: they say who may do what, and to have forgotten that would be no small thing. Without a ``listener`` it
    listens nowhere: it serves a stream, or is told later where.
    """
    keywords = {
        **limits.keywords(settings, listener),
        **peers.keywords(settings),
        **certificates.keywords(settings),
        **stopping.keywords(settings),
    }
    if isinstance(app, Server):
        server = Server(listener, app.service, **{"ssl_context": app.ssl_context, **app.hooks, **keywords})
    else:
        server = Server(listener, app, **keywords)
    logs.apply(settings, server)
    otel.apply(settings, server)
    return server
