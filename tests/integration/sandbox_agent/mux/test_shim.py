"""The program that agents are given: a real process between an agent and the multiplexer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.integration.sandbox_agent.mux.kit import DEADLINE_S, Agent, Place, server


class Shim:
    """An agent on the other side of a shim."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.agent = Agent(process.stdout, process.stdin)

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), DEADLINE_S)


async def started(place: Place) -> Shim:
    entry = place.mux.entry()
    pipe = asyncio.subprocess.PIPE
    made = await asyncio.create_subprocess_exec(
        entry["command"], *entry["args"], stdin=pipe, stdout=pipe, stderr=pipe, limit=2**24, env={}
    )
    return Shim(made)


@pytest_asyncio.fixture
async def shim(place: Place) -> AsyncIterator[Shim]:
    made = await started(place)
    yield made
    await made.agent.close()
    if made.process.returncode is None:
        made.process.kill()
        await made.process.wait()


async def test_big_messages_pass_both_ways(place: Place, shim: Shim) -> None:
    place.mux.set([server("one")])
    await shim.agent.hello()
    sent = "y" * 2_000_000
    assert (await shim.agent.value("one__echo", text=sent))["text"] == sent


async def test_it_ends_when_its_input_does_after_what_was_answered(place: Place, shim: Shim) -> None:
    await place.settled()
    answer = shim.agent.begin("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}})[1]
    listed = shim.agent.begin("tools/list")[1]
    shim.agent.writer.write_eof()
    assert (await asyncio.wait_for(answer, DEADLINE_S))["serverInfo"]["name"] == "cortex"
    assert await asyncio.wait_for(listed, DEADLINE_S) == {"tools": []}
    assert await shim.ended() == 0
    assert not place.mux._board.clients


async def test_it_ends_when_the_multiplexer_does(place: Place, shim: Shim) -> None:
    await shim.agent.hello()
    await place.mux.close()
    assert await shim.ended() == 0


async def test_its_conversation_ends_when_it_is_killed(place: Place, shim: Shim) -> None:
    await shim.agent.hello()
    other = await place.agent()
    shim.process.kill()
    async with asyncio.timeout(DEADLINE_S):
        while len(place.mux._board.clients) > 1:
            await other.ask("ping")


async def test_it_says_when_there_is_no_multiplexer(place: Place) -> None:
    Path(place.mux.entry()["args"][-1]).unlink()
    shim = await started(place)
    assert await shim.ended() == 69
    assert shim.process.stderr is not None
    assert b"is not there" in await shim.process.stderr.read()
    await shim.agent.close()


async def test_the_entry_is_always_the_same(place: Place) -> None:
    before = place.mux.entry()
    place.mux.set([server("one")])
    assert place.mux.entry() == before
    assert set(before) == {"name", "command", "args", "env"}
