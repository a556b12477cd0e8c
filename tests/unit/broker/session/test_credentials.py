from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import AgentConfig, Config
from broker.errors import Code, CortexError
from broker.session.credentials import VaultCredentials, check_file
from broker.session.providers import Credential, FileCredentials, providers_for
from broker.store.db import Database
from broker.store.keeper import open_vault
from broker.store.keys import KeyFile
from broker.store.vault import Secret, Vault
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE

AGENT = AgentConfig(command=("x",), provider="own", credential_path=".cli/auth.json")
FILE = '{"token": "cli"}'


class World:
    """``told``: users whose sessions were to take what is stored."""

    def __init__(self, db: Database, vault: Vault, config: Config) -> None:
        self.db = db
        self.vault = vault
        self.config = config
        self.told: list[str] = []
        self.credentials = VaultCredentials(
            vault, lambda: self.config, FileCredentials(), changed=self.changed, awake=lambda user: True
        )

    async def changed(self, user: str) -> None:
        self.told.append(user)

    async def get(self, user: str = "ann", provider: str = "own") -> Credential:
        return await self.credentials.get(user, provider, self.config.gateway.providers[provider])

    async def files(self, user: str = "ann", agent: AgentConfig = AGENT) -> list[dict[str, Any]]:
        return await self.credentials.files(user, "agent", agent)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    key = tmp_path / "operators.key"
    key.write_text("sk-operator")
    provider = {"kind": "anthropic", "base_url": "https://x.example", "credential_file": str(key)}
    headers = {"anthropic-beta": "oauth-2025-04-20", "chatgpt-account-id": "{account_id}"}
    oauth = {"token_url": "https://auth.example/t", "headers": headers}
    config = Config.model_validate({"gateway": {"providers": {"own": provider, "sub": provider | {"oauth": oauth}}}})
    db = await Database.open(tmp_path / "state")
    vault = await open_vault(db, KeyFile(tmp_path / "vault.key"), b"i" * 32)
    made = World(db, vault, config)
    yield made
    await made.credentials.close()
    await db.close()


async def test_the_users_own_stands_before_the_operators(world: World) -> None:
    await world.vault.put("ann", "own", Secret("api_key", "gateway", "sk-ann"))
    assert await world.get() == Credential("sk-ann")
    for user, provider in (("ann", "sub"), ("bob", "own"), ("", "own")):
        assert await world.get(user, provider) == Credential("sk-operator")
    await world.vault.delete("ann", "own")
    assert await world.get() == Credential("sk-operator")


async def test_a_token_goes_as_a_bearer_with_its_headers(world: World) -> None:
    tokens = {"access_token": "at", "account_id": "acc"}
    await world.vault.put("ann", "sub", Secret("oauth", "gateway", tokens))
    found = await world.get("ann", "sub")
    assert found == Credential("at", "bearer", {"anthropic-beta": "oauth-2025-04-20", "chatgpt-account-id": "acc"})
    assert "acc" not in repr(found)
    await world.vault.put("ann", "sub", Secret("oauth", "gateway", {"access_token": "at"}))
    assert (await world.get("ann", "sub")).headers == {"anthropic-beta": "oauth-2025-04-20"}


async def test_a_token_set_whose_oauth_was_turned_off_is_not_used_nor_is_the_operators(world: World) -> None:
    await world.vault.put("ann", "own", Secret("oauth", "gateway", {"access_token": "at"}))
    assert await world.get() == Credential()
    (warning,) = await world.credentials.warnings("ann")
    assert "[gateway.providers.own.oauth]" in warning


async def test_a_credential_file_passes_for_that_user_and_provider_alone(world: World) -> None:
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    told = {user: await providers_for(world.config, world.credentials, user, {}) for user in ("ann", "bob")}
    schemes = {
        (user, name): (entry.scheme, entry.credential) for user, table in told.items() for name, entry in table.items()
    }
    assert schemes == {
        ("ann", "own"): ("passthrough", ""),
        ("ann", "sub"): ("key", "sk-operator"),
        ("bob", "own"): ("key", "sk-operator"),
        ("bob", "sub"): ("key", "sk-operator"),
    }


async def test_the_agents_own_file_is_given_as_it_was_stored(world: World) -> None:
    assert await world.files() == []
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    assert await world.files() == [{"path": ".cli/auth.json", "mode": 0o600, "content": FILE.encode()}]
    assert await world.files("bob") == await world.files("") == []
    for changes in ({"provider": "sub"}, {"provider": ""}, {"credential_path": ""}):
        assert await world.files(agent=AGENT.model_copy(update=changes)) == []
    await world.vault.put("ann", "own", Secret("api_key", "gateway", "sk"))
    assert await world.files() == []


async def test_what_a_cli_made_of_its_file_is_what_the_next_sandbox_gets(world: World) -> None:
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    fresh = b'{"token":  "newer"}\n'
    await world.credentials.refreshed("ann", AGENT, ".cli/auth.json", fresh)
    assert (await world.files())[0]["content"] == fresh
    await asyncio.sleep(0)
    assert world.told == ["ann"]


async def test_what_it_said_already_is_not_written_again_but_answered(world: World) -> None:
    facts = await world.vault.put("ann", "own", Secret("file", "file", FILE))
    await world.credentials.refreshed("ann", AGENT, ".cli/auth.json", FILE.encode())
    assert await world.vault.facts("ann", "own") == facts
    await asyncio.sleep(0)
    assert world.told == ["ann"]


async def test_a_sandbox_that_says_it_over_and_over_has_its_user_told_once_more(world: World) -> None:
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    go_on = asyncio.Event()

    async def slow(user: str) -> None:
        world.told.append(user)
        await go_on.wait()

    world.credentials._changed = slow
    for _ in range(50):
        await world.credentials.refreshed("ann", AGENT, ".cli/auth.json", FILE.encode())
        await asyncio.sleep(0)
    assert world.told == ["ann"]
    go_on.set()
    async with asyncio.timeout(5):
        while world.credentials._telling:
            await asyncio.sleep(0)
    assert world.told == ["ann", "ann"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (".cli/other.json", FILE.encode()),
        ("/vol/home/.cli/auth.json", FILE.encode()),
        (".cli/auth.json", b""),
        (".cli/auth.json", b"{}"),
        (".cli/auth.json", b'["a"]'),
        (".cli/auth.json", b'{"a": '),
        (".cli/auth.json", b'{"a": "\xff"}'),
        (".cli/auth.json", b"[" * 100_000),
        (".cli/auth.json", json.dumps({"a": "x" * MAX_CREDENTIAL_FILE}).encode()),
    ],
)
async def test_what_a_sandbox_sends_is_hostile(world: World, path: str, content: bytes) -> None:
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    with pytest.raises(CortexError) as caught:
        await world.credentials.refreshed("ann", AGENT, path, content)
    assert caught.value.code is Code.BAD_CREDENTIAL
    assert (await world.files())[0]["content"] == FILE.encode()
    assert world.told == []


@pytest.mark.parametrize("stored", [None, Secret("api_key", "gateway", "sk-ann")])
async def test_a_sandbox_cannot_bring_a_credential_in(world: World, stored: Secret | None) -> None:
    if stored is not None:
        await world.vault.put("ann", "own", stored)
    before = await world.vault.list("ann")
    with pytest.raises(CortexError) as caught:
        await world.credentials.refreshed("ann", AGENT, ".cli/auth.json", FILE.encode())
    assert caught.value.code is Code.BAD_CREDENTIAL
    assert await world.vault.list("ann") == before


async def test_what_was_tampered_with_is_refused_and_the_operators_is_not_used(world: World) -> None:
    await world.vault.put("ann", "own", Secret("file", "file", FILE))
    # From the keys of a file to a key of the gateway: another way to use what was stored.
    await world.db.write(("UPDATE credentials SET kind = 'api_key', mode = 'gateway'", ()))
    for ask in (world.get, world.files):
        with pytest.raises(CortexError) as caught:
            await ask()
        assert caught.value.code is Code.VAULT_TAMPERED
        assert "cli" not in str(caught.value).replace("client", "")


async def test_a_failed_renewal_is_a_warning(world: World) -> None:
    facts = await world.vault.put("ann", "sub", Secret("oauth", "gateway", {"access_token": "at"}))
    assert facts is not None
    assert await world.credentials.warnings("ann") == []
    await world.vault.note_failure(facts, "the provider answered 400 invalid_grant", 5.0)
    (warning,) = await world.credentials.warnings("ann")
    assert "sub" in warning
    assert "invalid_grant" in warning
    assert "cortex user credential set" in warning
    assert await world.credentials.warnings("") == []


def test_a_file_of_any_cli_is_an_object_of_json() -> None:
    assert check_file(b' {"a": 1}\n') == ' {"a": 1}\n'
