"""aio-msgpack-rpc, told the same as gmprpc_growth_server.py."""

import asyncio
import sys

import aio_msgpack_rpc
import msgpack

method_count, max_message_size, milliseconds = map(int, sys.argv[1:])


def echo(self: object, value: object) -> object:
    return value


async def echo_later(self: object, value: object) -> object:
    await asyncio.sleep(milliseconds / 1000)
    return value


def unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(raw=False, max_buffer_size=max_message_size)


async def main() -> None:
    # A method is an attribute.
    methods = {f"echo{number}": echo for number in range(1, method_count)}
    handler = type("Methods", (), {**methods, "echo": echo_later if milliseconds else echo})()
    serve = aio_msgpack_rpc.Server(handler, unpacker_factory=unpacker)
    # A backlog for a thousand who come at once; else they are told to come again in a second.
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
