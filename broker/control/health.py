"""Liveness, readiness, metrics, the OpenAPI document."""

from __future__ import annotations

import asyncio

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from broker.control import schema
from broker.control.requests import answer, query
from broker.control.routes import control
from broker.metrics import REGISTRY

READY_TIMEOUT_S = 5.0


async def livez(request: web.Request) -> web.Response:
    """The loop runs; nothing else is asked."""
    return answer(schema.Health(status="ok"))


async def readyz(request: web.Request) -> web.Response:
    """Whether new work can be done; ``?verbose`` says what was looked at."""
    verbose = query(request, schema.Ready).verbose is not None
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            checks = {name: what or "ok" for name, what in (await control(request).health()).items()}
    except TimeoutError:
        checks = {"health": f"no answer within {READY_TIMEOUT_S:.0f} s"}
    good = all(what == "ok" for what in checks.values())
    told = schema.Health(status="ok" if good else "unavailable", checks=checks if verbose or not good else {})
    return answer(told, 200 if good else 503)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text format."""
    return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})
