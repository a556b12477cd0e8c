"""The command line as people and editors run it: processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.e2e.harness import ROOT, BrokerProcess

CORTEX = (sys.executable, "-m", "broker")


async def cortex(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """Runs a verb to its end without a terminal: status, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *CORTEX,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        **options,
    )
    async with asyncio.timeout(45):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_demo_runs_one_turn_where_there_is_no_terminal() -> None:
    status, out, err = await cortex("demo", "--prompt", "hello out there")
    assert status == 0, err
    assert "hello out there" in out
    assert "bring-up: cold, process" in out
    assert out.split()[-3:-1] == ["total", "0.0"]
    status, out, err = await cortex("demo", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["stop_reason"] == "end_turn"
    assert {stage["stage"] for stage in told["timeline"]["stages"]} >= {"hello", "bind"}


class Editor:
    """An editor that spawned ``cortex attach``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.updates: list[dict[str, Any]] = []

    async def send(self, ident: int, method: str, **params: Any) -> None:
        assert self.process.stdin is not None
        message = {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        await self.process.stdin.drain()

    async def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(45):
            line = await self.process.stdout.readline()
        assert line, "attach has ended"
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "session/update":
            self.updates.append(message["params"])
        return message

    async def answer(self, ident: int) -> dict[str, Any]:
        """The answer to request ``ident``; updates before it are collected."""
        while True:
            message = await self.receive()
            if message.get("id") == ident and "method" not in message:
                assert "result" in message, message
                result: dict[str, Any] = message["result"]
                return result

    @property
    def text(self) -> str:
        chunks = [one["update"] for one in self.updates if one["update"]["sessionUpdate"] == "agent_message_chunk"]
        return "".join(chunk["content"]["text"] for chunk in chunks)


@asynccontextmanager
async def attached(broker: BrokerProcess, user: str) -> AsyncIterator[Editor]:
    process = await asyncio.create_subprocess_exec(
        *(*CORTEX, "attach", user, "--config", str(broker.config_path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")},
        limit=2**25,
    )
    editor = Editor(process)
    try:
        await editor.send(0, "initialize", protocolVersion=1, clientCapabilities={})
        assert (await editor.answer(0))["protocolVersion"] == 1
        yield editor
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_an_editor_attaches_and_works(broker: BrokerProcess) -> None:
    async with attached(broker, "alice") as editor:
        await editor.send(1, "session/new", cwd="/Users/me/project", mcpServers=[])
        name = (await editor.answer(1))["sessionId"]
        await editor.send(2, "session/prompt", sessionId=name, prompt=[{"type": "text", "text": "over stdio"}])
        assert (await editor.answer(2))["stopReason"] == "end_turn"
        assert "over stdio" in editor.text


async def test_an_editor_does_not_notice_a_killed_broker(broker: BrokerProcess) -> None:
    async with attached(broker, "bob") as editor:
        await editor.send(1, "session/new", cwd="/x", mcpServers=[])
        name = (await editor.answer(1))["sessionId"]
        await editor.send(2, "session/prompt", sessionId=name, prompt=[{"type": "text", "text": "/slow 60"}])
        while len(editor.updates) < 5:
            await editor.receive()
        await broker.kill()
        await broker.start()
        assert (await editor.answer(2))["stopReason"] == "end_turn"
    seqs = [one["_meta"]["cortex"]["seq"] for one in editor.updates]
    assert seqs == sorted(set(seqs))
    chunks = [one for one in editor.updates if one["update"]["sessionUpdate"] == "agent_message_chunk"]
    assert len(chunks) >= 60
    assert "60" in editor.text


async def test_verbs_find_the_broker_by_its_settings(broker: BrokerProcess) -> None:
    config = ("--config", str(broker.config_path))
    status, out, err = await cortex("session", "create", "carol", "--wait", "--json", *config)
    assert status == 0, err
    assert json.loads(out)["state"] == "ready"
    status, out, _ = await cortex("session", "list", *config)
    assert out.split()[5:9] == ["carol", "main", "demo", "ready"]
    status, _, err = await cortex("serve", *config)
    assert status == 1
    assert "store.locked" in err or "config.invalid" in err
