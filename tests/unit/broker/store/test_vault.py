from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.metrics import STORE_READS, VAULT_ALARMS
from broker.store import vault as module
from broker.store.db import Database
from broker.store.keeper import open_vault
from broker.store.keys import KeyFile
from broker.store.vault import Secret, Vault

KEY = Secret("api_key", "gateway", "sk-secret-1")
CANARY = "sk-canary-7b1e"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def vault(db: Database, tmp_path: Path) -> AsyncIterator[Vault]:
    made = await open_vault(db, KeyFile(tmp_path / "vault.key"), b"i" * 32, Clock())
    yield made
    await made.close()


async def again(vault: Vault) -> Vault:
    """Another broker on the same store."""
    return Vault(vault._db, vault.ring, b"i" * 32, Clock())


def alarms(reason: str = "tampered") -> float:
    return float(VAULT_ALARMS.labels(reason)._value.get())


def reads() -> float:
    return float(STORE_READS._value.get())


async def get(vault: Vault, user: str = "ann", provider: str = "p") -> Secret:
    entry = await vault.get(user, provider)
    assert entry is not None
    return entry.secret


async def test_what_was_stored_comes_back_and_can_be_replaced(vault: Vault) -> None:
    assert await vault.get("ann", "p") is None
    first = await vault.put("ann", "p", KEY)
    assert first is not None
    assert await get(vault) == await get(await again(vault)) == KEY
    tokens = Secret("oauth", "gateway", {"access_token": "a", "n": [1, "ü"]}, expires_at=2000.5)
    Clock.now = 1001.0
    second = await vault.put("ann", "p", tokens)
    Clock.now = 1000.0
    assert second is not None
    assert await get(vault) == await get(await again(vault)) == tokens
    assert second.version > first.version
    assert (first.created_at, second.created_at, second.updated_at) == (1000.0, 1000.0, 1001.0)
    assert (await vault.list("ann")) == [second]
    assert (await vault.facts("ann", "p"), await vault.facts("ann", "q")) == (second, None)


async def test_facts_tell_nothing_of_the_secret(vault: Vault) -> None:
    facts = await vault.put("ann", "p", Secret("api_key", "gateway", CANARY))
    entry = await vault.get("ann", "p")
    assert CANARY not in repr(facts) + repr(entry) + repr(vault.__dict__)


async def test_equal_secrets_have_equal_fingerprints_for_one_user_only(vault: Vault) -> None:
    async def print_of(user: str, value: str) -> str:
        facts = await vault.put(user, "p", Secret("api_key", "gateway", value))
        assert facts is not None
        return facts.fingerprint

    first = await print_of("ann", "one")
    assert len(first) == 16
    assert await print_of("ann", "two") != first
    assert await print_of("ann", "one") == first
    assert await print_of("bob", "one") != first


async def test_nothing_readable_reaches_the_disk(vault: Vault, tmp_path: Path) -> None:
    await vault.put("ann", "p", Secret("api_key", "gateway", CANARY))
    await vault.put("ann", "p", Secret("file", "file", json.dumps({"t": CANARY})))
    await vault.delete("ann", "p")
    await vault.put("bob", "p", Secret("oauth", "gateway", {"access_token": CANARY}))
    for file in (tmp_path / "state").iterdir():
        assert CANARY.encode() not in file.read_bytes(), file


async def test_a_user_who_is_known_costs_no_query(vault: Vault) -> None:
    await vault.put("ann", "p", KEY)
    await get(vault)
    await vault.list("nobody")
    before = reads()
    for _ in range(3):
        assert await get(vault) == KEY
        assert await vault.list("nobody") == []
    assert reads() == before
    await vault.put("ann", "p", Secret("api_key", "gateway", "other"))
    assert (await get(vault)).value == "other"
    assert reads() == before + 1


async def test_what_is_kept_in_memory_is_bounded_and_sealed(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_USERS", 20)
    await vault.put("ann", "p", Secret("api_key", "gateway", CANARY))
    await get(vault)
    assert CANARY not in repr([row.sealed for rows in vault._known.values() for row in rows])
    for number in range(25):
        await vault.list(f"u{number}")
    assert len(vault._known) == 20
    assert (await get(vault)).value == CANARY


class SlowReads:
    """Reads of the store are answered when ``go`` is set; ``begun`` says that one has read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = asyncio.Event(), asyncio.Event()
        read = Database.read

        async def slow(db: Database, sql: str, params: Any = ()) -> Any:
            rows = await read(db, sql, params)
            self.begun.set()
            await self.go.wait()
            return rows

        monkeypatch.setattr(Database, "read", slow)


async def test_a_read_that_overlaps_a_write_is_not_remembered(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await vault.put("ann", "p", KEY)
    slow = SlowReads(monkeypatch)
    listing = asyncio.ensure_future(vault.list("ann"))
    await slow.begun.wait()
    new = await vault.put("ann", "p", Secret("api_key", "gateway", "newer"))
    slow.go.set()
    assert await listing == [old]
    assert await vault.list("ann") == [new]


async def test_what_was_read_before_a_write_is_no_attack(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    await vault.put("ann", "p", KEY)
    slow = SlowReads(monkeypatch)
    before = alarms("rolled_back")
    asking = asyncio.ensure_future(get(vault))
    await slow.begun.wait()
    await vault.put("ann", "p", Secret("api_key", "gateway", "newer"))
    slow.go.set()
    assert (await asking).value == "newer"
    assert alarms("rolled_back") == before


async def test_a_write_goes_on_when_its_caller_leaves(vault: Vault) -> None:
    await vault.list("ann")
    writing = asyncio.ensure_future(vault.put("ann", "p", KEY))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await vault.put("bob", "p", KEY)
    assert await get(vault) == KEY


async def test_only_the_version_that_is_expected_is_replaced(vault: Vault) -> None:
    facts = await vault.put("ann", "p", KEY)
    assert facts is not None
    newer = Secret("api_key", "gateway", "newer")
    assert await vault.put("ann", "p", newer) is not None
    assert await vault.put("ann", "p", KEY, expect=facts.version) is None
    assert await get(vault) == newer
    await vault.delete("ann", "p")
    assert await vault.put("ann", "p", KEY, expect=facts.version) is None
    assert await vault.get("ann", "p") is None


async def test_delete_and_erase(vault: Vault) -> None:
    for user in ("ann", "bob"):
        for provider in ("p", "q"):
            await vault.put(user, provider, KEY)
    assert await vault.delete("ann", "p")
    assert not await vault.delete("ann", "p")
    assert [facts.provider for facts in await vault.list("ann")] == ["q"]
    assert await vault.erase("ann") == 1
    assert await vault.erase("ann") == 0
    assert await vault.list("ann") == []
    assert len(await vault.list("bob")) == 2


async def test_a_failed_renewal_is_noted_until_the_next_write(vault: Vault) -> None:
    facts = await vault.put("ann", "p", KEY)
    assert facts is not None
    await vault.note_failure(facts, "invalid_grant", 1300.0)
    await vault.note_failure(facts, "timeout", 1600.0)
    (noted,) = await vault.list("ann")
    assert (noted.problem, noted.failures, noted.retry_at, noted.version) == ("timeout", 2, 1600.0, facts.version)
    await vault.put("ann", "p", KEY)
    await vault.note_failure(facts, "late", 9.0)
    (noted,) = await vault.list("ann")
    assert (noted.problem, noted.failures, noted.retry_at) == ("", 0, 0.0)


SWAPS = {
    "another user's": "UPDATE credentials SET sealed = (SELECT sealed FROM credentials WHERE user = 'bob') "
    "WHERE user = 'ann'",
    "another provider's": "UPDATE credentials SET sealed = (SELECT sealed FROM credentials WHERE provider = 'q') "
    "WHERE user = 'ann' AND provider = 'p'",
    "an older one": "UPDATE credentials SET sealed = (SELECT sealed FROM old) WHERE user = 'ann' AND provider = 'p'",
    "a changed byte": "UPDATE credentials SET sealed = "
    "CAST(substr(sealed, 1, 60) || x'00' || substr(sealed, 62) AS BLOB)",
    "cut off": "UPDATE credentials SET sealed = substr(sealed, 1, 60)",
    "empty": "UPDATE credentials SET sealed = x''",
    "text": "UPDATE credentials SET sealed = CAST('sk-mine' AS BLOB)",
    "a key of nobody's": "UPDATE credentials SET sealed = "
    "CAST(substr(sealed, 1, 4) || x'00000000' || substr(sealed, 9) AS BLOB)",
    "the canary": "UPDATE credentials SET sealed = (SELECT canary FROM vault)",
    "another kind": "UPDATE credentials SET kind = 'oauth'",
    "another mode": "UPDATE credentials SET mode = 'file'",
    "another expiry": "UPDATE credentials SET expires_at = 5",
    "another version": "UPDATE credentials SET version = version + 1",
    "another name": "UPDATE credentials SET user = 'x' || user; "
    "UPDATE credentials SET user = 'ann' WHERE user = 'xbob'",
}


@pytest.mark.parametrize("how", SWAPS)
async def test_a_row_that_was_tampered_with_is_refused_and_raises_an_alarm(
    vault: Vault, db: Database, how: str
) -> None:
    await vault.put("ann", "p", Secret("api_key", "gateway", "older"))
    await db.write(("CREATE TABLE old AS SELECT * FROM credentials", ()))
    await vault.put("ann", "p", KEY)
    await vault.put("ann", "q", KEY)
    await vault.put("bob", "p", KEY)
    await db.write(*((statement, ()) for statement in SWAPS[how].split(";")))
    fresh = await again(vault)
    before = alarms()
    with pytest.raises(CortexError) as caught:
        await fresh.get("ann", "p")
    assert caught.value.code is Code.VAULT_TAMPERED
    assert "ann" in str(caught.value)
    assert "sk-" not in str(caught.value)
    assert caught.value.__context__ is None or "sk-" not in repr(caught.value.__context__)
    assert alarms() == before + 1


async def test_a_whole_row_put_back_is_refused_by_the_broker_that_saw_the_newer_one(vault: Vault, db: Database) -> None:
    await vault.put("ann", "p", Secret("api_key", "gateway", "older"))
    await db.write(("CREATE TABLE old AS SELECT * FROM credentials", ()))
    await vault.put("ann", "p", KEY)
    back = (("DELETE FROM credentials", ()), ("INSERT INTO credentials SELECT * FROM old", ()))
    await db.write(*back)
    before = alarms("rolled_back")
    for _ in range(2):
        with pytest.raises(CortexError, match="older version"):
            await vault.get("ann", "p")
    assert alarms("rolled_back") == before + 2
    await vault.put("ann", "p", KEY)
    await db.write(("DELETE FROM old", ()), ("INSERT INTO old SELECT * FROM credentials", ()))
    await vault.delete("ann", "p")
    await db.write(*back)
    with pytest.raises(CortexError, match="older version"):
        await vault.get("ann", "p")
    await vault.erase("ann")
    await db.write(*back)
    with pytest.raises(CortexError, match="older version"):
        await vault.get("ann", "p")
    # What is stored now is the newest again, whatever numbers there were.
    await vault.put("ann", "p", KEY)
    assert await get(vault) == KEY


async def test_versions_never_come_again(vault: Vault, db: Database) -> None:
    seen = set()
    for _ in range(3):
        facts = await vault.put("ann", "p", KEY)
        assert facts is not None
        seen.add(facts.version)
        await vault.delete("ann", "p")
    assert len(seen) == 3
