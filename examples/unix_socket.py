"""Listens on a unix socket to which only this user can connect. The file goes when the server stops.

Run ``python examples/unix_socket.py``, then ``python -m gmprpc call unix:/tmp/gmprpc-example.sock add 1 2``.
"""

import os
import sys

import gmprpc

path = sys.argv[1] if len(sys.argv) > 1 else "/tmp/gmprpc-example.sock"
server = gmprpc.Server(f"unix:{path}")


@server.method
def add(a, b):
    return a + b


os.umask(0o077)  # Before the file is made: it is for this user only.
server.start()
print(f"listening on {server.address}", flush=True)
server.serve_forever()
