"""As many streams wait as were asked for, whatever becomes of those that were taken."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from sandbox_agent.streams import Streams
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import Attach


async def test_a_stream_that_was_taken_is_replaced(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    listener.listen()
    listener.setblocking(False)
    served: asyncio.Queue[tuple[socket.socket, Attach]] = asyncio.Queue()
    streams = Streams(str(tmp_path / "agent"), secret=b"s", count=1, serve=lambda *given: served.put_nowait(given))
    streams.up()
    loop = asyncio.get_running_loop()
    taken: list[socket.socket] = []
    for number in range(3):
        async with asyncio.timeout(5):
            sock, _ = await loop.sock_accept(listener)
            taken.append(sock)
            await loop.sock_sendall(sock, codec.pack(Attach(f"c{number}", "acp").encode()) + b"frames")
            ours, attach = await served.get()
            taken.append(ours)
            assert attach.connection == f"c{number}"
            assert await loop.sock_recv(ours, 100) == b"frames"
    await streams.close()
    for sock in (*taken, listener):
        sock.close()
