"""Bare ACP clients for benchmarks: over a WebSocket of the broker's, and straight over an agent's stdio.

They note when a token arrived and when it was sent, and parse nothing else of an update.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

from bench.peers.load import masked

AGENT = Path(__file__).with_name("agent.py")
TIMEOUT_S = 60.0
_STAMP = re.compile(rb"at=(\d+);")


class Caller(ABC):
    """Requests and answers; ``lags`` collects seconds from a token's sending to its arrival."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self._next = 0
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    @abstractmethod
    def write(self, message: bytes) -> None:
        """One message out."""

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The result. Raises ``RuntimeError`` for an error."""
        self._next += 1
        number = self._next
        future = self._open[number] = asyncio.get_running_loop().create_future()
        self.write(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode())
        return await asyncio.wait_for(future, TIMEOUT_S)

    async def open(self) -> str:
        """Initialises and makes a conversation; returns its id."""
        await self.call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
        result = await self.call("session/new", {"cwd": "/", "mcpServers": []})
        return str(result["sessionId"])

    async def tokens(self, session: str, count: int, pause_us: int) -> None:
        """One turn that streams ``count`` tokens."""
        text = f"tokens {count} {pause_us}"
        await self.call("session/prompt", {"sessionId": session, "prompt": [{"type": "text", "text": text}]})

    def received(self, message: bytes) -> None:
        if stamp := _STAMP.search(message):
            self.lags.append((time.monotonic_ns() - int(stamp[1])) / 1e9)
            return
        parsed = json.loads(message)
        future = self._open.pop(parsed.get("id", 0), None) if "method" not in parsed else None
        if future is None or future.done():
            return
        if "error" in parsed:
            future.set_exception(RuntimeError(str(parsed["error"])))
        else:
            future.set_result(parsed["result"])


class WebSocketCaller(Caller, asyncio.Protocol):
    """Over the broker."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token
        self._buffer = b""
        self._head = True
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        self.transport.write(
            (
                "GET /acp HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {self._token}\r\n\r\n"
            ).encode()
        )

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        pos = 0
        if self._head:
            pos = data.find(b"\r\n\r\n") + 4
            if pos < 4:
                self._buffer = data
                return
            self._head = False
            if data.startswith(b"HTTP/1.1 101"):
                self.opened.set_result(None)
            else:
                self.opened.set_exception(RuntimeError(data.decode(errors="replace")))
        while (end := _frame_end(data, pos)) is not None:
            start, stop = end
            if data[pos] & 0x0F == 1:
                self.received(data[start:stop])
            pos = stop
        self._buffer = data[pos:]

    def write(self, message: bytes) -> None:
        self.transport.write(masked(message))


class StdioCaller(Caller, asyncio.SubprocessProtocol):
    """The agent's own stdio, nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.process = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self.received(line)

    def process_exited(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def write(self, message: bytes) -> None:
        pipe = cast(asyncio.WriteTransport, self.process.get_pipe_transport(0))
        pipe.write(message + b"\n")

    async def close(self) -> None:
        self.process.kill()
        await asyncio.wait_for(self.ended, TIMEOUT_S)
        self.process.close()


async def over_websocket(port: int, token: str) -> WebSocketCaller:
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: WebSocketCaller(token), "127.0.0.1", port)
    await asyncio.wait_for(caller.opened, TIMEOUT_S)
    return caller


async def over_stdio() -> StdioCaller:
    loop = asyncio.get_running_loop()
    _, caller = await loop.subprocess_exec(StdioCaller, sys.executable, "-I", "-S", str(AGENT), stderr=None)
    return caller


def _frame_end(data: bytes, pos: int) -> tuple[int, int] | None:
    """Where the payload of the unmasked frame at ``pos`` begins and ends; None when it is not all there."""
    if len(data) - pos < 2:
        return None
    size, start = data[pos + 1] & 0x7F, pos + 2
    if size >= 126:
        start += 2 if size == 126 else 8
        if len(data) < start:
            return None
        size = int.from_bytes(data[pos + 2 : start], "big")
    return (start, start + size) if len(data) >= start + size else None
