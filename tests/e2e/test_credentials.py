"""Users' own credentials, from the control API to the provider, in a broker as it is run."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from tests.e2e.harness import BrokerProcess, start_fails
from tests.e2e.probing import OPERATORS, cli, probed, token_endpoint

pytestmark = pytest.mark.timeout(120)
OWN = {
    "authorization": "Bearer of-the-cli",
    "x-api-key": "of-the-cli",
    "x-goog-api-key": "of-the-cli",
    "cookie": "c=of-the-cli",
}


def path(user: str) -> str:
    return f"/v1/users/{user}/credentials/anthropic"


def sent(headers: dict[str, str]) -> dict[str, str]:
    """The headers of a call that authenticate it."""
    return {name: value for name, value in headers.items() if name in (*OWN, "anthropic-beta")}


async def test_a_users_key_is_that_of_the_very_next_call(place: Path, driver: str) -> None:
    async with probed(place, driver) as (broker, provider), cli(broker, provider, "ann") as ann:
        assert sent(await ann.call(OWN)) == {"x-api-key": OPERATORS}
        stored = await broker.api("PUT", path("ann"), {"value": "sk-ann-1"})
        assert (stored["effect"], stored["applied"][0]["state"]) == ("now", "applied")
        assert sent(await ann.call(OWN)) == {"x-api-key": "sk-ann-1"}
        await broker.api("PUT", path("ann"), {"value": "sk-ann-2"})
        assert sent(await ann.call()) == {"x-api-key": "sk-ann-2"}
        async with cli(broker, provider, "bob") as bob:
            assert sent(await bob.call()) == {"x-api-key": OPERATORS}
        await broker.api("DELETE", path("ann"))
        assert sent(await ann.call()) == {"x-api-key": OPERATORS}


async def test_a_clis_own_headers_pass_for_its_user_and_nobody_else(place: Path, driver: str) -> None:
    async with (
        probed(place, driver) as (broker, provider),
        cli(broker, provider, "ann") as ann,
        cli(broker, provider, "bob") as bob,
    ):
        await broker.api("PUT", path("ann"), {"kind": "file", "value": {"token": "of-the-cli"}})
        own = {name: value for name, value in OWN.items() if name != "cookie"}
        assert sent(await ann.call(OWN)) == own
        assert sent(await ann.call()) == {}, "nothing is put in for it"
        assert "of-the-cli" in await ann.run("cat ~/.cli/auth.json")
        assert sent(await bob.call(OWN)) == {"x-api-key": OPERATORS}
        await broker.api("PUT", path("ann"), {"value": "sk-ann-1"})
        assert sent(await ann.call(OWN)) == {"x-api-key": "sk-ann-1"}


async def test_an_expired_token_set_is_renewed_before_the_first_call_and_outlives_the_broker(
    place: Path, driver: str
) -> None:
    answer = {"access_token": "at-1", "refresh_token": "rt-1", "expires_in": 3600}
    async with token_endpoint(answer) as (url, asked), probed(place, driver, oauth=url) as (broker, provider):
        tokens = {"access_token": "at-0", "refresh_token": "rt-0", "expires_at": time.time() - 5}
        await broker.api("PUT", path("ann"), {"kind": "oauth", "value": tokens})
        async with cli(broker, provider, "ann") as ann:
            got = sent(await ann.call({"anthropic-beta": "mine"}))
            assert got == {"authorization": "Bearer at-1", "anthropic-beta": "mine,oauth-2025-04-20"}
        assert [one["refresh_token"] for one in asked] == ["rt-0"]
        await broker.kill()
        await broker.start()
        async with cli(broker, provider, "ann") as ann:
            assert sent(await ann.call())["authorization"] == "Bearer at-1"
        assert len(asked) == 1
        seen = await broker.metric('cortex_credential_refreshes_total{provider="anthropic",result="renewed"}')
        assert seen == 0, "the broker that renewed it was killed; this one had no need to"


async def test_a_token_set_that_the_provider_refuses_is_told_to_its_user_and_to_operators(place: Path) -> None:
    answer = {"error": "invalid_grant"}
    async with token_endpoint(answer) as (url, asked), probed(place, "process", oauth=url) as (broker, provider):
        tokens = {"access_token": "at-0", "refresh_token": "rt-0", "expires_at": time.time() - 5}
        await broker.api("PUT", path("ann"), {"kind": "oauth", "value": tokens})
        async with cli(broker, provider, "ann") as ann:
            assert sent(await ann.call())["authorization"] == "Bearer at-0"
            async with asyncio.timeout(20):
                while not (warnings := (await broker.api("GET", "/v1/sessions/ann/main"))["warnings"]):
                    await asyncio.sleep(0.02)
            assert "400 invalid_grant" in warnings[0]
            assert "cortex user credential set" in warnings[0]
            assert "invalid_grant" in (await broker.api("GET", path("ann")))["problem"]
            refused = 'cortex_credential_refreshes_total{provider="anthropic",result="refused"}'
            assert await broker.metric(refused) == 1
            # Whatever is asked of the session now, and of a broker that starts anew: the provider is left alone.
            await broker.api("PUT", "/v1/users/ann/config/env", {"A": "1"})
            await broker.kill()
            await broker.start()
            await broker.session("ann", "probe")
            assert len(asked) == 1
            answer.clear()
            answer |= {"access_token": "at-1", "expires_in": "3600"}
            await broker.api("PUT", path("ann"), {"kind": "oauth", "value": tokens})
            assert (await broker.api("GET", "/v1/sessions/ann/main"))["warnings"] == []
            assert len(asked) == 2


async def test_keys_rotate_while_agents_work(place: Path, driver: str) -> None:
    async with probed(place, driver) as (broker, provider), cli(broker, provider, "ann") as ann:
        await broker.api("PUT", path("ann"), {"value": "sk-ann-1"})
        for _ in range(3):
            done = await broker.api("POST", "/v1/vault/rotate")
            assert (done["sealed"], len(done["dropped"]), done["kept"]) == (1, 1, [done["key"]])
            assert sent(await ann.call()) == {"x-api-key": "sk-ann-1"}
        await broker.kill()
        await broker.start()
        assert (await broker.api("GET", "/v1/vault"))["keys"] == [{"id": done["key"], "sealed": 1}]
        await broker.api("POST", "/v1/sessions/ann/main/stop")
    # The next sandbox has it too; the one before was stopped.


async def stored_and_stopped(place: Path, broker: BrokerProcess) -> dict[Path, bytes]:
    """The broker has a credential and is down; what is on the disk."""
    await broker.api("PUT", path("ann"), {"value": "sk-ann-1"})
    await broker.stop()
    return {file: file.read_bytes() for file in broker.state_dir.iterdir() if file.is_file()}


@pytest.mark.parametrize("how", ["missing", "another", "cut", "readable"])
async def test_without_the_right_key_it_does_not_start_and_writes_nothing_over(place: Path, how: str) -> None:
    async with probed(place, "process") as (broker, _):
        before = await stored_and_stopped(place, broker)
        key = broker.state_dir / "vault.key"
        if how == "missing":
            key.unlink()
        elif how == "another":
            key.write_text("A" * 43 + "=\n")
        elif how == "cut":
            key.write_bytes(before[key][:-10])
        else:
            key.chmod(0o644)
        spoilt = key.read_bytes() if key.exists() else None
        status, log = await start_fails(broker)
        assert status == 78, log
        assert "vault.key_unusable" in log
        assert "hint" in log
        assert (key.read_bytes() if key.exists() else None) == spoilt
        key.write_bytes(before[key])
        key.chmod(0o600)
        await broker.start()
        facts = await broker.api("GET", path("ann"))
        assert facts["kind"] == "api_key"


async def test_a_row_that_was_tampered_with_serves_nobody_and_raises_an_alarm(place: Path) -> None:
    async with probed(place, "process") as (broker, _):
        await broker.api("PUT", path("bob"), {"value": "sk-bob"})
        await stored_and_stopped(place, broker)
        with sqlite3.connect(broker.state_dir / "cortex.db") as db:
            db.execute("UPDATE credentials SET sealed = (SELECT sealed FROM credentials WHERE user = 'bob')")
        db.close()
        await broker.start()
        problem = await broker.refused("POST", "/v1/sessions", {"user": "ann", "wait": "ready"})
        assert problem["code"] == "vault.tampered"
        assert await broker.metric('cortex_vault_alarms_total{reason="tampered"}') >= 1
        refused = [event for event in broker.log_events() if event["event"] == "credential_refused"]
        assert {event["user"] for event in refused} == {"ann"}
        assert {event["level"] for event in refused} == {"error"}
        assert "sk-" not in broker.log_tail(10**6).replace(OPERATORS, "")
        await broker.session("bob", "probe")
        # Stored again, all is well.
        await broker.api("PUT", path("ann"), {"value": "sk-ann-2"})
        await broker.session("ann", "probe")
