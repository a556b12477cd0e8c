"""A registry, a session and an access part in memory; streams are socketpairs, the far end the test's."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.config import Config
from broker.errors import Code, CortexError
from broker.front.door import FrontDoor
from broker.front.frames import TEXT, frame
from broker.host.tasks import TaskOwner
from broker.session.port import AttachedClient, State
from sandbox_agent.wire.messages import Attach

TIMEOUT_S = 5.0
ORIGIN = "https://app.example"


@dataclass(frozen=True)
class Grant:
    user: str
    workspace: str = "main"


class Access:
    """``good`` is ann's token, ``raw`` rob's; ``once`` a ticket that works a single time."""

    def __init__(self) -> None:
        self.tickets = {"once": "ann"}
        self.stuck = False

    async def verify(self, token: str) -> Grant:
        if self.stuck:
            await asyncio.Event().wait()
        if token == "expired":
            raise CortexError(Code.TOKEN_EXPIRED, "token has expired", hint="ask for a new one")
        if token == "broken":
            raise ZeroDivisionError
        users = {"good": "ann", "raw": "rob", "nobody": "nobody"}
        if token not in users:
            raise CortexError(Code.TOKEN_INVALID, "unknown token", hint="ask for a new one")
        return Grant(users[token])

    async def redeem(self, ticket: str) -> Grant:
        user = self.tickets.pop(ticket, None)
        if user is None:
            raise CortexError(Code.TOKEN_INVALID, "unknown ticket", hint="ask for a new one")
        return Grant(user)

    def check_origin(self, origin: str | None) -> None:
        if origin not in (None, ORIGIN):
            raise CortexError(Code.ORIGIN_FORBIDDEN, "origin not allowed", hint="add it to front.allowed_origins")

    def check_host(self, host: str) -> None:
        if host.rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            raise CortexError(Code.HOST_FORBIDDEN, "host not allowed", hint="add it to front.allowed_hosts")


class Stream:
    """The agent server's end of one client's stream."""

    def __init__(self, attach: Attach, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attach = attach
        self.reader = reader
        self.writer = writer

    async def read(self, size: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(size), TIMEOUT_S)

    async def message(self) -> bytes:
        """The payload of the next masked frame, which must be a whole text message."""
        return await read_message(self.reader)

    async def eof(self) -> bytes:
        """Everything until the broker closes the stream."""
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def text(self, payload: bytes) -> None:
        self.send(frame(TEXT, payload))

    async def drain(self) -> None:
        await asyncio.wait_for(self.writer.drain(), TIMEOUT_S)

    def close(self) -> None:
        self.writer.close()


class Session:
    """``ready`` gates the streams; ``error`` is raised instead of one."""

    id, user, workspace, agent = "s-1", "ann", "main", "demo"

    def __init__(self, protocol: Literal["acp", "websocket"] = "acp") -> None:
        self.protocol = protocol
        self.ready = asyncio.Event()
        self.ready.set()
        self.error: Exception | None = None
        self.clients: list[AttachedClient] = []
        self.limit = 100
        self.detached = 0
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()

    @property
    def state(self) -> State:
        return "ready" if self.ready.is_set() else "starting"

    def attach(self, client: AttachedClient) -> None:
        if len(self.clients) >= self.limit:
            raise CortexError(Code.SESSION_BUSY, "too many clients", hint="close one")
        self.clients.append(client)

    def detach(self, client: AttachedClient) -> None:
        self.clients.remove(client)
        self.detached += 1

    async def open_stream(self, attach: Attach) -> socket.socket:
        await self.ready.wait()
        if self.error:
            raise self.error
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.streams.put_nowait(Stream(attach, *await asyncio.open_unix_connection(sock=theirs)))
        return ours

    async def stream(self) -> Stream:
        return await asyncio.wait_for(self.streams.get(), TIMEOUT_S)


@dataclass
class House:
    """A front door with all around it."""

    door: FrontDoor
    access: Access
    sessions: dict[str, Session]
    port: int
    tasks: TaskOwner
    loaded: list[str] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return self.sessions["ann"]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/acp"


class Registry:
    """ann is in memory, rob has to be loaded, nobody has a session."""

    def __init__(self, sessions: dict[str, Session]) -> None:
        self.sessions = sessions
        self.loads = 0

    def held(self, user: str, workspace: str) -> Any:
        return self.sessions.get(user) if user == "ann" else None

    async def load(self, user: str, workspace: str) -> Any:
        self.loads += 1
        if user not in self.sessions:
            raise CortexError(Code.NO_SESSION, "no such session", hint="create it")
        return self.sessions[user]


@asynccontextmanager
async def house(**front: Any) -> AsyncIterator[House]:
    """An open front door on a free port. ``front``: settings of that section."""
    config = Config.model_validate({"front": front})
    sessions = {"ann": Session(), "rob": Session("websocket")}
    registry: Any = Registry(sessions)
    access, tasks = Access(), TaskOwner("test")
    door = FrontDoor(registry, access, lambda: config, tasks)
    sock = socket.create_server(("127.0.0.1", 0))
    await door.start([sock])
    port = sock.getsockname()[1]
    try:
        yield House(door, access, sessions, port, tasks)
    finally:
        await door.close(timeout=1.0)
        await tasks.close()
        while True:
            try:
                stream = sessions["ann"].streams.get_nowait()
            except asyncio.QueueEmpty:
                break
            stream.close()


def request(
    target: str = "/acp", *, token: str = "good", host: str = "127.0.0.1:1", origin: str = "", protocols: str = ""
) -> bytes:
    """A request head."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
    lines += [f"Authorization: Bearer {token}"] * bool(token)
    lines += [f"Origin: {origin}"] * bool(origin)
    lines += [f"Sec-WebSocket-Protocol: {protocols}"] * bool(protocols)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Raw:
    """A client made of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)

    async def frame(self) -> tuple[int, bytes]:
        """The next unmasked frame: opcode and payload."""
        opcode, _, payload = await read_frame(self.reader)
        return opcode, payload

    async def closed(self) -> tuple[int, str]:
        """The close frame that must come next."""
        opcode, payload = await self.frame()
        assert opcode == 8, (opcode, payload)
        return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    async def eof(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)


@asynccontextmanager
async def raw(house: House, data: bytes | None = None) -> AsyncIterator[Raw]:
    """A connection on which ``data`` (a request by default) is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    client = Raw(reader, writer)
    client.send(request() if data is None else data)
    try:
        yield client
    finally:
        writer.close()


@asynccontextmanager
async def attached(house: House, **how: Any) -> AsyncIterator[tuple[Raw, Stream]]:
    """A client that is tied to its stream."""
    async with raw(house, request(**how)) as client:
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        stream = await house.session.stream()
        try:
            yield client, stream
        finally:
            stream.close()


def masked(payload: bytes, opcode: int = TEXT, *, fin: bool = True, rsv: int = 0) -> bytes:
    """One frame as a client sends it."""
    key, size = b"\x11\x22\x33\x44", len(payload)
    short = size if size < 126 else 126 if size <= 0xFFFF else 127
    head = bytes(((0x80 if fin else 0) | rsv << 4 | opcode, 0x80 | short))
    head += struct.pack("!H", size) if short == 126 else struct.pack("!Q", size) if short == 127 else b""
    return head + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """The next frame: opcode, whether it is masked, payload."""

    async def exactly(size: int) -> bytes:
        return await asyncio.wait_for(reader.readexactly(size), TIMEOUT_S)

    first, second = await exactly(2)
    size = second & 0x7F
    if size >= 126:
        size = int.from_bytes(await exactly(2 if size == 126 else 8), "big")
    if not second & 0x80:
        return first & 15, False, await exactly(size)
    key = await exactly(4)
    payload = await exactly(size)
    return first & 15, True, bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


async def read_message(reader: asyncio.StreamReader) -> bytes:
    opcode, is_masked, payload = await read_frame(reader)
    assert (opcode, is_masked) == (TEXT, True)
    return payload


async def settle(condition: object) -> None:
    """Lets the loop run until ``condition()``."""
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)
