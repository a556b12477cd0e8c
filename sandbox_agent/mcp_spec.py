"""A configured MCP server, checked. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sandbox_agent import jsonrpc


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How a server is started."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Of its cached lists: the same for the same program, whatever it is called and whichever secrets are
        in its environment."""
        parts = [self.command, list(self.args), sorted(name for name, _ in self.env)]
        return hashlib.sha256(jsonrpc.dumps(parts)).hexdigest()[:32]


def parse(server: Any) -> ServerSpec:
    """An ACP stdio ``McpServer``: {name, command, args, env: [{name, value}]}. Raises ``ValueError``."""
    if not isinstance(server, dict):
        raise ValueError("it is not an object")
    name, command = server.get("name"), server.get("command")
    args, env = server.get("args", []), server.get("env", [])
    if server.get("type", "stdio") != "stdio":
        raise ValueError(f"its type {str(server['type'])[:40]!r} is not stdio")
    if not _text(name) or not name:
        raise ValueError("its name is not a text")
    if not _text(command) or not command:
        raise ValueError("its command is not a text")
    if not isinstance(args, list) or not all(_text(arg) for arg in args):
        raise ValueError("its args are not a list of texts")
    if not isinstance(env, list) or not all(_variable(pair) for pair in env):
        raise ValueError("its env is not a list of {name, value}")
    return ServerSpec(name, command, tuple(args), tuple((pair["name"], pair["value"]) for pair in env))


def _text(value: Any) -> bool:
    """A text that can be part of a command line."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _variable(pair: Any) -> bool:
    if not isinstance(pair, dict) or not _text(pair.get("name")) or not _text(pair.get("value")):
        return False
    return pair["name"] != "" and "=" not in pair["name"]
