"""The gate of a slot's agent socket: takes connections in and asks each for its preamble.

Whoever dials is hostile until its preamble was read in time. What it names, and whether its secret
is right, the link judges.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable

import structlog

from broker.host.tasks import TaskOwner
from broker.sandbox.limits import LinkLimits, TokenBucket
from sandbox_agent.wire.codec import HEADER, MAX_PREAMBLE, WireError, length, unpack
from sandbox_agent.wire.messages import Preamble

log = structlog.get_logger(__name__)

_ACCEPT_PAUSE = 0.5
"""Seconds without accepting when the process has no descriptor left."""


class Gate:
    """Accepts on ``listener`` while it runs.

    ``admit`` gets each connection with its preamble; the gate closes the socket when ``admit`` returns,
    so who wants to keep it takes the descriptor out with ``detach``.
    """

    def __init__(
        self,
        listener: socket.socket,
        limits: LinkLimits,
        tasks: TaskOwner,
        *,
        admit: Callable[[socket.socket, Preamble], Awaitable[None]],
        violation: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._limits = limits
        self._tasks = tasks
        self._admit = admit
        self._violation = violation
        self._bucket = TokenBucket(limits.accept_burst, limits.accept_per_s)
        self._strangers: dict[socket.socket, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Begins to accept."""
        self._accepting = self._tasks.start(self._accept(), "accept")

    def stop(self) -> None:
        """Accepts no more and drops whoever has not proved what it is. Idempotent."""
        self._stopped = True
        if self._accepting is not None:
            self._accepting.cancel()
        for task in list(self._strangers.values()):
            task.cancel()

    def known(self, sock: socket.socket) -> None:
        """The connection has proved what it is; it counts as a stranger no longer."""
        self._strangers.pop(sock, None)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopped:
            # Throttles: a sandbox that dials without end waits in its own backlog.
            await asyncio.sleep(self._bucket.reserve(loop.time()))
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    return
                log.warning("accept_failed", error=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            self._receive(sock)

    def _receive(self, sock: socket.socket) -> None:
        # An honest agent server sends its preamble at once, so the oldest stranger is the least honest.
        while len(self._strangers) >= self._limits.max_unauthenticated and not self._stopped:
            self._strangers.pop(next(iter(self._strangers))).cancel()
            self._violation("crowd")
        if self._stopped:
            sock.close()
            return
        task = self._tasks.start(self._greet(sock), "connection")
        self._strangers[sock] = task
        task.add_done_callback(lambda _: self._ended(sock))

    def _ended(self, sock: socket.socket) -> None:
        self._strangers.pop(sock, None)
        sock.close()

    async def _greet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._limits.preamble_timeout_s):
                preamble = await read_preamble(sock)
        except TimeoutError:
            self._violation("preamble_timeout")
        except WireError as error:
            log.debug("preamble_refused", error=str(error))
            self._violation("preamble")
        except OSError as error:
            log.debug("connection_lost", error=str(error))
        else:
            if preamble is not None:
                await self._admit(sock, preamble)


async def read_preamble(sock: socket.socket) -> Preamble | None:
    """The preamble, and not one byte more; None when the peer closed before it sent any.

    Raises ``WireError``, ``OSError``.
    """
    prefix = await _exactly(sock, HEADER)
    if prefix is None:
        return None
    body = await _exactly(sock, length(prefix, limit=MAX_PREAMBLE))
    if body is None:
        raise WireError("closed within the preamble")
    data = unpack(body)
    if data.get("t") != Preamble.TYPE:
        raise WireError("no preamble")
    return Preamble.decode(data)


async def _exactly(sock: socket.socket, size: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(sock, size - len(data))
        if not more:
            if data:
                raise WireError("closed within the preamble")
            return None
        data += more
    return data
