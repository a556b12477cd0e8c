"""The front door: a connection comes in, is asked for its token, and is tied to its session's agent."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import structlog

from broker.config import Config
from broker.errors import Code, CortexError
from broker.front.arrival import Arrival
from broker.front.handshake import Upgrade, accept, read
from broker.front.relay import Relay
from broker.host.tasks import TaskOwner
from broker.metrics import REFUSED
from broker.session.port import RegistryPort, SessionPort
from sandbox_agent.wire.messages import Attach

log = structlog.get_logger(__name__)

BACKLOG = 1024
CLOSE_TIMEOUT_S = 2.0
"""How long ``close`` waits for clients to answer their close frame."""
_STREAM_SLACK_S = 10.0
_TOLD_OVER_LIMIT = 64
"""So many connections over the limit get an answer; more are cut off."""
_AGENT_PROTOCOL = {"acp": "acp", "raw": "websocket"}


class Granted(Protocol):
    """Whose a token is."""

    @property
    def user(self) -> str: ...
    @property
    def workspace(self) -> str: ...


class AccessPort(Protocol):
    """Who may come in. All raise ``CortexError``."""

    async def verify(self, token: str) -> Granted: ...
    async def redeem(self, ticket: str) -> Granted: ...
    def check_origin(self, origin: str | None) -> None: ...
    def check_host(self, host: str) -> None: ...


class FrontDoor:
    """All client connections of this broker. ``config`` is asked at each connection, so a reload counts at once."""

    def __init__(
        self, registry: RegistryPort, access: AccessPort, config: Callable[[], Config], tasks: TaskOwner
    ) -> None:
        self._registry = registry
        self._access = access
        self._config = config
        self._tasks = tasks
        self._servers: list[asyncio.Server] = []
        self._arrivals: dict[Arrival, asyncio.Task[None] | None] = {}
        self._relays: dict[Relay, asyncio.Task[None] | None] = {}
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        """Open connections, handshakes included."""
        return len(self._arrivals) + len(self._relays)

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accepts on bound (TCP or Unix) sockets, which the door now owns."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if sock.family == socket.AF_UNIX:
                server: Any = await loop.create_unix_server(self._arrive, sock=sock, backlog=BACKLOG)
            else:
                server = await loop.create_server(self._arrive, sock=sock, backlog=BACKLOG)
            self._servers.append(server)

    async def adopt(self, sock: socket.socket) -> None:
        """Takes a connected socket, however it came."""
        sock.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(self._arrive, sock)

    def stop_listening(self) -> None:
        """Takes no more connections; those that are open go on."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def close(self, code: int = 1012, *, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Closes every client with ``code``; aborts those that have not answered after ``timeout`` seconds."""
        self._closing = True
        self.stop_listening()
        reason = _restarting()
        for arrival in list(self._arrivals):
            arrival.refuse(reason)
        for relay in list(self._relays):
            relay.close(code, reason.close_reason())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout)
        for arrival in list(self._arrivals):
            arrival.abort()
        for relay in list(self._relays):
            relay.abort()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), 1.0)

    # A connection's way in.

    def _arrive(self) -> Arrival:
        front = self._config().front
        return Arrival(
            timeout_s=front.handshake_timeout_s,
            user_timeout_s=front.stall_timeout_s,
            on_made=self._made,
            on_head=self._head,
            on_lost=self._lost,
        )

    def _made(self, arrival: Arrival) -> None:
        self._arrivals[arrival] = None
        self._empty.clear()
        if self._closing:
            self._refuse(arrival, _restarting())
            return
        limit = self._config().front.max_connections
        if len(self) > limit + _TOLD_OVER_LIMIT:
            REFUSED.labels(Code.MAILBOX_FULL.slug).inc()
            arrival.abort()
        elif len(self) > limit:
            hint = "try again later; operators raise front.max_connections"
            self._refuse(arrival, CortexError(Code.MAILBOX_FULL, "too many connections", hint=hint))

    def _head(self, arrival: Arrival, head: bytes) -> None:
        try:
            upgrade = read(head)
        except CortexError as error:
            self._refuse(arrival, error)
            return
        self._arrivals[arrival] = self._tasks.start(
            self._admit(arrival, upgrade), "admit", on_error=lambda error: self._refuse(arrival, _internal(error))
        )

    def _lost(self, arrival: Arrival) -> None:
        task = self._arrivals.pop(arrival, None)
        if task is not None:
            task.cancel()
        self._note_empty()

    async def _admit(self, arrival: Arrival, upgrade: Upgrade) -> None:
        try:
            session = await self._authorise(upgrade)
            relay = self._relay(arrival, upgrade, session)
        except CortexError as error:
            self._turn_away(arrival, upgrade, error)
            return
        log.info("client_attached", session=session.id, user=session.user, connection=relay.connection)
        self._relays[relay] = None
        headers = {"Acp-Connection-Id": relay.connection, "Cortex-Session": session.id}
        self._accept(arrival, upgrade, relay, headers)
        if not relay.gone:
            self._relays[relay] = self._tasks.start(
                self._tie(relay, upgrade, session), "tie", on_error=lambda error: relay.fail(_internal(error))
            )

    async def _authorise(self, upgrade: Upgrade) -> SessionPort:
        self._access.check_host(upgrade.host)
        self._access.check_origin(upgrade.origin)
        if upgrade.protocol is None:
            hint = "open a WebSocket at /acp, or /raw for agents with a WebSocket of their own"
            raise CortexError(Code.NOT_FOUND, "nothing is here", hint=hint)
        if not upgrade.token and not upgrade.ticket:
            hint = "send Authorization: Bearer TOKEN, the subprotocol bearer.TOKEN or ?ticket="
            raise CortexError(Code.TOKEN_MISSING, "no token", hint=hint)
        try:
            async with asyncio.timeout(self._config().front.handshake_timeout_s):
                if upgrade.ticket:
                    grant = await self._access.redeem(upgrade.ticket)
                else:
                    grant = await self._access.verify(upgrade.token)
                session = self._registry.held(grant.user, grant.workspace)
                if session is None:
                    session = await self._registry.load(grant.user, grant.workspace)
        except TimeoutError as error:
            hint = "try again later"
            raise CortexError(Code.MAILBOX_FULL, "the token could not be checked in time", hint=hint) from error
        if session.protocol != _AGENT_PROTOCOL[upgrade.protocol]:
            path = "/acp" if session.protocol == "acp" else "/raw"
            raise CortexError(Code.WRONG_PROTOCOL, "this agent does not speak that", hint=f"connect to {path}")
        return session

    def _relay(self, arrival: Arrival, upgrade: Upgrade, session: SessionPort) -> Relay:
        """A relay that its session counts. Raises ``SESSION_BUSY``."""
        if arrival.transport is None:
            raise CortexError(Code.BAD_REQUEST, "the client has gone", hint="stay until the handshake is answered")
        if self._closing:
            raise _restarting()
        relay = Relay(
            connection=str(uuid.uuid4()),
            cortex=upgrade.cortex,
            agent=session.agent,
            config=self._config().front,
            transport=arrival.transport,
            on_gone=lambda relay: self._gone(relay, session),
        )
        session.attach(relay)
        return relay

    def _accept(self, arrival: Arrival, upgrade: Upgrade, relay: Relay, headers: dict[str, str]) -> None:
        transport = arrival.transport
        del self._arrivals[arrival]
        if transport is None:
            relay.client_lost()
            return
        transport.write(accept(upgrade, headers))
        arrival.hand_over()
        relay.accepted(arrival.rest())

    async def _tie(self, relay: Relay, upgrade: Upgrade, session: SessionPort) -> None:
        """Waits for the sandbox and ties the client to a stream of its own."""
        assert upgrade.protocol is not None
        attach = Attach(connection=relay.connection, protocol=upgrade.protocol, cortex=upgrade.cortex)
        if session.state != "ready":
            relay.notify(_status(session.state))
        config = self._config()
        deadline = config.session.bringup_timeout_s + config.sandbox.package_timeout_s + _STREAM_SLACK_S
        try:
            async with asyncio.timeout(deadline):
                sock = await session.open_stream(attach)
        except CortexError as error:
            relay.notify(_status("failed", error))
            relay.fail(error)
            return
        except TimeoutError:
            hint = "connect again; cortex session timeline shows where it waits"
            relay.fail(CortexError(Code.BRINGUP_TIMEOUT, "the sandbox did not come up in time", hint=hint))
            return
        await asyncio.get_running_loop().connect_accepted_socket(relay.agent_side, sock)
        relay.tie()

    def _gone(self, relay: Relay, session: SessionPort) -> None:
        task = self._relays.pop(relay, None)
        if task is not None:
            task.cancel()
        session.detach(relay)
        log.info("client_gone", session=session.id, user=session.user, connection=relay.connection, code=relay.code)
        self._note_empty()

    # Refusals.

    def _turn_away(self, arrival: Arrival, upgrade: Upgrade, error: CortexError) -> None:
        """An HTTP error, or for a client that cannot read one a close frame at once."""
        if not upgrade.blind or arrival.transport is None:
            self._refuse(arrival, error)
            return
        REFUSED.labels(error.code.slug).inc()
        relay = Relay(
            connection="",
            cortex=False,
            agent="",
            config=self._config().front,
            transport=arrival.transport,
            on_gone=self._turned_away,
        )
        self._relays[relay] = None
        self._accept(arrival, upgrade, relay, {})
        relay.fail(error)

    def _turned_away(self, relay: Relay) -> None:
        self._relays.pop(relay, None)
        self._note_empty()

    def _refuse(self, arrival: Arrival, error: CortexError) -> None:
        REFUSED.labels(error.code.slug).inc()
        arrival.refuse(error)

    def _note_empty(self) -> None:
        if not self._arrivals and not self._relays:
            self._empty.set()


def _restarting() -> CortexError:
    return CortexError(Code.RESTARTING, "the broker is restarting", hint="connect again; nothing is lost")


def _internal(error: BaseException) -> CortexError:
    log.error("front_door_failed", exc_info=error)
    return CortexError(Code.INTERNAL, "the broker failed", hint="connect again; the broker's log says why")


def _status(state: str, error: CortexError | None = None) -> bytes:
    params: dict[str, Any] = {"state": state}
    if error is not None:
        params |= {"code": error.code.slug, "what": error.what, "hint": error.hint}
    return json.dumps({"jsonrpc": "2.0", "method": "_cortex/status", "params": params}).encode()
