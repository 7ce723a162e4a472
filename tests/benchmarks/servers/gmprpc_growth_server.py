"""gmprpc with as many methods as it is told, messages as large, and handlers that block for so many milliseconds."""

import sys

import gevent

import gmprpc

method_count, max_message_size, milliseconds = map(int, sys.argv[1:])
server = gmprpc.Server(("127.0.0.1", 0), max_message_size=max_message_size)


def echo(value: object) -> object:
    return value


def echo_later(value: object) -> object:
    gevent.sleep(milliseconds / 1000)
    return value


server.register(echo_later if milliseconds else echo, "echo")
for number in range(1, method_count):
    server.register(echo, f"echo{number}")
server.start()
print(server.server_port, flush=True)
server.serve_forever()
