"""gmprpc as it comes, without an option set."""

import gmprpc

server = gmprpc.Server(("127.0.0.1", 0))


@server.method
def echo(value: object) -> object:
    return value


server.start()
print(server.server_port, flush=True)
server.serve_forever()
