"""Answers over aiohttp, whole or as a stream, with the faults that were asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.standin.script import Answer, Fault

Events = AsyncIterator[tuple[str, Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SEEN: web.AppKey[Counter[str]] = web.AppKey("seen", Counter)
PIECE = 16
"""Bytes of a piece of an answer that trickles."""
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class Gone(Exception):
    """The connection was cut."""


async def give(
    request: web.Request, reply: Answer, events: Events | None, whole: Callable[[], Any], *, lines: bool = False
) -> web.StreamResponse:
    """``events`` as a stream if there are any, else ``whole()`` as JSON."""
    fault = reply.fault
    if fault.hang:
        await forever()
    if fault.status and still(request, fault):
        headers = {"retry-after": fault.retry_after} if fault.retry_after else {}
        return web.json_response(error(fault.status, "as the prompt asked"), status=fault.status, headers=headers)
    if events is not None:
        return await stream(request, events, fault, lines=lines)
    body = json.dumps(whole()).encode()
    if fault.cut is None and fault.stall is None and not fault.trickle_s:
        return web.Response(body=body, content_type="application/json")
    response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(body))})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError, Gone):
        await send(request, response, body[: len(body) // 2], fault, 0)
        await send(request, response, body[len(body) // 2 :], fault, 10**9)
        await response.write_eof()
    return response


def still(request: web.Request, fault: Fault) -> bool:
    """Whether the same prompt has to fail once more."""
    seen = request.config_dict[SEEN]
    seen[fault.prompt] += 1
    return not fault.times or seen[fault.prompt] <= fault.times


def error(status: int, why: str) -> dict[str, Any]:
    """In the shape of each provider at once."""
    kind = _KINDS.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "code": status, "status": kind.upper(), "message": why}}


async def stream(request: web.Request, events: Events, fault: Fault, *, lines: bool = False) -> web.StreamResponse:
    """Sends (event name or "", JSON value or text) pairs as server-sent events, or the values as ``lines`` of JSON,
    each flushed as it is made, as long as somebody listens."""
    kind = "application/x-ndjson" if lines else "text/event-stream"
    response = web.StreamResponse(headers={"content-type": kind, "cache-control": "no-cache"})
    await response.prepare(request)
    number = 0
    with contextlib.suppress(ConnectionResetError, Gone):
        async for name, value in events:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            piece = f"{text}\n" if lines else (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
            await send(request, response, piece.encode(), fault, number)
            number += 1
        await response.write_eof()
    return response


async def send(request: web.Request, response: web.StreamResponse, data: bytes, fault: Fault, number: int) -> None:
    """One part of an answer, unless it is behind the one that is the last by ``fault``."""
    if fault.stall is not None and number >= fault.stall:
        await forever()
    if fault.cut is not None and number >= fault.cut:
        if request.transport is not None:
            request.transport.close()
        raise Gone
    if not fault.trickle_s:
        await response.write(data)
        return
    for at in range(0, len(data), PIECE):
        await response.write(data[at : at + PIECE])
        await asyncio.sleep(fault.trickle_s)


async def forever() -> None:
    """Until the client, or the server, ends."""
    await asyncio.Event().wait()
