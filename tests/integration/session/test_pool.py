"""The pool with the real maker of warm sandboxes, store, slots and links; only the sandboxes are fake."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import geteuid
from typing import Any, cast

import pytest

from broker.errors import Code, CortexError
from broker.host.memory import HostMemory
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.fake import FakeDriver, Script
from broker.sandbox.reconcile import reconcile
from broker.sandbox.slots import Slots, home_key
from broker.session.directory import Solo
from broker.session.pool import Pool
from broker.session.registry import Registry
from broker.session.session import Session
from broker.session.warm import WarmMaker
from tests.integration.session.rig import FakeGateway, Rig, engine_down, rig, until

PLENTY = HostMemory(64 * 2**30, 32 * 2**30)
FAST: dict[str, Any] = {"debounce_s": 0.005, "refill_per_s": 500, "refill_burst": 100, "backoff_s": 0.01}


class House:
    """A rig with a real pool. ``engine`` and disk outlive a ``restart``."""

    def __init__(self, world: Rig) -> None:
        self.world = world
        self.move_in()

    def move_in(self) -> None:
        world = self.world
        self.pool = Pool(
            world.runtime, WarmMaker(world.runtime), users=lambda: self.registry.warm(), memory=lambda: PLENTY
        )
        self.registry = Registry(world.runtime, Solo("n1"), world.clock, self.pool, steady=world.steady)

    def agent(self, name: str = "demo") -> dict[str, Any]:
        found = next((one for one in self.pool.view()["agents"] if one["agent"] == name), None)
        return found or {"hot": 0, "paused": 0, "making": 0, "ending": 0}

    def counts(self, name: str = "demo") -> tuple[int, int, int, int]:
        agent = self.agent(name)
        return agent["hot"], agent["paused"], agent["making"], agent["ending"]

    async def reaches(self, *counts: int) -> None:
        """Until so many are hot and paused, and none on its way."""
        await until(lambda: self.counts() == (*counts, 0, 0))

    async def session(self, user: str) -> Session:
        made, _ = await self.registry.create(user, "main", None)
        assert isinstance(made, Session)
        return made

    async def ready(self, user: str) -> str:
        """The way by which it became ready."""
        session = await self.session(user)
        await session.wait_ready()
        return str(session.timeline()[0]["path"])

    async def restart(self) -> None:
        world = self.world
        await self.let_go()
        await world.let_go()
        await world.db.close()
        world.slots = Slots(world.base, uid=geteuid())
        world.gateway = FakeGateway()
        await world.open()
        driver, rows = cast(SandboxDriver, world.driver), await world.rows.sandboxes()
        outcome = await reconcile(driver, world.slots, rows, world.rows.sandbox_delete)
        self.move_in()
        for adopted in outcome.adopted:
            assert adopted.record.role == "warm"
            self.pool.adopt(adopted)
        self.pool.start()

    async def let_go(self) -> None:
        await self.registry.close()
        await self.pool.close()


@asynccontextmanager
async def house(*, target: int, hot: int = 1, maximum: int = 32, **changes: Any) -> AsyncIterator[House]:
    agents = {"demo": {"target": target, "hot": hot, "maximum": maximum}}
    async with rig(pool={**FAST, "agents": agents, **changes}) as world:
        made = House(world)
        try:
            made.pool.start()
            yield made
        finally:
            await made.let_go()


async def test_it_fills_and_pauses_and_nothing_is_anybodys() -> None:
    async with house(target=3) as here:
        await here.reaches(1, 2)
        rows = await here.world.rows.sandboxes()
        assert [(row.role, row.user) for row in rows] == [("warm", "")] * 3
        assert Counter(box.liveness for box in here.world.engine.sandboxes.values()) == {"running": 1, "paused": 2}


async def test_two_hundred_users_at_once_ten_warm_sandboxes() -> None:
    async with house(target=10, hot=3, refill_concurrency=1, debounce_s=30) as here:
        await here.reaches(3, 7)
        warm = set(here.world.engine.sandboxes)
        ways = Counter(await asyncio.gather(*(here.ready(f"u{number}") for number in range(200))))
        assert ways == {"generic_warm": 10, "cold": 190}
        rows = [row for row in await here.world.rows.sandboxes() if row.role == "session"]
        assert len({row.user for row in rows}) == len({row.slot for row in rows}) == 200
        assert {row.ref for row in rows} >= warm
        homes = [here.world.slots.owner(slot) for slot in here.world.slots.ids()]
        owners = Counter(key for key in homes if key is not None)
        assert owners == Counter(home_key(f"u{number}", "main") for number in range(200))
        for ref in warm:
            claims = [
                bind.parts["claim"]["session"]
                for bind in here.world.engine.sandboxes[ref].binds
                if "claim" in bind.parts
            ]
            assert len(claims) == 1


async def test_what_is_claimed_is_made_up_for_and_destroyed_after() -> None:
    async with house(target=2) as here:
        await here.reaches(1, 1)
        for number in range(6):
            await here.reaches(1, 1)
            assert await here.ready(f"u{number}") == "generic_warm"
        await here.reaches(1, 1)
        for number in range(6):
            await (await here.session(f"u{number}")).stop()
        await here.reaches(1, 1)
        assert len(here.world.engine.sandboxes) == len(here.world.slots.ids()) == 2


async def test_the_next_broker_takes_them_over_paused_ones_too() -> None:
    async with house(target=3) as here:
        await here.reaches(1, 2)
        before = set(here.world.engine.sandboxes)
        await here.restart()
        await here.reaches(1, 2)
        assert set(here.world.engine.sandboxes) == before
        ways = [await here.ready(f"u{number}") for number in range(2)]
        assert ways == ["generic_warm"] * 2


async def test_the_next_broker_replaces_those_that_were_made_with_other_settings() -> None:
    async with house(target=2) as here:
        await here.reaches(1, 1)
        before = set(here.world.engine.sandboxes)
        here.world.configure({"defaults": {"limits": {"memory_bytes": 2**28}}})
        await here.restart()
        await until(lambda: not before & set(here.world.engine.sandboxes))
        await here.reaches(1, 1)
        assert await here.ready("ann") == "generic_warm"


@pytest.mark.parametrize(
    "changes",
    [
        {"defaults": {"limits": {"memory_bytes": 2**28}}},
        {"defaults": {"env": {"A": "b"}}},
        {"agents": {"demo": {"command": ["other"]}}},
    ],
)
async def test_other_settings_replace_what_there_is(changes: dict[str, Any]) -> None:
    async with house(target=2) as here:
        await here.reaches(1, 1)
        before = set(here.world.engine.sandboxes)
        here.world.configure(changes)
        here.pool.settings_changed()
        await until(lambda: not before & set(here.world.engine.sandboxes))
        await here.reaches(1, 1)
        assert await here.ready("ann") == "generic_warm"
        await here.reaches(1, 1)


async def test_one_that_dies_is_put_away_whole() -> None:
    async with house(target=2) as here:
        await here.reaches(1, 1)
        for box in list(here.world.engine.sandboxes.values()):
            await here.world.engine.end(box.ref)
            await here.reaches(1, 1)
        assert len(await here.world.rows.sandboxes()) == len(here.world.slots.ids()) == 2
        assert len(here.world.gateway.slots) == 2


async def test_an_image_that_is_gone_is_told_by_the_pool_and_by_the_users_own_start() -> None:
    async with house(target=1, breaker_s=0.2) as here:
        await here.reaches(1, 0)
        here.world.engine.image_error = CortexError(Code.IMAGE_MISSING, "the image is gone", hint="build it")
        assert await here.ready("ann") == "generic_warm"
        await until(lambda: here.agent()["breaker"] == "open")
        assert "the image is gone" in here.agent()["error"]
        with pytest.raises(CortexError) as caught:
            await here.ready("bob")
        assert caught.value.code is Code.IMAGE_MISSING
        here.world.engine.image_error = None
        await here.reaches(1, 0)
        assert await here.ready("bob") == "generic_warm"


async def test_an_engine_that_loses_everything_and_comes_back() -> None:
    async with house(target=2, breaker_s=0.2) as here:
        await here.reaches(1, 1)
        here.world.engine.error = engine_down()
        for ref in list(here.world.engine.sandboxes):
            await here.world.engine.end(ref)
        with pytest.raises(CortexError) as caught:
            await here.ready("ann")
        assert caught.value.code is Code.ENGINE_DOWN
        here.world.engine.error = None
        await here.reaches(1, 1)
        assert len(here.world.slots.ids()) == len(here.world.engine.sandboxes)


async def test_an_agent_that_never_becomes_ready_leaves_nothing_behind() -> None:
    async with house(target=2, breaker_failures=2, breaker_s=0.2) as here:
        await here.reaches(1, 1)
        here.world.engine.script = Script(agent_fails="agent.failed")
        assert await here.ready("ann") == "generic_warm"
        await until(lambda: here.agent()["breaker"] == "open")
        assert "fake agent fails" in here.agent()["error"]
        here.world.engine.script = Script()
        await here.reaches(1, 1)
        assert len(here.world.slots.ids()) == len(here.world.engine.sandboxes) == 3


async def test_what_could_be_neither_made_nor_put_away_goes_when_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(driver: FakeDriver, ref: str) -> None:
        raise engine_down()

    async with house(target=2, maximum=4, breaker_s=0.1, breaker_failures=2) as here:
        await here.reaches(1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(FakeDriver, "remove", refuses)
            here.world.engine.script = Script(start_error=engine_down())
            assert await here.ready("ann") == "generic_warm"
            await until(lambda: here.agent()["stuck"] == 3 and here.agent()["short"] == "maximum")
            assert "engine is down" in here.agent()["error"]
        here.world.engine.script = Script()
        await here.reaches(1, 1)
        assert len(here.world.slots.ids()) == len(here.world.engine.sandboxes) == 3
        assert len(await here.world.rows.sandboxes()) == 3


async def test_users_own_warm_sessions_are_seen() -> None:
    async with house(target=1) as here:
        await here.reaches(1, 0)
        await here.registry.prewarm("ann", "main", None, create=True)
        await until(lambda: here.agent().get("users") == {"hot": 1, "paused": 0})
        assert here.pool.view()["memory"]["warm_bytes"] > 0
