"""The least HTTP/2 client that the ``h2`` package allows: asyncio, one TLS connection, all calls multiplexed."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset, WindowUpdated

Headers = list[tuple[bytes, bytes]]
WINDOW = 2**24
"""Bytes of answers that may be under way; a server is never held in this benchmark."""


@dataclass
class _Stream:
    """``left``: of the request's body, what flow control has not let through."""

    over: asyncio.Future[tuple[int, bytes]]
    left: memoryview
    status: int = 0
    answer: list[bytes] = field(default_factory=list)


class H2Client(asyncio.Protocol):
    """What calls of one turn of the event loop have to say goes out in one write."""

    def __init__(self) -> None:
        # Headers are ours and well-formed; what the server sends is validated, as in HTTP/1.1.
        self._h2 = H2Connection(
            H2Configuration(header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        self._streams: dict[int, _Stream] = {}
        self._flushing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in self._streams.values():
            if not stream.over.done():
                stream.over.set_exception(ConnectionError("the connection was lost"))

    async def call(self, headers: Headers, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. ``headers``: those with a colon first."""
        loop = asyncio.get_running_loop()
        number = self._h2.get_next_available_stream_id()
        stream = self._streams[number] = _Stream(loop.create_future(), memoryview(body))
        self._h2.send_headers(number, headers)
        self._send(number, stream)
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        try:
            return await stream.over
        finally:
            del self._streams[number]

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            self._take(event)
        self._flush()

    def _take(self, event: Event) -> None:
        if isinstance(event, WindowUpdated):
            for number, stream in self._streams.items():
                if stream.left:
                    self._send(number, stream)
            return
        if not isinstance(event, (ResponseReceived, DataReceived, StreamEnded, StreamReset)):
            return
        stream = self._streams[event.stream_id]
        if isinstance(event, DataReceived):
            stream.answer.append(event.data)
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, ResponseReceived):
            stream.status = int(dict(event.headers)[b":status"])
        elif isinstance(event, StreamEnded):
            stream.over.set_result((stream.status, b"".join(stream.answer)))
        elif not stream.over.done():
            stream.over.set_exception(ConnectionError("the stream was reset"))

    def _send(self, number: int, stream: _Stream) -> None:
        while stream.left:
            size = min(len(stream.left), self._h2.max_outbound_frame_size, self._h2.local_flow_control_window(number))
            if size <= 0:
                return
            piece, stream.left = stream.left[:size], stream.left[size:]
            self._h2.send_data(number, piece.tobytes(), end_stream=not stream.left)

    def _flush(self) -> None:
        self._flushing = False
        if data := self._h2.data_to_send():
            self._transport.write(data)


async def connect(port: int, context: ssl.SSLContext) -> H2Client:
    """``context`` offers h2 (ALPN)."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(H2Client, "127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
    return client
