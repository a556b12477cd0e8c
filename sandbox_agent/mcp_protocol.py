"""MCP as the multiplexer needs it: versions, lists, messages. Pure.

Source: modelcontextprotocol.io/specification/2025-11-25. Revision 2026-07-28 does away with ``initialize``;
who speaks it and hears that ``server/discover`` is unknown falls back to ``initialize`` (its section
"Versioning and Compatibility"), and so does every server that speaks both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sandbox_agent import jsonrpc
from sandbox_agent.jsonrpc import Message

VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05", "2024-10-07")
"""That we speak, newest first; all by the same code."""
MAX_LINE = 8 * 2**20
"""Longest message, in bytes, in either direction."""
RESOURCE_NOT_FOUND = -32002

LOG_LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
Id = str | int | float | None


class Kind(NamedTuple):
    """A list that a server has: how it is asked for, where it stands in the result, what names an item, the
    capability that says that there is one."""

    method: str
    field: str
    key: str
    capability: str

    @property
    def changed(self) -> str:
        """The notification that says that it changed."""
        return f"notifications/{self.capability}/list_changed"


KINDS = {
    "tools": Kind("tools/list", "tools", "name", "tools"),
    "prompts": Kind("prompts/list", "prompts", "name", "prompts"),
    "resources": Kind("resources/list", "resources", "uri", "resources"),
    "templates": Kind("resources/templates/list", "resourceTemplates", "uriTemplate", "resources"),
}
BY_METHOD = {kind.method: name for name, kind in KINDS.items()}

Items = list[dict[str, Any]]


@dataclass(slots=True)
class Listing:
    """What a server said it has. ``lists`` by name of the kind; a kind it has none of is missing."""

    capabilities: dict[str, Any] = field(default_factory=dict)
    instructions: str = ""
    lists: dict[str, Items] = field(default_factory=dict)

    def can(self, capability: str) -> bool:
        return isinstance(self.capabilities.get(capability), dict)

    def subscribes(self) -> bool:
        """Resources can be subscribed to."""
        resources = self.capabilities.get("resources")
        return isinstance(resources, dict) and resources.get("subscribe") is True


class McpError(Exception):
    """The other side answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def agreed(wanted: Any) -> str:
    """The version to answer a client with: its own if we speak it, else our newest."""
    return wanted if wanted in VERSIONS else VERSIONS[0]


def request(number: int, method: str, params: dict[str, Any]) -> Message:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def notification(method: str, params: dict[str, Any] | None = None) -> Message:
    return {"jsonrpc": "2.0", "method": method} | ({} if params is None else {"params": params})


def result(request_id: Id, value: Any) -> Message:
    return {"jsonrpc": "2.0", "id": request_id, "result": value}


def error(request_id: Id, code: int, message: str) -> Message:
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}


def failure(request_id: Id, method: str, what: str) -> Message:
    """No answer is to be had. Of a tool it is told as the tool's own, so that the model reads it."""
    if method == "tools/call":
        return result(request_id, {"content": [{"type": "text", "text": what}], "isError": True})
    return error(request_id, jsonrpc.INTERNAL_ERROR, what)


def items(value: Any, key: str) -> Items:
    """Of ``value`` what is an object with a text at ``key``."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict) and isinstance(item.get(key), str)]


def messages(line: bytes) -> list[Any]:
    """The messages on a line; more than one only in a batch (2025-03-26). Raises ``ValueError``."""
    value = jsonrpc.parse(line)
    if value == []:
        raise ValueError("an empty batch")
    return value if isinstance(value, list) else [value]


def params(message: Message) -> dict[str, Any]:
    """The params; none where they are no object."""
    found = message.get("params")
    return found if isinstance(found, dict) else {}


def token_of(params: dict[str, Any]) -> Any:
    """``params._meta.progressToken``; None when there is none."""
    meta = params.get("_meta")
    token = meta.get("progressToken") if isinstance(meta, dict) else None
    return token if jsonrpc.is_id(token) else None


def with_token(params: dict[str, Any], token: int) -> dict[str, Any]:
    """The params with another progress token; they have one."""
    return {**params, "_meta": {**params["_meta"], "progressToken": token}}
