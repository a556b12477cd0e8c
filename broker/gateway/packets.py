"""A SEQPACKET Unix socket on the event loop: whole messages both ways, descriptors with them.

A plain socket, never a transport: asyncio's and uvloop's transports lose descriptors that come in.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from broker.gateway.messages import MAX_PACKET, MessageError, pack, unpack

MAX_FDS = 2
MAX_QUEUED = 256
AT_ONCE = 64

Received = Callable[[dict[str, Any], list[int]], None]


class PacketSocket:
    """``received`` gets each message with the descriptors it brought, which it then owns. ``lost`` is called
    once, when the peer is gone, broke the rules or takes no more."""

    def __init__(self, sock: socket.socket, received: Received, lost: Callable[[str], None]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET)
        self._sock = sock
        self._received = received
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: Mapping[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Sends, or queues; ``fds`` stay the caller's and must stay open until acknowledged.
        Raises ``MessageError`` for a message over the limit."""
        packet = pack(message)
        if self._closed:
            return
        if self._queue:
            self._enqueue(packet, fds)
            return
        if not self._try(packet, fds) and not self._closed:
            self._enqueue(packet, fds)
            self._loop.add_writer(self._sock.fileno(), self._writable)

    @property
    def congested(self) -> bool:
        """Something is queued."""
        return bool(self._queue)

    def _enqueue(self, packet: bytes, fds: tuple[int, ...]) -> None:
        if len(self._queue) >= MAX_QUEUED:
            self.close("the peer takes no messages")
            return
        self._queue.append((packet, fds))

    def _try(self, packet: bytes, fds: tuple[int, ...]) -> bool:
        try:
            if fds:
                socket.send_fds(self._sock, [packet], list(fds))
            else:
                self._sock.send(packet)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.close(f"sending failed: {error.strerror}")
            return False
        return True

    def _writable(self) -> None:
        while self._queue and self._try(*self._queue[0]):
            self._queue.popleft()
        if not self._queue and not self._closed:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(AT_ONCE):
            if self._closed:
                return
            try:
                packet, fds, flags, _ = socket.recv_fds(self._sock, MAX_PACKET + 1, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(f"receiving failed: {error.strerror}")
                return
            self._packet(packet, fds, flags)

    def _packet(self, packet: bytes, fds: list[int], flags: int) -> None:
        try:
            if not packet:
                raise MessageError("the peer has closed")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise MessageError("a packet was too large or brought too much")
            message = unpack(packet)
        except MessageError as error:
            for fd in fds:
                os.close(fd)
            self.close(str(error))
            return
        self._received(message, fds)

    def close(self, why: str = "closed") -> None:
        """Closes; ``lost`` is told ``why`` if this is the first time."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._queue.clear()
        self._lost(why)
