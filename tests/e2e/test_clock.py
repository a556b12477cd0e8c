"""A broker whose wall clock is set a day on, two days back and right again: nobody's work suffers."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import ROOT, BrokerProcess, running
from tests.e2e.pools import filled, inits, newest, pooled, run, shell, slots, stop

pytestmark = pytest.mark.timeout(180)
DAY = 86_400.0


class Shifted(BrokerProcess):
    """See ``tests.e2e.shifted``."""

    def shift(self, seconds: float) -> None:
        draft = self.directory / "clock.new"
        draft.write_text(str(seconds))
        draft.rename(self.directory / "clock")

    async def spawn(self) -> asyncio.subprocess.Process:
        with self.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.e2e.shifted", "serve", "--config", str(self.config_path)),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")}
                | self.env
                | {"CLOCK_AT": str(self.directory / "clock")},
            )


async def shown(broker: BrokerProcess, user: str) -> dict[str, Any]:
    view = await broker.api("GET", f"/v1/sessions/{user}/main")
    return {"state": view["state"], "slot": view["sandbox"]["slot"], "pid": view["sandbox"]["agent_pid"]}


async def test_a_clock_that_jumps_a_day(place: Path, driver: str) -> None:
    config = pooled(2, after="[pool.forecast]\nmode = 'on'\ninterval_s = 0.1")
    async with running(place, driver, config, kind=Shifted) as broker:
        assert isinstance(broker, Shifted)
        await filled(broker, 2)
        await run(broker, "ann", "echo hers > ~/mine")
        await run(broker, "eve", "echo hello")
        async with shell(broker, "dan") as dan:
            await filled(broker, 2)
            for day in (1, -1, 0):
                await stop(broker, "ann")
                await filled(broker, 2)
                warm, before = inits(broker), [await shown(broker, user) for user in ("dan", "eve")]
                broker.shift(day * DAY)
                assert await dan.run("echo still here") == "still here"
                # A new token, whatever became of the old ones.
                assert await run(broker, "ann", "cat ~/mine") == "hers"
                assert (await newest(broker, "ann"))["path"] == "generic_warm"
                await filled(broker, 2)
                assert [await shown(broker, user) for user in ("dan", "eve")] == before
                assert set(warm) <= slots(broker)
                assert {slot: pid for slot, pid in inits(broker).items() if slot in warm} == warm
        told = {event["event"] for event in broker.log_events()}
        assert not told & {"session_failed", "claim_failed", "session_paused", "home_quarantined"}


async def test_tokens_and_hooks_live_by_the_clock_and_say_so(place: Path) -> None:
    """What has run out by the clock of the moment is refused clearly; right again, all is well."""
    async with running(place, "process", pooled(1), kind=Shifted) as broker:
        assert isinstance(broker, Shifted)
        await filled(broker, 1)
        made = await broker.session("ann")
        broker.shift(DAY)
        status, answer = await broker.hook({"user": "ann"})
        assert (status, answer["code"]) == (401, "hook.outside_tolerance")
        assert "clock" in answer["hint"]
        again = await broker.session("ann")
        assert again["token"] != made["token"]
        assert await run(broker, "ann", "echo served") == "served"
        broker.shift(0)
        status, _ = await broker.hook({"user": "ann"})
        assert status == 200
        assert await run(broker, "ann", "echo served") == "served"
