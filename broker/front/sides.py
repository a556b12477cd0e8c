"""The two ends of a relay as asyncio protocols. The hot path of the whole broker is in here.

A chunk that holds nothing but data frames is written to the other side as it came, after one scan of
its frame headers. All else goes to the owner's slow path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from broker.front.frames import FrameScanner

LINGER_S = 5.0
"""From the end of a connection until a peer that does not do its part is cut off."""


class Owner(Protocol):
    """What a relay does for its sides. ``passed``: how much of ``data`` is scanned and may be forwarded."""

    @property
    def gone(self) -> bool:
        """Nobody is there any more."""

    def client_data(self, data: bytes, passed: int) -> None: ...
    def client_lost(self) -> None: ...
    def agent_data(self, data: bytes, passed: int) -> None: ...
    def agent_lost(self) -> None: ...
    def pace(self) -> None:
        """Who is congested has changed."""


class Side(asyncio.Protocol):
    """One end. ``plain``: chunks may take the fast path, to ``forward``; ``received``: bytes so far."""

    __slots__ = ("_lost", "_slow", "congested", "forward", "owner", "plain", "received", "scan", "transport")

    def __init__(
        self,
        owner: Owner,
        scanner: FrameScanner,
        slow: Callable[[bytes, int], None],
        lost: Callable[[], None],
    ) -> None:
        self.owner = owner
        self.scan = scanner.scan
        self._slow = slow
        self._lost = lost
        self.plain = False
        self.forward: Callable[[bytes], None] = _nowhere
        self.received = 0
        self.congested = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.owner.gone:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        size = len(data)
        self.received += size
        passed = 0
        if self.plain:
            passed = self.scan(data)
            if passed == size:
                self.forward(data)
                return
        self._slow(data, passed)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends, or drops what nobody is there to take."""
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        """Closes after what is buffered is sent; what the peer still sends is dropped."""
        if self.transport is not None:
            self.transport.close()

    def end(self) -> None:
        """Tells the peer that nothing more comes; what it sends is still read."""
        if self.transport is not None:
            self.transport.write_eof()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def read(self, wanted: bool) -> None:
        """Reads on, or leaves data in the kernel until told again. Idempotent."""
        if self.transport is None or self.transport.is_closing():
            return
        if wanted:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def waiting(self) -> int | None:
        """Bytes that a congested peer has not taken yet; None when it is not congested."""
        if not self.congested or self.transport is None:
            return None
        return self.transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        self.congested = True
        self.owner.pace()

    def resume_writing(self) -> None:
        self.congested = False
        self.owner.pace()

    def eof_received(self) -> None:
        """The transport now closes by itself, but not before the peer takes what is buffered."""
        asyncio.get_running_loop().call_later(LINGER_S, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.plain = False
        self.transport = None
        self._lost()


def _nowhere(data: bytes) -> None:
    """Before there is another side nothing is forwarded: ``plain`` is off."""
