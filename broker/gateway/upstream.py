"""Connections to providers: one call at a time each, kept alive and pooled, reads held back on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, cast

from broker.errors import Code, CortexError
from broker.gateway.ahead import Prewarm
from broker.gateway.dialer import Dialer
from broker.gateway.framing import Body, response_body
from broker.gateway.heads import END, ResponseHead, parse_response
from broker.gateway.places import Places
from broker.gateway.routes import Origin
from broker.gateway.stats import Stats
from broker.gateway.tls import keep_session
from broker.host.tasks import TaskOwner

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

    def upstream_flush(self) -> None:
        """All that one read brought has been told: what goes on can go on at once."""

    def upstream_congested(self, congested: bool) -> None:
        """More is buffered towards the provider than it takes."""


class Upstream(asyncio.Protocol):
    """One connection. ``fresh``: dialled for the call at hand, so it cannot have been closed for being idle."""

    def __init__(self, origin: Origin, pool: Pool, max_head: int) -> None:
        self.origin = origin
        self.fresh = True
        self.used = False
        self.placed = False
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

    def remember(self) -> None:
        """Has its TLS session kept for the next connection; done once, when something was or may have been read."""
        if not self.used and self._transport is not None:
            keep_session(self._transport.get_extra_info("ssl_object"))

    def abort(self) -> None:
        """Breaks the connection at once; the sink hears nothing more."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    def _poolable(self) -> bool:
        return self.alive and self.origin.pooled

    @property
    def lost(self) -> bool:
        """asyncio has said so."""
        return self._transport is None

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
        sink = self._sink
        if sink is None:
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
        sink.upstream_flush()

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
        self.remember()
        self.fresh = False
        self.used = True
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


class _Lane(Places[Upstream]):
    """What the pool has of one origin: a place for each connection and each dial, idle connections newest last."""

    def __init__(self) -> None:
        super().__init__(Upstream.abort)
        self.keep_alive = True
        self.idle: list[Upstream] = []
        self.max_idle = MAX_IDLE
        self.prewarm: Prewarm | None = None
        self.configured = False

    @property
    def wanting(self) -> bool:
        """Fewer are idle than are to be, and another may be opened."""
        if self.prewarm is None or len(self.idle) >= self.prewarm.count:
            return False
        return not self.most or self.taken < self.most


class Pool:
    """Connections by origin: idle ones are used newest first; per origin bounded and opened ahead where configured."""

    def __init__(self, dialer: Dialer, stats: Stats, max_head: Callable[[], int], tasks: TaskOwner) -> None:
        self._dialer = dialer
        self._stats = stats
        self._max_head = max_head
        self._tasks = tasks
        self._lanes: dict[Origin, _Lane] = {}

    def configure(self, origin: Origin, *, keep_alive: bool, prewarm: int, max_connections: int) -> None:
        """``prewarm``: so many idle connections are kept open; ``max_connections``: open ones at most, more dials
        wait. Holds from now on; what is open stays."""
        lane = self._lane(origin)
        lane.configured = True
        lane.keep_alive = keep_alive
        lane.most = lane.max_idle = max_connections
        if not keep_alive:
            self._clear(lane)
        self._stop_prewarm(lane)
        if keep_alive and prewarm and origin.pooled:
            lane.prewarm = Prewarm(
                min(prewarm, max_connections), lambda: lane.wanting, lambda: self._open_ahead(lane, origin)
            )
            lane.prewarm.start(self._tasks)
        lane.admit()

    def unconfigure(self, origin: Origin) -> None:
        """As if it had never been configured; idle connections are closed."""
        lane = self._lanes.get(origin)
        if lane is not None:
            self._stop_prewarm(lane)
            lane.configured, lane.keep_alive, lane.most, lane.max_idle = False, True, 0, MAX_IDLE
            self._clear(lane)
            lane.admit()
            self._tidy(origin, lane)

    def take(self, origin: Origin) -> Upstream | None:
        """An idle connection, no waiting."""
        lane = self._lanes.get(origin)
        if lane is None:
            return None
        found: Upstream | None = None
        while lane.idle and found is None:
            upstream = lane.idle.pop()
            self._stats.idle_upstreams -= 1
            if upstream.alive and upstream.idle_until > time.monotonic():
                self._stats.upstream_reused += 1
                found = upstream
            else:
                upstream.abort()
        if lane.prewarm is not None and found is not None:
            lane.prewarm.content()
        return found

    async def dial(self, origin: Origin, *, wait_s: float | None = None) -> Upstream:
        """A new one; where all places are taken, an idle one, or what comes free first within ``wait_s`` (default:
        the deadline of connecting). Raises ``CortexError``."""
        lane = self._lane(origin)
        if not lane.take():
            if (idle := self.take(origin)) is not None:
                return idle
            deadline = time.monotonic() + (self._dialer.timeout_s if wait_s is None else wait_s)
            self._stats.upstream_waited += 1
            while (given := await self._wait(lane, origin, deadline)) is not None:
                if given.alive:
                    self._stats.upstream_reused += 1
                    return given
        upstream = await self._open(lane, origin)
        self._stats.upstream_new += 1
        return upstream

    async def _wait(self, lane: _Lane, origin: Origin, deadline: float) -> Upstream | None:
        try:
            return await lane.wait(deadline - time.monotonic())
        except TimeoutError as error:
            raise CortexError(
                Code.UPSTREAM_BUSY,
                f"All {lane.most} connections to {origin.host} are in use",
                hint="retry; an operator can raise the provider's max_connections",
            ) from error

    async def _open(self, lane: _Lane, origin: Origin) -> Upstream:
        """Dials; the place has been taken."""
        upstream: Upstream | None = None
        try:
            upstream = await self._dialer.dial(origin, lambda: Upstream(origin, self, self._max_head()))
            upstream.placed = not upstream.lost
        finally:
            # Not reached, cancelled, or lost as soon as it stood.
            if upstream is None or not upstream.placed:
                lane.leave()
                self._tidy(origin, lane)
        return upstream

    async def _open_ahead(self, lane: _Lane, origin: Origin) -> None:
        if lane.take():
            upstream = await self._open(lane, origin)
            upstream.fresh = False
            self._stats.upstream_prewarmed += 1
            if upstream.alive:
                self.put(upstream, IDLE_S)
            elif lane.prewarm is not None:
                lane.prewarm.lost_unused()

    def put(self, upstream: Upstream, keep_s: float) -> None:
        """Keeps it for ``keep_s`` seconds, or gives it to a dial that waits."""
        lane = self._lane(upstream.origin)
        if keep_s <= 0 or not lane.keep_alive or len(lane.idle) >= lane.max_idle or lane.taken > lane.most > 0:
            upstream.abort()
        elif not lane.hand(upstream):
            upstream.idle_until = time.monotonic() + keep_s
            lane.idle.append(upstream)
            self._stats.idle_upstreams += 1

    def forget(self, upstream: Upstream) -> None:
        """It was lost; it may be idle or not."""
        lane = self._lanes.get(upstream.origin)
        if lane is None:
            return
        if self._unidle(lane, upstream) and lane.prewarm is not None:
            if upstream.used:
                lane.prewarm.wake()
            else:
                lane.prewarm.lost_unused()
        if upstream.placed:
            upstream.placed = False
            lane.leave()
        self._tidy(upstream.origin, lane)

    def sweep(self, now: float) -> None:
        """Closes what was idle for too long."""
        for lane in list(self._lanes.values()):
            for upstream in [each for each in lane.idle if each.idle_until <= now]:
                self._unidle(lane, upstream)
                upstream.remember()
                upstream.abort()
                if lane.prewarm is not None:
                    lane.prewarm.content()
            if lane.prewarm is not None and lane.wanting:
                lane.prewarm.wake()

    def close(self) -> None:
        for lane in list(self._lanes.values()):
            self._stop_prewarm(lane)
            self._clear(lane)

    def _lane(self, origin: Origin) -> _Lane:
        lane = self._lanes.get(origin)
        if lane is None:
            lane = self._lanes[origin] = _Lane()
        return lane

    def _tidy(self, origin: Origin, lane: _Lane) -> None:
        """Sandboxes name hosts without end: of those nothing is kept."""
        if not (lane.configured or lane.taken or lane.waiting or lane.idle):
            self._lanes.pop(origin, None)

    def _clear(self, lane: _Lane) -> None:
        for upstream in list(lane.idle):
            self._unidle(lane, upstream)
            upstream.abort()

    def _unidle(self, lane: _Lane, upstream: Upstream) -> bool:
        if upstream not in lane.idle:
            return False
        lane.idle.remove(upstream)
        self._stats.idle_upstreams -= 1
        return True

    def _stop_prewarm(self, lane: _Lane) -> None:
        prewarm, lane.prewarm = lane.prewarm, None
        if prewarm is not None:
            prewarm.stop()
