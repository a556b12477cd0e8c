"""The loopback forwarder: a TCP port inside the sandbox, tied to a Unix socket that the host owns.

The gateway behind the socket may be restarting, so connecting is tried again for a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from sandbox_agent.tasks import TaskOwner
from sandbox_agent.tie import End

RETRY_FOR_S = 5.0
RETRY_PAUSE_S = (0.02, 0.5)
MAX_CONNECTIONS = 256
_BODY = b'{"code":"gateway.down","hint":"the gateway does not answer; try again, then ask the operator"}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n"
)
REFUSAL += b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)


class Forwarder:
    """Serves ``listener``, which stays the caller's, by connections to ``path``. Both speak HTTP, so a failure is told
    as a 503."""

    def __init__(self, listener: socket.socket, path: str, *, retry_for_s: float = RETRY_FOR_S) -> None:
        self._listener = listener
        self._path = path
        self._retry_for_s = retry_for_s
        self._tasks = TaskOwner(f"forward.{path.rsplit('/', 1)[-1]}")
        self._ends: set[End] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        number: int = self._listener.getsockname()[1]
        return number

    def __len__(self) -> int:
        return len(self._ends)

    async def start(self) -> None:
        """Accepts from here on. Idempotent."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: Accepted(self), sock=self._listener.dup())

    def pause(self) -> None:
        """Accepts no more until ``start``; connections stay. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Drops every connection."""
        self.pause()
        await self._tasks.close()
        for end in list(self._ends):
            end.abort()

    def accepted(self, near: Accepted) -> None:
        if len(self._ends) >= MAX_CONNECTIONS:
            near.refuse(REFUSAL)
            return
        self._ends.add(near)
        self._tasks.start(self._connect(near), "connect", on_error=lambda _: near.abort())

    def lost(self, near: Accepted) -> None:
        self._ends.discard(near)

    async def _connect(self, near: Accepted) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._retry_for_s
        pause = RETRY_PAUSE_S[0]
        far = End()
        while True:
            with contextlib.suppress(OSError):
                await loop.create_unix_connection(lambda: far, self._path)
                near.tie(far)
                return
            if near not in self._ends:
                return
            if loop.time() + pause > end:
                near.refuse(REFUSAL)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_PAUSE_S[1])


class Accepted(End):
    """A connection from inside."""

    def __init__(self, forwarder: Forwarder) -> None:
        super().__init__(lambda: forwarder.lost(self))
        self._forwarder = forwarder

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._forwarder.accepted(self)
