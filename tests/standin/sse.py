"""Server-sent events over aiohttp, each flushed as it is made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web


async def stream(request: web.Request, events: AsyncIterator[tuple[str, Any]]) -> web.StreamResponse:
    """Sends (event name or "", JSON value or text) pairs, as long as somebody listens."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        async for name, value in events:
            data = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            await response.write((f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode())
        await response.write_eof()
    return response
