"""Our front door alone, in a process of its own, its streams coming from the echo peer."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from dataclasses import dataclass
from typing import Any, Literal

import structlog
import uvloop

from bench.lib import ready
from broker.config import Config
from broker.front.door import FrontDoor
from broker.host.tasks import TaskOwner
from broker.session.port import AttachedClient, State
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import Attach


@dataclass(frozen=True)
class Grant:
    user: str = "bench"
    workspace: str = "main"


class Access:
    """Lets everybody in."""

    async def verify(self, token: str) -> Grant:
        return Grant()

    async def redeem(self, ticket: str) -> Grant:
        return Grant()

    def check_origin(self, origin: str | None) -> None: ...

    def check_host(self, host: str) -> None: ...


class Session:
    """Always ready; a stream is a connection to ``path``."""

    id, user, workspace, agent = "bench", "bench", "main", "echo"
    protocol: Literal["acp", "websocket"] = "acp"
    state: State = "ready"

    def __init__(self, path: str) -> None:
        self._path = path

    def attach(self, client: AttachedClient) -> None: ...

    def detach(self, client: AttachedClient) -> None: ...

    async def open_stream(self, attach: Attach) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, self._path)
        await loop.sock_sendall(sock, codec.pack(attach.encode()))
        return sock


class Registry:
    """One session for all."""

    def __init__(self, path: str) -> None:
        self._session: Any = Session(path)

    def held(self, user: str, workspace: str) -> Any:
        return self._session


async def serve(stream: str, port: int) -> None:
    registry: Any = Registry(stream)
    door = FrontDoor(registry, Access(), Config, TaskOwner("bench"))
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    await door.start([sock])
    gc.collect()
    gc.freeze()
    ready()
    await asyncio.Event().wait()


if __name__ == "__main__":
    # Nobody reads what is printed after "ready".
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
