"""Answers of the gateway itself: errors as JSON, in a shape that the providers' SDKs show to people. Pure."""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from broker.errors import Code, CortexError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def answer(error: CortexError, *, close: bool, head_only: bool = False) -> bytes:
    """A whole response. The body is the problem (RFC 9457) with an ``error`` member beside it, because
    ``error.message`` is where clients of model providers look."""
    status = error.code.http_status
    problem = error.problem()
    message = f"{error.what}. {error.hint}"
    body = json.dumps(
        {**problem, "type": "error", "error": {"type": error.code.slug, "code": error.code.slug, "message": message}}
    ).encode()
    lines = [
        f"HTTP/1.1 {status} {_reason(error)}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-cortex-error: {error.code.slug}",
    ]
    retry_after_s = error.details.get("retry_after_s", 1 if error.code.retryable else None)
    if retry_after_s is not None:
        lines.append(f"retry-after: {max(1, math.ceil(retry_after_s))}")
    if status == HTTPStatus.TOO_MANY_REQUESTS and not error.code.retryable:
        lines.append("x-should-retry: false")  # SDKs of providers retry every other 429
    if error.code is Code.BAD_METHOD:
        lines.append("allow: CONNECT" if error.details.get("proxy") else "allow: GET, HEAD, POST, PUT, PATCH, DELETE")
    if close:
        lines.append("connection: close")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    return head if head_only else head + body


_SAID = frozenset((Code.EGRESS_DENIED, Code.EGRESS_ADDRESS, Code.EGRESS_LIMIT, Code.UPSTREAM_UNREACHABLE))


def _reason(error: CortexError) -> str:
    """For failures of the way out what is wrong: the reason phrase is all that most tools show of a proxy's answer."""
    if error.code in _SAID:
        return f"{error.what} ({error.code.slug})"
    return HTTPStatus(error.code.http_status).phrase


def unclaimed() -> CortexError:
    """Nobody has claimed the slot, or it was taken back."""
    return CortexError(
        Code.GATEWAY_UNCLAIMED, "This sandbox belongs to no session", hint="wait until the session is ready, then retry"
    )


def unknown_provider(name: str, known: list[str]) -> CortexError:
    """No provider has that name."""
    have = ", ".join(sorted(known)) or "none"
    return CortexError(
        Code.UNKNOWN_PROVIDER,
        f"There is no model provider {name[:64]!r} here",
        hint=f"the path is /PROVIDER/…; providers of this sandbox: {have}",
    )


def no_websocket() -> CortexError:
    """An upgrade that is refused, so that the client falls back to POST at once."""
    return CortexError(Code.NO_WEBSOCKET, "This gateway does not speak WebSocket", hint="send the request as a POST")


def too_many(limit: int) -> CortexError:
    """A sandbox over its connection limit."""
    return CortexError(
        Code.GATEWAY_BUSY,
        f"This sandbox already has {limit} connections open",
        hint="close some, or raise gateway.max_connections_per_sandbox",
    )


def denied(host: str, port: int) -> CortexError:
    """A host that no list allows."""
    rule = host if port == 443 else f"{host}:{port}"
    return CortexError(
        Code.EGRESS_DENIED,
        f"Access to {host}:{port} is not allowed from this sandbox",
        hint=f'add "{rule}" to the egress section\'s hosts to allow it',
        details={"host": host, "port": port},
    )


def too_many_tunnels(limit: int) -> CortexError:
    """A sandbox over its limit of tunnels."""
    return CortexError(
        Code.EGRESS_LIMIT,
        f"This sandbox already has {limit} tunnels open",
        hint="close some, or have an operator raise gateway.max_tunnels_per_sandbox",
    )


def too_many_names(limit: int) -> CortexError:
    """A sandbox whose look-ups hang."""
    return CortexError(
        Code.EGRESS_LIMIT,
        f"This sandbox is looking up {limit} names already",
        hint="retry when those are answered; some of them have slow name servers",
    )


def spent(limit: int, retry_after_s: float) -> CortexError:
    """A sandbox that has moved what it may in an hour."""
    return CortexError(
        Code.EGRESS_LIMIT,
        f"This sandbox has moved its {limit} bytes of this hour",
        hint="wait, or have an operator raise gateway.egress_bytes_per_hour",
        details={"retry_after_s": math.ceil(retry_after_s)},
    )


def address_refused(host: str) -> CortexError:
    """A host whose addresses are all private, link-local, loopback or the like."""
    return CortexError(
        Code.EGRESS_ADDRESS,
        f"{host} leads to an address that sandboxes may not reach",
        hint="an operator can list the host in gateway.private_hosts",
        details={"host": host},
    )
