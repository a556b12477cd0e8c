"""The pool: how many connections an origin has, which are kept, which are opened ahead. Real loopback servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from broker.errors import Code, CortexError
from broker.gateway.context import Context
from broker.gateway.messages import Settings
from broker.gateway.routes import Origin
from broker.gateway.upstream import MAX_IDLE, Pool, Upstream
from broker.host.tasks import TaskOwner


class World:
    """A pool, and a server that holds what connects to it."""

    def __init__(self) -> None:
        self.context = Context(TaskOwner("test"), Settings(connect_timeout_s=5.0))
        self.pool = self.context.pool
        self.stats = self.context.stats
        self.writers: list[asyncio.StreamWriter] = []
        self.origin: Origin

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with suppress(ConnectionError, asyncio.CancelledError):
            await reader.read()
        self.writers.remove(writer)
        writer.close()

    def configure(self, *, keep_alive: bool = True, prewarm: int = 0, max_connections: int = 100) -> None:
        self.pool.configure(self.origin, keep_alive=keep_alive, prewarm=prewarm, max_connections=max_connections)

    def put(self, upstream: Upstream) -> None:
        upstream.fresh, upstream.used = False, True
        self.pool.put(upstream, 50)

    async def dials(self, count: int) -> list[asyncio.Task[Upstream]]:
        """So many that wait."""
        before = self.stats.upstream_waited
        tasks = [asyncio.ensure_future(self.pool.dial(self.origin)) for _ in range(count)]
        await until(lambda: self.stats.upstream_waited == before + count)
        return tasks


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.origin = Origin("http", "127.0.0.1", server.sockets[0].getsockname()[1], "", True)
    yield made
    await made.context.close()
    await made.context.tasks.close()
    for writer in made.writers:
        writer.close()
    server.close()


async def test_without_a_bound_all_that_are_asked_for(world: World) -> None:
    made = [await world.pool.dial(world.origin) for _ in range(MAX_IDLE + 1)]
    for upstream in made:
        world.put(upstream)
    assert world.stats.idle_upstreams == MAX_IDLE


async def test_a_dial_waits_for_a_place_or_for_a_connection(world: World) -> None:
    world.configure(max_connections=2)
    one, two = await world.pool.dial(world.origin), await world.pool.dial(world.origin)
    first, second = await world.dials(2)
    world.put(one)
    assert await first is one, "handed over as it came free"
    assert world.stats.idle_upstreams == 0
    assert (world.stats.upstream_new, world.stats.upstream_reused, world.stats.upstream_waited) == (2, 1, 2)
    two.abort()
    third = await asyncio.wait_for(second, 5)
    assert third is not two
    assert third.fresh
    assert world.stats.upstream_new == 3


async def test_what_came_free_before_the_dial_is_not_overlooked(world: World) -> None:
    world.configure(max_connections=1)
    one = await world.pool.dial(world.origin)
    world.put(one)
    assert await world.pool.dial(world.origin, wait_s=0) is one


async def test_what_was_handed_over_dead_is_not_used(world: World) -> None:
    world.configure(max_connections=1)
    one = await world.pool.dial(world.origin)
    (waiting,) = await world.dials(1)
    world.put(one)
    one.abort()
    given = await asyncio.wait_for(waiting, 5)
    assert given is not one
    assert given.alive


async def test_no_place_in_time(world: World) -> None:
    world.configure(max_connections=1)
    await world.pool.dial(world.origin)
    with pytest.raises(CortexError, match="in use") as caught:
        await world.pool.dial(world.origin, wait_s=0.01)
    assert caught.value.code is Code.UPSTREAM_BUSY
    world.context.settings = Settings(connect_timeout_s=0.01)
    with pytest.raises(CortexError, match="in use"):
        await world.pool.dial(world.origin)


async def test_places_come_back_from_dials_that_fail_or_are_cancelled(world: World) -> None:
    nobody = Origin("http", "127.0.0.1", 1, "", True)
    world.pool.configure(nobody, keep_alive=True, prewarm=0, max_connections=1)
    for _ in range(3):
        with pytest.raises(CortexError) as caught:
            await world.pool.dial(nobody)
        assert caught.value.code is Code.UPSTREAM_UNREACHABLE
    world.configure(max_connections=1)
    for _ in range(3):
        task = asyncio.ensure_future(world.pool.dial(world.origin))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    one = await asyncio.wait_for(world.pool.dial(world.origin), 5)
    gone, stays = await world.dials(2)
    gone.cancel()
    one.abort()
    assert await asyncio.wait_for(stays, 5)


async def test_a_connection_that_is_lost_as_soon_as_it_stands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.configure(max_connections=1)
    dial = world.context.dialer.dial

    async def unlucky(origin: Origin, factory: Callable[[], Upstream]) -> Upstream:
        upstream = await dial(origin, factory)
        upstream.abort()
        await until(lambda: upstream.lost)
        return upstream

    monkeypatch.setattr(world.context.dialer, "dial", unlucky)
    for _ in range(3):
        assert not (await world.pool.dial(world.origin, wait_s=1)).alive


async def test_a_bound_that_is_lowered_and_lifted(world: World) -> None:
    world.configure(max_connections=3)
    made = [await world.pool.dial(world.origin) for _ in range(3)]
    world.configure(max_connections=1)
    world.put(made[0])
    world.put(made[1])
    await until(lambda: len(world.writers) == 1)
    assert world.stats.idle_upstreams == 0, "there are too many: what comes free is closed"
    waiting = await world.dials(2)
    world.pool.unconfigure(world.origin)
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


async def test_keep_alive_off(world: World) -> None:
    world.put(await world.pool.dial(world.origin))
    world.configure(keep_alive=False, prewarm=2)
    assert world.stats.idle_upstreams == 0
    world.put(await world.pool.dial(world.origin))
    assert world.pool.take(world.origin) is None
    await until(lambda: not world.writers)
    assert world.stats.upstream_prewarmed == 0


async def test_opened_ahead_and_again(world: World) -> None:
    world.configure(prewarm=2)
    await until(lambda: world.stats.idle_upstreams == 2)
    taken = world.pool.take(world.origin)
    assert taken is not None
    assert not taken.fresh, "the server may have closed it as idle"
    await until(lambda: world.stats.idle_upstreams == 2)
    world.put(taken)
    assert (world.stats.upstream_prewarmed, world.stats.upstream_reused, world.stats.upstream_new) == (3, 1, 0)
    world.pool.sweep(asyncio.get_running_loop().time() + 3600)
    assert world.stats.idle_upstreams == 0
    await until(lambda: world.stats.idle_upstreams == 2)
    for writer in list(world.writers):
        writer.close()
    await until(lambda: world.stats.upstream_prewarmed >= 6)


async def test_one_opened_ahead_that_is_lost_at_once_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dial = world.context.dialer.dial

    async def unlucky(origin: Origin, factory: Callable[[], Upstream]) -> Upstream:
        upstream = await dial(origin, factory)
        upstream.abort()
        return upstream

    monkeypatch.setattr(world.context.dialer, "dial", unlucky)
    world.configure(prewarm=2)
    await until(lambda: world.stats.upstream_prewarmed == 1)
    await until(lambda: not world.writers)
    assert world.stats.idle_upstreams == 0
    assert world.stats.upstream_prewarmed == 1, "it pauses"


async def test_opened_ahead_within_the_bound_and_not_before_who_waits(world: World) -> None:
    world.configure(prewarm=5, max_connections=2)
    await until(lambda: world.stats.idle_upstreams == 2)
    one, two = world.pool.take(world.origin), world.pool.take(world.origin)
    assert one is not None
    assert two is not None
    (waiting,) = await world.dials(1)
    assert world.stats.upstream_prewarmed == 2
    one.abort()
    await asyncio.wait_for(waiting, 5)
    assert len(world.writers) <= 2


async def test_no_more_is_opened_ahead_for_what_is_not_configured_any_more(world: World) -> None:
    world.configure(prewarm=2)
    await until(lambda: world.stats.idle_upstreams == 2)
    world.pool.unconfigure(world.origin)
    await until(lambda: not world.writers)
    assert len(world.context.tasks) == 0
    assert world.stats.idle_upstreams == 0


async def test_nothing_is_kept_of_hosts_that_are_gone(world: World) -> None:
    pool: Pool = world.pool
    upstream = await pool.dial(world.origin)
    world.put(upstream)
    assert pool.take(world.origin) is upstream
    upstream.abort()
    await until(lambda: not pool._lanes)
    with pytest.raises(CortexError):
        await pool.dial(Origin("http", "127.0.0.1", 1, "", True))
    assert not pool._lanes
