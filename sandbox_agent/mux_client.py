"""One client of the multiplexer: the MCP connection of a conversation, on a Unix socket."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

from sandbox_agent import jsonrpc, mcp_protocol
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_budget import Budget
from sandbox_agent.mcp_peer import Peer
from sandbox_agent.mcp_protocol import Id
from sandbox_agent.stdio import LineBuffer

MAX_QUEUED_BYTES = 2 * mcp_protocol.MAX_LINE
"""What may wait for a client that does not read; over that it is dropped."""
HIGH_WATER = 2**20


class Desk(Protocol):
    """Who serves clients."""

    def came(self, client: Client) -> None: ...
    def left(self, client: Client) -> None: ...
    def heard(self, client: Client, kind: str, message: Message) -> None:
        """A message; ``kind`` as ``jsonrpc.kind``."""
        ...


class Client(Peer, asyncio.Protocol):
    """``capabilities``: what it said in ``initialize``. ``seen``: version by kind of the lists that it may have."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.capabilities: dict[str, Any] = {}
        self.level = ""
        self.ready = False
        self.seen: dict[str, int] = {}
        self.waiting: dict[Id, tuple[str, asyncio.TimerHandle]] = {}
        """Lists that it is to get when they are known, by request: the kind, and when it gets what is there."""
        self._desk = desk
        self._transport: asyncio.Transport | None = None
        self._lines = LineBuffer(mcp_protocol.MAX_LINE)
        self._budget = Budget()
        self._resume: asyncio.TimerHandle | None = None

    def can(self, capability: str) -> bool:
        return isinstance(self.capabilities.get(capability), dict)

    def busy(self, request_id: Id) -> bool:
        """A request of this id is under way."""
        return request_id in self.asking or request_id in self.waiting

    def send(self, message: Message) -> None:
        self.send_line(jsonrpc.dumps(message))

    def send_result(self, request_id: Id, body: bytes) -> None:
        """The answer to a request; ``body`` is JSON."""
        self.send_line(b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (jsonrpc.dumps(request_id), body))

    def send_line(self, line: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(line + b"\n")
        if transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
            transport.abort()

    def drop(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._desk.came(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._resume is not None:
            self._resume.cancel()
        for _, timer in self.waiting.values():
            timer.cancel()
        self.waiting.clear()
        self.lost("the agent has closed the connection")
        self._desk.left(self)

    def data_received(self, data: bytes) -> None:
        dropped = self._lines.dropped
        lines = self._lines.feed(data)
        for line in lines:
            self._line(line)
        if self._lines.dropped > dropped:
            what = f"a message of more than {mcp_protocol.MAX_LINE >> 20} MiB was dropped"
            self.send(mcp_protocol.error(None, jsonrpc.INVALID_REQUEST, what))
        pause = self._budget.spend(asyncio.get_running_loop().time(), len(lines), len(data))
        if pause > 0 and self._resume is None and self._transport is not None:
            self._transport.pause_reading()
            self._resume = asyncio.get_running_loop().call_later(pause, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        if self._transport is not None:
            self._transport.resume_reading()

    def _line(self, line: bytes) -> None:
        try:
            messages = mcp_protocol.messages(line)
        except ValueError as error:
            self.send(mcp_protocol.error(None, jsonrpc.PARSE_ERROR, f"this is not JSON: {error}"))
            return
        for message in messages:
            try:
                kind = jsonrpc.kind(message)
            except ValueError as error:
                self.send(mcp_protocol.error(None, jsonrpc.INVALID_REQUEST, str(error)))
            else:
                self._desk.heard(self, kind, message)
