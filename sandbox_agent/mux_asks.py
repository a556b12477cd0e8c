"""What servers say by themselves: their requests go to the client whose call is running, their notifications to
those whom they concern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from sandbox_agent import jsonrpc, mcp_protocol
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_peer import Crossing, cross
from sandbox_agent.mcp_protocol import LOG_LEVELS
from sandbox_agent.mcp_server import Server
from sandbox_agent.mux_board import Board
from sandbox_agent.mux_client import Client

MAX_ASKS = 32
"""Requests of one server under way."""
NEEDS = {"roots/list": "roots", "sampling/createMessage": "sampling", "elicitation/create": "elicitation"}
"""Method → the capability that a client must have."""
ASSUMED: dict[str, Any] = {"roots": {"listChanged": True}, "elicitation": {}}
"""What servers are told of clients before the first has said what it can."""


def features(client: Client) -> dict[str, Any]:
    """What servers that are started from now on may count on; roots we can always tell."""
    shared = {name: client.capabilities[name] for name in ("sampling", "elicitation") if client.can(name)}
    return {"roots": {"listChanged": True}, **shared}


class Asks:
    """``directory``: where agents work."""

    def __init__(self, board: Board, directory: Callable[[], str]) -> None:
        self._board = board
        self._directory = directory

    def asked(self, server: Server, message: Message) -> None:
        """A request of a server."""
        request_id, method = message["id"], message["method"]
        if method == "ping":
            server.send(mcp_protocol.result(request_id, {}))
            return
        if method not in NEEDS or request_id is None or request_id in server.asking:
            what = f"unknown method {method[:80]!r}, or an id that is null or in use"
            server.send(mcp_protocol.error(request_id, jsonrpc.METHOD_NOT_FOUND, what))
            return
        client = self._caller(server, NEEDS[method])
        if client is not None and len(server.asking) < MAX_ASKS:
            cross(server, message, client, mcp_protocol.params(message))
        elif method == "roots/list":
            server.send(mcp_protocol.result(request_id, {"roots": [self._root()]}))
        else:
            what = "too many requests are under way" if client else "no call is running whose client can do that"
            server.send(mcp_protocol.error(request_id, jsonrpc.METHOD_NOT_FOUND, what))

    def told(self, server: Server, message: Message) -> None:
        """A notification of a server."""
        method, params = message["method"], mcp_protocol.params(message)
        if method == "notifications/cancelled":
            server.cancelled(params)
        elif method == "notifications/message":
            self._log(server, params)
        elif method == "notifications/resources/updated":
            self._updated(server, params)
        elif method == "notifications/elicitation/complete":
            for client in self._board.clients:
                if client.can("elicitation"):
                    client.send(message)
        elif method.startswith("notifications/") and method.endswith("/list_changed"):
            server.relist(method.split("/")[1])

    def _caller(self, server: Server, capability: str) -> Client | None:
        """Whose call is running; of several the one who called last. MCP does not say which call a request is for."""
        for pending in reversed(server.open.values()):
            source = pending.source if isinstance(pending, Crossing) else None
            if isinstance(source, Client) and source.can(capability):
                return source
        return None

    def _root(self) -> dict[str, str]:
        directory = self._directory()
        return {"uri": f"file://{quote(directory)}", "name": directory.rstrip("/").rpartition("/")[2] or "/"}

    def _log(self, server: Server, params: dict[str, Any]) -> None:
        level, logger = params.get("level"), params.get("logger")
        if level not in LOG_LEVELS:
            return
        name = f"{server.spec.name}: {logger}" if isinstance(logger, str) else server.spec.name
        told = mcp_protocol.notification("notifications/message", {**params, "logger": name})
        for client in self._board.clients:
            if client.ready and (not client.level or LOG_LEVELS.index(level) >= LOG_LEVELS.index(client.level)):
                client.send(told)

    def _updated(self, server: Server, params: dict[str, Any]) -> None:
        uri = params.get("uri")
        if not isinstance(uri, str):
            return
        name = server.spec.name
        # The URI may be of something below what was subscribed to.
        routes = [route for route in self._board.subscriptions(server=name) if uri.startswith(route[1])]
        clients = {client for route in routes for client in self._board.subscribers(route)}
        public = self._board.catalog.public_uri(name, uri)
        for client in clients:
            client.send(mcp_protocol.notification("notifications/resources/updated", {**params, "uri": public}))
