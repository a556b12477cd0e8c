"""A proxy as one writes it with the websockets library: every message decoded and encoded again."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from websockets.asyncio.client import unix_connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from bench.lib import ready

_LIMIT = 32 * 2**20


async def proxy(upstream: str, port: int) -> None:
    async def handle(client: ServerConnection) -> None:
        async with unix_connect(upstream, "ws://peer/", compression=None, max_size=_LIMIT) as agent:

            async def up() -> None:
                async for message in client:
                    await agent.send(message)

            async def down() -> None:
                async for message in agent:
                    await client.send(message)

            done, pending = await asyncio.wait(
                [asyncio.create_task(up()), asyncio.create_task(down())], return_when=asyncio.FIRST_COMPLETED
            )
            for task in pending:
                task.cancel()
            for task in done:
                if not isinstance(task.exception(), ConnectionClosed | None):
                    task.result()

    async with serve(handle, "127.0.0.1", port, compression=None, max_size=_LIMIT):
        ready()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(proxy(sys.argv[1], int(sys.argv[2])))
