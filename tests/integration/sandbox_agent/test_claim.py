"""A sandbox that is nobody's, and the bind that makes it somebody's: the real agent server and demo agent."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent.wire.messages import AgentSpec, Bound, Status
from tests.integration.sandbox_agent.harness import DEMO, Broker, Client, ControlConnection, Sandbox, children
from tests.integration.sandbox_agent.test_conversation import Ide
from tests.integration.sandbox_agent.test_server import alive, shell, until_dead

SETTINGS = {"settings": {"open_ahead": True}, "mcp": []}
MCP_SERVER = """
import json, os, sys
tools = [{"name": "whoami", "inputSchema": {"type": "object"}}]
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    answers = {
        "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                       "serverInfo": {"name": "x", "version": "1"}},
        "tools/list": {"tools": tools},
        "tools/call": {"content": [{"type": "text", "text": f"{os.getpid()} {os.environ.get('COLOUR')}"}]},
    }
    answer = {"jsonrpc": "2.0", "id": message["id"], "result": answers.get(message["method"], {})}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def nobodys(broker: Broker) -> Broker:
    """Welcomes sandboxes without a session."""
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, session="")
    return broker


async def warm(sandbox: Sandbox, broker: Broker) -> ControlConnection:
    """Started, bound, its conversation open."""
    await sandbox.start()
    control = await broker.control()
    bound = await control.bind(1, SETTINGS, {"settings": "s", "mcp": "m"})
    assert bound.ok
    await control.expect(Status, agent="ready", ahead="open")
    return control


async def claim(control: ControlConnection, parts: dict[str, Any] | None = None, **how: Any) -> Bound:
    parts = {"claim": {"session": "ann/main", **how}, **(parts or {})}
    return await control.bind(2, parts, {name: f"h-{name}" for name in parts} | {"claim": "ann/main"})


def journals(broker: Broker) -> list[Any]:
    return [preamble for preamble in broker.preambles if preamble.kind == "journal"]


def move_in(sandbox: Sandbox) -> Path:
    """Another home is in the place of the blank one, as by the broker's rename; returns where that went."""
    away, theirs = sandbox.vol / "blank", sandbox.vol / "theirs"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("kept")
    sandbox.home.rename(away)
    theirs.rename(sandbox.home)
    return away


async def test_it_is_ready_with_a_conversation_open_and_neither_journal_nor_client(
    sandbox: Sandbox, nobodys: Broker
) -> None:
    control = await warm(sandbox, nobodys)
    assert "claim" not in (await control.bind(3, {}, {})).applied
    assert journals(nobodys) == []
    frame = await (await Client.attach(nobodys)).receive()
    assert frame.data[:2] == (1013).to_bytes(2, "big")
    assert "claim" not in control.hello.applied


async def test_a_claimed_one_serves_what_was_opened_before(sandbox: Sandbox, nobodys: Broker) -> None:
    control = await warm(sandbox, nobodys)
    before = await control.probe(5)
    bound = await claim(control)
    assert (bound.ok, bound.effect) == (True, {"claim": "now"})
    assert bound.applied["claim"] == "ann/main"
    ide = Ide(await Client.attach(nobodys))
    session = await ide.open()
    assert (await ide.prompt(session, "!pwd"))["result"]["stopReason"] == "end_turn"
    assert ide.said == str(sandbox.home / "workspace")
    told = await control.expect(Status, turns=1)
    assert (told.ahead, told.agent_pid) == ("", before.agent_pid)
    assert journals(nobodys)
    assert sum(path.stat().st_size for path in nobodys.journal_dir.iterdir()) > 0


async def test_a_broker_that_comes_back_is_told_whose_it_is(sandbox: Sandbox, nobodys: Broker) -> None:
    control = await warm(sandbox, nobodys)
    await nobodys.stop()
    await nobodys.start()
    control = await nobodys.control()
    assert "claim" not in control.hello.applied
    await control.expect(Status, ahead="open")
    assert (await claim(control)).ok
    await nobodys.stop()
    await nobodys.start()
    control = await nobodys.control()
    assert control.hello.applied["claim"] == "ann/main"
    refused = await control.bind(3, {"claim": {"session": "bob/main"}}, {"claim": "bob/main"})
    assert (refused.ok, refused.code) == (False, "session.conflict")
    assert (await claim(control, restart=True)).ok
    assert (await control.probe(4)).agent == "ready", "a claim that is there is not claimed again"


async def test_a_journal_that_comes_late_holds_up_clients_and_not_the_claim(sandbox: Sandbox, nobodys: Broker) -> None:
    given = asyncio.Event()
    grant = nobodys._grant

    def later(sock: Any, segment: int) -> None:
        if not given.is_set():
            raise EOFError
        grant(sock, segment)

    nobodys._grant = later  # type: ignore[method-assign]
    control = await warm(sandbox, nobodys)
    assert (await claim(control)).ok
    ide = Ide(await Client.attach(nobodys))
    opening = asyncio.ensure_future(ide.open())
    while not journals(nobodys):
        await control.probe(9)
    assert not opening.done()
    given.set()
    assert (await ide.prompt(await opening, "hello"))["result"]["stopReason"] == "end_turn"


async def test_an_agent_that_bears_it_goes_on_in_a_home_that_was_moved_in(sandbox: Sandbox, nobodys: Broker) -> None:
    assert nobodys.welcome is not None
    nobodys.welcome = replace(nobodys.welcome, agent_spec=replace(DEMO, files={".demo/config": "url={gateway}"}))
    control = await warm(sandbox, nobodys)
    pid = (await control.probe(5)).agent_pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    move_in(sandbox)
    assert (await claim(control, moved=True)).ok
    assert (sandbox.home / ".demo/config").exists(), "the agent's files are in the new home"
    ide = Ide(await Client.attach(nobodys))
    session = await ide.open()
    await ide.prompt(session, "!pwd; cat ../mine.txt")
    assert ide.said == f"{sandbox.home}/workspace\nkept"
    assert (await control.probe(6)).agent_pid == pid


async def test_an_agent_that_does_not_is_started_anew_in_it_once(sandbox: Sandbox, nobodys: Broker) -> None:
    """Killed at once: it has no time to write anything anywhere."""
    assert nobodys.welcome is not None
    script = (
        "trap 'touch $HOME/ended' TERM; echo started >> $HOME/starts; {python} -I -S {sandbox_agent}/demo.py & wait"
    )
    spec = shell("exec 3<&0; " + script.replace("demo.py &", "demo.py <&3 &"))
    nobodys.welcome = replace(nobodys.welcome, agent_spec=spec)
    control = await warm(sandbox, nobodys)
    first = (await control.probe(5)).agent_pid
    blank = move_in(sandbox)
    changed = replace(spec, env={"COLOUR": "green"})
    bound = await claim(control, {"process": changed.encode()}, moved=True, restart=True, keep_ahead=False)
    assert bound.effect == {"claim": "now", "process": "now"}
    assert (await control.probe(6)).agent != "ready"
    ready = await control.expect(Status, agent="ready", ahead="open")
    assert ready.agent_pid != first
    await until_dead(first)
    assert (sandbox.home / "starts").read_text() == "started\n"
    assert not (sandbox.home / "ended").exists()
    assert sorted(path.name for path in blank.iterdir()) == ["starts", "workspace"]
    ide = Ide(await Client.attach(nobodys))
    session = await ide.open()
    await ide.prompt(session, "!echo $COLOUR")
    assert ide.said == "green"


async def test_an_agent_of_other_settings_is_killed_at_once_too(sandbox: Sandbox, nobodys: Broker) -> None:
    assert nobodys.welcome is not None
    deaf = shell("trap 'touch $HOME/ended' TERM; exec 3<&0; {python} -I -S {sandbox_agent}/demo.py <&3 & wait")
    nobodys.welcome = replace(nobodys.welcome, agent_spec=deaf)
    control = await warm(sandbox, nobodys)
    first = (await control.probe(5)).agent_pid
    assert (await claim(control, {"process": DEMO.encode()})).ok
    await control.status("ready")
    await until_dead(first)
    assert not (sandbox.home / "ended").exists()


async def test_an_agent_that_still_starts_is_started_anew(sandbox: Sandbox, nobodys: Broker) -> None:
    assert nobodys.welcome is not None
    slow = shell("test -e $HOME/go || exec sleep 60; exec {python} -I -S {sandbox_agent}/demo.py")
    nobodys.welcome = replace(nobodys.welcome, agent_spec=slow)
    server = await sandbox.start()
    control = await nobodys.control()
    first = (await control.probe(5)).agent_pid
    async with asyncio.timeout(10):
        while Path(f"/proc/{first}/comm").read_text() != "sleep\n":
            await control.probe(6)
    (sandbox.home / "go").touch()
    assert (await claim(control, restart=True)).ok
    ready = await control.status("ready")
    async with asyncio.timeout(10):
        while children(server) != [ready.agent_pid]:
            await control.probe(7)


async def test_the_users_servers_run_once_for_all_conversations_and_their_tools_are_there(
    sandbox: Sandbox, nobodys: Broker
) -> None:
    script = sandbox.vol / "server.py"
    script.write_text(MCP_SERVER)
    server = {"name": "me", "command": sys.executable, "args": ["-I", str(script)], "env": []}
    control = await warm(sandbox, nobodys)
    coloured: AgentSpec = replace(DEMO, env={"COLOUR": "green"})
    assert (await claim(control, {"mcp": [server], "process": coloured.encode()})).ok
    await control.expect(Status, agent="ready", ahead="open")
    said = set()
    for key in ("one", "two"):
        ide = Ide(await Client.attach(nobodys, key=key))
        await ide.prompt(await ide.open(), "/tool me__whoami {}")
        (done,) = [u for u in ide.updates if u["sessionUpdate"] == "tool_call_update" and u["status"] == "completed"]
        assert done
        said.add(ide.said)
    (answer,) = said
    assert "green" in answer
    pid = int(json.dumps(answer).strip('"').split()[0])
    assert alive(pid)
    assert list((sandbox.home / ".cache/cortex/mcp").iterdir()), "what it has is known before it runs the next time"
