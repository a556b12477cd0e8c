"""A token endpoint that rotates refresh tokens: each is good once (RFC 6749, section 6; RFC 9700, 4.14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class TokenServer:
    """``good``: refresh tokens that it takes; ``answer``: makes a response in the place of the usual one."""

    def __init__(self) -> None:
        self.url = ""
        self.good = {"rt-0"}
        self.life: Any = 3600
        self.asked: list[dict[str, Any]] = []
        self.kinds: list[str] = []
        self.answer: Callable[[], web.Response] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.under_way = 0
        self.most = 0
        self.given = 0

    async def token(self, request: web.Request) -> web.Response:
        self.kinds.append(request.content_type)
        body = await (request.json() if request.content_type == "application/json" else request.post())
        self.asked.append(dict(body))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.arrived.set()
        try:
            await self.gate.wait()
        finally:
            self.under_way -= 1
        if self.answer is not None:
            return self.answer()
        if body.get("refresh_token") not in self.good:
            return web.json_response({"error": "invalid_grant", "error_description": str(body)}, status=400)
        self.good.discard(str(body["refresh_token"]))
        self.given += 1
        self.good.add(f"rt-{self.given}")
        told = {"access_token": f"at-{self.given}", "refresh_token": f"rt-{self.given}", "token_type": "Bearer"}
        return web.json_response(told | ({} if self.life is None else {"expires_in": self.life}))


@asynccontextmanager
async def token_server() -> AsyncIterator[TokenServer]:
    server = TokenServer()
    app = web.Application()
    app.router.add_post("/token", server.token)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/token"
    try:
        yield server
    finally:
        server.gate.set()
        await runner.cleanup()
