"""The link with a real agent server and the demo agent, in a real slot; no isolation, no driver."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

import sandbox_agent
from broker.errors import Code, CortexError
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.link import Link
from broker.sandbox.slots import Slot, Slots, home_key
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.messages import AgentSpec, Attach, Hello, Status, Welcome

PROGRAM = Path(sandbox_agent.__file__).parent / "__main__.py"
DEMO = AgentSpec(name="demo", protocol="acp", command=["{python}", "-I", "-S", "{sandbox_agent}/demo.py"])
NO_SUCH = AgentSpec(name="none", protocol="acp", command=["/nonexistent/agent"])
KEY = home_key("ann", "main")


class Box:
    """One slot with an agent server; ``link`` is the broker's of now."""

    def __init__(self, state: Path) -> None:
        self.slots = Slots(state, uid=os.geteuid())
        self.slots.check()
        self.slot: Slot = self.slots.create(self.slots.new_id())
        self.slots.adopt_home(self.slot.id, KEY)
        self.spec = DEMO
        self.hellos: list[Hello] = []
        self.heard = asyncio.Event()
        self.lost: list[str] = []
        self.process: asyncio.subprocess.Process | None = None

    def broker(self, *, welcomed: bool) -> None:
        """A broker starts."""
        self.sockets = SlotSockets(self.slot, gid=self.slots.gid)
        self.sockets.open()
        self.link = Link(
            self.sockets,
            1,
            installation_key=b"k" * 32,
            on_hello=self._hello,
            on_status=self._status,
            on_lost=self.lost.append,
            journal=JournalFiles(self.slots.journal_dir(KEY)),
            welcomed=welcomed,
        )
        self.link.start()

    async def broker_dies(self) -> None:
        await self.link.close("killed")
        self.sockets.close()

    async def launch(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(PROGRAM), "--socket-dir", str(self.slot.sock_dir), "--vol",
            str(self.slot.vol_dir), start_new_session=True,
        )  # fmt: skip

    async def _hello(self, link: Link, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        first = len(self.hellos) == 1
        return Welcome(0, b"", "s1", agent_spec=self.spec if first else None, home=str(self.slot.home_dir))

    def _status(self, status: Status) -> None:
        self.heard.set()

    async def status(self, agent: str) -> Status:
        async with asyncio.timeout(20):
            while self.link.status is None or self.link.status.agent != agent:
                self.heard.clear()
                await self.heard.wait()
        return self.link.status


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    made = Box(tmp_path / "s")
    made.broker(welcomed=False)
    await made.launch()
    yield made
    await made.link.stop(5)
    await made.broker_dies()
    assert made.process is not None
    if made.process.returncode is None:
        made.process.terminate()
    async with asyncio.timeout(15):
        await made.process.wait()


class Client:
    """A WebSocket client on a stream."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.protocol = ClientProtocol(parse_uri("ws://x/"), state=State.OPEN)

    async def call(self, number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        self.protocol.send_text(json.dumps(request).encode())
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            await loop.sock_sendall(self.sock, b"".join(self.protocol.data_to_send()))
            while True:
                data = await loop.sock_recv(self.sock, 65_536)
                assert data, "hung up"
                self.protocol.receive_data(data)
                for event in self.protocol.events_received():
                    assert getattr(event, "opcode", None) is Opcode.TEXT
                    message: dict[str, Any] = json.loads(bytes(event.data))  # type: ignore[union-attr]
                    if message.get("id") == number and "method" not in message:
                        return message


async def talk(box: Box) -> dict[str, Any]:
    """A whole turn; returns the prompt's result."""
    client = Client(await box.link.take_stream(Attach("c", "acp")))
    await client.call(1, "initialize", {"protocolVersion": 1, "clientCapabilities": {}})
    made = await client.call(2, "session/new", {"cwd": "/home/elsewhere", "mcpServers": []})
    prompt = {"sessionId": made["result"]["sessionId"], "prompt": [{"type": "text", "text": "hello"}]}
    answer = await client.call(3, "session/prompt", prompt)
    client.sock.close()
    result: dict[str, Any] = answer["result"]
    return result


async def test_from_hello_to_a_turn_with_its_journal_on_disk(box: Box) -> None:
    await box.link.wait_hello(20)
    assert json.loads((await box.status("ready")).agent_info)["protocolVersion"] == 1
    assert (await talk(box))["stopReason"] == "end_turn"
    (segment, *_) = sorted(box.slots.journal_dir(KEY).iterdir())
    assert segment.stat().st_size > 0
    assert (await box.link.probe()).clients in (0, 1)
    assert box.link.violations == 0


async def test_a_broker_that_starts_again_finds_the_same_agent(box: Box) -> None:
    before = (await box.status("ready")).agent_pid or (await box.link.probe()).agent_pid
    bound = await box.link.bind({"settings": {"allow_client_mcp": False}}, {"settings": "h1"}, 1)
    assert bound.applied["settings"] == "h1"
    await box.broker_dies()
    box.broker(welcomed=True)
    hello = await box.link.wait_hello(20)
    assert hello.applied["settings"] == "h1"
    assert hello.agent_info
    assert (await box.link.probe()).agent_pid == before
    assert (await talk(box))["stopReason"] == "end_turn"
    assert box.link.violations == 0


async def test_stop_ends_the_agent_server(box: Box) -> None:
    await box.status("ready")
    await box.link.stop(5)
    assert not box.link.connected
    assert box.process is not None
    async with asyncio.timeout(10):
        assert await box.process.wait() == 0
    assert box.lost == []


async def test_an_agent_that_is_not_there_says_so(tmp_path: Path) -> None:
    box = Box(tmp_path / "s")
    box.spec = NO_SUCH
    box.broker(welcomed=False)
    await box.launch()
    try:
        status = await box.status("failed")
        assert status.code == Code.AGENT_MISSING.slug
        assert status.hint
    finally:
        await box.link.stop(5)
        await box.broker_dies()
        assert box.process is not None
        async with asyncio.timeout(15):
            await box.process.wait()


async def test_an_agent_server_that_is_killed_is_a_loss_or_an_error_not_a_hang(box: Box) -> None:
    await box.status("ready")
    assert box.process is not None
    box.process.kill()
    await box.process.wait()
    with pytest.raises(CortexError) as caught:
        await box.link.probe()
    assert caught.value.code is Code.SANDBOX_DIED
