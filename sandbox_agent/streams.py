"""Streams dialled ahead: each waits for the broker to write an attach header, then is a client's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from sandbox_agent.control import Pause
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import Attach, Preamble

HEADER_TIMEOUT_S = 5.0


class Streams:
    """Keeps ``count`` streams waiting while ``up``; an attached one is replaced at once."""

    def __init__(self, path: str, *, secret: bytes, count: int, serve: Callable[[socket.socket, Attach], None]) -> None:
        self._path = path
        self._preamble = codec.pack(Preamble(kind="stream", version=codec.VERSION, secret=secret).encode())
        self._count = count
        self._serve = serve
        self._tasks = TaskOwner("streams")
        self._waiting: set[asyncio.Task[None]] = set()

    def up(self) -> None:
        """The broker is there: dial."""
        for _ in range(self._count - len(self._waiting)):
            self._add()

    def down(self) -> None:
        """The broker is gone: waiting streams are too; attached ones end by themselves."""
        for task in self._waiting:
            task.cancel()
        self._waiting.clear()

    async def close(self) -> None:
        await self._tasks.close()

    def _add(self) -> None:
        task = self._tasks.start(self._wait(), "waiting")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _wait(self) -> None:
        pause = Pause()
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            attach: Attach | None = None
            try:
                attach = await self._attached(sock)
            except (OSError, EOFError) as error:  # TimeoutError included
                log.debug("stream: %s", error)
            except codec.WireError as error:
                log.warning("stream: %s", error)
            finally:
                if attach is None:
                    sock.close()
            if attach is not None:
                self._replace()
                self._serve(sock, attach)
                return
            await asyncio.sleep(pause())

    def _replace(self) -> None:
        current = asyncio.current_task()
        if current in self._waiting:  # not when the broker has gone meanwhile
            self._waiting.discard(current)
            self._add()

    async def _attached(self, sock: socket.socket) -> Attach:
        """Dials and waits, with no deadline until the first byte. Takes no byte behind the header."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, self._path)
        await loop.sock_sendall(sock, self._preamble)
        prefix = await loop.sock_recv(sock, codec.HEADER)
        if not prefix:
            raise EOFError("closed while waiting")
        async with asyncio.timeout(HEADER_TIMEOUT_S):
            prefix += await _exactly(sock, codec.HEADER - len(prefix))
            body = await _exactly(sock, codec.length(prefix, limit=codec.MAX_PREAMBLE))
        data = codec.unpack(body)
        if data.get("t") != Attach.TYPE:
            raise codec.WireError("a stream opens with an attach header")
        return Attach.decode(data)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise EOFError("closed inside the attach header")
        data += piece
    return data
