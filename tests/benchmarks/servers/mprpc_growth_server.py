"""mprpc, told the same as gmprpc_growth_server.py, but for the methods: it can't be measured with many."""

import sys

import gevent
from gevent.server import StreamServer
from mprpc import RPCServer

_, max_message_size, milliseconds = map(int, sys.argv[1:])


class Methods(RPCServer):  # type: ignore[misc]  # There are no types for it.
    def echo(self, value):
        return value


class SlowMethods(RPCServer):  # type: ignore[misc]
    def echo(self, value):
        gevent.sleep(milliseconds / 1000)
        return value


methods = (SlowMethods if milliseconds else Methods)(
    tcp_no_delay=True,
    unpack_params={"use_list": False, "max_buffer_size": max_message_size, "max_str_len": max_message_size},
)
server = StreamServer(("127.0.0.1", 0), methods, backlog=1024)
server.start()
print(server.server_port, flush=True)
server.serve_forever()
