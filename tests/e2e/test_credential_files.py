"""Credentials of mode file: what an agent renews in its own file is the user's from then on, and never on a disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn

pytestmark = pytest.mark.timeout(180)
FILE = "~/.cli/auth.json"
CONFIG = """
[gateway.providers.anthropic]
kind = "anthropic"
base_url = "http://127.0.0.1:9"

[agents.cli]
command = ["{python}", "-I", "-S", "{sandbox_agent}/demo.py"]
provider = "anthropic"
credential_path = ".cli/auth.json"
"""
HEAD, TAIL = "canary", "ocelot"
"""What is typed never holds both together, so that it is in no conversation."""
WRITTEN = 'cortex_state_writes_total{kind="credentials",result="written"}'


def token(value: str) -> str:
    return json.dumps({"token": f"{HEAD}-{TAIL}-{value}"})


def write(value: str, file: str = FILE) -> str:
    return f"""printf '{{"token": "%s-%s-%s"}}' {HEAD} {TAIL} {value} > {file}"""


@pytest.fixture
async def isolated(place: Path, driver: str) -> AsyncIterator[BrokerProcess]:
    if driver == "process" and process_config():
        pytest.skip("no bubblewrap here: there is no vault without isolation")
    async with running(place, driver, CONFIG) as process:
        yield process


class Shell:
    """Commands in a user's sandbox."""

    def __init__(self, agent: Any, session: str, client: Client) -> None:
        self._agent, self._session, self._client = agent, session, client

    async def run(self, command: str) -> str:
        """What it prints."""
        self._client.updates.clear()
        await turn(self._agent, self._session, f"!{command}")
        return self._client.text.strip()

    async def holds(self, value: str) -> None:
        """Returns when the credential file is this one."""
        wanted = hashlib.sha256(token(value).encode()).hexdigest()
        async with asyncio.timeout(20):
            while wanted not in await self.run(f"sha256sum < {FILE}"):
                await asyncio.sleep(0.02)


@asynccontextmanager
async def shell(broker: BrokerProcess, user: str, workspace: str = "main") -> AsyncIterator[Shell]:
    made = await broker.session(user, "cli", workspace=workspace)
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        yield Shell(agent, session.session_id, client)


async def store(broker: BrokerProcess, user: str, value: str) -> Any:
    body = {"kind": "file", "value": token(value)}
    return await broker.api("PUT", f"/v1/users/{user}/credentials/anthropic", body)


async def fingerprint(broker: BrokerProcess, user: str) -> str:
    return str((await broker.api("GET", f"/v1/users/{user}/credentials/anthropic"))["fingerprint"])


async def renewed(broker: BrokerProcess, user: str, before: str) -> None:
    """Returns when the vault has another one."""
    async with asyncio.timeout(20):
        while await fingerprint(broker, user) == before:
            await asyncio.sleep(0.02)


def on_disk(directory: Path) -> str:
    found = subprocess.run(["grep", "-rlE", f"{HEAD}-{TAIL}", str(directory)], capture_output=True, text=True)
    return found.stdout


async def test_what_one_sandbox_renews_the_others_and_the_next_have(isolated: BrokerProcess) -> None:
    await store(isolated, "ann", "1")
    async with shell(isolated, "ann") as main, shell(isolated, "ann", "other") as other:
        await main.holds("1")
        await other.holds("1")
        assert await isolated.metric(WRITTEN) == 2
        await main.run(write("2"))
        await other.holds("2")
        await main.run(f"{write('3', '~/.cli/new')} && mv ~/.cli/new {FILE}")
        await other.holds("3")
        await main.holds("3")
        # All that is asked for now has been written: each change once to each of the two, and no more.
        await isolated.api("PUT", "/v1/users/ann/config/env", {"A": "1"})
        assert await isolated.metric(WRITTEN) == 6
        before = await fingerprint(isolated, "ann")
        await main.run(write("4"))
        await isolated.api("POST", "/v1/sessions/ann/main/stop")
        assert await fingerprint(isolated, "ann") != before, "told while it ended"
        assert on_disk(isolated.directory) == ""
    async with shell(isolated, "ann") as again:
        await again.holds("4")
    assert on_disk(isolated.directory) == ""


async def test_a_login_that_the_user_stores_takes_the_place_and_one_that_is_deleted_is_gone(
    isolated: BrokerProcess,
) -> None:
    await store(isolated, "bob", "1")
    async with shell(isolated, "bob") as main:
        await main.run(write("2"))
        await store(isolated, "bob", "new")
        await main.holds("new")
        before = await fingerprint(isolated, "bob")
        await main.run(write("newer"))
        await renewed(isolated, "bob", before)
        await isolated.api("DELETE", "/v1/users/bob/credentials/anthropic")
        assert "gone" in await main.run(f"test -L {FILE} || test -e {FILE} || echo gone")
        # Now it is a file of the user's own.
        await main.run(f"echo own > {FILE}")
        await isolated.api("PUT", "/v1/users/bob/config/env", {"A": "1"})
        assert "own" in await main.run(f"cat {FILE}")


async def test_what_is_renewed_while_the_broker_is_dead_reaches_the_next_one(isolated: BrokerProcess) -> None:
    await store(isolated, "cal", "1")
    before = await fingerprint(isolated, "cal")
    async with shell(isolated, "cal") as main:
        waits = f"until test -e ~/go; do sleep 0.02; done; {write('2')}; touch ~/written"
        await main.run(f"({waits}) > /dev/null 2>&1 &")
        await isolated.kill()
    (home,) = (isolated.state_dir / "slots").glob("*/vol/home")
    (home / "go").touch()
    async with asyncio.timeout(20):
        while not (home / "written").exists():
            await asyncio.sleep(0.02)
    assert on_disk(isolated.directory) == ""
    await isolated.start()
    await renewed(isolated, "cal", before)
    async with shell(isolated, "cal", "other") as other:
        await other.holds("2")


async def test_a_sandbox_that_is_killed_leaves_no_credential_behind(isolated: BrokerProcess) -> None:
    await store(isolated, "dan", "1")
    async with shell(isolated, "dan") as main:
        await main.holds("1")
        before = await fingerprint(isolated, "dan")
        await main.run(f"{write('2', '~/.cli/new')} && mv ~/.cli/new {FILE}")
        await renewed(isolated, "dan", before)
        dying = asyncio.ensure_future(main.run("kill -9 -1; sleep 60"))
        async with asyncio.timeout(20):
            while (await isolated.api("GET", "/v1/sessions/dan/main"))["state"] == "ready":
                await asyncio.sleep(0.02)
        await asyncio.wait([dying])
        assert dying.exception() is not None
    assert on_disk(isolated.directory) == ""
    async with shell(isolated, "dan") as again:
        await again.holds("2")


async def test_a_claimed_sandbox_has_the_credential_in_the_home_that_was_moved_in(place: Path, driver: str) -> None:
    if driver == "process" and process_config():
        pytest.skip("no bubblewrap here: there is no vault without isolation")
    async with running(place, driver, CONFIG + "[pool.agents.cli]\ntarget = 1\nhot = 1\n") as broker:
        await store(broker, "ann", "1")
        for value, kept in (("1", "2"), ("2", "3")):
            async with asyncio.timeout(60):
                while await broker.metric('cortex_pool_size{agent="cli",kind="generic",state="hot"}') < 1:
                    await asyncio.sleep(0.02)
            async with shell(broker, "ann") as main:
                (bringup, *_) = (await broker.api("GET", "/v1/sessions/ann/main/timeline"))["bringups"]
                assert bringup["path"] == "generic_warm"
                await main.holds(value)
                before = await fingerprint(broker, "ann")
                await main.run(write(kept))
                await renewed(broker, "ann", before)
            await broker.api("POST", "/v1/sessions/ann/main/stop")
            assert on_disk(broker.directory) == ""
