"""What a bind sets for conversations to come: MCP servers, the workspace, whose servers are allowed."""

from __future__ import annotations

from typing import Any

from sandbox_agent.workspace import Workspace

MAX_CLIENT_SERVERS = 64


class AgentSettings:
    """``version`` goes up when the MCP servers change, so that conversations know what they were opened with."""

    def __init__(self, home: str) -> None:
        self.workspace = Workspace(home)
        self.version = 0
        self._allow_client_mcp = False
        self._servers: list[dict[str, Any]] = []

    def set_servers(self, servers: list[dict[str, Any]]) -> None:
        """The configured MCP servers (ACP ``McpServer`` objects)."""
        if servers != self._servers:
            self._servers = [dict(server) for server in servers]
            self.version += 1

    def set(self, settings: dict[str, Any]) -> None:
        """``{"allow_client_mcp": bool, "workspace": str}``; what is missing is the default."""
        self._allow_client_mcp = settings.get("allow_client_mcp") is True
        path = settings.get("workspace")
        self.workspace.set(path if isinstance(path, str) and "\0" not in path else "")

    def client_servers(self, wanted: Any) -> list[dict[str, Any]]:
        """Of the servers that a client names those it may have: none unless the user's settings allow it."""
        if not self._allow_client_mcp or not isinstance(wanted, list):
            return []
        named = [s for s in wanted if isinstance(s, dict) and isinstance(s.get("name"), str)]
        return named[:MAX_CLIENT_SERVERS]

    def servers(self, clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For ``session/new``: the configured ones, then a client's with other names."""
        taken = {server.get("name") for server in self._servers}
        return [*self._servers, *(server for server in clients if server["name"] not in taken)]
