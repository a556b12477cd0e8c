"""What clients of the multiplexer ask: answered from the lists, or sent on to the server that it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from sandbox_agent import jsonrpc, mcp_protocol
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_catalog import Route
from sandbox_agent.mcp_names import MUX
from sandbox_agent.mcp_peer import Finish, cross
from sandbox_agent.mcp_protocol import BY_METHOD, LOG_LEVELS, RESOURCE_NOT_FOUND, Id
from sandbox_agent.mux_board import Board
from sandbox_agent.mux_client import Client
from sandbox_agent.mux_content import Content

LIST_WAIT_S = 5.0
"""How long a client waits for lists of servers that have not said yet what they have."""
MAX_OPEN = 256
"""Requests of one client under way."""
MAX_INSTRUCTIONS = 16_384


class Requests:
    """Serves clients from the board. ``on_client``: one has said what it can."""

    def __init__(self, board: Board, on_client: Callable[[Client], None]) -> None:
        self._board = board
        self._content = Content(board)
        self._on_client = on_client
        self._methods: dict[str, Callable[[Client, Message, dict[str, Any]], None]] = {
            "initialize": self._initialize,
            "ping": lambda client, message, _: client.send(mcp_protocol.result(message["id"], {})),
            "tools/call": self._named,
            "prompts/get": self._named,
            "resources/read": self._read,
            "resources/subscribe": self._subscribe,
            "resources/unsubscribe": self._unsubscribe,
            "completion/complete": self._complete,
            "logging/setLevel": self._set_level,
        }
        self._methods |= dict.fromkeys(BY_METHOD, self._list)

    def asked(self, client: Client, message: Message) -> None:
        """A request."""
        request_id, method = message["id"], message["method"]
        act = self._methods.get(method)
        if request_id is None or client.busy(request_id):
            client.send(mcp_protocol.error(request_id, jsonrpc.INVALID_REQUEST, "this id is null or in use"))
        elif act is None:
            client.send(mcp_protocol.error(request_id, jsonrpc.METHOD_NOT_FOUND, f"unknown method {method[:80]!r}"))
        elif len(client.asking) + len(client.waiting) >= MAX_OPEN:
            client.send(mcp_protocol.failure(request_id, method, f"over {MAX_OPEN} requests are under way"))
        else:
            act(client, message, mcp_protocol.params(message))

    def cancelled(self, client: Client, params: dict[str, Any]) -> None:
        """The client wants no answer any more."""
        request_id = params.get("requestId")
        waiting = client.waiting.pop(request_id, None) if jsonrpc.is_id(request_id) else None
        if waiting is not None:
            waiting[1].cancel()
        else:
            client.cancelled(params)

    def settle(self) -> None:
        """Gives lists that are known now to those who wait for them."""
        for client in self._board.clients:
            for request_id, (kind, _) in list(client.waiting.items()):
                if self._board.known(kind):
                    self._give(client, request_id, kind)

    # -- from the lists -------------------------------------------------------------------------

    def _initialize(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        capabilities = params.get("capabilities")
        client.capabilities = capabilities if isinstance(capabilities, dict) else {}
        self._on_client(client)
        catalog = self._board.catalog
        client.seen = dict(self._board.versions)  # what it asks for from now on is no older
        able: dict[str, Any] = {
            "tools": {"listChanged": True},
            "prompts": {"listChanged": True},
            "resources": {"listChanged": True, "subscribe": True},
        }
        able |= {name: {} for name in ("logging", "completions") if catalog.can(name)}
        answer = {
            "protocolVersion": mcp_protocol.agreed(params.get("protocolVersion")),
            "capabilities": able,
            "serverInfo": {"name": MUX, "title": "MCP servers of this session", "version": "1"},
        }
        if instructions := catalog.instructions():
            answer["instructions"] = instructions[:MAX_INSTRUCTIONS]
        client.send(mcp_protocol.result(message["id"], answer))

    def _list(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        kind, request_id = BY_METHOD[message["method"]], message["id"]
        if params.get("cursor") is not None:
            self._invalid(client, message, "there is one page; this cursor is not ours")
        elif self._board.known(kind):
            self._give(client, request_id, kind)
        else:
            timer = asyncio.get_running_loop().call_later(LIST_WAIT_S, self._give, client, request_id, kind)
            client.waiting[request_id] = kind, timer

    def _give(self, client: Client, request_id: Id, kind: str) -> None:
        waiting = client.waiting.pop(request_id, None)
        if waiting is not None:
            waiting[1].cancel()
        body = self._board.catalog.bodies[kind]
        client.seen[kind] = self._board.versions[kind]
        client.send_result(request_id, body)

    def _set_level(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        if params.get("level") not in LOG_LEVELS:
            self._invalid(client, message, f"level is one of {', '.join(LOG_LEVELS)}")
            return
        client.level = params["level"]
        for server in self._board.servers.values():
            self._board.tell_level(server)
        client.send(mcp_protocol.result(message["id"], {}))

    # -- sent on --------------------------------------------------------------------------------

    def _named(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        """``tools/call`` and ``prompts/get``."""
        kind, name = message["method"].split("/")[0], params.get("name")
        route = self._board.catalog.named(kind, name) if isinstance(name, str) else None
        if route is None:
            self._invalid(client, message, f"unknown {kind[:-1]} {str(name)[:80]!r}")
        else:
            finish = self._content.called if kind == "tools" else self._content.prompted
            self._send_on(client, message, route, {**params, "name": route[1]}, partial(finish, route[0]))

    def _read(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        route = self._located(client, message, params)
        if route is not None:
            self._send_on(client, message, route, {**params, "uri": route[1]}, partial(self._content.read, route[0]))

    def _subscribe(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        route = self._located(client, message, params)
        if route is None:
            return
        listing = self._board.servers[route[0]].listing
        if listing is not None and not listing.subscribes():
            what = f"MCP server {route[0]!r} has no subscriptions"
            client.send(mcp_protocol.error(message["id"], jsonrpc.METHOD_NOT_FOUND, what))
            return
        first = self._board.subscribe(client, route)
        if first is None:
            self._invalid(client, message, "too many subscriptions")
        elif first:
            self._send_on(client, message, route, {**params, "uri": route[1]})
        else:
            client.send(mcp_protocol.result(message["id"], {}))

    def _unsubscribe(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        route = self._located(client, message, params)
        if route is None:
            return
        if self._board.unsubscribe(client, route):
            self._send_on(client, message, route, {**params, "uri": route[1]})
        else:
            client.send(mcp_protocol.result(message["id"], {}))

    def _complete(self, client: Client, message: Message, params: dict[str, Any]) -> None:
        ref = params.get("ref")
        ref = ref if isinstance(ref, dict) else {}
        key = "name" if ref.get("type") == "ref/prompt" else "uri"
        wanted, route = ref.get(key), None
        if isinstance(wanted, str):
            catalog = self._board.catalog
            route = catalog.named("prompts", wanted) if key == "name" else catalog.located(wanted, self._board.hints)
        if route is None:
            self._invalid(client, message, "ref is neither a known prompt nor a known resource")
            return
        listing = self._board.servers[route[0]].listing
        if listing is not None and not listing.can("completions"):
            client.send(mcp_protocol.result(message["id"], {"completion": {"values": []}}))
            return
        self._send_on(client, message, route, {**params, "ref": {**ref, key: route[1]}})

    def _located(self, client: Client, message: Message, params: dict[str, Any]) -> Route | None:
        """The resource that is meant; None: the client has been told that there is none."""
        uri = params.get("uri")
        route = self._board.catalog.located(uri, self._board.hints) if isinstance(uri, str) else None
        if route is None:
            what = f"unknown resource {str(uri)[:200]!r}"
            client.send(mcp_protocol.error(message["id"], RESOURCE_NOT_FOUND, what))
        return route

    def _send_on(
        self, client: Client, message: Message, route: Route, params: dict[str, Any], finish: Finish | None = None
    ) -> None:
        server = self._board.servers[route[0]]
        if why := server.refusal():
            client.send(mcp_protocol.failure(message["id"], message["method"], why))
        else:
            cross(client, message, server, params, finish=finish)

    @staticmethod
    def _invalid(client: Client, message: Message, what: str) -> None:
        client.send(mcp_protocol.error(message["id"], jsonrpc.INVALID_PARAMS, what))
