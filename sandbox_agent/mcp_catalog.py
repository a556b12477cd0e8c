"""The lists of all servers as one: what agents see, and which server a name or a URI of theirs means. Pure.

Names are put before (``mcp_names``). URIs stay as they are and are routed by table; where two servers have the
same, the one that is configured first keeps it.
"""

from __future__ import annotations

from typing import Any

from sandbox_agent import jsonrpc, mcp_names
from sandbox_agent.mcp_protocol import KINDS, Items, Listing

MAX_BYTES = 6 * 2**20
"""Of a list that agents get: it has to fit into one of their lines. Servers that come last lose."""

Route = tuple[str, str]
"""Server, and the name or URI at the server."""


class Catalog:
    """``bodies``: the JSON of each list's result. ``left_out``: server → how many items had no room.
    Of a ``hidden`` server nothing is shown, but what it had is still routed to it: it can say why it is not there."""

    def __init__(self, listings: dict[str, Listing], hidden: frozenset[str] = frozenset()) -> None:
        self.listings = listings
        self._hidden = hidden
        self.aliases = mcp_names.aliases(listings)
        self.left_out: dict[str, int] = {}
        self._servers = {alias: server for server, alias in self.aliases.items()}
        self._routes: dict[str, dict[str, Route]] = {kind: {} for kind in KINDS}
        self.bodies = {kind: self._body(kind) for kind in KINDS}
        self._stems = sorted(
            ((public.split("{", 1)[0], server) for public, (server, _) in self._routes["templates"].items()),
            key=lambda stem: -len(stem[0]),
        )

    def named(self, kind: str, name: str) -> Route | None:
        """The tool or prompt that an agent means. One that is in no list yet goes where its beginning says."""
        route = self._routes[kind].get(name)
        if route is None:
            alias, rest = mcp_names.split(name)
            server = self._servers.get(alias)
            if server is not None and kind not in self.listings[server].lists:
                return server, rest
        return route

    def located(self, uri: str, hints: dict[str, str]) -> Route | None:
        """The resource or template that an agent means; ``hints``: URI → server, of those that are in no list."""
        route = self._routes["resources"].get(uri) or self._routes["templates"].get(uri)
        if route is not None:
            return route
        alias, there = mcp_names.unprefixed(uri)
        if alias in self._servers:
            return self._servers[alias], there
        if (hinted := hints.get(uri)) in self.listings:
            return str(hinted), uri
        for stem, server in self._stems:
            if uri.startswith(stem):
                return server, uri
        having = [server for server, listing in self.listings.items() if listing.can("resources")]
        return (having[0], uri) if len(having) == 1 else None

    def public_uri(self, server: str, uri: str) -> str:
        """What agents call a URI that a server has named."""
        owner = self._routes["resources"].get(uri)
        if owner is None or owner[0] == server or server not in self.aliases:
            return uri
        return mcp_names.prefixed(self.aliases[server], uri)

    def instructions(self) -> str:
        """What the servers want models to know."""
        said = [(self.aliases[server], listing.instructions) for server, listing in self.listings.items()]
        return "\n\n".join(f"About the tools {alias}__*:\n{text}" for alias, text in said if text)

    def can(self, capability: str) -> bool:
        """One of the servers can."""
        return any(listing.can(capability) for listing in self.listings.values())

    def _body(self, kind: str) -> bytes:
        parts: list[bytes] = []
        room = MAX_BYTES
        for server, listing in self.listings.items():
            for item in self._public(kind, server, listing.lists.get(kind, [])):
                if server in self._hidden:
                    continue
                part = jsonrpc.dumps(item)
                room -= len(part) + 1
                if room < 0:
                    self.left_out[server] = self.left_out.get(server, 0) + 1
                else:
                    parts.append(part)
        return b'{"%b":[%b]}' % (KINDS[kind].field.encode(), b",".join(parts))

    def _public(self, kind: str, server: str, items: Items) -> Items:
        """A server's items as agents see them, each with its route; of two with the same key the first."""
        key = KINDS[kind].key
        first: dict[str, dict[str, Any]] = {}
        for item in items:
            if not _needs_task(item):
                first.setdefault(item[key], item)
        names = mcp_names.safe_names(self.aliases[server], first) if key == "name" else {}
        public: Items = []
        for own, item in first.items():
            shown = names[own] if names else self._free_uri(kind, server, own)
            self._routes[kind][shown] = (server, own)
            public.append({**item, key: shown})
        return public

    def _free_uri(self, kind: str, server: str, uri: str) -> str:
        while uri in self._routes[kind]:
            uri = mcp_names.prefixed(self.aliases[server], uri)
        return uri


def _needs_task(item: dict[str, Any]) -> bool:
    """A tool that can only be called as a task (2025-11-25, experimental), which we do not offer."""
    execution = item.get("execution")
    return isinstance(execution, dict) and execution.get("taskSupport") == "required"
