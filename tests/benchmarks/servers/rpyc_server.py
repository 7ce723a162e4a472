"""RPyC's server on gevent, which serves each connection in a greenlet, one call after the other."""

from gevent import monkey

monkey.patch_all()

import rpyc  # noqa: E402
from rpyc.utils.server import GeventServer  # noqa: E402


class EchoService(rpyc.Service):  # type: ignore[misc]  # Untyped.
    def exposed_echo(self, value: object) -> object:
        return value


server = GeventServer(EchoService, hostname="127.0.0.1", port=0)
server._listen()  # `start` wouldn't come back to say so.
print(server.port, flush=True)
server.start()
