"""aio-msgpack-rpc on asyncio's own loop. Its methods may be coroutines; plain functions cost it less."""

import asyncio

import aio_msgpack_rpc


class Methods:
    def echo(self, value: object) -> object:
        return value


async def main() -> None:
    server = await asyncio.start_server(aio_msgpack_rpc.Server(Methods()), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
