"""A WebSocket client that may break every rule of RFC 6455."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

LIMIT_S = 10.0
"""How long anything may take to be answered."""


def request(token: str = "", *, path: str = "/acp", host: str = "127.0.0.1", **headers: str) -> bytes:
    """An upgrade request; ``headers`` with ``_`` for ``-``, which may also replace one of the usual."""
    fields = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    if token:
        fields["Authorization"] = f"Bearer {token}"
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def frame(
    payload: bytes, opcode: int = 1, *, fin: bool = True, rsv: int = 0, masked: bool = True, length: int | None = None
) -> bytes:
    """One frame, its mask zero; ``length``: what its header says instead of the truth."""
    size = len(payload) if length is None else length
    first = bytes([fin << 7 | rsv << 4 | opcode])
    bit = masked << 7
    if size < 126:
        head = first + bytes([bit | size])
    elif size < 2**16:
        head = first + bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head = first + bytes([bit | 127]) + struct.pack(">Q", size)
    return head + (bytes(4) if masked else b"") + payload


def rpc(method: str, params: Any = None, ident: Any = 1) -> bytes:
    """A JSON-RPC request in a frame."""
    return frame(json.dumps({"jsonrpc": "2.0", "id": ident, "method": method, "params": params or {}}).encode())


class Raw:
    """One connection; every read has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Until the kernel took it, or the peer is gone."""
        self._writer.write(data)
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._writer.drain()
        except ConnectionError:
            return

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and header fields of the answer, names in lower case."""
        async with asyncio.timeout(LIMIT_S):
            text = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status, *fields = text.splitlines()
        pairs = (field.partition(":") for field in fields if field)
        return int(status.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def refusal(self) -> dict[str, Any]:
        """The problem details that an HTTP answer has; the connection ends behind them."""
        status, fields = await self.head()
        assert fields["content-type"] == "application/problem+json"
        async with asyncio.timeout(LIMIT_S):
            problem: dict[str, Any] = json.loads(await self._reader.read())
        assert problem["status"] == status
        assert problem["hint"]
        return problem

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame; raises ``IncompleteReadError`` at the end."""
        async with asyncio.timeout(LIMIT_S):
            first, second = await self._reader.readexactly(2)
            assert not second & 0x80, "a server never masks"
            size = second & 0x7F
            if size == 126:
                size = struct.unpack(">H", await self._reader.readexactly(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", await self._reader.readexactly(8))[0]
            return first & 0x0F, await self._reader.readexactly(size)

    async def closed(self) -> tuple[int, str]:
        """Code and reason of the close frame; messages before it are passed over."""
        while True:
            opcode, payload = await self.frame()
            if opcode == 8:
                return struct.unpack(">H", payload[:2])[0], payload[2:].decode()

    async def answer(self, ident: Any) -> dict[str, Any]:
        """The JSON-RPC answer to request ``ident``."""
        while True:
            opcode, payload = await self.frame()
            assert opcode == 1, (opcode, payload)
            message: dict[str, Any] = json.loads(payload)
            if "method" not in message and message.get("id") == ident:
                return message

    async def ended(self) -> None:
        """Returns when the peer has closed the connection."""
        async with asyncio.timeout(LIMIT_S):
            try:
                await self._reader.read()
            except ConnectionError:
                return


@asynccontextmanager
async def raw(url: str, first: bytes) -> AsyncIterator[Raw]:
    """A TCP connection on which ``first`` was sent."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        connection = Raw(reader, writer)
        await connection.send(first)
        yield connection
    finally:
        writer.close()


@asynccontextmanager
async def upgraded(url: str, token: str, *, initialize: bool = False) -> AsyncIterator[Raw]:
    """A WebSocket that was accepted."""
    async with raw(url, request(token)) as connection:
        status, _ = await connection.head()
        assert status == 101
        if initialize:
            await connection.send(rpc("initialize", {"protocolVersion": 1}, "init"))
            assert "result" in await connection.answer("init")
        yield connection
