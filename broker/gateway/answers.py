"""Answers of the gateway itself: errors as JSON, in a shape that the providers' SDKs show to people. Pure."""

from __future__ import annotations

import json
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
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-cortex-error: {error.code.slug}",
    ]
    if error.code.retryable:
        lines.append("retry-after: 1")
    if error.code is Code.BAD_METHOD:
        lines.append("allow: CONNECT" if error.details.get("proxy") else "allow: GET, HEAD, POST, PUT, PATCH, DELETE")
    if close:
        lines.append("connection: close")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    return head if head_only else head + body


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


def address_refused(host: str) -> CortexError:
    """A host whose addresses are all private, link-local, loopback or the like."""
    return CortexError(
        Code.EGRESS_ADDRESS,
        f"{host} leads to an address that sandboxes may not reach",
        hint="an operator can list the host in gateway.private_hosts",
        details={"host": host},
    )
