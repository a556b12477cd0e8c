"""Reports of the gateway: durable before they are answered, each call counted once, budgets told when they change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import AgentConfig, Config
from broker.errors import Code, CortexError
from broker.gateway.records import Record, to_wire
from broker.metrics import USAGE_LOST
from broker.session import usage as usage_module
from broker.session.model_names import MAX_OF_USER
from broker.session.usage import Accounting
from broker.store.db import Database
from broker.store.usage import SpeedRow, UsageFilter, UsageStore
from tests.unit.broker.gateway.test_usage_log import record

DAY = 86_400.0
NOON = 20_000 * DAY + DAY / 2
PRICES = {"m": {"input": 1.0, "output": 10.0}}
AGENT = {"command": ["x"], "provider": "p", "model": "fastest", "models": ["m", "n"]}


class Gateway:
    """What is told to the gateway."""

    def __init__(self) -> None:
        self.seen: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.changes = 0

    def usage_seen(self, boot: str, upto: int) -> None:
        self.seen.put_nowait((boot, upto))

    def budgets_changed(self) -> None:
        self.changes += 1


class World:
    def __init__(self, db: Database) -> None:
        self.db = db
        self.now = NOON
        self.settings: dict[str, Any] = {"prices": PRICES}
        self.agents: dict[str, Any] = {}
        self._made: tuple[Any, Config] | None = None
        self.gateway = Gateway()

    def config(self) -> Config:
        agents = {name: AgentConfig.model_validate(agent) for name, agent in self.agents.items()}
        made = Config.model_validate({"gateway": self.settings, "agents": agents})
        if self._made is None or self._made[1] != made:
            self._made = None, made
        return self._made[1]

    async def open(self) -> Accounting:
        made = Accounting(UsageStore(self.db), self.config, lambda: self.now)
        await made.open()
        made.start(self.gateway)
        return made

    async def tell(self, accounting: Accounting, *calls: Record, upto: int = 1) -> None:
        """Tells and waits for the answer."""
        accounting.heard({"kind": "usage", "boot": "b", "upto": upto, "records": [to_wire(call) for call in calls]})
        assert await asyncio.wait_for(self.gateway.seen.get(), 5) == ("b", upto)


def call(number: int, **changes: Any) -> Record:
    made = record(**{"model": "m", "provider": "p", "at": NOON, "input": 1_000_000, "output": 0, **changes})
    made.id = f"b-{number}"
    return made


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    db = await Database.open(tmp_path / "state")
    yield World(db)
    await db.close()


async def costs(accounting: Accounting) -> dict[str | int, float]:
    return {one.key: one.cost_usd for one in await accounting.sums(UsageFilter(), "user")}


async def test_a_record_is_durable_when_it_is_answered_and_counts_once(world: World) -> None:
    accounting = await world.open()
    await world.tell(accounting, call(1), upto=1)
    assert await world.db.read("SELECT id, cost_usd FROM usage_calls") == [("b-1", 1.0)]
    await world.tell(accounting, call(1), call(2), upto=2)
    await accounting.close()
    # The next broker hears it from a gateway that got no answer.
    accounting = await world.open()
    await world.tell(accounting, call(1), call(2), call(3, user="bob"), upto=3)
    assert await costs(accounting) == {"ann": 2.0, "bob": 1.0}
    await accounting.close()


async def test_what_cannot_be_stored_is_not_answered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    accounting = await world.open()
    tried = asyncio.Event()
    add = UsageStore.add

    async def fail(self: UsageStore, calls: Any) -> frozenset[str]:
        tried.set()
        raise CortexError(Code.DISK_FULL, "full", hint="free some")

    monkeypatch.setattr(UsageStore, "add", fail)
    accounting.heard({"kind": "usage", "boot": "b", "upto": 1, "records": [to_wire(call(1))]})
    await asyncio.wait_for(tried.wait(), 5)
    monkeypatch.setattr(UsageStore, "add", add)
    await world.tell(accounting, call(1), upto=9)
    assert world.gateway.seen.empty()
    assert await costs(accounting) == {"ann": 1.0}
    await accounting.close()


async def test_what_has_come_is_stored_at_the_end(world: World) -> None:
    accounting = await world.open()
    for number in range(5):
        accounting.heard({"kind": "usage", "boot": "b", "upto": number, "records": [to_wire(call(number))]})
    await accounting.close()
    assert len(await world.db.read("SELECT id FROM usage_calls")) == 5


async def test_nonsense_is_counted_and_does_not_hold_up_the_rest(world: World) -> None:
    accounting = await world.open()
    before = USAGE_LOST._value.get()
    accounting.heard({"kind": "usage", "boot": "b", "upto": 2, "records": [{"id": 1}, None, to_wire(call(1))]})
    await asyncio.wait_for(world.gateway.seen.get(), 5)
    assert USAGE_LOST._value.get() == before + 2
    assert await costs(accounting) == {"ann": 1.0}
    await accounting.close()


async def test_answers_of_the_cache_cost_nothing_and_use_no_tokens(world: World) -> None:
    accounting = await world.open()
    await world.tell(accounting, call(1, cached="hit"), call(2, cached="coalesced"), call(3, cached="batched"))
    (found,) = await accounting.sums(UsageFilter(), "user")
    assert (found.calls, found.cached, found.input, found.cost_usd) == (3, 2, 1_000_000, 1.0)
    await accounting.close()


async def test_a_spent_budget_is_told_once_until_it_is_anew(world: World) -> None:
    world.settings |= {"budgets": {"period": "day", "user_usd": 2.0, "team_usd": 3.0}}
    accounting = await world.open()
    await world.tell(accounting, call(1, team="red"), call(2, user="bob", team="red"))
    await world.tell(accounting, call(1, team="red"), call(2, user="bob", team="red"))
    assert world.gateway.changes == 0
    await world.tell(accounting, call(3, team="red"))
    assert world.gateway.changes == 1
    assert accounting.spent() == {"users": ["ann"], "teams": ["red"], "for_s": DAY / 2}
    await world.tell(accounting, call(4))
    assert world.gateway.changes == 1
    await accounting.close()
    # A new broker knows.
    accounting = await world.open()
    assert world.gateway.changes == 1
    assert accounting.spent()["users"] == ["ann"]
    # So does one whose operator has raised it.
    world.settings |= {"budgets": {"period": "day", "user_usd": 50.0}}
    accounting.settings_changed()
    assert world.gateway.changes == 2
    assert accounting.spent()["users"] == []
    await accounting.close()
    world.settings |= {"budgets": {"period": "day", "user_usd": 2.0}}
    world.now += DAY
    accounting = await world.open()
    assert accounting.spent()["users"] == []
    await accounting.close()


async def test_those_who_have_spent_fit_into_a_message(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "MAX_SPENT_BYTES", 20)
    world.settings |= {"budgets": {"user_usd": 1.0, "team_usd": 1.0}}
    accounting = await world.open()
    await world.tell(accounting, *(call(number, user=f"user{number}", team="red") for number in range(5)))
    assert accounting.spent()["teams"] == ["red"]
    assert accounting.spent()["users"] == ["user0"]
    await accounting.close()


async def test_names_that_a_sandbox_makes_up_are_accounted_as_one(world: World) -> None:
    accounting = await world.open()
    made_up = [call(number, model=f"x{number}", status=404, outcome="error", input=None) for number in range(2, 40)]
    await world.tell(accounting, call(1), *made_up)
    await accounting.close()
    # The next broker knows who has answered.
    accounting = await world.open()
    await world.tell(accounting, call(50, status=500, outcome="error", input=None))
    await world.tell(accounting, *(call(100 + number, model=f"y{number}") for number in range(100)))
    rows = {one.key: one for one in await accounting.sums(UsageFilter(), "model")}
    assert (rows["m"].calls, rows["m"].cost_usd, rows["m"].errors) == (2, 1.0, 1)
    assert not [name for name in rows if str(name).startswith("x")]
    assert len(rows) <= MAX_OF_USER + 2
    assert sum(one.calls for one in rows.values()) == 140
    await accounting.close()


async def test_of_an_erased_user_nothing_comes_back(world: World) -> None:
    world.settings |= {"budgets": {"user_usd": 1.0}}
    accounting = await world.open()
    await world.tell(accounting, call(1))
    assert accounting.spent()["users"] == ["ann"]
    accounting.forget("ann")
    assert accounting.spent()["users"] == []
    await world.tell(accounting, call(2), call(3, at=NOON + 1, user="ann", input=3))
    assert await world.db.read("SELECT id FROM usage_calls ORDER BY id") == [("b-1",), ("b-3",)]
    await accounting.close()


async def test_the_past_is_pruned(world: World) -> None:
    world.settings |= {"usage_days": 30}
    accounting = await world.open()
    await world.tell(accounting, call(1, at=NOON - 31 * DAY), call(2, at=NOON - 8 * DAY), call(3))
    await accounting.close()
    pruned = asyncio.Event()
    accounting = Accounting(store := UsageStore(world.db), world.config, lambda: world.now)
    prune = store.prune

    async def noticed(calls_before: float, hours_before: int) -> None:
        await prune(calls_before, hours_before)
        pruned.set()

    store.prune = noticed  # type: ignore[method-assign]
    await accounting.open()
    accounting.start(world.gateway)
    await asyncio.wait_for(pruned.wait(), 5)
    assert await world.db.read("SELECT id FROM usage_calls") == [("b-3",)]
    assert [one.calls for one in await accounting.sums(UsageFilter(), "user")] == [2]
    await accounting.close()


async def test_the_fastest_model_is_known_over_restarts(world: World) -> None:
    accounting = await world.open()
    assert accounting.resolved() is world.config()
    world.settings |= {"providers": {"p": {"kind": "openai", "base_url": "http://127.0.0.1:1"}}}
    world.agents = {"one": AGENT, "two": {"command": ["y"], "model": "own"}}
    assert accounting.resolved().agents["one"].model == "m"
    assert accounting.resolved() is accounting.resolved()
    await world.tell(accounting, call(1, ttft_s=0.5), call(2, model="n", ttft_s=0.25))
    await accounting.close()
    assert await UsageStore(world.db).speeds() == [SpeedRow("p", "m", 0.5, 1, NOON), SpeedRow("p", "n", 0.25, 1, NOON)]
    accounting = await world.open()
    assert accounting.resolved().agents["one"].model == "n"
    assert accounting.resolved().agents["two"].model == "own"
    await accounting.close()
