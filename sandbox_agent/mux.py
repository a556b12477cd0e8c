"""The MCP multiplexer: one MCP server for agents, behind it the servers of the user, each running once.

Agents are given ``entry()``: a small program (``mux_shim``) that joins its stdin and stdout with our socket. A
connection is a conversation. Servers come and go while conversations are open; agents are told that lists changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from sandbox_agent import mcp_protocol, mcp_spec, mux_asks, mux_shim
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_cache import ListCache
from sandbox_agent.mcp_names import MUX
from sandbox_agent.mcp_protocol import KINDS, Listing
from sandbox_agent.mcp_server import Server
from sandbox_agent.mcp_spec import ServerSpec
from sandbox_agent.mux_asks import Asks
from sandbox_agent.mux_board import Board
from sandbox_agent.mux_client import Client
from sandbox_agent.mux_requests import Requests
from sandbox_agent.tasks import TaskOwner, log

MAX_CLIENTS = 64
MAX_SERVERS = 64
CHANGE_PAUSE_S = 0.03
"""Changes that come within it are told as one."""
FOLLOW_S = 1.0
"""Who does not list other tools within it does not follow changes."""
CLOSE_S = 6.0
"""For all servers together; each is killed before that."""


class Mux:
    """``env`` and ``cwd`` are those of servers, asked for at each start; ``cache_dir`` lies below HOME, None: there is
    no home yet. ``on_change``: ``settled``, ``followed`` or ``problems`` are others."""

    def __init__(
        self,
        run_dir: str,
        env: Callable[[], dict[str, str]],
        cwd: Callable[[], str],
        cache_dir: Callable[[], str | None],
        on_change: Callable[[], None],
    ) -> None:
        self._path = os.path.join(run_dir, "mcp")
        self._env = env
        self._cwd = cwd
        self._on_change = on_change
        self._cache = ListCache(lambda: env().get("HOME", "/"), cache_dir)
        self._board = Board()
        self._asks = Asks(self._board, cwd)
        self._requests = Requests(self._board, self._introduced)
        self._features: dict[str, Any] = mux_asks.ASSUMED
        self._invalid: dict[str, str] = {}
        self._tasks = TaskOwner("mux")
        self._runs: dict[Server, asyncio.Task[None]] = {}
        self._listener: asyncio.Server | None = None
        self._closed = False
        self._telling: asyncio.TimerHandle | None = None
        self._told = self._versions()
        self._deaf: set[Client] = set()
        self._state: tuple[bool, bool, dict[str, str]] = (True, True, {})

    # -- for the hub ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens. Raises ``OSError``."""
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: Client(self), self._path)

    async def close(self) -> None:
        """Drops all clients and ends all servers."""
        self._closed = True
        if self._listener is not None:
            self._listener.close()
        if self._telling is not None:
            self._telling.cancel()
        for client in list(self._board.clients):
            client.drop()
        for server in list(self._runs):
            server.stop()
        if self._runs:
            await asyncio.wait(list(self._runs.values()), timeout=CLOSE_S)
        await self._tasks.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def entry(self) -> dict[str, Any]:
        """The ACP stdio ``McpServer`` that conversations get; always the same."""
        return {"name": MUX, "command": sys.executable, "args": ["-I", "-S", mux_shim.__file__, self._path], "env": []}

    def set(self, servers: list[dict[str, Any]]) -> bool:
        """The servers there are to be (ACP stdio ``McpServer`` objects). True when something is another: what is new is
        started, what is gone is ended, what is equal keeps running."""
        wanted = self._checked(servers)
        current = {name: server.spec for name, server in self._board.servers.items()}
        if wanted == current and list(wanted) == list(current):
            self._noticed()
            return False
        self._take(wanted, again=False)
        return True

    def renew(self) -> None:
        """Starts all servers anew: their home is another."""
        self._take({name: server.spec for name, server in self._board.servers.items()}, again=True)

    @property
    def settled(self) -> bool:
        """Every server has listed its tools, has failed, or its list is known from an earlier run."""
        return self._board.known("tools")

    @property
    def followed(self) -> bool:
        """Nobody has yet to list tools again that are others now; who never does is not waited for."""
        now = self._board.current("tools")
        return all(
            not client.ready or client.seen.get("tools", now) == now for client in self._board.clients - self._deaf
        )

    def problems(self) -> dict[str, str]:
        """Server → why it is not up."""
        failed = {name: server.problem for name, server in self._board.servers.items() if server.problem}
        return self._invalid | failed

    # -- servers (mcp_server.Host) --------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        return self._env()

    def directory(self) -> str:
        return self._cwd()

    def features(self) -> dict[str, Any]:
        return self._features

    def save(self, spec: ServerSpec, listing: Listing) -> None:
        self._cache.save(spec.key, listing)

    def asked(self, server: Server, message: Message) -> None:
        self._asks.asked(server, message)

    def told(self, server: Server, message: Message) -> None:
        self._asks.told(server, message)

    def changed(self, server: Server) -> None:
        if self._board.servers.get(server.spec.name) is server:
            self._noticed()

    def up(self, server: Server) -> None:
        self._board.tell_level(server)
        self._board.tell_subscriptions(server)

    # -- clients (mux_client.Desk) --------------------------------------------------------------

    def came(self, client: Client) -> None:
        if self._closed or len(self._board.clients) >= MAX_CLIENTS:
            log.warning("an MCP client is refused: %d are there", len(self._board.clients))
            client.drop()
        else:
            self._board.clients.add(client)

    def left(self, client: Client) -> None:
        self._board.forget(client)
        self._deaf.discard(client)
        self._look()

    def heard(self, client: Client, kind: str, message: Message) -> None:
        if kind == "request":
            self._requests.asked(client, message)
            if message["method"] == KINDS["tools"].method:
                self._deaf.discard(client)
                self._look()
        elif kind == "response":
            client.answered(message)
        else:
            self._client_told(client, message["method"], mcp_protocol.params(message))

    def _client_told(self, client: Client, method: str, params: dict[str, Any]) -> None:
        if method == "notifications/initialized":
            client.ready = True
        elif method == "notifications/cancelled":
            self._requests.cancelled(client, params)
        elif method == "notifications/progress":
            client.progressed(params)
        elif method == "notifications/roots/list_changed":
            for server in self._board.servers.values():
                if server.state == "up":
                    server.send(mcp_protocol.notification(method))

    def _introduced(self, client: Client) -> None:
        self._features = mux_asks.features(client)

    # -- changes --------------------------------------------------------------------------------

    def _checked(self, servers: list[dict[str, Any]]) -> dict[str, ServerSpec]:
        wanted: dict[str, ServerSpec] = {}
        self._invalid = {}
        for each in servers[:MAX_SERVERS]:
            try:
                spec = mcp_spec.parse(each)
            except ValueError as error:
                name = each.get("name")
                self._invalid[name if isinstance(name, str) else ""] = f"MCP server {str(name)[:80]!r}: {error}"
            else:
                wanted[spec.name] = spec
        return wanted

    def _take(self, wanted: dict[str, ServerSpec], *, again: bool) -> None:
        before = self._board.servers
        self._board.servers = {}
        for name, spec in wanted.items():
            old = before.get(name)
            if old is not None and old.spec == spec and not again:
                self._board.servers[name] = old
            else:
                self._board.servers[name] = self._start(spec, old)
        for name, server in before.items():
            if self._board.servers.get(name) is not server:
                server.stop()
        self._noticed()

    def _start(self, spec: ServerSpec, old: Server | None) -> Server:
        server = Server(spec, self, self._cache.load(spec.key))
        task = self._tasks.start(self._run(server, self._runs.get(old) if old else None), spec.name)
        self._runs[server] = task
        task.add_done_callback(lambda _: self._runs.pop(server, None))
        return server

    @staticmethod
    async def _run(server: Server, before: asyncio.Task[None] | None) -> None:
        """Once its predecessor is gone: both may want the same port or file."""
        if before is not None:
            await asyncio.wait({before}, timeout=CLOSE_S)
        await server.run()

    def _noticed(self) -> None:
        """Something about the servers is another: who waits for it is served, the others hear of it soon."""
        self._board.changed()
        self._requests.settle()
        if self._telling is None and not self._closed:
            self._telling = asyncio.get_running_loop().call_later(CHANGE_PAUSE_S, self._tell)
        self._look()

    def _look(self) -> None:
        state = (self.settled, self.followed, self.problems())
        if state != self._state:
            self._state = state
            self._on_change()

    def _tell(self) -> None:
        """Tells clients which of the lists that they were given are others now."""
        self._telling = None
        versions = self._versions()
        changed = [kind for kind in KINDS if versions[kind] != self._told[kind]]
        self._told = versions
        for client in [client for client in self._board.clients if client.ready]:
            stale = {KINDS[kind].changed for kind in changed if client.seen.get(kind) != versions[kind]}
            for method in sorted(stale):
                client.send(mcp_protocol.notification(method))
        if "tools" in changed:
            asyncio.get_running_loop().call_later(FOLLOW_S, self._waited, versions["tools"])

    def _waited(self, version: int) -> None:
        """Long enough for who has not listed tools of that version or a later one."""
        self._deaf |= {client for client in self._board.clients if client.seen.get("tools", version) < version}
        self._look()

    def _versions(self) -> dict[str, int]:
        for server, count in self._board.catalog.left_out.items():
            log.warning("MCP server %r: %d of its tools, prompts and resources had no room", server, count)
        return dict(self._board.versions)
