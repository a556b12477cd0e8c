"""What a bind sets for conversations to come: the workspace, whose MCP servers are allowed, what is opened ahead."""

from __future__ import annotations

from typing import Any

from sandbox_agent.workspace import Workspace

MAX_CLIENT_SERVERS = 64


class AgentSettings:
    """``open_ahead``: a conversation is to be opened before its client asks."""

    def __init__(self, home: str) -> None:
        self.workspace = Workspace(home)
        self.open_ahead = False
        self._allow_client_mcp = False

    def set(self, settings: dict[str, Any]) -> None:
        """``{"allow_client_mcp": bool, "workspace": str, "open_ahead": bool}``; what is missing is the default."""
        self._allow_client_mcp = settings.get("allow_client_mcp") is True
        self.open_ahead = settings.get("open_ahead") is True
        path = settings.get("workspace")
        self.workspace.set(path if isinstance(path, str) and "\0" not in path else "")

    def client_servers(self, wanted: Any) -> list[dict[str, Any]]:
        """Of the servers that a client names those it may have: none unless the user's settings allow it."""
        if not self._allow_client_mcp or not isinstance(wanted, list):
            return []
        named = [s for s in wanted if isinstance(s, dict) and isinstance(s.get("name"), str)]
        return named[:MAX_CLIENT_SERVERS]
