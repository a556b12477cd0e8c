"""One connection of a sandbox: HTTP/1.1 requests, one after the other, handed to a call or a tunnel.

Which slot a connection belongs to was settled when it was accepted; whether that slot may be
served, and with what, is asked for every request. What a sandbox sends is hostile: heads are
bounded in size and time, bodies stream and are never kept.
"""

from __future__ import annotations

import asyncio
from typing import cast

from broker.errors import Code, CortexError
from broker.gateway import answers
from broker.gateway.call import Call
from broker.gateway.caller import Endpoint, endpoint_of
from broker.gateway.context import Context
from broker.gateway.egress import Flow
from broker.gateway.framing import Body, request_body
from broker.gateway.handover import Handover
from broker.gateway.heads import END, RequestHead, parse_request
from broker.gateway.tunnel import Tunnel
from broker.gateway.ways import Face, Way
from broker.gateway.websocket import WebSocketCall

HEAD_TIMEOUT_S = 30.0
DISCARD_S = 5.0
"""How long the rest of a body is read after an early answer, so that the client gets to read it."""
CLOSE_S = 10.0
"""How long a connection that is being closed may make no progress before it is aborted."""
WRITE_HIGH = 64 * 2**10
MAX_PIPELINED = 64 * 2**10


class Connection(asyncio.Protocol):
    """A sandbox's connection to one face (gateway or egress) of its slot."""

    def __init__(self, face: Face, context: Context) -> None:
        self.face = face
        self.congested = False
        self.closing_soon = False
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._body: Body | None = None
        self._call: Call | None = None
        self._tunnel: Tunnel | WebSocketCall | Handover | None = None
        self._flow: Flow | None = None
        self._discarding = False
        self._head_only = False
        self._closing = False
        self._unsent = 0
        self._held = False
        self._moved = self._since = self._loop.time()

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)
        self.face.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.face.closed(self)
        self._drop_work()

    def eof_received(self) -> bool:
        """A client that is gone looks like one that only ended its request; the first is what happens."""
        if self._tunnel is not None:
            return self._tunnel.sandbox_eof()
        if self.busy:
            self.abort()
        return False

    def pause_writing(self) -> None:
        self.congested = True
        self._hold_far_side(True)

    def resume_writing(self) -> None:
        self.congested = False
        self.touch()
        self._hold_far_side(False)
        if not self.busy and not self._closing:
            self._resume()

    def data_received(self, data: bytes) -> None:
        self._moved = self._loop.time()
        if self._held and self._transport is not None:
            self._transport.pause_reading()
        if self._tunnel is not None:
            self._tunnel.from_sandbox(data)
            return
        if self._closing:
            return
        if self._body is not None:
            data = self._take_body(self._body, data)
        if data:
            if not self._buffer:
                self._since = self._moved
            self._buffer += data
        self._advance()

    # -- requests

    @property
    def busy(self) -> bool:
        """A request is under way."""
        return self._call is not None or self._tunnel is not None or self._body is not None

    def _advance(self) -> None:
        """Takes up what requests are there whole, while none is under way and the answers are being read."""
        limit = self._context.settings.max_head_bytes
        data, self._buffer, at = self._buffer, b"", 0
        while at < len(data) and not self.busy and not self._closing and not self.congested:
            end = data.find(END, at, at + limit)
            if end < 0:
                if len(data) - at >= limit:
                    self.refuse(_head_too_large(limit), fatal=True)
                break
            raw, at = data[at : end + 4], end + 4
            try:
                head = parse_request(raw)
            except CortexError as error:
                self.refuse(error, fatal=True)
                return
            self._begin(head)
            if self._tunnel is not None:
                if at < len(data):
                    self._tunnel.from_sandbox(data[at:])
                return
            call = self._call
            if self._body is not None and at < len(data):
                at = len(data) - len(self._take_body(self._body, data[at:]))
            # Head and what is there of the body go on in one write.
            if call is not None:
                call.start()
        self._buffer = data[at:]
        if (self.busy or self.congested) and len(self._buffer) > MAX_PIPELINED:
            self.hold(True)

    def _begin(self, head: RequestHead) -> None:
        context = self._context
        context.stats.requests += 1
        self.closing_soon = not head.keep_alive or context.draining
        self._head_only = head.method == b"HEAD"
        self._body = request_body(head.length, head.chunked)
        try:
            way = self.face.way(head)
        except CortexError as error:
            self.refuse(error, fatal=head.method == b"CONNECT" or error.code is Code.NO_WEBSOCKET)
            return
        if way.flow is not None:
            way.flow.cut = self.abort
        if way.doors is not None:
            self._tunnel = Handover(self, way.doors)
            self._tunnel.start()
        elif way.upgrade:
            self._tunnel = WebSocketCall(self, head, way, context)
            self._tunnel.start()
        elif way.tunnel_to is not None and way.flow is not None:
            self._tunnel = Tunnel(self, way.tunnel_to, way.flow, context.dialer, context.stats, context.tasks)
            self._tunnel.start()
        else:
            self._flow = way.flow
            self._call = _call(self, head, way, context)

    def _take_body(self, body: Body, data: bytes) -> bytes:
        """Passes on what belongs to the request's body; gives back what lies behind it."""
        try:
            pieces, used = body.feed(data)
        except CortexError as error:
            self._body = None
            self.closing_soon = True
            if self._call is not None:
                self._call.spoil(error)
            self._linger()
            return b""
        if body.done:
            self._body = None
        if self._flow is not None:
            self._flow.moved(sum(map(len, pieces)), 0)
        if self._call is not None:
            self._call.body(pieces, body.done)
        elif body.done and self._discarding:
            self._discarding = False
            if self.closing_soon:
                self.close()
        return data[used:]

    # -- what calls and tunnels ask for

    def send(self, parts: list[bytes]) -> None:
        if self._transport is not None and parts:
            self._transport.writelines(parts)
            if self._flow is not None:
                self._flow.moved(0, sum(map(len, parts)))

    def send_eof(self) -> None:
        if self._transport is not None and self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def hold(self, held: bool) -> None:
        if self._transport is None or held == self._held or self._transport.is_closing():
            return
        self._held = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    @property
    def descriptor(self) -> int:
        """Of its socket."""
        assert self._transport is not None
        number: int = self._transport.get_extra_info("socket").fileno()
        return number

    def touch(self) -> None:
        self._moved = self._loop.time()

    def fail(self, error: CortexError) -> None:
        # Behind a CONNECT may come bytes that are no HTTP.
        fatal = self._tunnel is not None
        self._call = self._tunnel = None
        self._end_flow(error)
        self._context.note("answered_error", slot=self.face.slot, code=error.code.slug, cause=str(error.cause or ""))
        self.refuse(error, fatal=fatal)
        self._resume()

    def finish(self, keep_alive: bool) -> None:
        self._call = None
        self._end_flow()
        self.closing_soon |= not keep_alive
        self._settle()
        self._resume()

    def cut(self) -> None:
        self._call = None
        self._end_flow()
        self.abort()

    # -- answers and ends

    def refuse(self, error: CortexError, *, fatal: bool = False) -> None:
        """Answers an error. ``fatal``: the connection cannot be trusted to be in step any more."""
        self._context.stats.refused += 1
        self.closing_soon |= fatal or self._body is not None
        self.send([answers.answer(error, close=self.closing_soon, head_only=self._head_only)])
        if fatal:
            self._body = None
            self._linger()
        else:
            self._settle()

    def _settle(self) -> None:
        """The response is out: goes on with the rest of the body, with the next request, or ends."""
        if self._body is not None:
            self._discarding = True
            self._since = self._loop.time()
        elif self.closing_soon:
            self.close()

    def _resume(self) -> None:
        self.hold(False)
        self._since = self._loop.time()
        self._advance()

    def _linger(self) -> None:
        """Ends our side and swallows what still comes: closing with unread bytes would cost the client the answer."""
        self._closing = True
        self.touch()
        self.hold(False)
        self.send_eof()

    def close(self) -> None:
        """Closes once what was sent is out."""
        self._closing = True
        self.touch()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Breaks the connection and what hangs on it, at once."""
        self._closing = True
        self._drop_work()
        if self._transport is not None:
            self._transport.abort()

    def fence(self) -> None:
        """The slot was taken back: work under way is broken off; the next request is refused."""
        if self.busy:
            self.abort()

    def drain(self) -> None:
        """The process ends: idle connections close now, others after their response."""
        self.closing_soon = True
        if isinstance(self._tunnel, Handover):
            self.abort()
        elif not self.busy and not self._buffer:
            self.close()

    def _drop_work(self) -> None:
        call, self._call = self._call, None
        tunnel, self._tunnel = self._tunnel, None
        if call is not None:
            call.abort()
        if tunnel is not None:
            tunnel.abort()
        self._end_flow()

    def _end_flow(self, error: CortexError | None = None) -> None:
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.close(error)

    def _hold_far_side(self, held: bool) -> None:
        if self._call is not None:
            self._call.hold_response(held)
        if self._tunnel is not None:
            self._tunnel.hold(held)

    def check(self, now: float) -> None:
        """Called every second or so: ends what takes too long."""
        if isinstance(self._tunnel, Handover):
            return
        if self._closing:
            unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
            if unsent != self._unsent:
                self._unsent, self._moved = unsent, now
            elif now - self._moved > CLOSE_S:
                self.abort()
        elif self._discarding:
            if now - self._since > DISCARD_S:
                self.close()
        elif self._buffer and not self.busy and now - self._since > HEAD_TIMEOUT_S:
            self.refuse(_head_too_slow(), fatal=True)
        elif now - self._moved > self._context.settings.idle_timeout_s:
            if self._call is not None:
                self._call.time_out()
            elif self.busy:
                self.abort()
            else:
                self.close()


def _call(connection: Connection, head: RequestHead, way: Way, context: Context) -> Call:
    assert way.route is not None
    endpoint = endpoint_of(head.method, way.target) if way.caller is not None else Endpoint.OTHER
    return Call(
        connection, head, way.route, way.target, context, caller=way.caller, endpoint=endpoint, routes=way.routes
    )


def _head_too_large(limit: int) -> CortexError:
    return CortexError(
        Code.HEAD_TOO_LARGE, f"The request's head is over {limit} bytes", hint="send fewer or shorter headers"
    )


def _head_too_slow() -> CortexError:
    return CortexError(Code.REQUEST_TIMEOUT, "The request's head did not arrive in time", hint="send it at once")
