"""A handler may block, in plain sequential code: this one calls another service, and meanwhile others are answered.

Run ``python examples/server.py`` and ``python examples/blocking_handler.py``, each in a terminal of its own, then
``python -m gmprpc call 127.0.0.1:4424 average 1 2 6``.
"""

import sys

import gmprpc

address, upstream = sys.argv[1:] or ("127.0.0.1:4424", "127.0.0.1:4423")
server = gmprpc.Server(address)
adder = gmprpc.Client(upstream, timeout=5)  # One for all requests; it connects with the first call.


@server.method
def average(*numbers):
    total = adder.call("sum", *numbers)  # Only the greenlet of this request waits.
    return total / len(numbers)


server.start()
print(f"listening on {server.server_host}:{server.server_port}", flush=True)
server.serve_forever()
