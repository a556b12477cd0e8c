"""Connections to providers: one exchange at a time each, kept alive and pooled, reads held back on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from broker.errors import CortexError
from broker.gateway.dialer import Dialer
from broker.gateway.framing import Body, response_body
from broker.gateway.heads import END, ResponseHead, parse_response
from broker.gateway.routes import Origin
from broker.gateway.stats import Stats

IDLE_S = 55.0
"""How long an idle connection is kept; common servers and load balancers close at 60 s or more."""
MAX_IDLE = 64
"""Idle connections kept for one origin."""
WRITE_HIGH = 64 * 2**10


class Sink(Protocol):
    """Who gets a response. No call fails."""

    def upstream_interim(self, head: ResponseHead) -> None: ...
    def upstream_head(self, head: ResponseHead, body: Body) -> None: ...
    def upstream_body(self, pieces: list[bytes]) -> None: ...
    def upstream_end(self) -> None: ...
    def upstream_lost(self, why: str) -> None:
        """The connection broke, or the response is malformed; nothing comes after it."""

    def upstream_congested(self, congested: bool) -> None:
        """More is buffered towards the provider than it takes."""


class Upstream(asyncio.Protocol):
    """One connection. ``fresh``: it has carried no exchange yet."""

    def __init__(self, origin: Origin, pool: Pool, max_head: int) -> None:
        self.origin = origin
        self.fresh = True
        self.idle_until = 0.0
        self.request_done = True
        self._pool = pool
        self._max_head = max_head
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._method = b""
        self._head: ResponseHead | None = None
        self._body: Body | None = None
        self._buffer = b""
        self._held = False

    # -- the exchange's side

    def begin(self, sink: Sink, method: bytes) -> None:
        """The next response is for ``sink``; set ``request_done`` when all of the request is written."""
        self._sink = sink
        self._method = method
        self._head = self._body = None
        self.request_done = False

    def write(self, parts: list[bytes]) -> None:
        if self._transport is not None:
            self._transport.writelines(parts)

    def hold(self, held: bool) -> None:
        """Stops reading, or goes on."""
        if self._transport is None or held == self._held:
            return
        self._held = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Breaks the connection at once; the sink hears nothing more."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    def _poolable(self) -> bool:
        return self.alive and self.origin.pooled

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        self._fail("closed before the whole response had come")

    def eof_received(self) -> bool:
        if self._sink is not None and self._body is not None and self._body.ends_at_close:
            self._finish(reusable=False)
        return False

    def pause_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_congested(True)

    def resume_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_congested(False)

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            self.abort()
            return
        if self._held and self._transport is not None:
            # uvloop starts reading after connection_made, whatever was asked for by then.
            self._transport.pause_reading()
        try:
            if self._body is None:
                data = self._take_head(data)
            if self._body is not None and self._sink is not None:
                self._take_body(self._body, data)
        except CortexError as error:
            self._fail(error.what)
            self.abort()

    # -- parsing

    def _take_head(self, data: bytes) -> bytes:
        """Reads heads, interim ones too; gives back what lies behind the final one."""
        data = self._buffer + data
        while self._body is None and self._sink is not None:
            end = data.find(END)
            if end < 0 or end > self._max_head:
                if len(data) > self._max_head:
                    self._fail("its response head is too large")
                    self.abort()
                self._buffer = data
                return b""
            head = parse_response(data[: end + 4])
            data = data[end + 4 :]
            if head.status == 101:
                self._fail("it switched protocols unasked")
                self.abort()
            elif head.status < 200:
                self._sink.upstream_interim(head)
            else:
                self._head = head
                self._body = response_body(head.status, self._method, head.length, head.chunked)
                self._sink.upstream_head(head, self._body)
        self._buffer = b""
        return data

    def _take_body(self, body: Body, data: bytes) -> None:
        used = 0
        if data and not body.done:
            pieces, used = body.feed(data)
            if pieces and self._sink is not None:
                self._sink.upstream_body(pieces)
        if body.done and self._sink is not None:
            self._finish(reusable=used == len(data))

    def _finish(self, *, reusable: bool) -> None:
        sink, head = self._sink, self._head
        self._sink = None
        self.fresh = False
        self.hold(False)
        if reusable and head is not None and head.keep_alive and self.request_done and self._poolable():
            self._pool.put(self, min(IDLE_S, IDLE_S if head.keep_alive_s is None else head.keep_alive_s - 1))
        else:
            self.abort()
        if sink is not None:
            sink.upstream_end()

    def _fail(self, why: str) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.upstream_lost(why)


class Pool:
    """Idle connections by origin, newest first."""

    def __init__(self, dialer: Dialer, stats: Stats, max_head: Callable[[], int]) -> None:
        self._dialer = dialer
        self._stats = stats
        self._max_head = max_head
        self._idle: dict[Origin, list[Upstream]] = {}

    def take(self, origin: Origin) -> Upstream | None:
        """An idle connection, no waiting."""
        idle = self._idle.get(origin)
        while idle:
            upstream = idle.pop()
            self._stats.idle_upstreams -= 1
            if not idle:
                del self._idle[origin]
            if upstream.alive and upstream.idle_until > asyncio.get_running_loop().time():
                self._stats.upstream_reused += 1
                return upstream
            upstream.abort()
        return None

    async def dial(self, origin: Origin) -> Upstream:
        """A new one. Raises ``CortexError``."""
        upstream = await self._dialer.dial(origin, lambda: Upstream(origin, self, self._max_head()))
        self._stats.upstream_new += 1
        return upstream

    def put(self, upstream: Upstream, keep_s: float) -> None:
        """Keeps it for ``keep_s`` seconds."""
        idle = self._idle.setdefault(upstream.origin, [])
        if keep_s <= 0 or len(idle) >= MAX_IDLE:
            upstream.abort()
            return
        upstream.idle_until = asyncio.get_running_loop().time() + keep_s
        idle.append(upstream)
        self._stats.idle_upstreams += 1

    def forget(self, upstream: Upstream) -> None:
        """It was lost; it may be idle or not."""
        idle = self._idle.get(upstream.origin)
        if idle is not None and upstream in idle:
            idle.remove(upstream)
            self._stats.idle_upstreams -= 1
            if not idle:
                del self._idle[upstream.origin]

    def sweep(self, now: float) -> None:
        """Closes what was idle for too long."""
        for idle in list(self._idle.values()):
            for upstream in [each for each in idle if each.idle_until <= now]:
                self.forget(upstream)
                upstream.abort()

    def close(self) -> None:
        for idle in list(self._idle.values()):
            for upstream in list(idle):
                self.forget(upstream)
                upstream.abort()
