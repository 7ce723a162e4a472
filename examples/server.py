"""Echoes and sums: the synopsis of Perl's AnyEvent::MPRPC. A callback gets the reply first and answers it.

Run ``python examples/server.py``, and ``python examples/client.py`` in another terminal.
"""

import sys

import gmprpc


def echo(reply, *params):
    reply.result(*params)


def add_up(reply, *numbers):
    reply.result(sum(numbers))


server = gmprpc.Server(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:4423")
server.reg_cb(echo=echo, sum=add_up)
server.start()
print(f"listening on {server.server_host}:{server.server_port}", flush=True)
server.serve_forever()
