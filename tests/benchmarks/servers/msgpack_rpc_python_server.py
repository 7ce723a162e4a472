"""msgpack-rpc-python on tornado's loop."""

import msgpackrpc
from tornado import netutil, tcpserver


class Methods:
    def echo(self, value):
        return value


def bind_sockets(port, address):
    """Listen where the others do, and say where that is: the server itself takes every address and tells no port."""
    sockets = netutil.bind_sockets(port, "127.0.0.1")
    print(sockets[0].getsockname()[1], flush=True)
    return sockets


tcpserver.bind_sockets = bind_sockets
server = msgpackrpc.Server(Methods(), unpack_encoding="utf-8")
server.listen(msgpackrpc.Address("127.0.0.1", 0))
server.start()
