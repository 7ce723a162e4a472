"""A client on aio-msgpack-rpc, a process of its own: sends what it is told, all at once, and prints the outcomes.

``python aio_client.py PORT MESSAGES``, where MESSAGES is a JSON array of ``["call" or "notify", method, params]``. The
outcomes come as a JSON array too: of a call ``{"result": ...}`` or ``{"error": ...}``, of a notification null.
"""

import asyncio
import json
import sys
from typing import Any

import aio_msgpack_rpc
from aio_msgpack_rpc.error import RPCResponseError


async def send(client: aio_msgpack_rpc.Client, kind: str, method: str, params: list[Any]) -> Any:
    if kind == "notify":
        return await client.notify(method, *params)
    try:
        return {"result": await client.call(method, *params)}
    except RPCResponseError as exc:
        return {"error": exc.args[0]}


async def main(port: int, messages: list[tuple[str, str, list[Any]]]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = aio_msgpack_rpc.Client(reader, writer)
    outcomes = await asyncio.gather(*(send(client, *message) for message in messages))
    client.close()
    await writer.wait_closed()
    print(json.dumps(outcomes))


asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))
