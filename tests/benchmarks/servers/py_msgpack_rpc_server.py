"""py-msgpack-rpc on asyncio's own loop. Its methods are plain functions."""

import asyncio

from py_msgpack_rpc import AsyncServerBuilder


def echo(value: object) -> object:
    return value


async def main() -> None:
    builder = AsyncServerBuilder()
    builder.add_method("echo", echo)
    builder.listen_tcp("127.0.0.1", 0)
    async with await builder.build() as server:
        print(server.local_endpoints()[0][1], flush=True)
        await server.run()


asyncio.run(main())
