"""aiorpc on uvloop, as its documentation runs it."""

import asyncio

import aiorpc
import uvloop


async def main() -> None:
    aiorpc.register("echo", lambda value: value)
    server = await asyncio.start_server(aiorpc.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


uvloop.run(main())
