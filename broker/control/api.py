"""The control API's application and its server."""

from __future__ import annotations

import socket

from aiohttp import web

from broker.control.middleware import guarded, hosts, problems
from broker.control.routes import CONTROL, ROUTE_TABLE, Control
from broker.control.table import ROUTES

SHUTDOWN_S = 2.0
HEADER_LIMIT = 16_384


def build_app(control: Control) -> web.Application:
    """The application; every route is in ``broker.control.table``."""
    app = web.Application(middlewares=[problems, hosts])
    app[CONTROL] = control
    app[ROUTE_TABLE] = ROUTES
    for route in ROUTES:
        app.router.add_route(route.method, route.path, guarded(route))
    return app


class ControlServer:
    """Serves the control API on listening sockets, however they were made."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._runner = web.AppRunner(
            build_app(control),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=SHUTDOWN_S,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
        )

    async def start(self, *listeners: socket.socket) -> None:
        """Serves on ``listeners``, which it owns from here."""
        await self._runner.setup()
        for listener in listeners:
            listener.setblocking(False)
            await web.SockSite(self._runner, listener).start()

    async def close(self) -> None:
        """Ends turns over HTTP and open requests; also keep-alive connections."""
        await self._control.tasks.close()
        await self._runner.cleanup()
