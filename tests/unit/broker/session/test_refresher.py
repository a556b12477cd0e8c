from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from broker.config import Config
from broker.errors import Code, CortexError
from broker.metrics import CREDENTIAL_REFRESHES
from broker.session import refresher as module
from broker.session.oauth import REFUSED_S
from broker.session.refresher import AT_ONCE, Refresher
from broker.store.db import Database
from broker.store.keeper import open_vault
from broker.store.keys import KeyFile
from broker.store.vault import Entry, Facts, Secret, Vault
from tests.unit.broker.session.token_endpoint import TokenServer, token_server

NOW = 1_000_000.0


class World:
    """A vault, a token endpoint and whoever renews; ``told``: users whose sessions were to take what is stored."""

    def __init__(self, server: TokenServer, db: Database, vault: Vault) -> None:
        self.server = server
        self.db = db
        self.vault = vault
        self.now = NOW
        self.told: list[str] = []
        self.asleep: set[str] = set()
        self.kept_at_telling: list[Any] = []
        self.config = Config.model_validate(
            {
                "gateway": {
                    "providers": {
                        "p": {"kind": "openai", "base_url": "https://x.example", "oauth": {"token_url": server.url}},
                        "off": {"kind": "openai", "base_url": "https://x.example"},
                    }
                },
                "vault": {"refresh_ahead_s": 300, "refresh_timeout_s": 5},
            }
        )
        self.refresher = self.another()

    def another(self) -> Refresher:
        """As it is after a restart of the broker."""
        return Refresher(
            self.vault,
            lambda: self.config,
            changed=self.changed,
            awake=lambda user: user not in self.asleep,
            clock=lambda: self.now,
        )

    async def changed(self, user: str) -> None:
        self.told.append(user)
        rows = await self.db.read("SELECT version FROM credentials WHERE user = ?", (user,))
        self.kept_at_telling.append(rows[0][0] if rows else None)

    async def store(
        self, life: float = 3600, *, user: str = "ann", provider: str = "p", refresh: str | None = "rt-0"
    ) -> Entry:
        value = {"access_token": "at-0"} | ({"refresh_token": refresh} if refresh else {})
        await self.vault.put(user, provider, Secret("oauth", "gateway", value, self.now + life if life else 0.0))
        return await self.entry(user, provider)

    async def entry(self, user: str = "ann", provider: str = "p") -> Entry:
        entry = await self.vault.get(user, provider)
        assert entry is not None
        return entry

    async def token(self, entry: Entry | None = None) -> str:
        """What a call would be made with now."""
        found = await self.refresher.current(entry or await self.entry())
        assert isinstance(found.secret.value, dict)
        return str(found.secret.value["access_token"])

    async def facts(self, user: str = "ann") -> Facts:
        facts = await self.vault.facts(user, "p")
        assert facts is not None
        return facts

    async def heard(self, times: int) -> None:
        """The sessions were told so often."""
        await self.until(lambda: len(self.told) >= times)
        assert len(self.told) == times

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not reached():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[World]:
    async with token_server() as server:
        db = await Database.open(tmp_path / "state")
        vault = await open_vault(db, KeyFile(tmp_path / "vault.key"), b"i" * 32, lambda: made.now if made else NOW)
        made: World | None = None
        made = World(server, db, vault)
        yield made
        server.gate.set()
        await made.refresher.close()
        await vault.close()
        await db.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as made:
        yield made


def count(result: str) -> float:
    return float(CREDENTIAL_REFRESHES.labels("p", result)._value.get())


async def test_a_good_token_is_used_as_it_is(world: World) -> None:
    await world.store()
    assert await world.token() == "at-0"
    assert world.server.asked == []


async def test_fifty_who_need_an_expired_token_at_once_make_one_request(world: World) -> None:
    entry = await world.store(-5)
    world.server.gate.clear()
    needs = [asyncio.ensure_future(world.token(entry)) for _ in range(50)]
    await world.server.arrived.wait()
    await asyncio.sleep(0)
    world.server.gate.set()
    assert set(await asyncio.gather(*needs)) == {"at-1"}
    assert len(world.server.asked) == 1
    assert world.server.good == {"rt-1"}
    value = (await world.entry()).secret.value
    assert isinstance(value, dict)
    assert value == {"access_token": "at-1", "refresh_token": "rt-1"}


async def test_one_that_is_due_is_renewed_meanwhile_and_told(world: World) -> None:
    await world.store()
    world.now += 3400
    world.server.gate.clear()
    before = count("renewed")
    # It is good for some minutes yet: nobody waits.
    assert await world.token() == "at-0"
    await world.server.arrived.wait()
    world.server.gate.set()
    await world.until(lambda: world.told == ["ann"])
    assert await world.token() == "at-1"
    assert count("renewed") == before + 1
    # It was durable before anyone heard of it.
    assert world.kept_at_telling == [(await world.facts()).version]
    assert (await world.facts()).expires_at == world.now + 3600


async def test_renewed_ahead_of_time_while_its_user_is_there(world: World) -> None:
    await world.store()
    await world.token()
    world.now += 3000
    await world.refresher.look()
    assert world.server.asked == []
    for renewals in (1, 2, 3):
        world.now += 3600 - 200
        await world.refresher.look()
        await world.heard(renewals)
        assert len(world.server.asked) == renewals
    assert world.server.good == {"rt-3"}


async def test_nobodys_token_is_renewed_while_the_user_is_away_but_at_once_when_they_come(world: World) -> None:
    await world.store()
    await world.token()
    world.asleep.add("ann")
    for _ in range(5):
        world.now += 3600
        await world.refresher.look()
    assert world.refresher._flights == {}
    assert world.server.asked == []
    assert await world.token() == "at-1"


async def test_the_loop_wakes_by_itself_when_one_is_due(world: World) -> None:
    entry = await world.store()
    world.refresher.start()
    await asyncio.sleep(0)
    world.now += 3290
    # The look that was waited for is that of the new one.
    due = await world.store(601)
    assert due.facts.version > entry.facts.version
    await world.token()
    world.now += 600
    world.refresher._news.set()
    await world.until(lambda: world.told == ["ann"])
    assert len(world.server.asked) == 1


@pytest.mark.parametrize(("life", "provider", "refresh"), [(0, "p", "rt-0"), (-5, "off", "rt-0"), (-5, "p", None)])
async def test_what_cannot_be_renewed_is_used_as_it_is(
    world: World, life: float, provider: str, refresh: str | None
) -> None:
    entry = await world.store(life, provider=provider, refresh=refresh)
    assert await world.token(entry) == "at-0"
    world.now += 10_000
    await world.refresher.look()
    assert world.server.asked == []


async def test_a_refused_token_set_is_told_once_and_the_provider_left_alone(world: World) -> None:
    entry = await world.store(-5, refresh="rt-old")
    before = count("refused")
    with capture_logs() as logs:
        assert await world.token(entry) == "at-0"
        await world.until(lambda: world.told == ["ann"])
        for _ in range(5):
            assert await world.token() == "at-0"
            world.now += REFUSED_S / 6
            await world.refresher.look()
    assert count("refused") == before + 1
    assert len(world.server.asked) == 1
    facts = await world.facts()
    assert facts.problem == "the provider answered 400 invalid_grant"
    assert world.told == ["ann"]
    assert "rt-old" not in repr(logs)
    # Signing in again ends it.
    await world.store(-5)
    assert await world.token() == "at-1"
    assert (await world.facts()).problem == ""


async def test_failures_back_off_and_a_restart_does_not_forget_it(world: World) -> None:
    entry = await world.store(-5)
    world.server.answer = lambda: web.Response(status=503)
    with capture_logs():
        await world.token(entry)
        assert len(world.server.asked) == 1
        pauses = []
        for tries in range(2, 6):
            facts = await world.facts()
            pauses.append(facts.retry_at - world.now)
            await world.refresher.close()
            world.refresher = world.another()
            assert await world.token() == "at-0"
            world.now = facts.retry_at - 0.1
            assert await world.token() == "at-0"
            assert len(world.server.asked) == tries - 1
            world.now = facts.retry_at
            assert await world.token() == "at-0"
            assert len(world.server.asked) == tries
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]
    assert world.told == ["ann"], "the same failure is no news"
    world.server.answer = None
    world.now = (await world.facts()).retry_at
    assert await world.token() == "at-1"
    assert (await world.facts()).failures == 0


async def test_a_restart_that_finds_many_due_asks_for_a_few_at_a_time(world: World) -> None:
    users = [f"u{number}" for number in range(40)]
    for user in users:
        world.server.good.add(user)
        await world.store(-5, user=user, refresh=user)
    world.server.gate.clear()
    needs = [asyncio.ensure_future(world.token(await world.entry(user))) for user in users]
    await world.until(lambda: world.server.under_way == AT_ONCE)
    world.server.gate.set()
    await asyncio.gather(*needs)
    assert len(world.server.asked) == len(users)
    assert world.server.most == AT_ONCE


async def test_one_that_was_stored_anew_while_it_waited_for_its_turn_is_not_renewed(world: World) -> None:
    users = [f"u{number}" for number in range(AT_ONCE + 1)]
    for user in users:
        world.server.good.add(user)
        await world.store(-5, user=user, refresh=user)
    world.server.gate.clear()
    needs = [asyncio.ensure_future(world.token(await world.entry(user))) for user in users]
    await world.until(lambda: world.server.under_way == AT_ONCE)
    fresh = {"access_token": "new", "refresh_token": "rt-new"}
    await world.vault.put(users[-1], "p", Secret("oauth", "gateway", fresh, world.now + 3600))
    world.server.gate.set()
    assert (await asyncio.gather(*needs))[-1] == "new"
    assert [asked["refresh_token"] for asked in world.server.asked] == users[:-1]


async def test_what_was_stored_meanwhile_wins(world: World) -> None:
    entry = await world.store(-5)
    world.server.gate.clear()
    need = asyncio.ensure_future(world.token(entry))
    await world.server.arrived.wait()
    before = count("superseded")
    await world.vault.put("ann", "p", Secret("oauth", "gateway", {"access_token": "new"}, world.now + 60))
    world.server.gate.set()
    assert await need == "new"
    assert count("superseded") == before + 1


async def test_what_was_erased_meanwhile_stays_erased(world: World) -> None:
    entry = await world.store(-5)
    world.server.gate.clear()
    need = asyncio.ensure_future(world.token(entry))
    await world.server.arrived.wait()
    await world.vault.erase("ann")
    world.server.gate.set()
    assert await need == "at-0"
    assert await world.vault.get("ann", "p") is None


async def test_a_new_token_that_cannot_be_stored_is_not_used_and_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_AGAIN_S", 0.0)
    entry = await world.store(-5)
    put, refused = world.vault.put, 0

    async def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal refused
        refused += 1
        if refused <= 3:
            assert world.told == []
            raise CortexError(Code.DISK_FULL, "the disk is full", hint="make room")
        return await put(*args, **kwargs)

    monkeypatch.setattr(world.vault, "put", full)
    with capture_logs() as logs:
        assert await world.token(entry) == "at-1"
    assert len(world.server.asked) == 1
    assert [log["event"] for log in logs].count("credential_not_stored") == 3
    value = (await world.entry()).secret.value
    assert isinstance(value, dict)
    assert value["refresh_token"] == "rt-1"


@pytest.mark.parametrize("broken", ["get", "note_failure"])
async def test_a_store_that_fails_for_a_while_ends_no_renewal(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    await world.store(3600)
    assert await world.token() == "at-0"
    world.now += 3400

    async def full(*args: Any) -> Any:
        raise CortexError(Code.STORE_ERROR, "cannot ask the store", hint="see the broker's log")

    world.server.answer = lambda: web.Response(status=503)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(world.vault, broken, full)
        await world.refresher.look()
        await world.until(lambda: not world.refresher._flights)
    assert [log["event"] for log in logs][-1] == "credential_not_renewed"
    world.server.answer = None
    world.now += 60
    await world.refresher.look()
    await world.heard(1)
    assert world.server.good == {"rt-1"}


async def test_a_provider_that_hangs_holds_nobody_for_long(world: World) -> None:
    entry = await world.store(-5)
    world.config = Config.model_validate(
        world.config.model_dump() | {"vault": {"refresh_ahead_s": 300, "refresh_timeout_s": 0.05}}
    )
    world.server.gate.clear()
    with capture_logs():
        assert await world.token(entry) == "at-0"
        await world.until(lambda: world.told == ["ann"])
    assert "no answer" in (await world.facts()).problem


async def test_a_stop_takes_in_the_answer_that_is_on_its_way(world: World) -> None:
    entry = await world.store(-5)
    world.server.gate.clear()
    need = asyncio.ensure_future(world.token(entry))
    await world.server.arrived.wait()
    closing = asyncio.ensure_future(world.refresher.close())
    await asyncio.sleep(0)
    world.server.gate.set()
    await closing
    assert await need == "at-1"


async def test_a_clock_that_jumps_a_day_makes_no_storm(world: World) -> None:
    await world.store()
    await world.token()
    world.now += 86_400
    for _ in range(3):
        await world.refresher.look()
        assert await world.token() == "at-1"
    assert len(world.server.asked) == 1
    world.now -= 86_400
    for _ in range(3):
        await world.refresher.look()
        assert await world.token() == "at-1"
    assert len(world.server.asked) == 1
