"""The server calls its caller back over the same connection, before it answers: a question, then some progress.

Run ``python examples/callback.py``: it is the server and the client in one.
"""

import gmprpc

server = gmprpc.Server(("127.0.0.1", 0))
service = gmprpc.Service()  # What the client lets the server call.


@server.method
def install(*packages):
    caller = gmprpc.current_call().connection
    for package in packages:
        if caller.call("confirm", f"Install {package}?"):
            caller.notify("show", f"{package} is installed.")
    return "done"


@service.method
def confirm(question):
    print(question)
    return "grpc" not in question


service.register(print, "show")

with server, gmprpc.Client(server.address, service=service) as client:
    print(client.call("install", "gevent", "grpcio", "msgpack"))
