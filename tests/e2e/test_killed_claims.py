"""The broker is killed at the steps of a claim and of a release: no home is lost, doubled, or moved under a writer.

By default some of the steps are tried, evenly spread.
CORTEX_TEST_KILLS=200 asks for at least so many kills: every step, gone through again and again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.sandbox.slots import home_key
from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.pools import until
from tests.e2e.stepping import Crashing

pytestmark = pytest.mark.timeout(900)

KEY = home_key("ann", "main")
QUICK = "stop_timeout_s = 0.5\n"
POOL = "[pool]\ndebounce_s = 0.05\n[pool.agents.demo]\nminimum = 0\ntarget = 1\nmaximum = 2\nhot = 1\n"
HOT = 'cortex_pool_size{agent="demo",kind="generic",state="hot"}'
STEPS = 120
"""More than there are; a run that is not killed ends the test."""
KILLS = int(os.environ.get("CORTEX_TEST_KILLS", "0"))
STRIDE = {"claim": 1, "release": 1} if KILLS else {"claim": 3, "release": 2}


def homes(broker: BrokerProcess) -> list[Path]:
    """Every place where ann's home is."""
    rest = broker.state_dir / "homes" / KEY / "home"
    slots = (broker.state_dir / "slots").iterdir()
    held = [slot / "vol" / "home" for slot in slots if (slot / f"owner.{KEY}").exists()]
    return [home for home in (rest, *held) if home.is_dir() and (home / "mine").exists()]


async def say(broker: BrokerProcess, text: str) -> str:
    """What the demo agent answers in a session of ann's that is brought up if need be."""
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as connection:
        opened = await connection.new_session(cwd="/", mcp_servers=[])
        await turn(connection, opened.session_id, text)
    return client.text


async def warm(broker: BrokerProcess) -> None:
    """Returns when a warm sandbox waits."""

    async def hot() -> bool:
        return await broker.metric(HOT) >= 1

    await until(broker, hot)


async def still(home: Path) -> bool:
    """Nobody writes into it."""
    ticks = home / "ticks"
    before = ticks.stat().st_size if ticks.exists() else 0
    await asyncio.sleep(0.2)
    return (ticks.stat().st_size if ticks.exists() else 0) == before


async def attempt(broker: BrokerProcess, method: str, path: str, body: Any = None) -> None:
    """A call whose answer may never come."""
    with suppress(OSError, AssertionError, TimeoutError, aiohttp.ClientError):
        await broker.api(method, path, body)


async def one_kill(broker: Crashing, what: str, at: int, marks: list[str]) -> bool:
    """One kill at step ``at`` of a claim or a release; whether it came that far. ``marks``: what ann's home holds."""
    if what == "claim":
        await broker.api("POST", "/v1/sessions/ann/main/stop")
        await warm(broker)
    else:
        await say(broker, "!(while :; do echo x >> ~/ticks; sleep 0.02; done) >/dev/null 2>&1 &")
    broker.arm(at)
    if what == "claim":
        await attempt(broker, "POST", "/v1/sessions", {"user": "ann", "agent": "demo", "wait": "ready"})
    else:
        await attempt(broker, "POST", "/v1/sessions/ann/main/stop")
    killed = await broker.died()
    reached = broker.disarm()
    found = homes(broker)
    assert len(found) == 1, (what, at, reached[-3:], found)
    if found[0].parts[-3] == "homes":
        assert await still(found[0]), (what, at, reached[-3:])
    if not killed:
        return False
    await broker.start()
    marks.append(f"{what}{at}")
    told = await say(broker, f"!echo {marks[-1]} >> ~/mine; cat ~/mine; rm -f ~/ticks")
    for mark in marks:
        assert mark in told, (what, at, reached[-3:], told)
    assert len(homes(broker)) == 1
    assert not any((broker.state_dir / "quarantine").iterdir())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("what", ["claim", "release"])
async def test_no_home_is_lost_doubled_or_moved_under_a_writer(place: Path, what: str) -> None:
    async with running(place, "process", QUICK + process_config() + POOL, kind=Crashing) as broker:
        assert isinstance(broker, Crashing)
        marks = ["begin"]
        await say(broker, "!echo begin > ~/mine")
        kills, at = 0, 0
        while True:
            if await one_kill(broker, what, at, marks):
                kills, at = kills + 1, at + STRIDE[what]
                assert at < STEPS
            elif kills >= KILLS / 2:
                break
            else:
                at = 0
        assert kills >= 10
        print(f"{kills} kills in a {what}")
