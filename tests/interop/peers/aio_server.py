"""A server on aio-msgpack-rpc, a process of its own; prints its port."""

import asyncio
from typing import Any

import aio_msgpack_rpc


class Handler:
    def __init__(self) -> None:
        self._notes: list[Any] = []
        self._held: list[asyncio.Future[None]] = []

    def echo(self, *params: Any) -> Any:
        return params

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def note(self, *params: Any) -> None:
        self._notes.append(params)

    def notes(self) -> Any:
        return self._notes

    async def hold(self, value: Any) -> Any:
        """Answer when `release` is called."""
        self._held.append(asyncio.get_running_loop().create_future())
        await self._held[-1]
        return value

    def release(self) -> int:
        """Let those who hold on go, the last one first; tells how many there were."""
        for future in reversed(self._held):
            future.set_result(None)
        return len(self._held)


async def main() -> None:
    server = await asyncio.start_server(aio_msgpack_rpc.Server(Handler()), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
