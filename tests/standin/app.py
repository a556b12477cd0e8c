"""One server for all providers, each below its name, and a record of what they were asked.

``GET /_requests`` answers the record, oldest first; ``DELETE /_requests`` empties it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.standin import anthropic, gemini, openai

MAX_RECORDS = 2000
RECORDS: web.AppKey[Any] = web.AppKey("records", deque)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app() -> web.Application:
    """``/anthropic``, ``/openai`` and ``/gemini`` are base URLs as [gateway.providers.*] wants them."""
    app = web.Application(client_max_size=64 * 2**20, middlewares=[record])
    app[RECORDS] = deque(maxlen=MAX_RECORDS)
    app.add_routes([web.get("/_requests", requests), web.delete("/_requests", forget)])
    for name, routes in (("anthropic", anthropic.routes), ("openai", openai.routes), ("gemini", gemini.routes)):
        part = web.Application()
        part.add_routes(routes())
        app.add_subapp(f"/{name}", part)
    return app


@web.middleware
async def record(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Notes provider, method, path, headers (names in lower case) and body before answering."""
    provider = request.path.split("/")[1]
    if not provider.startswith("_"):
        text = await request.text()
        request.config_dict[RECORDS].append(
            {
                "provider": provider,
                "method": request.method,
                "path": request.path_qs.removeprefix(f"/{provider}"),
                "headers": {name.lower(): value for name, value in request.headers.items()},
                "body": json.loads(text) if text.startswith("{") else text,
                "at": time.monotonic(),
            }
        )
    return await handler(request)


async def requests(request: web.Request) -> web.Response:
    return web.json_response(list(request.app[RECORDS]))


async def forget(request: web.Request) -> web.Response:
    request.app[RECORDS].clear()
    return web.Response(status=204)
