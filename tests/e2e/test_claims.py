"""Ways to a ready session in a running broker: the user's own warm sandbox, one of the pool's, a cold start."""

from __future__ import annotations

import asyncio
import base64
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.sandbox.slots import home_key
from tests.e2e import probing
from tests.e2e.conftest import process_config
from tests.e2e.harness import ROOT, BrokerProcess, Client, connected, running, turn
from tests.e2e.pools import (
    alive,
    claims,
    filled,
    inits,
    newest,
    pooled,
    run,
    seen,
    shell,
    slots,
    stop,
    until,
)
from tests.e2e.providers import stand_in
from tests.host import missing

pytestmark = pytest.mark.timeout(240)

STAGES = {"claim", "bind", "agent"}
BLANK = "workspace"
"""What a home holds before its user has used it."""


async def brought_up(broker: BrokerProcess, path: str) -> float:
    """How many sessions became ready by ``path``, as the metrics tell."""
    return await broker.metric(f'cortex_bringup_seconds_count{{driver="{broker.driver}",path="{path}"}}')


async def test_every_way_there_is_is_told(place: Path, driver: str) -> None:
    """Generic for a new user and for one who comes back; their own, made ready by intent; cold when there is none."""
    async with running(place, driver, pooled(1)) as broker:
        await filled(broker, 1)
        async with shell(broker, "ann") as ann:
            await ann.run("echo hers > ~/mine; mkdir work; echo draft > work/file")
            told = await newest(broker, "ann")
        assert told["path"] == "generic_warm"
        assert told["outcome"] == "ready"
        assert {stage["stage"] for stage in told["stages"]} >= STAGES
        assert await claims(broker) == {"generic hit": 1}
        assert await brought_up(broker, "generic_warm") == 1

        await stop(broker, "ann")
        await filled(broker, 1)
        async with shell(broker, "ann") as ann:
            assert await ann.run("cat ~/mine work/file") == "hers\ndraft"
        assert (await newest(broker, "ann"))["path"] == "generic_warm"

        await stop(broker, "ann")
        await filled(broker, 1)
        await broker.api("POST", "/v1/sessions/ann/main/prewarm")
        await until(broker, lambda: _is(broker, "ann", "ready"))
        told = await newest(broker, "ann")
        assert told["path"] == "generic_warm"
        assert told["intent"]
        before = await claims(broker)
        async with shell(broker, "ann") as ann:
            assert await ann.run("cat ~/mine") == "hers"
        told = await newest(broker, "ann")
        assert (told["path"], told["stages"]) == ("user_warm", [])
        assert await claims(broker) == before | {"user hit": before.get("user hit", 0) + 1}
        assert await brought_up(broker, "user_warm") == 1

        broker.write_config(pooled(0))
        await filled(broker, 0)
        assert await run(broker, "bob", "ls -A ~") == BLANK
        told = await newest(broker, "bob")
        assert told["path"] == "cold"
        assert {stage["stage"] for stage in told["stages"]} >= {"place", "start", "hello", "bind", "agent"}
        assert (await claims(broker))["cold hit"] == 1
        assert await brought_up(broker, "cold") == 1


async def _is(broker: BrokerProcess, user: str, state: str) -> bool:
    return bool((await broker.api("GET", f"/v1/sessions/{user}/main"))["state"] == state)


async def test_one_that_is_empty_for_the_moment_is_told_as_such(place: Path, driver: str) -> None:
    """The pool has been claimed empty and is filled again later."""
    async with running(place, driver, pooled(1, more="debounce_s = 60")) as broker:
        await filled(broker, 1)
        assert await run(broker, "ann", "echo a") == "a"
        assert await run(broker, "bob", "echo b") == "b"
        assert [(await newest(broker, user))["path"] for user in ("ann", "bob")] == ["generic_warm", "cold"]
        assert await claims(broker) == {"generic hit": 1, "generic empty": 1, "cold hit": 1}


# What comes along

AGENT = """prewarm = "agent"
open_ahead = "any"
"""
SERVER = base64.b64encode((ROOT / "tests" / "e2e" / "swap_mcp.py").read_bytes()).decode()
MCP = {"mcpServers": {"own": {"command": "python3", "args": ["/vol/home/server.py", "/vol/home"]}}}


async def test_home_mcp_and_credential_of_who_comes_back_are_in_place(place: Path, driver: str) -> None:
    if driver == "process" and process_config():
        missing("no bubblewrap here: there is no vault without isolation")
    async with stand_in() as provider:
        settings = probing.config(place, provider.url).replace("[agents.probe.env]", f"{AGENT}[agents.probe.env]")
        async with running(place, driver, pooled(1, agent="probe", after=settings)) as broker:
            await filled(broker, 1, "probe")
            async with probing.cli(broker, provider, "ann") as ann:
                await ann.run(f"echo {SERVER} | base64 -d > ~/server.py; echo hers > ~/mine")
            await stop(broker, "ann")
            await broker.api("PUT", "/v1/users/ann/config/mcp", MCP)
            await broker.api("PUT", "/v1/users/ann/credentials/anthropic", {"value": "sk-ann"})
            await broker.api("PUT", "/v1/users/ann/config/env", {"GREETING": "salve"})
            await filled(broker, 1, "probe")
            async with probing.cli(broker, provider, "ann") as ann:
                assert (await newest(broker, "ann"))["path"] == "generic_warm"
                assert await ann.run("cat ~/mine; echo $GREETING") == "hers\nsalve"
                assert (await ann.call())["x-api-key"] == "sk-ann"
            async with shell(broker, "ann", "probe") as place_:
                assert await place_.say("/tool own__alpha {}") == "called alpha"
            await filled(broker, 1, "probe")
            async with probing.cli(broker, provider, "bob") as bob:
                assert (await newest(broker, "bob"))["path"] == "generic_warm"
                assert await bob.run("ls -A ~; echo .$GREETING") == f"{BLANK}\n."
                assert (await bob.call())["x-api-key"] == probing.OPERATORS


# Once, and never again


async def test_a_claimed_one_is_destroyed_after_and_none_is_used_twice(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(1)) as broker:
        used: list[str] = []
        for number in range(3):
            await filled(broker, 1)
            (slot,) = slots(broker)
            (pid,) = inits(broker).values()
            user = f"u{number}"
            assert await run(broker, user, "ls -A ~; touch ~/mine") == BLANK
            shown = await broker.api("GET", f"/v1/sessions/{user}/main")
            assert shown["sandbox"]["slot"] == slot
            used.append(slot)
            await stop(broker, user)
            assert not alive(pid)
            assert slot not in slots(broker)
        assert len(set(used)) == 3
        assert (await claims(broker)) == {"generic hit": 3}


async def test_those_that_a_stopped_broker_leaves_are_claimed_at_the_next(place: Path, driver: str) -> None:
    """Stopped or killed: hot and paused ones go on, each is claimed once, and what was claimed stays its user's."""
    async with running(place, driver, pooled(2)) as broker:
        await filled(broker, 2)
        async with shell(broker, "ann") as ann:
            await ann.run("echo hers > ~/mine")
        await filled(broker, 2)
        before = inits(broker)
        await broker.stop()
        assert inits(broker) == before
        await broker.start()
        await filled(broker, 2)
        assert inits(broker) == before
        for user in ("bob", "cid"):
            assert await run(broker, user, "ls -A ~; echo his > ~/mine") == BLANK
        shown = [await broker.api("GET", f"/v1/sessions/{user}/main") for user in ("ann", "bob", "cid")]
        assert {view["sandbox"]["slot"] for view in shown} == set(before)
        assert [(await newest(broker, user))["path"] for user in ("bob", "cid")] == ["generic_warm"] * 2
        assert await run(broker, "ann", "cat ~/mine") == "hers"
        await filled(broker, 2)
        everybody = inits(broker)
        await broker.kill()
        await broker.start()
        await filled(broker, 2)
        assert inits(broker) == everybody
        for user, mark in (("ann", "hers"), ("bob", "his"), ("cid", "his")):
            assert await run(broker, user, "cat ~/mine") == mark


# A crowd


def at_rest(broker: BrokerProcess, user: str, uid: int) -> None:
    """A home from an earlier time."""
    home = broker.state_dir / "homes" / home_key(user, "main") / "home"
    home.parent.mkdir(mode=0o700)
    home.mkdir(mode=0o700)
    (home / "mine").write_text(user)
    for path in (home, home / "mine"):
        os.chown(path, uid, uid)


async def comes(broker: BrokerProcess, http: aiohttp.ClientSession, user: str) -> str:
    """The way by which the user's session became ready; "" for one who was told to try again later."""
    body = {"user": user, "agent": "demo", "wait": "ready"}
    async with http.post(f"{broker.control_url}/v1/sessions", json=body) as response:
        answer = await response.json()
        if response.status >= 400:
            assert answer["retryable"], answer
            return ""
    async with http.get(f"{broker.control_url}/v1/sessions/{user}/main/timeline") as response:
        return str((await response.json())["bringups"][0]["path"])


async def says(broker: BrokerProcess, http: aiohttp.ClientSession, user: str, text: str) -> str:
    """One turn over HTTP."""
    body = {"text": text}
    async with http.post(f"{broker.control_url}/v1/sessions/{user}/main/prompt", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.text()


@asynccontextmanager
async def operator(broker: BrokerProcess) -> AsyncIterator[aiohttp.ClientSession]:
    """For many calls at once."""
    headers = {"Authorization": f"Bearer {broker.admin_token}"}
    timeout, connector = aiohttp.ClientTimeout(total=200), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as http:
        yield http


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_a_crowd_on_few_warm_ones(place: Path, driver: str) -> None:
    """Each warm one is claimed once; everybody has their own home, whether they had one or not."""
    crowd, warm = (200, 10) if driver == "process" else (30, 5)
    users = [f"u{number}" for number in range(crowd)]
    config = pooled(warm, more="debounce_s = 60", before="hello_timeout_s = 120")
    async with running(place, driver, config) as broker:
        await filled(broker, warm)
        before = slots(broker)
        uid = (broker.state_dir / "slots" / min(before) / "vol" / "home").stat().st_uid
        for user in users[::2]:
            at_rest(broker, user, uid)
        async with operator(broker) as http:
            ways = Counter(await asyncio.gather(*(comes(broker, http, user) for user in users)))
            assert ways["generic_warm"] == warm, ways
            assert ways["generic_warm"] + ways["cold"] + ways[""] == crowd, ways
            assert ways["cold"] > 0, ways
            # Who was refused tries again.
            while "" in await asyncio.gather(*(comes(broker, http, user) for user in users)):
                pass
            views = [await broker.api("GET", f"/v1/sessions/{user}/main") for user in users]
            assert len({view["sandbox"]["slot"] for view in views}) == crowd
            assert before <= {view["sandbox"]["slot"] for view in views}
            for some in (users[begin : begin + 20] for begin in range(0, crowd, 20)):
                await asyncio.gather(*(says(broker, http, user, f"!echo {user} >> ~/came") for user in some))
        for number, user in enumerate(users):
            slot = broker.state_dir / "slots" / views[number]["sandbox"]["slot"]
            assert (slot / f"owner.{home_key(user, 'main')}").exists()
            assert (slot / "vol" / "home" / "came").read_text() == f"{user}\n"
            if number % 2 == 0:
                assert (slot / "vol" / "home" / "mine").read_text() == user
            assert not (broker.state_dir / "homes" / home_key(user, "main") / "home").exists()
        assert not list((broker.state_dir / "quarantine").iterdir())


# Settings


GREETED = """[agents.greeter]
command = ["{{python}}", "-I", "-S", "{{sandbox_agent}}/demo.py"]
prewarm = "agent"
open_ahead = "any"
[agents.greeter.env]
GREETING = "{greeting}"
"""


async def test_an_agents_new_environment_replaces_what_was_made_with_the_old(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(2, agent="greeter", after=GREETED.format(greeting="salve"))) as broker:
        await filled(broker, 2, "greeter")
        async with shell(broker, "ann", "greeter") as ann:
            assert await ann.run("echo $GREETING") == "salve"
            await filled(broker, 2, "greeter")
            before = inits(broker)
            anns = (await broker.api("GET", "/v1/sessions/ann/main"))["sandbox"]["slot"]
            broker.write_config(pooled(2, agent="greeter", after=GREETED.format(greeting="ave")))
            await until(broker, lambda: _gone(broker, before, anns))
            await filled(broker, 2, "greeter")
            assert alive(before[anns])
        async with shell(broker, "bob", "greeter") as bob:
            assert await bob.run("echo $GREETING") == "ave"
        assert (await newest(broker, "bob"))["path"] == "generic_warm"
        async with shell(broker, "ann", "greeter") as ann:
            assert await ann.run("echo $GREETING") == "ave"


async def _gone(broker: BrokerProcess, before: dict[str, int], but: str) -> bool:
    return not (set(before) - {but}) & slots(broker)


async def test_a_pool_that_is_taken_out_of_the_settings_is_drained_and_users_go_on(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(2)) as broker:
        await filled(broker, 2)
        async with shell(broker, "ann") as ann:
            await filled(broker, 2)
            broker.write_config(process_config())
            await until(broker, lambda: _only(broker, "ann"))
            assert await ann.run("echo still here") == "still here"
        assert await run(broker, "bob", "echo cold") == "cold"
        assert (await newest(broker, "bob"))["path"] == "cold"
        broker.write_config(pooled(1))
        await filled(broker, 1)
        assert await run(broker, "cid", "echo warm") == "warm"
        assert (await newest(broker, "cid"))["path"] == "generic_warm"


async def _only(broker: BrokerProcess, user: str) -> bool:
    sandbox = (await broker.api("GET", f"/v1/sessions/{user}/main"))["sandbox"]
    return slots(broker) == {sandbox["slot"]} and not await seen(broker)


# The web app's hook


async def test_a_session_by_hook_is_a_claim(place: Path, driver: str) -> None:
    async with running(place, driver, pooled(1)) as broker:
        await filled(broker, 1)
        status, made = await broker.hook({"user": "ann", "agent": "demo"})
        assert status == 201
        assert await _talks(made) == "by hook"
        assert (await newest(broker, "ann"))["path"] == "generic_warm"
        again = await broker.hook({"user": "ann", "agent": "demo"})
        assert again[1]["token"] == made["token"]
        await filled(broker, 1)
        status, _ = await broker.hook({"user": "bob", "action": "prewarm", "agent": "demo"}, hook_id="msg_2")
        assert status == 202
        await until(broker, lambda: _is(broker, "bob", "ready"))
        assert (await newest(broker, "bob"))["path"] == "generic_warm"
        status, made = await broker.hook({"user": "bob", "agent": "demo"}, hook_id="msg_3")
        assert status == 200
        assert await _talks(made) == "by hook"
        assert (await newest(broker, "bob"))["path"] == "user_warm"
        # Ann's client found her session up, be it so soon that her claim was under way; the repeat claimed nothing.
        assert (await claims(broker))["generic hit"] == 2


async def _talks(made: dict[str, Any]) -> str:
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!echo by hook")
    return client.text.strip()
