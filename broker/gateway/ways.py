"""Where a request of a slot goes: to a provider, through a tunnel, or nowhere. Asked for every request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from broker.errors import Code, CortexError
from broker.gateway import answers
from broker.gateway.addresses import parse_authority
from broker.gateway.caller import Caller
from broker.gateway.egress import Flow, WayOut
from broker.gateway.handover import Doors
from broker.gateway.heads import RequestHead, bad
from broker.gateway.routes import Origin, Route, find_route, proxy_route
from broker.gateway.user_agent import tool_of

FaceKind = Literal["gateway", "egress"]


@dataclass(frozen=True, slots=True)
class Way:
    """Either ``route`` and ``target``, or ``tunnel_to``, or ``doors``. ``caller``: who calls a provider; ``routes``:
    all of the slot; ``upgrade``: the call becomes a WebSocket; ``flow``: of the way out, to be closed; ``doors``:
    where the listener goes that is to be handed over."""

    route: Route | None = None
    target: bytes = b""
    tunnel_to: Origin | None = None
    caller: Caller | None = None
    routes: Mapping[bytes, Route] = field(default_factory=dict)
    upgrade: bool = False
    flow: Flow | None = None
    doors: Doors | None = None


class Face(Protocol):
    """One listening socket of a slot, as its connections see it."""

    slot: str

    def way(self, head: RequestHead) -> Way:
        """Raises ``CortexError``, unclaimed slots included."""

    def opened(self, connection: Held) -> None: ...
    def closed(self, connection: Held) -> None: ...


class Held(Protocol):
    """A connection, as its slot sees it."""

    def fence(self) -> None: ...
    def abort(self) -> None: ...
    def drain(self) -> None: ...
    def check(self, now: float) -> None: ...


def gateway_way(
    head: RequestHead, routes: Mapping[bytes, Route], caller: Caller, websocket: Callable[[Route], bool]
) -> Way:
    """The way of a request on the gateway socket; ``websocket``: whether a provider speaks it."""
    if head.method == b"CONNECT":
        raise CortexError(
            Code.BAD_METHOD, "This socket serves model providers", hint="use the proxy in HTTPS_PROXY for CONNECT"
        )
    route, target = find_route(routes, head.target)
    upgrade = head.websocket and head.method == b"GET"
    if upgrade and not websocket(route):
        raise answers.no_websocket()
    return Way(route, target, caller=caller, routes=routes, upgrade=upgrade)


def egress_way(head: RequestHead, out: WayOut) -> Way:
    """The way of a request on the egress socket, by what ``out`` allows."""
    if head.method == b"CONNECT":
        authority = parse_authority(head.target.decode("ascii", "replace"))
        if authority is None:
            raise bad("CONNECT needs host:port")
        flow = out.open(*authority, tool_of(head.headers), tunnel=True)
        return Way(tunnel_to=Origin("tcp", *authority, "", flow.private, whose=out.slot), flow=flow)
    if b"://" not in head.target:
        raise CortexError(
            Code.BAD_REQUEST, "This socket is a proxy", hint="use it as HTTPS_PROXY; it is not a server to ask"
        )
    found = proxy_route(head.target, private=False, whose=out.slot)
    if found is None:
        raise bad("the request target is not an http:// address")
    route, target = found
    # Plain HTTP only where the port is listed: what a name alone allows is TLS.
    flow = out.open(route.spot.origin.host, route.spot.origin.port, tool_of(head.headers), tunnel=False)
    if head.websocket:
        flow.close()
        raise answers.no_websocket()
    if flow.private:
        route, target = proxy_route(head.target, private=True, whose=out.slot) or found
    return Way(route, target, flow=flow)
