"""The far end that all proxies share: echoes messages, or streams as many frames as it is asked for.

Serves WebSockets on ``DIR/ws.sock`` and the broker's streams (an attach header, then frames) on
``DIR/stream.sock``. A message ``stream SIZE COUNT`` is answered by COUNT frames of SIZE bytes, each
written by itself, as an agent's tokens are.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop
from websockets.server import ServerProtocol

from bench.lib import ready
from broker.front.frames import TEXT, frame
from sandbox_agent.wire import codec

_BURST = 8


class Echo(asyncio.Protocol):
    """One connection, opened by a WebSocket handshake or by an attach header."""

    def __init__(self, attached: bool) -> None:
        self._attached = attached
        self._open = False
        self._buffer = bytearray()
        self._paused = False
        self._frame = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._open and not self._begin():
            return
        while (message := self._message()) is not None:
            if message.startswith(b"stream "):
                _, size, count = message.split()
                self._frame = frame(TEXT, b"x" * int(size))
                self._left = int(count)
                self._stream()
            else:
                self._transport.write(frame(TEXT, message))

    def _begin(self) -> bool:
        if self._attached:
            end = codec.HEADER + (codec.length(bytes(self._buffer[: codec.HEADER])) if len(self._buffer) > 3 else 1)
            self._open = len(self._buffer) >= end
        else:
            end = self._buffer.find(b"\r\n\r\n") + 4
            self._open = end > 3
            if self._open:
                protocol = ServerProtocol()
                protocol.receive_data(bytes(self._buffer[:end]))
                protocol.send_response(protocol.accept(protocol.events_received()[0]))  # type: ignore[arg-type]
                self._transport.write(b"".join(protocol.data_to_send()))
        if self._open:
            del self._buffer[:end]
        return self._open

    def _message(self) -> bytes | None:
        """The next message: one masked frame. Control frames are skipped."""
        buffer = self._buffer
        while len(buffer) >= 2:
            short, head = buffer[1] & 0x7F, 2
            if short >= 126:
                head = 4 if short == 126 else 10
                if len(buffer) < head:
                    return None
                short = int.from_bytes(buffer[2:head], "big")
            end = head + 4 + short
            if len(buffer) < end:
                return None
            opcode, mask, payload = buffer[0] & 0x0F, bytes(buffer[head : head + 4]), bytes(buffer[head + 4 : end])
            del buffer[:end]
            if opcode == TEXT:
                key = (mask * (short // 4 + 1))[:short]
                return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(short, "big")
        return None

    def _stream(self) -> None:
        for _ in range(_BURST):
            if self._paused or not self._left:
                return
            self._left -= 1
            self._transport.write(self._frame)
        self._loop.call_soon(self._stream)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._loop.call_soon(self._stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = 0


async def serve(directory: str) -> None:
    loop = asyncio.get_running_loop()
    websockets = await loop.create_unix_server(lambda: Echo(False), f"{directory}/ws.sock", backlog=1024)
    streams = await loop.create_unix_server(lambda: Echo(True), f"{directory}/stream.sock", backlog=1024)
    async with websockets, streams:
        ready()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
