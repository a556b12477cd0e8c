"""One client's WebSocket on a stream: frames in, frames out, and how far behind it is.

The only module that imports websockets for clients. The stream begins after the handshake (it was
the front door's); extensions are never in use.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from sandbox_agent.wire.messages import Attach

CLOSE_GRACE_S = 5.0
"""How long a closed client may take to read what is left for it."""
INBOX_MESSAGES = 64
INBOX_BYTES = 2**20
INSERTS = 256
"""Answers that may wait for a client that is behind; over that it is not read from."""
MAX_STRIKES = 100
"""Malformed messages (with one good one making up for one bad) after which a client is closed."""
PUSH_BYTES = 256 * 1024

_QUIET = logging.getLogger("agent_server.websocket")
_QUIET.setLevel(logging.CRITICAL)
_SMALL, _MEDIUM, _LARGE = struct.Struct("!BB"), struct.Struct("!BBH"), struct.Struct("!BBQ")


def frame(body: bytes) -> bytes:
    """An unmasked text frame (RFC 6455 section 5.2)."""
    size = len(body)
    if size < 126:
        return _SMALL.pack(0x81, size) + body
    if size < 65536:
        return _MEDIUM.pack(0x81, 126, size) + body
    return _LARGE.pack(0x81, 127, size) + body


@dataclass
class Insert:
    """Something for one client that is not in the journal, or not in order: sent when its cursor has come to
    ``position``. Either ``data``, a frame, or the history of ``conversation`` from ``at`` up to ``position``."""

    position: int
    data: bytes = b""
    conversation: int = 0
    at: int = 0


class ClientEvents(Protocol):
    """Who owns clients."""

    def client_connected(self, client: Client) -> None: ...
    def client_spoke(self, client: Client) -> None:
        """There is something in its inbox."""

    def client_writable(self, client: Client) -> None:
        """It takes bytes again."""

    def client_gone(self, client: Client) -> None: ...


class Client(asyncio.Protocol):
    """``cursor``: journal position of what it gets next, None when it is up to date and is sent to directly.
    ``gate``: it waits until the journal is on disk up to there. ``subscriptions``: conversation numbers
    and the seq after which it gets their messages."""

    def __init__(self, attach: Attach, events: ClientEvents, *, max_message: int, buffer_bytes: int) -> None:
        self.attach = attach
        self.number = 0
        self.introduced = False
        self.inbox: deque[str] = deque()
        self.inbox_bytes = 0
        self.cursor: int | None = None
        self.gate = 0
        self.inserts: deque[Insert] = deque()
        self.pump_due = False
        self.subscriptions: dict[int, int] = {}
        self.calls: dict[object, tuple[str, Any, int]] = {}
        """Open at the agent for it: method, the client's id, the id at the agent."""
        self.strikes = 0
        self.since = 0.0
        self.closing = False
        self.gone = False
        self._events = events
        self._buffer_bytes = buffer_bytes
        self._transport: asyncio.Transport | None = None
        self._ws = ServerProtocol(state=OPEN, max_size=max_message, logger=_QUIET)
        self._parts = bytearray()
        self._part_is_text = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._sent = 0
        self._taken = 0
        self._taken_at = 0.0
        self._paused = False
        self._reading = True

    # -- transport -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        self.since = asyncio.get_running_loop().time()
        transport.set_write_buffer_limits(self._buffer_bytes, self._buffer_bytes // 4)
        self._events.client_connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = self.closing = True
        self._events.client_gone(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self.closing:
            self._events.client_writable(self)

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Frame):
                self._take(event)
        self.push()
        answers = self._ws.data_to_send()
        if self._transport is not None:
            self._transport.writelines([answer for answer in answers if answer])
        if self._ws.close_expected():
            self._leave()
        if self.inbox:
            self._events.client_spoke(self)

    def _take(self, event: Frame) -> None:
        if event.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if event.opcode is not Opcode.CONT:
            self._part_is_text = event.opcode is Opcode.TEXT
        data: bytes | bytearray = bytes(event.data)
        if not event.fin or self._parts:
            self._parts += data
            if not event.fin:
                return
            data, self._parts = self._parts, bytearray()
        if not self._part_is_text:
            self.strikes += 1  # binary frames are ignored in ACP
            return
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self._ws.fail(1007, "text is not UTF-8")
            return
        self.inbox.append(text)
        self.inbox_bytes += len(text)

    # -- in --------------------------------------------------------------------------------------

    def next_message(self) -> str:
        """The oldest message in the inbox."""
        text = self.inbox.popleft()
        self.inbox_bytes -= len(text)
        return text

    def regulate_reading(self) -> None:
        """Reads on only while what waits, in and out, is bounded."""
        crowded = len(self.inbox) > INBOX_MESSAGES or self.inbox_bytes > INBOX_BYTES or len(self.inserts) > INSERTS
        if self._transport is None or self.closing or crowded != self._reading:
            return
        self._reading = not crowded
        if crowded:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # -- out -------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Takes frames now."""
        return not self._paused and not self.closing

    @property
    def direct(self) -> bool:
        """Is up to date: frames go straight to it."""
        return self.cursor is None

    @property
    def at_rest(self) -> bool:
        """Nothing of it waits to be done, and nothing for it to be sent."""
        unsent = self._transport is not None and self._transport.get_write_buffer_size() > 0
        return self.direct and not (self.inbox or self.inserts or self._out or unsent)

    def offer(self, position: int, data: bytes) -> None:
        """The frame of the record at ``position``, if it is up to date; falls behind there if it takes no more."""
        if self.cursor is not None:
            return
        if self._paused:
            self.cursor = position
        else:
            self.send(data)

    def send(self, data: bytes) -> None:
        """One frame; goes out with ``push``."""
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > PUSH_BYTES:
            self.push()

    def push(self) -> None:
        """Hands the collected frames to the transport."""
        if not self._out:
            return
        out, self._out = self._out, []
        self._sent += self._out_bytes
        self._out_bytes = 0
        if self._transport is None or self.closing:
            return
        if len(out) == 1:
            self._transport.write(out[0])
        else:
            self._transport.writelines(out)

    def stalled(self, now: float, timeout: float) -> bool:
        """True when it has taken no byte of what waits for it for ``timeout`` seconds."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        taken = self._sent - waiting
        if not waiting or taken != self._taken or not self._taken_at:
            self._taken, self._taken_at = taken, now
            return False
        return now - self._taken_at >= timeout

    # -- the end ---------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Sends a close frame behind what was sent and ends; ``reason`` is cut to 123 bytes."""
        if self.closing:
            return
        self.push()
        self._ws.send_close(code, reason.encode()[:123].decode(errors="ignore"))
        answers = self._ws.data_to_send()
        if self._transport is not None:
            self._transport.writelines([answer for answer in answers if answer])
        self._leave()

    def _leave(self) -> None:
        """Lets the transport send what it has, for a bounded time."""
        self.closing = True
        transport = self._transport
        if transport is not None and not self.gone:
            transport.close()
            asyncio.get_running_loop().call_later(CLOSE_GRACE_S, transport.abort)


async def adopt(sock: socket.socket, make: Callable[[], Client]) -> None:
    """Ties a client to a connected, non-blocking stream."""
    loop = asyncio.get_running_loop()
    if sock.family == socket.AF_UNIX:
        await loop.create_unix_connection(make, sock=sock)
    else:
        await loop.create_connection(make, sock=sock)
