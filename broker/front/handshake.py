"""The opening handshake (RFC 6455 section 4) as bytes in, bytes out; the only user of ``websockets`` here.

``read`` turns a request head into an ``Upgrade`` or raises; ``accept`` and ``refuse`` make the answer.
"""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs

from websockets.datastructures import MultipleValuesError
from websockets.headers import parse_subprotocol
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from broker.errors import Code, CortexError

MAX_HEAD = 16_384
"""Largest request head, in bytes."""
CORTEX = "cortex.acp.v1"
"""Offered by a client that wants ``_cortex/status`` notifications."""

_SUBPROTOCOLS = (CORTEX, "acp.v1")
_PATHS: Mapping[str, Literal["acp", "raw"]] = {
    "/acp": "acp",
    "/": "acp",
    "/acp/ws": "acp",
    "/message": "acp",
    "/raw": "raw",
}
_BEARER = "bearer."
_HINT = "open a WebSocket at /acp, or /raw for agents with a WebSocket of their own"

# The library logs requests, tokens included; this logger passes nothing on.
_SILENT = logging.getLogger("cortex.handshake")
_SILENT.propagate = False
_SILENT.addHandler(logging.NullHandler())
_SILENT.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Upgrade:
    """A valid request for a WebSocket. ``token`` and ``ticket`` are secrets: at most one is not empty.

    ``blind``: the client cannot read an HTTP refusal (a browser). ``path`` is without the query.
    """

    path: str
    protocol: Literal["acp", "raw"] | None
    host: str
    origin: str | None
    token: str
    ticket: str
    blind: bool
    subprotocol: str | None
    response: Response

    def __repr__(self) -> str:
        return f"Upgrade({self.path!r}, host={self.host!r}, origin={self.origin!r})"

    @property
    def cortex(self) -> bool:
        return self.subprotocol == CORTEX


def read(head: bytes) -> Upgrade:
    """``head``: the request up to and with its blank line. Raises ``BAD_REQUEST`` or ``BODY_TOO_LARGE``."""
    protocol = ServerProtocol(logger=_SILENT, select_subprotocol=_select)
    protocol.receive_data(head)
    events = protocol.events_received()
    if not events or not isinstance(request := events[0], Request):
        cause = protocol.handshake_exc
        raise _bad("not a valid HTTP/1.1 request", cause.__cause__ or cause if cause else None)
    response = protocol.accept(request)
    if response.status_code != 101:
        raise _bad("not a WebSocket handshake", protocol.handshake_exc, status=response.status_code)
    path, _, query = request.path.partition("?")
    headers = request.headers
    try:
        host, origin, authorization = (headers.get(name) for name in ("Host", "Origin", "Authorization"))
    except MultipleValuesError as error:
        raise _bad("a header is given twice", f"{error} more than once") from error
    if host is None:
        raise _bad("the request has no Host header", None)
    bearers = [item[len(_BEARER) :] for item in _offered(headers.get_all("Sec-WebSocket-Protocol")) if _is_bearer(item)]
    tickets = parse_qs(query, keep_blank_values=True).get("ticket", [])
    tokens = bearers + ([_bearer_header(authorization)] if authorization is not None else [])
    if len(tokens) + len(tickets) > 1:
        raise _bad("more than one token", "give one token, in one place")
    return Upgrade(
        path=path,
        protocol=_PATHS.get(path),
        host=host,
        origin=origin,
        token=tokens[0] if tokens else "",
        ticket=tickets[0] if tickets else "",
        blind=bool(bearers or tickets),
        subprotocol=protocol.subprotocol,
        response=response,
    )


def accept(upgrade: Upgrade, headers: Mapping[str, str]) -> bytes:
    """The 101 response; ``headers`` are added to it."""
    for name, value in headers.items():
        upgrade.response.headers[name] = value
    return upgrade.response.serialize()


def refuse(error: CortexError) -> bytes:
    """An HTTP response with problem details (RFC 9457) after which the connection is closed."""
    status = int(error.details.get("status", error.code.http_status))
    body = json.dumps({**error.problem(), "status": status}).encode()
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status == 401:
        lines.append('WWW-Authenticate: Bearer realm="cortex"')
    if status == 426:
        lines.append("Upgrade: websocket")
    if status == 405:
        lines.append("Allow: GET")
    if error.code.retryable:
        lines.append("Retry-After: 1")
    return "\r\n".join([*lines, "", ""]).encode() + body


def too_big() -> CortexError:
    """The refusal of a head over ``MAX_HEAD``."""
    return CortexError(
        Code.BODY_TOO_LARGE,
        "request head is too big",
        hint=f"send at most {MAX_HEAD} bytes of headers",
        details={"status": 431},
    )


def _bad(what: str, cause: BaseException | str | None, *, status: int = 400) -> CortexError:
    return CortexError(Code.BAD_REQUEST, what, cause=cause, hint=_HINT, details={"status": status})


def _is_bearer(item: str) -> bool:
    return item.startswith(_BEARER)


def _offered(values: Sequence[str]) -> list[str]:
    return [str(item) for value in values for item in parse_subprotocol(value)]


def _select(_: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return next((item for item in offered if item in _SUBPROTOCOLS), None)


def _bearer_header(value: str) -> str:
    scheme, _, token = value.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise CortexError(
            Code.TOKEN_INVALID, "not a bearer token", hint="send Authorization: Bearer and the attach token"
        )
    return token.strip()
