"""An agent server that says what a test tells it to, over real Unix sockets; hostile when told."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from pathlib import Path
from typing import Any

from sandbox_agent.wire.codec import VERSION, Decoder, pack
from sandbox_agent.wire.messages import (
    FROM_BROKER,
    Bind,
    Bound,
    Hello,
    Message,
    Preamble,
    Probe,
    Status,
    Welcome,
    parse,
)


async def dial(path: Path) -> socket.socket:
    """A connection that has said nothing yet."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
    return sock


async def say(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def read(sock: socket.socket, size: int = 65_536) -> bytes:
    """Bytes, or b"" when the broker hung up, however it did."""
    try:
        async with asyncio.timeout(10):
            return await asyncio.get_running_loop().sock_recv(sock, size)
    except ConnectionError:
        return b""


class ScriptedAgent:
    """Dials ``path``; every socket it made is closed by ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secret = b""
        self.welcome: Welcome | None = None
        self.control: socket.socket | None = None
        self._decoder = Decoder()
        self._waiting: list[Message] = []
        self._sockets: list[socket.socket] = []

    async def connect(self, kind: str, *, secret: bytes | None = None, version: int = VERSION, **more: Any) -> Any:
        """A connection with its preamble sent; ``secret`` None: the one it was given."""
        sock = await dial(self.path)
        self._sockets.append(sock)
        preamble = Preamble(kind, version, self.secret if secret is None else secret, **more)
        await say(sock, pack(preamble.encode()))
        return sock

    async def raw(self) -> socket.socket:
        """A connection without a preamble."""
        sock = await dial(self.path)
        self._sockets.append(sock)
        return sock

    async def hello(self, **facts: Any) -> Welcome:
        """Dials control, says Hello, returns the Welcome."""
        self.control = await self.connect("control")
        self._decoder = Decoder()
        self._waiting.clear()
        await self.send(Hello(**{"pid": 7, **facts}))
        welcome = await self.receive()
        assert isinstance(welcome, Welcome)
        self.welcome, self.secret = welcome, welcome.secret
        return welcome

    async def send(self, message: Message) -> None:
        assert self.control is not None
        await say(self.control, pack(message.encode()))

    async def receive(self) -> Message:
        """The next message. Raises ``EOFError`` when the broker hung up."""
        assert self.control is not None
        while not self._waiting:
            data = await read(self.control)
            if not data:
                raise EOFError
            self._waiting += [parse(raw, FROM_BROKER) for raw in self._decoder.feed(data)]
        return self._waiting.pop(0)

    async def answer_bind(self, **facts: Any) -> Bind:
        """Takes a Bind and says that it is applied."""
        bind = await self.receive()
        assert isinstance(bind, Bind)
        await self.send(Bound(**{"id": bind.id, "ok": True, "applied": bind.hashes, **facts}))
        return bind

    async def answer_probe(self) -> None:
        probe = await self.receive()
        assert isinstance(probe, Probe)
        await self.send(Status(agent="ready", id=probe.id))

    async def journal(self, segment: int, *, secret: bytes | None = None) -> tuple[dict[str, Any], list[int]] | None:
        """A Grant and its descriptors; None when the broker hung up instead."""
        sock = await self.connect("journal", secret=secret, segment=segment)
        await _readable(sock)
        try:
            data, ancillary, _, _ = sock.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        if not data:
            return None
        fds = array.array("i")
        for level, kind, content in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(content)
        return Decoder().feed(data)[0], list(fds)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        async with asyncio.timeout(10):
            await ready.wait()
    finally:
        loop.remove_reader(sock.fileno())
