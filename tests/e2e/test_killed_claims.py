"""The broker is killed at every step of a claim and of a release: no home is lost, doubled, or moved under a writer.

CORTEX_TEST_KILLS=200 asks for at least so many kills: the steps are gone through again and again.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.sandbox.slots import home_key
from tests.e2e.conftest import process_config
from tests.e2e.harness import ROOT, BrokerProcess, Client, connected, running, turn

pytestmark = pytest.mark.timeout(900)

KEY = home_key("ann", "main")
POOL = "[pool.agents.demo]\nminimum = 0\ntarget = 1\nmaximum = 2\nhot = 1\n"
HOT = 'cortex_pool_size{agent="demo",kind="generic",state="hot"}'
STEPS = 120
"""More than there are; a run that is not killed ends the test."""
KILLS = int(os.environ.get("CORTEX_TEST_KILLS", "0"))


class Crashing(BrokerProcess):
    """Dies at the step that was asked for."""

    @property
    def crash_at(self) -> Path:
        return self.directory / "crash"

    def arm(self, step: int) -> None:
        draft = self.directory / "crash.new"
        draft.write_text(str(step))
        draft.rename(self.crash_at)

    def disarm(self) -> list[str]:
        """The steps that were reached."""
        steps = Path(f"{self.crash_at}.steps")
        reached = steps.read_text().split("\n")[:-1] if steps.exists() else []
        for path in (self.crash_at, steps):
            path.unlink(missing_ok=True)
        return reached

    async def spawn(self) -> asyncio.subprocess.Process:
        with self.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.e2e.crashing", "serve", "--config", str(self.config_path)),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")}
                | self.env
                | {"CRASH_AT": str(self.crash_at)},
            )

    async def died(self) -> bool:
        """Whether it is dead, or dies within the moment that an answer to a killed call takes."""
        assert self.process is not None
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            return False
        return True

    # -- what is on disk -------------------------------------------------------------------------

    def homes(self) -> list[Path]:
        """Every place where ann's home is."""
        rest = self.state_dir / "homes" / KEY / "home"
        slots = (self.state_dir / "slots").iterdir()
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
    async with asyncio.timeout(30):
        while await broker.metric(HOT) < 1:
            await asyncio.sleep(0.05)


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
    homes = broker.homes()
    assert len(homes) == 1, (what, at, reached[-3:], homes)
    if homes[0].parts[-3] == "homes":
        assert await still(homes[0]), (what, at, reached[-3:])
    if not killed:
        return False
    await broker.start()
    marks.append(f"{what}{at}")
    told = await say(broker, f"!echo {marks[-1]} >> ~/mine; cat ~/mine; rm -f ~/ticks")
    for mark in marks:
        assert mark in told, (what, at, reached[-3:], told)
    assert len(broker.homes()) == 1
    assert not any((broker.state_dir / "quarantine").iterdir())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("what", ["claim", "release"])
async def test_no_home_is_lost_doubled_or_moved_under_a_writer(place: Path, what: str) -> None:
    async with running(place, "process", process_config() + POOL, kind=Crashing) as broker:
        assert isinstance(broker, Crashing)
        marks = ["begin"]
        await say(broker, "!echo begin > ~/mine")
        kills, at = 0, 0
        while True:
            if await one_kill(broker, what, at, marks):
                kills, at = kills + 1, at + 1
                assert at < STEPS
            elif kills >= KILLS / 2:
                break
            else:
                at = 0
        assert kills >= 10
        print(f"{kills} kills in a {what}")
