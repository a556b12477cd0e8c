"""A client that is not ours (PyPI agent-client-protocol) and the demo agent in a real process, a hub between."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import acp
import pytest
from acp import schema

import sandbox_agent.demo
from sandbox_agent.acp import AcpHub
from tests.unit.sandbox_agent.acp.kit import SPEC, Bench, Peer


class Process:
    """The demo agent on pipes."""

    congested = False

    def __init__(self, hub: AcpHub, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._hub = hub
        self.reading = asyncio.ensure_future(self._read())

    @classmethod
    async def start(cls, hub: AcpHub) -> Process:
        command = (sys.executable, "-I", "-S", sandbox_agent.demo.__file__)
        pipe = asyncio.subprocess.PIPE
        made = cls(hub, await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        hub.agent_up(made, SPEC)
        return made

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)

    def hold(self, held: bool) -> None:
        raise AssertionError("there is space for the journal here")

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self._hub.agent_lines([line.rstrip(b"\n")])
        self._hub.agent_down("it ended", final=False)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self.reading


class Transport:
    """Messages of the SDK over one of our test clients."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def send(self, message: dict[str, Any]) -> None:
        await self._peer.send(message)

    async def receive(self) -> dict[str, Any] | None:
        while not self._peer.seen:
            if self._peer.ended:
                return None
            await self._peer.read()
        return self._peer.seen.pop(0)

    async def close(self) -> None:
        self._peer.close()


class Ide:
    """What the SDK calls."""

    def __init__(self) -> None:
        self.updates: list[Any] = []
        self.asked = 0
        self.answer = asyncio.Event()
        self.answer.set()
        self.moved = asyncio.Event()

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        self.updates.append(update)
        self.moved.set()

    async def request_permission(self, session_id: str, tool_call: Any, options: Any, **_: Any) -> Any:
        self.asked += 1
        self.moved.set()
        await self.answer.wait()
        chosen = schema.AllowedOutcome(outcome="selected", option_id=options[0].option_id)
        return schema.RequestPermissionResponse(outcome=chosen)

    async def until(self, ready: Any) -> None:
        async with asyncio.timeout(10):
            while not ready():
                self.moved.clear()
                await self.moved.wait()

    def said(self, kind: Any = schema.AgentMessageChunk) -> str:
        return "".join(u.content.text for u in self.updates if isinstance(u, kind))


def connect(bench: Bench) -> tuple[Ide, acp.ClientSideConnection]:
    ide = Ide()
    return ide, acp.connect_to_agent(cast(Any, ide), Transport(bench.connect()))


def text(words: str) -> list[Any]:
    return [schema.TextContentBlock(type="text", text=words)]


async def test_the_sdk_client_talks_to_the_demo_agent_through_the_hub(bench: Bench) -> None:
    agent = await Process.start(bench.start(up=False))
    ide, client = connect(bench)
    started = await client.initialize(protocol_version=acp.PROTOCOL_VERSION)
    assert started.protocol_version == 1
    assert started.auth_methods == []
    session = (await client.new_session(cwd="/Users/somebody/project", mcp_servers=[])).session_id
    assert (await client.prompt(session_id=session, prompt=text("good morning"))).stop_reason == "end_turn"
    assert "good morning" in ide.said()
    await client.prompt(session_id=session, prompt=text("!ask pwd"))
    assert ide.asked == 1
    assert str(bench.home / "workspace") in "".join(map(str, ide.updates))

    turn = asyncio.ensure_future(client.prompt(session_id=session, prompt=text("/slow 200")))
    before = len(ide.updates)
    await ide.until(lambda: len(ide.updates) > before)
    await client.cancel(session_id=session)
    assert (await turn).stop_reason == "cancelled"

    second, other = connect(bench)
    await other.initialize(protocol_version=1)
    listed = (await other.list_sessions()).sessions
    assert [(s.session_id, s.title) for s in listed] == [(session, "good morning")]
    await other.load_session(cwd="/", session_id=session, mcp_servers=[])
    assert second.said().startswith(ide.said()[:20])
    assert second.said(schema.UserMessageChunk).startswith("good morning!ask pwd/slow 200")

    turn = asyncio.ensure_future(client.prompt(session_id=session, prompt=text("/slow 200")))
    before = len(ide.updates)
    await ide.until(lambda: len(ide.updates) > before)
    await agent.kill()
    with pytest.raises(acp.RequestError) as failure:
        await turn
    assert cast(Any, failure.value.data)["code"] == "agent.failed"
    agent = await Process.start(bench.hub)
    assert (await client.prompt(session_id=session, prompt=text("still there?"))).stop_reason == "end_turn"
    assert ide.said().endswith("still there?")
    await client.close()
    await other.close()
    await agent.kill()
