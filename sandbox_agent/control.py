"""The control connection to the broker: messages in and out, and redialling when it is lost."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable
from typing import Any, cast

from sandbox_agent.tasks import log
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import FROM_BROKER, Hello, Message, Preamble, Welcome, parse

REDIAL_S = (0.05, 2.0)
"""First and longest pause between dials; each is jittered by half."""
WELCOME_TIMEOUT_S = 10.0
MAX_UNSENT = 16 * 2**20


class SlotGone(Exception):
    """The host has erased the slot while this sandbox was out of its sight."""


def slot_is_gone(path: str) -> bool:
    """Whether the directory of socket ``path`` was removed; a mount of it stays, without a link."""
    try:
        return os.stat(os.path.dirname(path)).st_nlink == 0
    except FileNotFoundError:
        return True
    except OSError:
        return False


class Pause:
    """Growing pauses with jitter, so that many sandboxes do not redial as one."""

    def __init__(self, limits: tuple[float, float] = REDIAL_S) -> None:
        self._limits = limits
        self._next = limits[0]

    def reset(self) -> None:
        self._next = self._limits[0]

    def __call__(self) -> float:
        pause = self._next
        self._next = min(pause * 2, self._limits[1])
        return pause * random.uniform(0.5, 1.0)


class Connection(asyncio.Protocol):
    """One control connection. Garbage from the broker ends it."""

    def __init__(self, on_message: Callable[[Message], None]) -> None:
        self._on_message = on_message
        self._decoder = codec.Decoder()
        self._transport: asyncio.Transport | None = None
        self._held: list[Message] | None = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.welcomed: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()

    def deliver(self) -> None:
        """Messages are held until here, so that their answers find the connection in its place."""
        held, self._held = self._held or [], None
        for message in held:
            self._on_message(message)

    def send(self, message: Message) -> None:
        """Never blocks; a broker that does not read is dropped."""
        if self._transport is None or self.lost.done():
            return
        self._transport.write(codec.pack(message.encode()))
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("the broker does not read; dropping the control connection")
            self._transport.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            for raw in self._decoder.feed(data):
                message = parse(raw, FROM_BROKER)
                if isinstance(message, Welcome):
                    if not self.welcomed.done():
                        self.welcomed.set_result(message)
                elif self._held is not None:
                    self._held.append(message)
                else:
                    self._on_message(message)
        except codec.WireError as error:
            log.warning("control connection: %s", error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        self.welcomed.cancel()


class Control:
    """Keeps one control connection for ever. ``on_up``/``on_down`` frame the time it is welcomed."""

    def __init__(
        self,
        path: str,
        *,
        secret: bytes,
        hello: Callable[[], Hello],
        on_message: Callable[[Message], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self._path = path
        self._secret = secret
        self._hello = hello
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._connection: Connection | None = None

    @property
    def up(self) -> bool:
        return self._connection is not None

    def send(self, message: Message) -> None:
        """Dropped while the broker is away: the next hello says how things are."""
        if self._connection is not None:
            self._connection.send(message)

    async def run(self, sock: socket.socket) -> None:
        """Serves the connection that boot made, then redials until cancelled. Raises ``SlotGone``."""
        connection = Connection(self._on_message)
        sock.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=sock)
        await self._serve(connection)
        pause = Pause()
        while True:
            await asyncio.sleep(pause())
            if slot_is_gone(self._path):
                raise SlotGone("the slot was erased: no broker will ever answer there")
            again = await self._redial()
            if again is not None:
                pause.reset()
                await self._serve(again)

    async def close(self) -> None:
        """Sends what is buffered."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            await asyncio.wait([connection.lost], timeout=1.0)

    async def _serve(self, connection: Connection) -> None:
        self._connection = connection
        self._on_up()
        connection.deliver()
        try:
            await asyncio.shield(connection.lost)
        finally:
            if self._connection is connection:
                self._connection = None
            self._on_down()

    async def _redial(self) -> Connection | None:
        """A welcomed connection, or None."""
        connection = Connection(self._on_message)
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await asyncio.get_running_loop().create_unix_connection(lambda: connection, self._path)
                connection.send(Preamble(kind="control", version=codec.VERSION, secret=self._secret))
                connection.send(self._hello())
                ends: list[asyncio.Future[Any]] = [connection.welcomed, connection.lost]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except OSError:  # TimeoutError included
            connection.close()
            return None
        return None if connection.lost.done() else connection
