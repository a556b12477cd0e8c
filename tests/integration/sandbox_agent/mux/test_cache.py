"""Lists that are known before the servers run, and waiting for those that are not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent import mux_requests
from tests.integration.sandbox_agent.mux.kit import DEADLINE_S, Place, server, text


class Gate:
    """What a server reads before it answers ``initialize``; shut, it waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def shut(self) -> None:
        self.path.unlink()
        os.mkfifo(self.path)

    async def open(self) -> None:
        await asyncio.to_thread(self.path.write_text, "")


@pytest.fixture
def gate(root: Path) -> Gate:
    return Gate(root / "gate")


async def seen_once(place: Place, *servers: dict[str, Any]) -> None:
    """The servers have run, and their lists are kept."""
    files = place.home / ".cache/cortex/mcp"
    place.mux.set(list(servers))
    agent = await place.agent()
    await agent.names()
    async with asyncio.timeout(DEADLINE_S):
        while not files.is_dir() or len(list(files.glob("*.json"))) < len(servers):
            await agent.ask("ping")
    place.mux.set([])
    await agent.close()


async def test_lists_of_an_earlier_run_are_there_before_the_server(place: Place, gate: Gate) -> None:
    one = server("one", gate=str(gate.path), prompts=["p"], resources=["mem://a"], instructions="Hi.")
    await seen_once(place, one)
    gate.shut()
    place.mux.set([one])
    assert place.mux.settled
    agent = await place.connect()
    assert "Hi." in (await agent.hello())["instructions"]
    assert "one__echo" in await agent.names()
    assert await agent.names("prompts") == ["one__p"]
    call = agent.call("one__echo")
    await agent.ask("ping")
    assert not call.done()
    await gate.open()
    assert "one" in text(await asyncio.wait_for(call, DEADLINE_S))
    await agent.ask("ping")
    assert not agent.notes, "what it has now is what it had"


async def test_a_list_that_is_another_now_is_told(place: Place, gate: Gate, root: Path) -> None:
    more = root / "more"
    more.write_text("before")
    one = server("one", gate=str(gate.path), more=str(more))
    await seen_once(place, one)
    gate.shut()
    more.write_text("after")
    place.mux.set([one])
    agent = await place.agent()
    assert "one__before" in await agent.names()
    await gate.open()
    await agent.noted("notifications/tools/list_changed")
    names = await agent.names()
    assert "one__after" in names
    assert "one__before" not in names


async def test_a_list_of_an_earlier_run_counts_until_there_is_another(place: Place, gate: Gate) -> None:
    one = server("one", list_gate=str(gate.path))
    await seen_once(place, one)
    gate.shut()
    place.mux.set([one])
    agent = await place.agent()
    assert (await agent.value("one__echo"))["name"] == "one", "it is up, and asked for its list after this"
    assert "one__echo" in await agent.names()
    await gate.open()


async def test_a_call_that_waited_for_a_server_that_died_is_not_made_later(
    place: Place, gate: Gate, root: Path
) -> None:
    gate.shut()
    place.mux.set([server("one", gate=str(gate.path), die_once=str(root / "dead"))])
    agent = await place.agent()
    call = agent.call("one__echo", text="old")
    await agent.ask("ping")
    await gate.open()
    assert "exited with code 4" in text(await asyncio.wait_for(call, DEADLINE_S))
    heard = asyncio.get_running_loop().create_task(agent.value("one__heard"))
    await gate.open()
    assert "old" not in str(await heard)


async def test_a_call_that_waits_for_its_server_can_be_cancelled(place: Place, gate: Gate) -> None:
    one = server("one", gate=str(gate.path))
    await seen_once(place, one)
    gate.shut()
    place.mux.set([one])
    agent = await place.agent()
    number, _ = agent.begin("tools/call", {"name": "one__echo", "arguments": {}})
    agent.tell("notifications/cancelled", requestId=number)
    await agent.ask("ping")
    await gate.open()
    assert (await agent.value("one__echo"))["name"] == "one"
    assert number in agent._open


async def test_a_list_that_nobody_knows_yet_is_waited_for(place: Place, gate: Gate) -> None:
    gate.shut()
    place.mux.set([server("slow", gate=str(gate.path)), server("quick")])
    assert not place.mux.settled
    agent = await place.agent()
    _, listed = agent.begin("tools/list")
    await agent.ask("ping")
    assert not listed.done()
    await gate.open()
    names = [tool["name"] for tool in (await asyncio.wait_for(listed, DEADLINE_S))["tools"]]
    assert {"slow__echo", "quick__echo"} <= set(names)
    assert place.mux.settled


async def test_the_wait_has_an_end(place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mux_requests, "LIST_WAIT_S", 0.05)
    place.mux.set([server("quick")])
    agent = await place.agent()
    await agent.names()
    gate.shut()
    place.mux.set([server("slow", gate=str(gate.path)), server("quick")])
    assert all(name.startswith("quick__") for name in await agent.names())
    await gate.open()
    await agent.noted("notifications/tools/list_changed")
    assert "slow__echo" in await agent.names()


async def test_many_changes_at_once_are_told_once(place: Place, gate: Gate) -> None:
    servers = [server(name, gate=str(gate.path)) for name in ("one", "two", "three")]
    await seen_once(place, *servers)
    gate.shut()
    agent = await place.agent()
    assert await agent.names() == []
    for count in (1, 2, 3, 2, 3):
        place.mux.set(servers[:count])
    await agent.until(lambda: agent.notes)
    assert {name.split("__")[0] for name in await agent.names()} == {"one", "two", "three"}
    assert [note["method"] for note in agent.notes] == ["notifications/tools/list_changed"]
    place.mux.set([])


async def test_nothing_is_kept_while_there_is_no_home(place: Place) -> None:
    place.cached = False
    place.mux.set([server("one")])
    agent = await place.agent()
    assert "one__echo" in await agent.names()
    await agent.text("one__add", tool="more")
    await agent.noted("notifications/tools/list_changed")
    assert list(place.home.iterdir()) == []


async def test_a_planted_link_is_not_followed(place: Place, root: Path) -> None:
    target = root / "target"
    target.mkdir()
    (place.home / ".cache").symlink_to(target)
    place.mux.set([server("one")])
    agent = await place.agent()
    assert "one__echo" in await agent.names()
    await agent.text("one__add", tool="more")
    await agent.noted("notifications/tools/list_changed")
    assert list(target.iterdir()) == []


async def test_no_secret_is_kept(place: Place) -> None:
    one = server("one")
    one["env"].append({"name": "TOKEN", "value": "canary-value"})
    await seen_once(place, one)
    (file,) = (place.home / ".cache/cortex/mcp").iterdir()
    assert "canary-value" not in file.read_text() + file.name
    assert file.stat().st_mode & 0o777 == 0o600
