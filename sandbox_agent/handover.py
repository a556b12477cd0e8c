"""The loopback port of the gateway: handed over to it, so that nothing here wakes up for what passes.

While that cannot be done (no gateway is there, or the container's runtime passes no sockets, as gVisor does not)
the port is forwarded as any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from sandbox_agent.control import Pause
from sandbox_agent.forward import Forwarder
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.handover import GIVEN, REQUEST, SWITCHED, TAKEN

OFFER_S = 5.0
"""How long a gateway may take to accept; whoever connects meanwhile waits in the listener's queue."""
RETRY_S = (0.5, 30.0)
"""First and longest pause between offers."""


class Handover:
    """Serves ``listener``, which it owns, by the gateway at ``path``."""

    def __init__(self, listener: socket.socket, path: str, *, offer_s: float = OFFER_S) -> None:
        self._listener = listener
        self._path = path
        self._offer_s = offer_s
        self._tasks = TaskOwner("handover")
        self.forwarder = Forwarder(listener, path)
        self.taken = asyncio.Event()
        """The gateway has it."""

    @property
    def port(self) -> int:
        return self.forwarder.port

    async def start(self) -> None:
        """Offers it from now on."""
        self._tasks.start(self._run(), "offer")

    async def close(self) -> None:
        """Drops the listener and what is forwarded; what the gateway has accepted is the gateway's."""
        await self._tasks.close()
        await self.forwarder.close()
        self._listener.close()

    async def _run(self) -> None:
        pause = Pause(RETRY_S)
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            with sock:
                try:
                    async with asyncio.timeout(self._offer_s):
                        await self._offer(sock)
                except (OSError, EOFError) as error:  # TimeoutError included
                    log.debug("handover: %s", error)
                    with contextlib.suppress(OSError):
                        await self.forwarder.start()
                else:
                    self.forwarder.pause()
                    self.taken.set()
                    pause.reset()
                    await _ended(sock)
                    self.taken.clear()
                    continue
            await asyncio.sleep(pause())

    async def _offer(self, sock: socket.socket) -> None:
        """Returns when it is taken. Raises ``OSError`` or ``EOFError``."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, self._path)
        await loop.sock_sendall(sock, REQUEST)
        await _expect(sock, SWITCHED)
        socket.send_fds(sock, [GIVEN], [self._listener.fileno()])
        await _expect(sock, TAKEN)


async def _expect(sock: socket.socket, wanted: bytes) -> None:
    loop, data = asyncio.get_running_loop(), b""
    while data != wanted:
        piece = await loop.sock_recv(sock, len(wanted) - len(data))
        data += piece
        if not piece or not wanted.startswith(data):
            raise EOFError("the gateway takes no listener")


async def _ended(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(sock, 1):
            pass
