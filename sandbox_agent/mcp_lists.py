"""Reads a server's lists, page by page."""

from __future__ import annotations

from typing import Any

from sandbox_agent import mcp_protocol
from sandbox_agent.mcp_peer import Peer
from sandbox_agent.mcp_protocol import KINDS, Items, Listing, McpError

MAX_PAGES = 100
MAX_ITEMS = 2000
PAGE_S = 20.0
MAX_INSTRUCTIONS = 8192
"""Characters."""


async def fetch(server: Peer, kind: str) -> Items:
    """All items of a list, ``MAX_ITEMS`` at most; none when the server refuses. Raises ``Gone``."""
    about = KINDS[kind]
    found: Items = []
    cursor: Any = None
    seen: set[str] = set()
    for _ in range(MAX_PAGES):
        try:
            page = await server.query(about.method, {} if cursor is None else {"cursor": cursor}, PAGE_S)
        except McpError:
            break  # it has said that it can, and cannot; seen of resources/templates/list
        if not isinstance(page, dict):
            break
        found += mcp_protocol.items(page.get(about.field), about.key)
        cursor = page.get("nextCursor")
        if not isinstance(cursor, str) or cursor in seen or len(found) >= MAX_ITEMS:
            break
        seen.add(cursor)
    return found[:MAX_ITEMS]


def greeting(answer: Any) -> Listing:
    """What the answer to ``initialize`` says, lists still empty. Raises ``ValueError``."""
    if not isinstance(answer, dict):
        raise ValueError("its answer to initialize is not an object")
    version = answer.get("protocolVersion")
    if version not in mcp_protocol.VERSIONS:
        raise ValueError(f"it speaks version {str(version)[:40]!r}, which is none of ours")
    capabilities, instructions = answer.get("capabilities"), answer.get("instructions")
    return Listing(
        capabilities=capabilities if isinstance(capabilities, dict) else {},
        instructions=instructions[:MAX_INSTRUCTIONS] if isinstance(instructions, str) else "",
    )
