"""Ties two stream transports: bytes pass both ways untouched, with backpressure and half-closes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

HIGH_WATER = 256 * 2**10
MAX_HELD = 2**20
"""What one side may send before the other is there."""
FLUSH_S = 30.0
"""How long what is left may take to a peer that stopped reading."""


class End(asyncio.Protocol):
    """One of two ends. ``tie`` it to the other; until then what comes in is held, reading paused."""

    def __init__(self, on_lost: Callable[[], None] | None = None, *, half_close: bool = True) -> None:
        self.transport: asyncio.Transport | None = None
        self._other: End | None = None
        self._held = bytearray()
        self._eof = False
        self._eof_sent = False
        self._lost = False
        self._refused = False
        self._on_lost = on_lost
        self._half_close = half_close
        self._flush: asyncio.TimerHandle | None = None

    def tie(self, other: End) -> None:
        """Both are connected: lets bytes flow in both directions."""
        self._other, other._other = other, self
        for end in (self, other):
            end._release()

    def send(self, data: bytes) -> None:
        """Writes to this end's peer."""
        if self.transport is not None and not self._lost:
            self.transport.write(data)

    def close(self) -> None:
        """Sends what is buffered, then closes; aborts a peer that does not take it."""
        if self.transport is None or self._lost or self._flush is not None:
            return
        self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self.transport.abort)
        self.transport.close()

    def refuse(self, answer: bytes) -> None:
        """Sends ``answer`` and ends; what the peer still sends is read and dropped, or it would see a reset."""
        if self.transport is None or self._lost:
            return
        self._refused = True
        self._held.clear()
        self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self.transport.abort)
        self.transport.write(answer)
        self.transport.write_eof()
        self.transport.resume_reading()

    def abort(self) -> None:
        """Drops the connection and all that is buffered."""
        if self.transport is not None:
            self.transport.abort()

    def _release(self) -> None:
        if self._lost:
            self._end_other()
            return
        other = self._other
        if self._held and other is not None:
            other.send(bytes(self._held))
            self._held.clear()
        if self._eof:
            self._forward_eof()
        if self.transport is not None:
            self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        if self._other is None:
            self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other.send(data)
            return
        if self._refused:
            return
        self._held += data  # uvloop delivers once more after pause_reading in connection_made
        if len(self._held) > MAX_HELD:
            self.abort()

    def eof_received(self) -> bool:
        self._eof = True
        if self._other is not None:
            self._forward_eof()
        return self._half_close and not self._refused

    def _forward_eof(self) -> None:
        other = self._other
        if other is None or other._eof_sent or other._lost or other.transport is None:
            return
        other._eof_sent = True
        if other._eof:
            other.close()
            self.close()
        elif other.transport.can_write_eof():
            other.transport.write_eof()

    def pause_writing(self) -> None:
        if self._other is not None and self._other.transport is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and self._other.transport is not None and not self._other._lost:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._flush is not None:
            self._flush.cancel()
        self._end_other()
        if self._on_lost is not None:
            self._on_lost()
            self._on_lost = None

    def _end_other(self) -> None:
        if self._other is not None:
            self._other.close()


async def join(stream: socket.socket, tcp: socket.socket, *, to_stream: bytes, on_lost: Callable[[], None]) -> None:
    """Ties a Unix socket and a TCP socket, both connected and non-blocking; EOF from one ends both.

    ``to_stream`` goes to ``stream`` first. ``on_lost``: the stream is gone.
    """
    loop = asyncio.get_running_loop()
    first, second = End(on_lost, half_close=False), End(half_close=False)
    await loop.create_unix_connection(lambda: first, sock=stream)
    await loop.create_connection(lambda: second, sock=tcp)
    if to_stream:
        first.send(to_stream)
    first.tie(second)
