"""Streams that an agent server dialled ahead, and clients that wait for the next one."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable


class IdleStreams:
    """Waiting streams (oldest first, at most ``limit``) or waiting takers, never both."""

    def __init__(self, limit: int, violation: Callable[[str], None]) -> None:
        self._limit = limit
        self._violation = violation
        self._idle: deque[socket.socket] = deque()
        self._takers: deque[asyncio.Future[socket.socket]] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """Takers that wait."""
        return len(self._takers)

    def put(self, sock: socket.socket) -> None:
        """A stream has come; this owns it now."""
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(sock)
                return
        if self._closed:
            # A taker was given it, and cancelled, before it could look.
            sock.close()
            return
        if len(self._idle) >= self._limit:
            self._prune()
        if len(self._idle) >= self._limit:
            sock.close()
            self._violation("streams")
            return
        self._idle.append(sock)

    def _prune(self) -> None:
        self._idle = deque(sock for sock in self._idle if self._usable(sock))

    def _usable(self, sock: socket.socket) -> bool:
        """Still open, and silent as it has to be before its Attach; closes it otherwise."""
        try:
            early = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            early = b""
        sock.close()
        if early:
            self._violation("early_data")
        return False

    def take(self) -> socket.socket | None:
        """A waiting stream, now the caller's, if there is one."""
        while self._idle:
            sock = self._idle.popleft()
            if self._usable(sock):
                return sock
        return None

    async def wait(self) -> socket.socket:
        """The next stream to come, now the caller's. Safe to cancel."""
        taker: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._takers.append(taker)
        try:
            return await taker
        except asyncio.CancelledError:
            if taker.done() and not taker.cancelled() and taker.exception() is None:
                self.put(taker.result())
            raise
        finally:
            if taker in self._takers:
                self._takers.remove(taker)

    def close(self, error: Exception) -> None:
        """Closes the streams and fails the takers; what comes later is closed."""
        self._closed = True
        while self._idle:
            self._idle.popleft().close()
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_exception(error)
