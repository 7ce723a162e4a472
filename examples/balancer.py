"""Two servers and one Balancer: when one of them is down the other answers, and when it is back both do.

Run ``python examples/balancer.py``: it is the servers and the client in one.
"""

import gmprpc


def serve(name, address=("127.0.0.1", 0)):
    server = gmprpc.Server(address)
    server.register(lambda: name, "who")
    server.start()
    return server


first, second = serve("first"), serve("second")
addresses = [first.address, second.address]

with gmprpc.Balancer(addresses, timeout=5) as balancer:
    while len(who := {balancer.call("who") for _ in range(100)}) < 2:
        pass  # One that isn't connected yet is waited for only if there is no other.
    print(*sorted(who))
    first.stop()
    print(*{balancer.call("who") for _ in range(100)})
    first = serve("first", addresses[0])
    while balancer.call("who") != "first":
        pass  # It is tried again from time to time.
    print("first is back")
