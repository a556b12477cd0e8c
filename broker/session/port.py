"""What the front door and the control API ask of sessions, and what a session asks of a client.

``session`` never imports ``front``: the front door's relay satisfies ``AttachedClient``.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sandbox_agent.wire.messages import Attach

State = Literal["stopped", "starting", "ready", "paused", "stopping", "failed"]


class AttachedClient(Protocol):
    """One client connection, as its session sees it. All calls are synchronous and never fail."""

    connection: str

    @property
    def spoke_at(self) -> float:
        """When it last had something for the agent; monotonic seconds, true to a few."""

    def hold(self, on_speech: Callable[[], None] | None = None) -> None:
        """Stops forwarding the client's frames at the next frame boundary. ``on_speech`` is called once, when the
        client has something for the agent meanwhile (pings are not)."""

    def release(self) -> None:
        """Forwards again, what was held first."""

    def notify(self, message: bytes) -> None:
        """Sends one JSON text as a frame of its own, at a frame boundary; only to ``cortex.acp.v1`` clients."""

    def close(self, code: int, reason: str) -> None:
        """Closes the client with a close frame, at a frame boundary."""


@dataclass(frozen=True)
class Applied:
    """What a configuration change did to one session. ``effect`` by part: now, next_turn,
    next_session, next_start; ``state``: applied, stored (nothing runs) or failed (then ``error``)."""

    user: str
    workspace: str
    state: Literal["applied", "stored", "failed"]
    effect: Mapping[str, str]
    error: Mapping[str, Any] | None = None


class SessionPort(Protocol):
    """A session in memory. ``id`` is opaque and stable over restarts of the broker."""

    id: str
    user: str
    workspace: str
    agent: str

    @property
    def protocol(self) -> Literal["acp", "websocket"]: ...

    @property
    def state(self) -> State: ...

    def attach(self, client: AttachedClient) -> None:
        """Counts the client in and starts a bring-up when none runs. Raises ``SESSION_BUSY``."""

    def detach(self, client: AttachedClient) -> None:
        """Counts it out; never stops anything. Idempotent."""

    async def open_stream(self, attach: Attach) -> socket.socket:
        """A stream of the agent server, ``attach`` already written: a connected, non-blocking Unix
        socket that the caller now owns. On a ready session it returns without waiting; else it waits
        for the bring-up. Raises ``CortexError`` when that fails."""

    async def wait_ready(self) -> None:
        """Brings the session up if need be; returns when it is ready. Raises ``CortexError``."""

    def prewarm(self, *, announced: bool = True) -> None:
        """Somebody will come, at any moment where it was ``announced``: has it ready for them. No use of it."""

    async def let_go(self) -> None:
        """Nobody is expected any more: stops what was made ready ahead, unless it is of use. Raises ``CortexError``."""

    async def stop(self) -> None:
        """Stops the sandbox; the session, its home and its journal stay."""

    async def config_changed(self, section: str) -> Applied:
        """Assembles, binds, returns when acknowledged (at once when nothing runs)."""

    def close_clients(self, code: int, reason: str) -> int:
        """Closes every attached client; returns how many."""

    def view(self) -> dict[str, Any]:
        """JSON-safe facts for operators: session, user, workspace, agent, state, reason, clients, …"""

    def timeline(self) -> list[dict[str, Any]]:
        """The last bring-ups, newest first: path, driver, started_at, total_ms, stages[{stage, start_ms, ms}]."""


class RegistryPort(Protocol):
    """The one place that answers whose a session is."""

    def held(self, user: str, workspace: str) -> SessionPort | None:
        """The session if it is in memory; no I/O."""

    async def create(self, user: str, workspace: str, agent: str | None) -> tuple[SessionPort, bool]:
        """Creates or loads, and starts its bring-up without waiting; the flag says created.

        Raises ``UNKNOWN_AGENT`` or ``SESSION_CONFLICT`` (other agent)."""

    async def prewarm(
        self, user: str, workspace: str, agent: str | None = None, *, create: bool = False, announced: bool = False
    ) -> SessionPort:
        """Has a session ready ahead, for somebody who will come. Raises ``NO_SESSION``, unless it may ``create`` it."""

    async def load(self, user: str, workspace: str) -> SessionPort:
        """Raises ``NO_SESSION``."""

    async def list(self, *, after: str = "", limit: int = 100) -> tuple[list[dict[str, Any]], str]:
        """A page of views of stored sessions by user and workspace, and the next cursor ("" at the end)."""

    async def delete(self, user: str, workspace: str) -> None:
        """Stops it and erases its row, home and journal. Raises ``NO_SESSION``."""

    async def erase_user(self, user: str) -> int:
        """Everything of that user; returns the number of sessions erased."""

    async def config_changed(self, user: str, section: str) -> Sequence[Applied]:
        """Tells every held session of the user."""
