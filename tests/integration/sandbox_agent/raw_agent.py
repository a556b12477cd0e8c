"""An agent that speaks WebSocket itself: ``raw_agent.py PORT``. Refuses an Origin, echoes, ends on ``bye``."""

from __future__ import annotations

import sys
from http import HTTPStatus

from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve


def no_origin(connection: ServerConnection, request: Request) -> Response | None:
    if "Origin" in request.headers or "Sec-WebSocket-Extensions" in request.headers:
        return connection.respond(HTTPStatus.FORBIDDEN, "no")
    return None


def echo(connection: ServerConnection) -> None:
    connection.send("early")
    for message in connection:
        if message == "bye":
            connection.socket.close()
            return
        connection.send(message)


with serve(echo, "127.0.0.1", int(sys.argv[1]), process_request=no_origin, compression=None, max_size=None) as server:
    server.serve_forever()
