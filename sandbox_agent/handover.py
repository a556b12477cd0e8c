"""The loopback port of the gateway: handed over to it, so that nothing here wakes up for what passes.

While that cannot be done (no gateway is there, or the container's runtime passes no sockets, as gVisor does not)
the port is forwarded as any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from sandbox_agent.control import Pause
from sandbox_agent.forward import Forwarder
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.handover import GIVEN, REQUEST, SWITCHED, TAKEN

OFFER_S = 5.0
"""How long a gateway may take to accept; whoever connects meanwhile waits in the listener's queue."""
RETRY_S = (0.5, 30.0)
"""First and longest pause between offers."""
STEADY_S = 5.0
"""Kept for so long, the port is offered anew at once."""


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
        loop, pause = asyncio.get_running_loop(), Pause(RETRY_S)
        while True:
            with contextlib.ExitStack() as held:
                try:
                    channel = await self._offer(held)
                except (OSError, EOFError) as error:
                    log.debug("handover: %s", error)
                    with contextlib.suppress(OSError):
                        await self.forwarder.start()
                else:
                    self.forwarder.pause()
                    self.taken.set()
                    since = loop.time()
                    await _ended(channel)
                    self.taken.clear()
                    if loop.time() - since >= STEADY_S:
                        pause.reset()
                        continue
            await asyncio.sleep(pause())

    async def _offer(self, held: contextlib.ExitStack) -> socket.socket:
        """Raises ``OSError`` or ``EOFError``. What stands afterwards is ended by ``held``."""
        sock = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        held.callback(_hang_up, sock)
        listener = self._listener.fileno()
        # In a thread, since loops receive no descriptors; each step has the deadline.
        channel = await asyncio.get_running_loop().run_in_executor(
            None, offer, sock, self._path, listener, self._offer_s
        )
        held.enter_context(channel)
        channel.setblocking(False)
        return channel


def offer(sock: socket.socket, path: str, listener: int, timeout_s: float) -> socket.socket:
    """Hands ``listener`` to the gateway at ``path`` by ``sock``; returns the channel that stands for it. Blocks.

    Raises ``OSError`` (``TimeoutError`` included) or ``EOFError``: it is not taken.
    """
    sock.settimeout(timeout_s)
    sock.connect(path)
    sock.sendall(REQUEST)
    answer, descriptors, _, _ = socket.recv_fds(sock, len(SWITCHED), 1, socket.MSG_CMSG_CLOEXEC)
    if answer != SWITCHED or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise EOFError("the gateway takes no listener")
    try:
        channel = socket.socket(fileno=descriptors[0])
    except OSError:
        os.close(descriptors[0])
        raise
    try:
        channel.settimeout(timeout_s)
        socket.send_fds(channel, [GIVEN], [listener])
        if channel.recv(1) != TAKEN:
            raise EOFError("the gateway did not take the listener")
    except BaseException:
        channel.close()
        raise
    return channel


def _hang_up(sock: socket.socket) -> None:
    """Ends what a thread waits for."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


async def _ended(channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(channel, 1):
            pass
