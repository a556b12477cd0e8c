"""The gateway's ports inside many sandboxes, in one process: ``python -m bench.peers.forwarders SOCKET:PORT…``."""

from __future__ import annotations

import asyncio
import socket
import sys

import uvloop

from bench.lib import ready
from sandbox_agent.handover import Handover

TAKEN_S = 10.0


async def serve(pairs: list[str]) -> None:
    for pair in pairs:
        path, _, port = pair.rpartition(":")
        listener = socket.create_server(("127.0.0.1", int(port)), backlog=256)
        listener.setblocking(False)
        door = Handover(listener, path)
        await door.start()
        await asyncio.wait_for(door.taken.wait(), TAKEN_S)
    ready()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1:]))
