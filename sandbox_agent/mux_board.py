"""Who is there: the servers, the clients, all lists as one, who has subscribed to what."""

from __future__ import annotations

from collections import OrderedDict

from sandbox_agent.mcp_catalog import Catalog, Route
from sandbox_agent.mcp_protocol import KINDS, LOG_LEVELS, Listing
from sandbox_agent.mcp_server import Server
from sandbox_agent.mux_client import Client

MAX_HINTS = 4096
MAX_SUBSCRIPTIONS = 1024
"""Of one client."""
TELL_S = 30.0
"""For an answer that nobody waits for."""


class Board:
    """``versions``: goes up by kind of list whenever that list is another. ``hints``: URI → server, of resources that
    a server has named but that are in no list."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.clients: set[Client] = set()
        self.versions = dict.fromkeys(KINDS, 0)
        self.hints: OrderedDict[str, str] = OrderedDict()
        self._subscribers: dict[Route, set[Client]] = {}
        self._catalog: Catalog | None = None
        self._bodies: dict[str, bytes] = {}

    @property
    def catalog(self) -> Catalog:
        """All lists as one."""
        if self._catalog is None:
            hidden = frozenset(name for name, server in self.servers.items() if server.state == "failed")
            known = {name: server.listing or Listing() for name, server in self.servers.items()}
            self._catalog = Catalog(known, hidden)
            for kind, body in self._catalog.bodies.items():
                if self._bodies.get(kind) != body:
                    self.versions[kind] += 1
            self._bodies = self._catalog.bodies
        return self._catalog

    def changed(self) -> None:
        """Servers have come, gone, or have other lists."""
        self._catalog = None

    def current(self, kind: str) -> int:
        """The version of a list as it is now."""
        _ = self.catalog  # made when it is asked for, and the versions with it
        return self.versions[kind]

    def known(self, kind: str) -> bool:
        """There is nothing to wait for."""
        return all(server.knows(kind) for server in self.servers.values())

    def hint(self, server: str, uri: str) -> None:
        """A server has named a resource."""
        self.hints[uri] = server
        self.hints.move_to_end(uri)
        if len(self.hints) > MAX_HINTS:
            self.hints.popitem(last=False)

    def subscribe(self, client: Client, route: Route) -> bool | None:
        """True: it is the first, so the server has to know; None: it has too many."""
        if sum(client in clients for clients in self._subscribers.values()) >= MAX_SUBSCRIPTIONS:
            return None
        clients = self._subscribers.setdefault(route, set())
        clients.add(client)
        return len(clients) == 1

    def unsubscribe(self, client: Client, route: Route) -> bool:
        """True: it was the last, so the server has to know."""
        clients = self._subscribers.get(route, set())
        if client not in clients:
            return False
        clients.discard(client)
        if clients:
            return False
        del self._subscribers[route]
        return True

    def subscribers(self, route: Route) -> set[Client]:
        return self._subscribers.get(route, set())

    def subscriptions(self, *, client: Client | None = None, server: str | None = None) -> list[Route]:
        """Of a client, or to resources of a server."""
        return [
            route
            for route, clients in self._subscribers.items()
            if (client is None or client in clients) and (server is None or route[0] == server)
        ]

    def tell_level(self, server: Server) -> None:
        """Lets a server log as much as any client wants to have."""
        wanted = {client.level for client in self.clients}
        level = next((level for level in LOG_LEVELS if level in wanted), None)
        if level and server.state == "up" and server.listing is not None and server.listing.can("logging"):
            server.query("logging/setLevel", {"level": level}, TELL_S)

    def tell_subscriptions(self, server: Server) -> None:
        """A server that was started anew has none."""
        for _, uri in self.subscriptions(server=server.spec.name):
            server.query("resources/subscribe", {"uri": uri}, TELL_S)

    def forget(self, client: Client) -> None:
        """The client is gone, and what it had subscribed to."""
        self.clients.discard(client)
        for route in self.subscriptions(client=client):
            server = self.servers.get(route[0])
            if self.unsubscribe(client, route) and server is not None and server.state == "up":
                server.query("resources/unsubscribe", {"uri": route[1]}, TELL_S)
