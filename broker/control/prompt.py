"""One turn over plain HTTP: the ACP updates as server-sent events, then the result.

Events: ``session`` (the conversation's id), ``update`` (params of ``session/update``), ``permission``
(what was asked and how the policy answered), then ``result`` or ``error`` (problem details). The turn
goes on when the HTTP client leaves: transport is not lifecycle.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web

from broker.control import schema
from broker.control.acp import TURN_SILENCE_S, AcpStream, Message, decide, dump, part
from broker.control.requests import body
from broker.control.routes import Control, control
from broker.control.sessions import load
from broker.errors import Code, CortexError
from broker.session.port import SessionPort
from sandbox_agent.wire.messages import Attach

KEEPALIVE_S = 15.0
MAX_EVENTS = 256
"""Events that wait for a slow HTTP client before the agent's stream is no longer read."""
_PLACE = re.compile(r"[\w.-]{1,64}:[0-9]{1,20}", re.ASCII)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    name: str
    data: Any
    id: str = ""

    def encode(self) -> bytes:
        """The event on the wire (WHATWG HTML, server-sent events)."""
        head = f"event: {self.name}\n" + (f"id: {self.id}\n" if self.id else "")
        return b"%sdata: %s\n\n" % (head.encode(), dump(self.data))


class Feed:
    """Events on their way to the HTTP client; once it has left they are dropped."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(MAX_EVENTS)
        self._left = False
        self._ended = False

    async def put(self, event: Event) -> None:
        """Waits while the client is slow."""
        if not self._left:
            await self._queue.put(event)

    def end(self) -> None:
        """Nothing more comes; what is queued is still delivered."""
        self._ended = True
        if not self._queue.full():
            self._queue.put_nowait(None)

    async def get(self) -> Event | None:
        """The next event; None at the end."""
        if self._ended and self._queue.empty():
            return None
        return await self._queue.get()

    def leave(self) -> None:
        """The client is gone."""
        self._left = True
        while not self._queue.empty():
            self._queue.get_nowait()


class TurnClient:
    """The turn as its session's client (``AttachedClient``)."""

    def __init__(self) -> None:
        self.connection = f"http-{secrets.token_hex(8)}"
        self.stream: AcpStream | None = None
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._closed: CortexError | None = None

    @property
    def spoke_at(self) -> float:
        """See ``AttachedClient``. It is here for its turn alone, and says something, or waits, all the time."""
        return time.monotonic()

    def hold(self, on_speech: Callable[[], None] | None = None) -> None:
        """See ``AttachedClient``."""
        self._may_send.clear()
        if on_speech is not None:
            on_speech()

    def release(self) -> None:
        """See ``AttachedClient``."""
        self._may_send.set()

    def notify(self, message: bytes) -> None:
        """Progress is for clients that asked for it."""

    def close(self, code: int, reason: str) -> None:
        """See ``AttachedClient``."""
        self._closed = CortexError(
            Code.SESSION_STOPPED, f"the session let go of the turn ({code})", cause=reason, hint="try again"
        )
        if self.stream is not None:
            self.stream.close(self._closed)

    def adopt(self, stream: AcpStream) -> None:
        """Takes the stream; it may be closed already."""
        self.stream = stream
        if self._closed is not None:
            stream.close(self._closed)

    async def allowed(self, limit_s: float) -> None:
        """Returns when nothing is held back, after ``limit_s`` at most."""
        try:
            async with asyncio.timeout(limit_s):
                await self._may_send.wait()
        except TimeoutError:
            log.warning("prompt_hold_too_long", connection=self.connection)


class Turn:
    """One prompt on a session."""

    def __init__(self, context: Control, session: SessionPort) -> None:
        self._context = context
        self._session = session
        self._client = TurnClient()
        self.feed = Feed()
        self.acp_session = ""

    async def open(self, acp_session: str | None) -> None:
        """Attaches, initializes, opens the conversation. Raises ``CortexError``; then nothing is left open."""
        config = self._context.config()
        self._session.attach(self._client)
        try:
            attach = Attach(connection=self._client.connection, protocol="acp", client=self._client.connection)
            async with asyncio.timeout(config.session.bringup_timeout_s):
                sock = await self._session.open_stream(attach)
            self._client.adopt(AcpStream(sock, max_message_bytes=config.front.max_message_bytes))
            await self._initialize(acp_session)
        except TimeoutError as error:
            self.close()
            raise CortexError(
                Code.BRINGUP_TIMEOUT, "the session was not ready in time", hint="cortex session timeline USER"
            ) from error
        except BaseException:
            self.close()
            raise

    async def run(self, content: list[dict[str, Any]]) -> None:
        """The turn; everything that happens goes to the feed."""
        try:
            await self.feed.put(Event("session", {"acp_session": self.acp_session}))
            await self._client.allowed(self._context.config().session.bind_hold_s)
            params = {"sessionId": self.acp_session, "prompt": content}
            message = await self._stream.call("session/prompt", params, self._on_message, silence_s=TURN_SILENCE_S)
            result = {"acp_session": self.acp_session, **part(message, "result")}
            await self.feed.put(Event("result", result, _event_id(result)))
        except CortexError as error:
            await self.feed.put(Event("error", error.problem()))
        finally:
            self.close()
            self.feed.end()

    def close(self) -> None:
        """Lets go of the session; stops nothing."""
        self._session.detach(self._client)
        if self._client.stream is not None:
            self._client.stream.close()
            self._client.stream.release()

    @property
    def _stream(self) -> AcpStream:
        assert self._client.stream is not None
        return self._client.stream

    async def _initialize(self, acp_session: str | None) -> None:
        info = {"name": "cortex-control", "title": "Cortex control API", "version": "1"}
        capabilities = {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}
        hello = {"protocolVersion": 1, "clientInfo": info, "clientCapabilities": capabilities}
        await self._stream.call("initialize", hello, silence_s=self._context.config().session.agent_init_timeout_s)
        params: Message = {"cwd": "/", "mcpServers": []}
        if acp_session is None:
            opened = await self._stream.call("session/new", params)
            self.acp_session = str(part(opened, "result").get("sessionId", ""))
            return
        await self._stream.call("session/resume", params | {"sessionId": acp_session})
        self.acp_session = acp_session

    async def _on_message(self, message: Message) -> None:
        params = part(message, "params")
        if message["method"] == "session/update":
            await self.feed.put(Event("update", params, _event_id(params)))
        elif message["method"] == "session/request_permission" and "id" in message:
            outcome = decide(params, self._policy())
            await self.feed.put(Event("permission", {"request": params, "outcome": outcome}, _event_id(params)))
            await self._answer(message, {"result": {"outcome": outcome}})
        elif "id" in message:
            await self._answer(message, {"error": {"code": -32601, "message": "not offered by this client"}})

    async def _answer(self, message: Message, body: Message) -> None:
        await self._client.allowed(self._context.config().session.bind_hold_s)
        await self._stream.send({"jsonrpc": "2.0", "id": message["id"], **body})

    def _policy(self) -> str:
        own = self._session.view().get("permission_policy")
        return own if own in ("allow", "deny") else self._context.config().session.permission_policy


async def prompt(request: web.Request) -> web.StreamResponse:
    """Runs one turn. What fails before the agent has the prompt is an HTTP error, later an ``error`` event."""
    context = control(request)
    wanted = await body(request, schema.Prompt)
    session = await load(request)
    if session.protocol != "acp":
        raise CortexError(
            Code.WRONG_PROTOCOL,
            f"agent {session.agent!r} does not speak ACP",
            hint="connect to its own WebSocket at /raw",
        )
    turn = Turn(context, session)
    await turn.open(wanted.acp_session)
    context.tasks.start(turn.run(wanted.blocks()), "prompt")
    return await _stream_events(request, turn.feed, context.config().front.stall_timeout_s)


async def _stream_events(request: web.Request, feed: Feed, stall_s: float) -> web.StreamResponse:
    """Writes the feed until it ends or the client leaves; a comment every 15 s of silence notices that."""
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    try:
        await response.prepare(request)
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    event = await feed.get()
            except TimeoutError:
                event = Event("", None)
            if event is None:
                break
            async with asyncio.timeout(stall_s):
                await response.write(event.encode() if event.name else b": still there\n\n")
    except ConnectionError:
        log.debug("prompt_client_left")
    except TimeoutError:
        log.info("prompt_client_stalled")
        if request.transport is not None:
            request.transport.abort()
    finally:
        feed.leave()
    return response


def _event_id(params: Message) -> str:
    """``EPOCH:SEQ`` of the message, empty where it has none: a sandbox must not write events of its own."""
    place = part(part(params, "_meta"), "cortex")
    text = f"{place.get('epoch')}:{place.get('seq')}"
    return text if _PLACE.fullmatch(text) else ""
