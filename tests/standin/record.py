"""What the stand-in was asked."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from aiohttp import web

from tests.standin.reply import Handler

MAX_RECORDS = 2000
RECORDS: web.AppKey[Any] = web.AppKey("records", deque)


@web.middleware
async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Notes provider, method, path, headers (names in lower case) and body before answering."""
    if not request.path.startswith("/_"):
        text = await request.text()
        note(request, json.loads(text) if text.startswith("{") else text, request.method)
    return await handler(request)


def note(request: web.Request, body: Any, method: str = "WEBSOCKET") -> None:
    """One request, or one message that came over a WebSocket."""
    provider = request.path.split("/")[1]
    request.config_dict[RECORDS].append(
        {
            "provider": provider,
            "method": method,
            "path": request.path_qs.removeprefix(f"/{provider}"),
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": body,
            "at": time.monotonic(),
        }
    )


async def requests(request: web.Request) -> web.Response:
    return web.json_response(list(request.app[RECORDS]))


async def forget(request: web.Request) -> web.Response:
    request.app[RECORDS].clear()
    return web.Response(status=204)
