"""A link and the agent server at its other end, as the tests of links play them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from broker.sandbox.link import Link
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.messages import Attach, Hello, Status, Welcome
from tests.unit.broker.sandbox.scripted_agent import ScriptedAgent, read

KEY = b"k" * 32
ATTACH = Attach(connection="c1", protocol="acp", client="ide")


class Owner:
    """What a session would do with a link."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.statuses: asyncio.Queue[Status] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.refuse: Exception | None = None
        self.pauses: list[asyncio.Event] = []

    async def hello(self, link: Link, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        if self.pauses:
            await self.pauses.pop().wait()
        if self.refuse:
            raise self.refuse
        return Welcome(incarnation=0, secret=b"", session="s1")


class Pair:
    """A link and the agent server at its other end."""

    def __init__(self, link: Link, owner: Owner, agent: ScriptedAgent, sockets: SlotSockets) -> None:
        self.link, self.owner, self.agent, self.sockets = link, owner, agent, sockets


@asynccontextmanager
async def paired(sockets: SlotSockets, *, incarnation: int = 3, **more: Any) -> AsyncIterator[Pair]:
    owner = Owner()
    link = Link(
        sockets,
        incarnation,
        installation_key=KEY,
        on_hello=owner.hello,
        on_status=owner.statuses.put_nowait,
        on_lost=owner.lost.put_nowait,
        **more,
    )
    link.start()
    agent = ScriptedAgent(sockets.slot.sock_dir / "agent")
    try:
        yield Pair(link, owner, agent, sockets)
    finally:
        agent.close()
        await link.close()


async def hung_up(sock: socket.socket) -> bool:
    return await read(sock) == b""


async def soon(awaitable: Any) -> Any:
    async with asyncio.timeout(5):
        return await awaitable


async def served(pair: Pair) -> None:
    """The link still does its work."""
    asking = asyncio.create_task(pair.link.probe())
    await pair.agent.answer_probe()
    assert (await asking).agent == "ready"
