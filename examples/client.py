"""Calls server.py: one call after the other, then several in flight at once over the same connection.

Run ``python examples/server.py``, and ``python examples/client.py`` in another terminal.
"""

import sys

import gmprpc

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:4423"

with gmprpc.Client(address, timeout=5) as client:
    print(client.call("echo", "hello"))
    print(client.call("sum", 1, 2, 3))

    calls = [client.call_async("sum", number, number) for number in range(5)]
    print([call.get() for call in calls])
