"""mprpc in gevent's StreamServer, as its documentation runs it, but without Nagle's delay."""

from gevent.server import StreamServer
from mprpc import RPCServer


class Methods(RPCServer):  # type: ignore[misc]  # It has no type hints.
    def echo(self, value):
        return value


server = StreamServer(("127.0.0.1", 0), Methods(tcp_no_delay=True))
server.start()
print(server.server_port, flush=True)
server.serve_forever()
