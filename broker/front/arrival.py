"""A connection until its request head is whole: bytes are collected, nothing else happens."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from broker.errors import Code, CortexError
from broker.front.handshake import MAX_HEAD, refuse, too_big

_END = b"\r\n\r\n"
_LINGER_S = 2.0


class Arrival(asyncio.Protocol):
    """Calls ``on_head(arrival, head)`` once; ``rest()`` gives what came behind the head. ``on_lost`` is called
    unless another protocol took the transport over."""

    def __init__(
        self,
        *,
        timeout_s: float,
        user_timeout_s: float,
        on_made: Callable[[Arrival], None],
        on_head: Callable[[Arrival, bytes], None],
        on_lost: Callable[[Arrival], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._user_timeout_s = user_timeout_s
        self._on_made = on_made
        self._on_head = on_head
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._done = False
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._timeout_s, self._late)
        _tune(transport.get_extra_info("socket"), self._user_timeout_s)
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._done:
            # Reading goes on so that a client that leaves is noticed; one that talks on is not waited for.
            if len(self._buffer) > MAX_HEAD and self.transport is not None:
                self.transport.pause_reading()
            return
        end = self._buffer.find(_END)
        if end > MAX_HEAD or (end < 0 and len(self._buffer) > MAX_HEAD):
            self.refuse(too_big())
        elif end >= 0:
            self._finish()
            head = bytes(self._buffer[: end + len(_END)])
            del self._buffer[: end + len(_END)]
            self._on_head(self, head)

    def rest(self) -> bytes:
        """What came behind the head so far."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def refuse(self, error: CortexError) -> None:
        """Answers with an HTTP error and closes, without cutting off a client that is still sending."""
        self._finish()
        if self._refused or self.transport is None or self.transport.is_closing():
            return
        self._refused = True
        self._buffer.clear()
        self.transport.write(refuse(error))
        self.transport.set_protocol(_Farewell(self))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self._timer = asyncio.get_running_loop().call_later(_LINGER_S, self.abort)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def hand_over(self) -> None:
        """Another protocol has the transport from now on."""
        self._finish()
        self.transport = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()
        self.transport = None
        self._on_lost(self)

    def _finish(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        hint = "send the whole request head at once"
        self.refuse(
            CortexError(
                Code.BAD_REQUEST,
                f"no whole request head within {self._timeout_s:g} s",
                hint=hint,
                details={"status": 408},
            )
        )


class _Farewell(asyncio.Protocol):
    """After a refusal: what still comes is dropped, until the client or the timer closes."""

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrival.connection_lost(exc)


def _tune(sock: socket.socket | None, user_timeout_s: float) -> None:
    """No delay for small frames; the kernel gives up a peer that acknowledges nothing."""
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))
