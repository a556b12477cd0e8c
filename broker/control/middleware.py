"""Around every handler: Host check, who may call, errors as problem details (RFC 9457)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from functools import partial

import structlog
from aiohttp import web

from broker.control.routes import Handler, Route, control
from broker.errors import Code, CortexError

PROBLEM = "application/problem+json"

log = structlog.get_logger(__name__)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into problem details and logs the request, without its query."""
    started = time.monotonic()
    status = 500
    try:
        response = await handler(request)
        status = response.status
    except CortexError as error:
        response = problem(error)
        status = response.status
    except web.HTTPException as error:
        response = _refused(error, request)
        status = response.status
    except Exception as error:
        log.exception("control_failed", method=request.method, path=request.path)
        response = problem(_internal(error))
    finally:
        took = round((time.monotonic() - started) * 1000, 1)
        say = log.debug if request.method == "GET" and status < 400 else log.info
        told = partial(say, "control_request", method=request.method, path=request.path, status=status, ms=took)
        asyncio.get_running_loop().call_soon(told)  # the answer goes first
    return response


@web.middleware
async def hosts(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses a wrong Host, so that a page cannot reach us by rebinding its name. Unix sockets have no name."""
    if peer_uid(request) is None:
        control(request).access.check_control_host(request.headers.get("Host"))
    return await handler(request)


def guarded(route: Route) -> Handler:
    """The route's handler, behind its check of who may call."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if route.auth == "admin":
            require_admin(request)
        return await route.handler(request)

    return handle


def require_admin(request: web.Request) -> None:
    """The admin token, or on the Unix socket the broker's own uid or root. Raises ``ADMIN_REQUIRED``."""
    uid = peer_uid(request)
    if uid is not None and uid in trusted_uids():
        return
    control(request).access.check_admin(request.headers.get("Authorization"))


def trusted_uids() -> frozenset[int]:
    """Peers of the Unix socket that need no token."""
    return frozenset({0, os.geteuid()})


def peer_uid(request: web.Request) -> int | None:
    """The uid at the other end of a Unix socket (SO_PEERCRED); None on any other."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def problem(error: CortexError, *, status: int | None = None) -> web.Response:
    """``error`` as a response; ``status`` overrides the code's."""
    headers = {"Cache-Control": "no-store"}
    if error.code.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code.http_status in (429, 503):
        headers["Retry-After"] = "1"
    status = status or error.code.http_status
    return web.json_response(error.problem() | {"status": status}, status=status, content_type=PROBLEM, headers=headers)


def _refused(error: web.HTTPException, request: web.Request) -> web.Response:
    """The router's own refusals; it knows statuses that have no code of their own."""
    what = {404: "there is no such route", 405: f"{request.method} is not allowed here"}.get(error.status, error.reason)
    code = {404: Code.NOT_FOUND, 405: Code.BAD_METHOD}.get(error.status, Code.BAD_REQUEST)
    response = problem(CortexError(code, what, hint="see /v1/openapi.json for the routes"), status=error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _internal(error: BaseException) -> CortexError:
    return CortexError(
        Code.INTERNAL,
        "the broker failed to answer",
        cause=type(error).__name__,
        hint="the log has the details; trying again may help",
    )
