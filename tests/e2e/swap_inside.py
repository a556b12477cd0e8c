"""Run in a sandbox by ``swap``: ties loopback ports to Unix sockets, then becomes the agent that its first line names.

``argv[1]`` is JSON, ``[[port, socket path], …]``; the line ``{"argv": [], "env": {}, "cwd": ""}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def serve(port: int, path: str) -> asyncio.Server:
    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(path)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    return await asyncio.start_server(accepted, "127.0.0.1", port)


async def forward(up: int) -> None:
    servers = [await serve(port, path) for port, path in json.loads(sys.argv[1])]
    os.write(up, b"1")
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    below, up = os.pipe()
    if os.fork() == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        asyncio.run(forward(up))
    os.read(below, 1)
    os.close(below)
    print("{}", flush=True)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or sys.exit(0)
    order = json.loads(line)
    os.makedirs(order["cwd"], exist_ok=True)
    os.chdir(order["cwd"])
    os.execvpe(order["argv"][0], order["argv"], order["env"])


main()
