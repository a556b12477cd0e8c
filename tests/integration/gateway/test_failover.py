"""A provider of three servers, through the real gateway process: one dies, comes back, all are gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
import pytest_asyncio

from broker.gateway.link import Provider
from broker.gateway.policy import CacheStore, Policy
from tests.integration.gateway.support import Rig, client, rig
from tests.integration.gateway.test_servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

REST = 0.3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


class World:
    """Three servers behind one provider, and a sandbox's client."""

    def __init__(self, rig: Rig, servers: list[Server], http: aiohttp.ClientSession) -> None:
        self.rig = rig
        self.servers = servers
        self.http = http

    async def post(self) -> int:
        async with self.http.post("/p/v1/chat/completions", data=b"{}") as answer:
            await answer.read()
            return answer.status

    def asked(self) -> list[int]:
        """Calls that each server has had."""
        return [sum(head.startswith(b"POST ") for head in server.heads) for server in self.servers]


@pytest_asyncio.fixture(loop_scope="module", params=["", "/health"], ids=["unprobed", "probed"])
async def world(shared: Rig, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    servers = [Server() for _ in range(3)]
    for server in servers:
        await server.start()
    urls = tuple(f"http://127.0.0.1:{server.port}" for server in servers)
    policy = Policy(
        kind="openai", upstreams=urls, prewarm=1, max_fails=2, fail_timeout_s=REST, retries=2,
        health_path=request.param, health_interval_s=0.05,
    )  # fmt: skip
    async with shared.own_slot(), AsyncExitStack() as stack:
        shared.link.set_policies({"p": policy}, CacheStore())
        slot = await shared.put({"p": Provider("openai", urls[0], "k", policy="p")})
        yield World(shared, servers, await stack.enter_async_context(client(slot.gateway_path)))
        shared.link.set_policies({}, CacheStore())
    for server in servers:
        server.stop()


async def test_calls_are_shared_out(world: World) -> None:
    assert set(await asyncio.gather(*(world.post() for _ in range(30)))) == {200}
    assert min(world.asked()) > 0


@pytest.mark.parametrize("fault", ["dead", "reset", "error"])
async def test_one_dies_under_load_and_comes_back(world: World, fault: str) -> None:
    sick = world.servers[0]
    answers: list[int] = []
    over = asyncio.Event()

    async def caller() -> None:
        while not over.is_set():
            answers.append(await world.post())

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(caller())
        async with asyncio.timeout(20):
            while len(answers) < 20:
                await asyncio.sleep(0.002)
            sick.mood = fault
            if fault == "dead":
                sick.stop()
            so_far = len(answers)
            while len(answers) < so_far + 100:
                await asyncio.sleep(0.002)
            sick.mood = "ok"
            if fault == "dead":
                await sick.start()
            had = world.asked()[0]
            while world.asked()[0] < had + 10:
                await asyncio.sleep(0.002)
        over.set()
    assert set(answers) == {200}, "nobody noticed"


async def test_all_are_gone_and_one_is_back(world: World) -> None:
    for server in world.servers:
        server.mood = "reset"
    async with asyncio.timeout(20):
        while (status := await world.post()) != 503:
            assert status == 502
    async with world.http.post("/p/v1/chat/completions", data=b"{}") as answer:
        problem = await answer.json()
    assert answer.status in (502, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert "127.0.0.1" not in str(problem)
    world.servers[1].mood = "ok"
    async with asyncio.timeout(20):
        while await world.post() != 200:
            await asyncio.sleep(0.01)
