"""A server that wants to know who calls, and a client that says so on each connection before anything else.

Run ``python examples/login.py``.
"""

import gmprpc

USERS = {"correct horse battery staple": "somebody"}  # By their tokens.


def authenticate(connection, message):
    _, _, method, params = message
    if method == "login" and len(params) == 1 and isinstance(params[0], str):
        connection.user = USERS.get(params[0])
    return connection.user is not None  # True lets the connection in, and nothing else does.


def log_in(client, connection):
    connection.call("login", "correct horse battery staple")


server = gmprpc.Server(("127.0.0.1", 0), authenticate=authenticate)


@server.method
def login(token):  # It is carried out like any other method, when it has let somebody in.
    return "welcome"


@server.method
def whoami():
    return gmprpc.current_call().connection.user


with server:
    with gmprpc.Client(server.address, on_connect=log_in) as client:
        print(client.call("whoami"))
    with gmprpc.Client(server.address) as stranger:
        try:
            stranger.call("whoami")
        except gmprpc.RemoteError as exc:
            print(exc.error)
