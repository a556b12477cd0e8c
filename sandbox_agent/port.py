"""The port between the agent's process (``process``) and ACP in the middle (``acp``)."""

from __future__ import annotations

import socket
from typing import Any, Protocol

from sandbox_agent.wire.messages import AgentSpec, Attach


class AgentChannel(Protocol):
    """The agent's standard streams, as far as the hub works them."""

    @property
    def congested(self) -> bool:
        """More is buffered than the agent takes; hold prompts back."""

    def write(self, line: bytes) -> None:
        """Sends one JSON-RPC message, newline included. Never blocks, never fails."""

    def hold(self, held: bool) -> None:
        """Reads no more of the agent's output (the journal has no space), or goes on. Idempotent."""


class AgentHub(Protocol):
    """An ACP server to clients and an ACP client to the agent. All but ``close`` are synchronous."""

    agent_info: str
    """The agent's ``initialize`` result as JSON text; empty until it is held."""
    open_turns: int
    clients: int
    turns: int
    """Prompts accepted."""
    ahead: str
    """The conversation that is opened ahead: empty (none), opening, open, or failed."""

    @property
    def pending(self) -> int:
        """What is under way beside turns: requests that the agent has not answered, clients with messages that wait,
        MCP servers that start."""

    def claim(self, *, moved: bool, keep_ahead: bool) -> None:
        """The sandbox is somebody's from now on: the journal may be opened. ``moved``: the home is another;
        ``keep_ahead``: what was opened ahead may serve."""

    def agent_up(self, channel: AgentChannel, spec: AgentSpec) -> None:
        """The process runs; the hub sends ``initialize`` itself."""

    def agent_lines(self, lines: list[bytes]) -> None:
        """Whole lines of standard output, without their newlines."""

    def agent_down(self, what: str, *, final: bool) -> None:
        """The process ended. ``final``: it will not be restarted."""

    def serve(self, sock: socket.socket, attach: Attach) -> None:
        """A client's stream, non-blocking; the hub owns it from here."""

    def set_mcp(self, servers: list[dict[str, Any]]) -> str:
        """ACP ``McpServer`` objects for conversations; returns the effect: now, next_turn or next_session."""

    def set_settings(self, settings: dict[str, Any]) -> str:
        """``{"allow_client_mcp": bool, "workspace": str, "open_ahead": bool}``; returns the effect."""

    async def close(self) -> None:
        """Syncs the journal and lets clients go."""
