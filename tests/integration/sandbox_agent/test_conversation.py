"""Conversations through a real agent server, its real journal and the real demo agent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

from sandbox_agent.wire.messages import Status
from tests import host
from tests.integration.sandbox_agent.harness import Broker, Client, Sandbox, open_files


class Ide:
    """An ACP client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.updates: list[dict[str, Any]] = []
        self._number = 0

    async def start(self, method: str, **params: Any) -> int:
        self._number += 1
        message = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        await self.client.send(json.dumps(message).encode())
        return self._number

    async def finish(self, number: int) -> dict[str, Any]:
        """The answer to ``number``; updates that come before it are kept, permissions are given."""
        while True:
            message: dict[str, Any] = json.loads(await self.client.text())
            if message.get("id") == number and "method" not in message:
                return message
            if message.get("method") == "session/request_permission":
                answer = {"outcome": {"outcome": "selected", "optionId": "allow"}}
                reply = {"jsonrpc": "2.0", "id": message["id"], "result": answer}
                await self.client.send(json.dumps(reply).encode())
            elif message.get("method") == "session/update":
                self.updates.append(message["params"]["update"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.finish(await self.start(method, **params))

    async def open(self) -> str:
        await self.call("initialize", protocolVersion=1, clientCapabilities={})
        answer = await self.call("session/new", cwd="/home/somebody/elsewhere", mcpServers=[])
        key: str = answer["result"]["sessionId"]
        return key

    async def prompt(self, session: str, text: str) -> dict[str, Any]:
        return await self.call("session/prompt", sessionId=session, prompt=[{"type": "text", "text": text}])

    @property
    def said(self) -> str:
        chunks = [u["content"]["text"] for u in self.updates if u["sessionUpdate"] == "agent_message_chunk"]
        return "".join(chunks)


async def test_a_turn_is_streamed_and_journaled(sandbox: Sandbox, broker: Broker) -> None:
    await sandbox.start()
    control = await broker.control()
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    answer = await ide.prompt(session, "hello there")
    assert answer["result"]["stopReason"] == "end_turn"
    assert ide.said.endswith("You said: hello there")
    assert sum(path.stat().st_size for path in broker.journal_dir.iterdir()) > 0
    status = await control.probe(1)
    assert (status.clients, status.open_turns) == (1, 0)


async def test_a_command_with_permission_runs_in_the_workspace(sandbox: Sandbox, broker: Broker) -> None:
    await sandbox.start()
    control = await broker.control()
    workspace = sandbox.home / "project"
    bound = await control.bind(
        1, {"settings": {"allow_client_mcp": False, "workspace": str(workspace)}}, {"settings": "s"}
    )
    assert bound.ok
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    await ide.prompt(session, "!ask pwd")
    assert ide.said == str(workspace)


async def test_no_socket_and_no_journal_leaks_into_the_agent_or_its_commands(sandbox: Sandbox, broker: Broker) -> None:
    await sandbox.start()
    control = await broker.control()
    first = await control.status("ready")
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    await ide.prompt(session, "hello")
    assert sandbox.process is not None
    host.need_sight_of(sandbox.process.pid)
    journals = [name for name in open_files(sandbox.process.pid).values() if str(broker.journal_dir) in name]
    assert journals
    os.kill(first.agent_pid, signal.SIGKILL)
    await control.status("restarting")
    second = await control.status("ready")
    for pid in (second.agent_pid,):
        held = open_files(pid)
        assert sorted(held) == [0, 1, 2], held
        assert all(name.startswith("pipe:") for name in held.values())
    ide.updates.clear()
    answer = await ide.prompt(session, "!ls -l /proc/self/fd")
    assert "result" in answer, answer
    assert "socket:" not in ide.said
    assert str(broker.journal_dir) not in ide.said


async def test_an_agent_killed_in_a_turn_is_an_error_with_a_hint_and_the_next_turn_works(
    sandbox: Sandbox, broker: Broker
) -> None:
    await sandbox.start()
    control = await broker.control()
    status = await control.status("ready")
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    number = await ide.start("session/prompt", sessionId=session, prompt=[{"type": "text", "text": "/slow 1000"}])
    await control.expect(Status, open_turns=1)
    os.kill(status.agent_pid, signal.SIGKILL)
    answer = await ide.finish(number)
    assert answer["error"]["data"]["code"] == "agent.failed"
    assert answer["error"]["data"]["hint"]
    await control.status("ready")
    assert (await ide.prompt(session, "again"))["result"]["stopReason"] == "end_turn"


async def test_a_change_of_the_process_waits_for_the_turn_to_end(sandbox: Sandbox, broker: Broker) -> None:
    await sandbox.start()
    control = await broker.control()
    status = await control.status("ready")
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    number = await ide.start("session/prompt", sessionId=session, prompt=[{"type": "text", "text": "/slow 20 20"}])
    await control.expect(Status, open_turns=1)
    assert broker.welcome is not None
    assert broker.welcome.agent_spec is not None
    changed = broker.welcome.agent_spec.encode() | {"env": {"COLOUR": "green"}}
    bound = await control.bind(1, {"process": changed}, {"process": "a2"})
    assert bound.effect == {"process": "next_turn"}
    assert (await control.probe(2)).agent_pid == status.agent_pid
    assert (await ide.finish(number))["result"]["stopReason"] == "end_turn"
    assert ide.said.endswith("20 ")
    await control.status("starting")
    assert (await control.status("ready")).agent_pid != status.agent_pid
    ide.updates.clear()
    await ide.prompt(session, "!echo $COLOUR")
    assert ide.said == "green"


async def test_a_turn_survives_the_broker(sandbox: Sandbox, broker: Broker) -> None:
    await sandbox.start()
    control = await broker.control()
    before = await control.status("ready")
    ide = Ide(await Client.attach(broker))
    session = await ide.open()
    await ide.start("session/prompt", sessionId=session, prompt=[{"type": "text", "text": "/slow 100 30"}])
    await control.expect(Status, open_turns=1)
    await broker.stop()
    ide.client.sock.close()
    await asyncio.sleep(0.2)
    await broker.start()
    control = await broker.control()
    assert control.hello.open_turns == 1
    await control.expect(Status, open_turns=0, agent_pid=before.agent_pid)
    again = Ide(await Client.attach(broker, key="c2"))
    await again.call("initialize", protocolVersion=1, clientCapabilities={})
    answer = await again.call("session/load", sessionId=session, cwd="/x", mcpServers=[])
    assert "result" in answer, answer
    assert again.said == "".join(f"{number} " for number in range(1, 101))
