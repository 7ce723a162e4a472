"""A client that is there before its server and outlives it: calls wait for a connection, within their time-outs.

Run ``python examples/reconnecting.py``: it is the client, and one server after the other.
"""

import gevent

import gmprpc


def start_server(address, name):
    server = gmprpc.Server(address)
    server.register(lambda: f"this is the {name} server", "who")
    server.start()
    return server


server = start_server(("127.0.0.1", 0), "first")
address = server.address
server.stop()  # Now nobody listens there.

client = gmprpc.Client(address, timeout=10)
try:
    client.call("who", timeout=0.1)
except gmprpc.CallTimeout as exc:
    print("sent:", exc.sent)

starting = gevent.spawn_later(0.2, start_server, address, "second")
print(client.call("who"))
starting.get().stop()

starting = gevent.spawn_later(0.2, start_server, address, "third")
# Had the connection broken amid this call: idempotent says that it may be carried out twice, so it is sent again.
print(client.call("who", idempotent=True))
client.close()
starting.get().stop()
