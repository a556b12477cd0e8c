"""One client tied to one stream of its agent server.

Data frames pass in both directions as they came; ping, pong and close end here. Until there is a
stream, and while a session holds the client, what the client sends is checked and kept, up to
``hold_bytes``; then it is not read any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from broker.config import FrontConfig
from broker.errors import Code, CortexError
from broker.front.frames import CLOSE, PING, Control, FrameScanner, parse_close
from broker.front.inserts import Inserts
from broker.front.liveness import Liveness, Verdict
from broker.front.sides import LINGER_S, Side
from broker.front.traffic import Traffic

REVOKED_LINGER_S = 0.5
"""``LINGER_S`` for a client that may not be here any more."""
_MASKED_PONG = bytes((0x8A, 0x80, 0, 0, 0, 0))


class Relay:
    """An attached client (``broker.session.port.AttachedClient``). ``on_gone`` is called once, at its end."""

    def __init__(
        self,
        *,
        connection: str,
        cortex: bool,
        agent: str,
        config: FrontConfig,
        transport: asyncio.Transport,
        on_gone: Callable[[Relay], None],
    ) -> None:
        self.connection = connection
        self._cortex = cortex
        self._config = config
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._up = FrameScanner(masked=True, limit=config.max_message_bytes)
        self._down = FrameScanner(masked=False, limit=config.max_message_bytes)
        self._client = Side(self, self._up, self.client_data, self.client_lost)
        self._client.transport = transport
        self._agent: Side | None = None
        self._agent_lost = False
        self._held = bytearray()
        self._holding = False
        self._on_speech: Callable[[], None] | None = None
        self._passing = False
        self._inserts = Inserts()
        self._agent_pinged = False
        self._accepted = False
        self._close_code = 1006
        self._closing = False
        self._close_sent = False
        self._client_closed = False
        self._deaf = False
        self._tied = False
        self._gone = False
        self._timers: list[asyncio.TimerHandle] = []
        self._liveness = Liveness(
            ping_interval_s=config.ping_interval_s,
            ping_timeout_s=config.ping_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            now=time.monotonic(),
        )
        self._tick_timer: asyncio.TimerHandle | None = None
        self._traffic = Traffic(agent)

    # What the front door does.

    def accepted(self, rest: bytes) -> None:
        """The handshake's answer is written. ``rest``: what came behind the client's request."""
        transport = self._client.transport
        if transport is None:
            return
        transport.set_write_buffer_limits(high=self._config.write_high_bytes)
        transport.set_protocol(self._client)
        self._accepted = True
        self._traffic.opened()
        self._tick_timer = self._loop.call_later(self._liveness.tick_s, self._tick)
        if rest:
            self._client.data_received(rest)
        self._client.read(True)
        self.pace()
        self._flush()

    def agent_side(self) -> Side:
        """The protocol for the stream's transport; call ``tie`` when it is connected."""
        self._agent = Side(self, self._down, self.agent_data, self.agent_lost)
        return self._agent

    def tie(self) -> None:
        """The stream is connected: what is held goes out, and from now on frames pass."""
        agent = self._agent
        if agent is None or agent.transport is None:
            return
        if self._gone or self._closing:
            agent.close()
            return
        agent.transport.set_write_buffer_limits(high=self._config.write_high_bytes)
        self._client.forward = agent.transport.write
        if self._client.transport is not None:
            agent.forward = self._client.transport.write
        self._tied = True
        if not self._holding:
            self._pass_on()
        self.pace()

    def fail(self, error: CortexError) -> None:
        """Closes the client with the error's code and hint."""
        self.close(error.code.close_code, error.close_reason())

    @property
    def gone(self) -> bool:
        return self._gone

    @property
    def code(self) -> int:
        """The close code; 1006 when the connection ended without one."""
        return self._close_code

    # What a session does (AttachedClient).

    @property
    def spoke_at(self) -> float:
        self._count()
        return self._traffic.spoke_at

    def hold(self, on_speech: Callable[[], None] | None = None) -> None:
        self._holding = True
        self._on_speech = on_speech or self._on_speech
        self._passing = self._passing and self._up.remaining > 0
        self._replan()
        if self._held:
            self._spoken()

    def release(self) -> None:
        self._holding = False
        self._on_speech = None
        if self._tied:
            self._pass_on()
        self.pace()

    def notify(self, message: bytes) -> None:
        if self._cortex and not self._closing and not self._gone:
            self._inserts.note(message)
            self._flush()

    def close(self, code: int, reason: str) -> None:
        if self._closing or self._gone:
            return
        self._closing = True
        self._close_code = code
        linger = REVOKED_LINGER_S if code in (4401, 4403) else LINGER_S
        self._timers.append(self._loop.call_later(linger, self.abort))
        self._inserts.close(code, reason)
        self._flush()
        self.pace()

    def abort(self) -> None:
        """Ends both connections now."""
        self._client.abort()
        if self._agent is not None:
            self._agent.abort()

    # From the client.

    def client_data(self, data: bytes, passed: int) -> None:
        if self._deaf:
            return
        view, pos, size = memoryview(data), passed, len(data)
        if passed:
            self._to_agent(view[:passed])
        try:
            while pos < size:
                if self._holding and self._passing:
                    # A hold begins where the frame under way ends.
                    end = self._up.scan_frame(data, pos) if self._up.remaining else pos
                    self._to_agent(view[pos:end])
                    pos, self._passing = end, self._up.remaining > 0
                    continue
                if (end := self._up.scan(data, pos)) > pos:
                    self._to_agent(view[pos:end])
                    pos = end
                    continue
                pos, found = self._up.step(data, pos)
                if isinstance(found, Control):
                    self._client_control(found)
                elif found:
                    self._to_agent(found)
        except CortexError as error:
            self._deaf = True
            if self._close_sent:
                self._client.close()
            self.fail(error)
            return
        self._traffic.client_spoke(self._up.frames)
        self._replan()
        self.pace()

    def client_lost(self) -> None:
        if self._gone:
            return
        self._gone = True
        for timer in self._timers:
            timer.cancel()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._end_agent()
        self._count()
        self._traffic.closed(self._close_code)
        self._on_gone(self)

    def _client_control(self, control: Control) -> None:
        if control.opcode == PING:
            self._inserts.pong(control.payload)
            self._flush()
        elif control.opcode == CLOSE:
            code, _ = parse_close(control.payload)
            self._client_closed = True
            if self._close_sent:
                self._client.close()
            self.close(code, "")

    def _to_agent(self, piece: bytes | memoryview) -> None:
        if self._closing or not piece:
            return
        if self._on_speech is not None:
            self._spoken()
        if self._passing and self._agent is not None:
            self._agent.write(piece)
        else:
            self._held += piece

    def _spoken(self) -> None:
        """Whoever holds the client hears of it once. The fast path is off during a hold, so all comes by here."""
        heard, self._on_speech = self._on_speech, None
        if heard is not None:
            heard()

    def _pass_on(self) -> None:
        self._passing = True
        if self._held and self._agent is not None:
            held, self._held = self._held, bytearray()
            self._agent.write(held)
        self._replan()

    # From the agent.

    def agent_data(self, data: bytes, passed: int) -> None:
        view, pos, size = memoryview(data), passed, len(data)
        if passed:
            self._client.write(view[:passed])
        try:
            while pos < size and not self._close_sent and not self._gone:
                end = self._down.scan_frame(data, pos) if self._inserts else self._down.scan(data, pos)
                if end > pos:
                    self._client.write(view[pos:end])
                    pos = end
                    self._flush()
                    continue
                pos, found = self._down.step(data, pos)
                if isinstance(found, Control):
                    self._agent_control(found)
                elif found:
                    self._client.write(found)
        except CortexError as error:
            self._agent_broke(error)
        self._traffic.agent_spoke(self._down.frames)
        self._replan()

    def agent_lost(self) -> None:
        self._agent_lost = True
        self._client.plain = False
        if self._gone or self._close_sent:
            return
        if self._down.remaining:
            # Nothing can be said in the middle of a frame.
            self._close_code = self._close_code if self._closing else 1006
            self._closing = True
            self._client.close()
            return
        hint = "connect again; the session brings its sandbox up anew"
        self.fail(CortexError(Code.SANDBOX_DIED, "the agent server closed the stream", hint=hint))

    def _agent_control(self, control: Control) -> None:
        if control.opcode == PING:
            self._agent_pinged = True
            self._answer_agent()
        elif control.opcode == CLOSE:
            code, reason = parse_close(control.payload)
            self.close(1000 if code == 1005 else code, reason)

    def _answer_agent(self) -> None:
        if self._agent is None or (self._passing and self._up.remaining):
            return
        self._agent_pinged = False
        if not self._agent.congested:
            self._agent.write(_MASKED_PONG)

    def _agent_broke(self, error: CortexError) -> None:
        self._traffic.violation()
        hint = "connect again; if it goes on, stop the session"
        self.fail(CortexError(Code.SANDBOX_PROTOCOL, "the agent server sent a bad frame", cause=error, hint=hint))
        if self._agent is not None:
            self._agent.abort()

    def _end_agent(self) -> None:
        agent = self._agent
        if agent is None or self._agent_lost or agent.transport is None:
            return
        agent.plain = False
        if self._held:
            agent.write(bytes(self._held))
            self._held = bytearray()
        agent.close()
        self._loop.call_later(LINGER_S, agent.abort)

    # Both.

    def pace(self) -> None:
        """Stops reading from one side while the other has enough to take."""
        agent = self._agent
        if agent is not None:
            agent.read(not self._client.congested)
        full = len(self._held) > self._config.hold_bytes or (agent is not None and agent.congested)
        self._client.read(self._closing or not full)
        if not self._client.congested:
            self._flush()

    def _flush(self) -> None:
        """Sends what waits for a boundary, where there is one."""
        if not self._inserts or not self._accepted or self._gone:
            self._replan()
            return
        if not self._down.remaining and not self._close_sent:
            closing = self._inserts.closing
            out = self._inserts.take(in_message=self._down.in_message, congested=self._client.congested)
            if out:
                self._client.write(out)
            if closing:
                self._close_sent = True
                self._end_agent()
                if self._client_closed:
                    self._client.close()
                elif self._deaf:
                    # Closing with data unread would reset the connection, and the client might never see why.
                    self._client.end()
        self._replan()

    def _replan(self) -> None:
        """Chooses fast or slow path for what comes next."""
        if self._agent_pinged:
            self._answer_agent()
        tied = self._tied and not self._agent_lost and not self._closing and not self._gone
        self._client.plain = tied and self._passing and not self._holding and self._traffic.timed_client
        self._client.plain = self._client.plain and not self._agent_pinged
        if self._agent is not None:
            self._agent.plain = tied and not self._inserts and self._traffic.timed_agent

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(self._liveness.tick_s, self._tick)
        self._count()
        transport = self._client.transport
        reading = transport is not None and transport.is_reading()
        verdict = self._liveness.tick(
            time.monotonic(),
            heard=self._client.received if reading else -1,
            client=self._client.waiting(),
            agent=None if self._agent is None else self._agent.waiting(),
        )
        if self._closing or verdict is Verdict.NOTHING:
            return
        if verdict is Verdict.PING:
            self._inserts.ping()
            self._flush()
        elif verdict is Verdict.CLIENT_STALLED:
            # It takes nothing, so it cannot be told.
            self._close_code = Code.SLOW_CONSUMER.close_code
            self._closing = True
            self.abort()
        elif verdict is Verdict.CLIENT_SILENT:
            self.fail(CortexError(Code.SLOW_CONSUMER, "no pong", hint="answer pings within the ping timeout"))
        else:
            hint = "connect again; the agent server took no data for too long"
            self.fail(CortexError(Code.SANDBOX_DIED, "the agent server is stuck", hint=hint))
            if self._agent is not None:
                self._agent.abort()

    def _count(self) -> None:
        self._traffic.count(
            up=(self._up.frames, self._client.received),
            down=(self._down.frames, 0 if self._agent is None else self._agent.received),
        )
