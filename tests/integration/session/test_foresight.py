"""From what users did to a sandbox that is up when they come: store, patterns, look, sessions on fake sandboxes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.session.activity import DAY, HOUR
from broker.session.directory import Solo
from broker.session.foresight import Foresight
from broker.session.preparation import Preparation
from broker.session.registry import Registry
from broker.store.activity import ActivityStore, Tally
from tests.integration.session.rig import Client, Rig, rig

NINE = 1_700_000_000 // DAY * DAY + 9 * HOUR
COMES = float(NINE + 10 * DAY)
"""The morning after ten on which ann came at nine."""
ROOM = 2**30


class Pools:
    """What the pool would tell and be told."""

    def __init__(self) -> None:
        self.memory = {
            "budget_bytes": ROOM,
            "warm_bytes": 0,
            "host_available_bytes": 4 * ROOM,
            "reserve_bytes": ROOM,
        }
        self.expected: dict[str, int | None] = {}

    def view(self) -> dict[str, Any]:
        return {"memory": self.memory, "agents": [{"agent": "demo", "bytes_each": 100 * 2**20, "memory_bytes": 0}]}

    def expect(self, agent: str, count: int | None) -> None:
        self.expected[agent] = count


class World:
    """A rig whose sessions note what is done, with a look at it at the test's word."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.pools = Pools()
        self._make()

    def _make(self) -> None:
        self.foresight = Foresight(ActivityStore(self.rig.db), lambda: self.rig.config.pool, self.rig.clock)
        self.runtime = replace(self.rig.runtime, activity=self.foresight.activity)
        self.rig.registry = Registry(self.runtime, Solo("n1"), self.rig.clock, self.rig.pool, steady=self.rig.clock)
        self.preparer = Preparation(self.runtime, self.rig.registry, self.pools, lambda: self.rig.config.pool.agents)

    async def history(self, user: str) -> None:
        days = (NINE + day * DAY for day in range(10))
        await self.foresight.merge([Tally(at // 60, 0, "request", user, 3, 40) for at in days])

    async def at(self, now: float) -> list[tuple[str, str]]:
        """Everything that happens by itself until then; who is expected and what is done."""
        self.rig.clock.now = now
        await self.foresight.activity.turn()
        await self.foresight._warner.look(self.preparer)
        return [(one["user"], one["action"]) for one in self.foresight.forecast()["expected"]]

    async def known(self, user: str = "ann") -> None:
        """The user has a home, a session that rests, and a history."""
        session = await self.rig.ready(user)
        await session.stop()
        self.rig.clock.now = COMES - 4 * HOUR
        await self.history(user)


@asynccontextmanager
async def world(**changes: Any) -> AsyncIterator[World]:
    async with rig(**{"pool": {"forecast": {"mode": "on"}}, **changes}) as made:
        made.clock.now = COMES - 5 * HOUR
        await made.registry.close()
        yield World(made)


async def test_who_is_expected_finds_the_sandbox_up() -> None:
    async with world() as here:
        await here.known()
        assert await here.at(COMES - 300) == []
        assert await here.at(COMES - 100) == [("ann", "prewarmed")]
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        created = here.rig.calls("create")
        client = Client()
        here.rig.clock.now = COMES + 20
        session.attach(client)
        (await session.open_stream(client.attach)).close()
        assert session.timeline()[0]["path"] == "user_warm"
        assert here.rig.calls("create") == created
        assert await here.at(COMES + 60) == []
        assert here.foresight.forecast()["counts"] == {"hit": 1, "miss": 0, "wasted": 0}


async def test_a_forecast_alone_starts_nothing() -> None:
    async with world(pool={"forecast": {"mode": "forecast"}}) as here:
        await here.known()
        created = here.rig.calls("create")
        assert await here.at(COMES - 100) == [("ann", "would prewarm")]
        await here.rig.ready("ann")
        await here.at(COMES - 40)
        assert here.rig.calls("create") == created + 1, "by the user alone"
        assert here.foresight.forecast()["counts"]["hit"] == 1


async def test_when_memory_runs_short_what_waits_for_somebody_goes() -> None:
    async with world() as here:
        await here.known()
        assert await here.at(COMES - 100) == [("ann", "prewarmed")]
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        here.pools.memory["warm_bytes"] = ROOM + 1
        assert await here.at(COMES - 40) == [("ann", "left out")]
        assert session.state == "stopped"
        await here.rig.assert_at_rest("ann")


async def test_what_is_in_use_never_goes() -> None:
    async with world() as here:
        await here.known()
        await here.at(COMES - 100)
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        session.attach(Client())
        await here.preparer.let_go("ann")
        assert session.state == "ready"


async def test_a_turn_that_outlives_its_client_is_not_cut_to_make_room() -> None:
    async with world() as here:
        await here.known()
        await here.at(COMES - 100)
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        client = Client()
        session.attach(client)
        session.detach(client)
        here.rig.clock.now += DAY
        here.rig.box.open_turns = 1
        await here.preparer.let_go("ann")
        assert session.state == "ready"


async def test_who_comes_while_room_is_made_keeps_the_sandbox() -> None:
    async with world() as here:
        await here.known()
        await here.at(COMES - 100)
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        free = asyncio.Event()
        session._mailbox.post(free.wait)  # type: ignore[arg-type]
        going = asyncio.ensure_future(here.preparer.let_go("ann"))
        await asyncio.sleep(0)
        client = Client()
        session.attach(client)
        free.set()
        await going
        assert session.state == "ready"
        assert client.closed is None


async def test_intent_is_noted_and_its_lead_measured() -> None:
    async with world() as here:
        await here.rig.registry.prewarm("ann", "main", create=True, announced=True)
        session = here.rig.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        here.rig.clock.now += 42
        await here.rig.registry.create("ann", "main", None)
        await here.foresight.activity.turn()
        told = await here.foresight.of_user("ann")
        assert told["leads"] == {"intents": 1, "followed": 1, "median_s": 42, "p90_s": 42}


async def test_what_was_noted_outlives_the_broker() -> None:
    async with world() as here:
        session = await here.rig.ready("ann")
        await session.stop()
        await here.rig.registry.close()
        await here.foresight.close()
        here._make()
        told = await here.foresight.of_user("ann")
        assert told["minutes"] == 1
        await here.history("ann")
        await here.at(COMES - 4 * HOUR)
        assert [pattern.user for pattern in here.foresight.activity.patterns] == ["ann"]


async def test_preparing_sees_to_home_packages_and_credentials(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-1")
    provider = {"kind": "openai", "base_url": "https://api.example", "credential_file": str(key)}
    changes: dict[str, Any] = {
        "gateway": {"providers": {"p": provider}},
        "agents": {"demo": {"command": ["demo"], "provider": "p"}},
    }
    async with world(**changes) as here:
        await here.known()
        well = {"home": "", "packages": "", "credentials": ""}
        assert await here.preparer.prepare("ann") == well
        await here.rig.ready("ann")
        assert await here.preparer.prepare("ann") == well, "a home in its slot is there too"
        key.unlink()
        assert "cannot be read" in (await here.preparer.prepare("ann"))["credentials"]


async def test_pools_are_scaled_by_what_is_expected() -> None:
    async with world(pool={"agents": {"demo": {"target": 5, "maximum": 9}}}) as here:
        for share, count in ((0.5, 3), (2.0, 10), (0.0, 0), (None, None)):
            here.preparer.load(share)
            assert here.pools.expected == {"demo": count}
