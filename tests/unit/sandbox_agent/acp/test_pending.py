"""What a sandbox has to finish before it may be paused, beside turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.unit.sandbox_agent.acp.kit import Bench


async def settle(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not reached():
            await asyncio.sleep(0.001)


async def test_a_request_that_the_agent_has_not_answered(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    await bench.session(peer)
    await settle(lambda: bench.hub.pending == 0)
    bench.agent.on["session/new"] = lambda params: None
    request = await peer.ask("session/new", {"cwd": "/", "mcpServers": []})
    await bench.agent.asked("session/new", 2)
    assert (bench.hub.pending, bench.hub.open_turns) == (1, 0)
    bench.agent.answer("session/new", {"sessionId": "late"})
    await peer.answer_to(request)
    await settle(lambda: bench.hub.pending == 0)


async def test_what_a_client_said_before_the_agent_was_there(bench: Bench) -> None:
    bench.start(up=False)
    peer = bench.connect()
    await peer.ask("session/new", {"cwd": "/", "mcpServers": []})
    await settle(lambda: bench.hub.pending == 1)


async def test_a_client_that_is_behind(bench: Bench) -> None:
    bench.start(client_buffer_bytes=100_000)
    peer = bench.connect()
    session = await bench.session(peer)
    for _ in range(200):
        bench.agent.update(session, "x" * 10_000)
    assert bench.hub.pending == 1
    await peer.texts(200)
    await settle(lambda: bench.hub.pending == 0)


async def test_mcp_servers_that_start(bench: Bench) -> None:
    bench.start()
    await bench.session(bench.connect())
    bench.hub.set_mcp([{"name": "fs", "command": "/bin/fs", "args": [], "env": []}])
    assert bench.hub.pending == 1
    await settle(lambda: bool(bench.muxes))
    bench.mux.settle(False)
    assert bench.hub.pending == 1
    bench.mux.settle()
    await settle(lambda: bench.hub.pending == 0)
