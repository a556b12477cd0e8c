"""The load generator: WebSocket clients on uvloop that count bytes, so that they cost little themselves.

It runs in the benchmark's own process; the proxies and the far end have theirs.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
import time
from collections.abc import Callable
from typing import cast

from broker.front.frames import TEXT

TIMEOUT_S = 60.0


def masked(payload: bytes) -> bytes:
    """One whole masked text frame, as a client sends it."""
    size, key = len(payload), os.urandom(4)
    short = size if size < 126 else 126 if size <= 0xFFFF else 127
    head = bytes((0x80 | TEXT, 0x80 | short))
    head += struct.pack("!H", size) if short == 126 else struct.pack("!Q", size) if short == 127 else b""
    return head + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def reply_size(payload: int) -> int:
    """Bytes of an unmasked frame."""
    return payload + (2 if payload < 126 else 4 if payload <= 0xFFFF else 10)


class Client(asyncio.Protocol):
    """One connection. ``on_bytes`` gets the number of bytes after the handshake's answer, chunk by chunk."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_bytes: Callable[[int], None] = lambda size: None
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        self.transport.write(
            (
                "GET /acp HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer bench\r\n\r\n"
            ).encode()
        )

    def data_received(self, data: bytes) -> None:
        if self.opened.done():
            self.on_bytes(len(data))
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            if not self._head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(RuntimeError(self._head.decode(errors="replace")))
            else:
                self.opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("closed in the handshake"))


async def connect(port: int, count: int) -> list[Client]:
    """``count`` open connections, one round trip made on each, so that the whole way is up."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(count)]
    for client in clients:
        await asyncio.wait_for(client.opened, TIMEOUT_S)
    await echo(clients, payload=16, turns=2)
    return clients


async def echo(clients: list[Client], *, payload: int, turns: int) -> list[float]:
    """Each client sends, waits for the echo and sends again, ``turns`` times. All round trips, in seconds."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    frame, size = masked(b"x" * payload), reply_size(payload)
    trips: list[float] = []
    wanted = len(clients) * turns
    clock = time.perf_counter

    def start(client: Client) -> None:
        state = [0, turns, clock()]

        def got(count: int) -> None:
            state[0] += count
            if state[0] < size:
                return
            state[0] -= size
            now = clock()
            trips.append(now - state[2])
            state[1] -= 1
            if state[1]:
                state[2] = now
                client.transport.write(frame)
            elif len(trips) == wanted:
                done.set_result(None)

        client.on_bytes = got
        client.transport.write(frame)

    for client in clients:
        start(client)
    await asyncio.wait_for(done, TIMEOUT_S)
    return trips


async def stream(clients: list[Client], *, payload: int, count: int) -> None:
    """Each client asks for ``count`` frames of ``payload`` bytes; returns when all are there."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = [len(clients)]

    def start(client: Client) -> None:
        missing = [reply_size(payload) * count]

        def got(size: int) -> None:
            missing[0] -= size
            if not missing[0]:
                left[0] -= 1
                if not left[0]:
                    done.set_result(None)

        client.on_bytes = got
        client.transport.write(masked(f"stream {payload} {count}".encode()))

    for client in clients:
        start(client)
    await asyncio.wait_for(done, TIMEOUT_S)


def close(clients: list[Client]) -> None:
    for client in clients:
        client.transport.abort()
