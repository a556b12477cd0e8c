"""A broker as it runs: whoever is expected finds their sandbox up, and what users did outlives a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, running

CONFIG = '[pool.forecast]\nmode = "on"\ninterval_s = 0.2\n'
DAY_MINUTES = 1440
LIMIT_S = 40.0


@pytest.fixture
async def broker(place: Path, driver: str) -> AsyncIterator[BrokerProcess]:
    async with running(place, driver, process_config() + CONFIG) as process:
        yield process


async def told(ask: Callable[[], Awaitable[Any]], right: Callable[[Any], bool]) -> Any:
    """Asks until the answer is right; the deadline fails the test."""
    async with asyncio.timeout(LIMIT_S):
        while not right(answer := await ask()):
            await asyncio.sleep(0.1)
    return answer


def habit(user: str) -> dict[str, Any]:
    """For ten days the user has come at the minute after this one."""
    comes = int(time.time() // 60) + 1
    return {"tallies": [[user, comes - day * DAY_MINUTES, "request", 3, 0, 50] for day in range(1, 11)]}


async def test_who_is_expected_finds_the_sandbox_up(broker: BrokerProcess) -> None:
    # A word of intent makes the session, and is no use: a user who was there this hour already is not expected.
    await broker.api("POST", "/v1/sessions/ann/main/prewarm", expect=202)

    async def session() -> Any:
        return await broker.api("GET", "/v1/sessions/ann/main")

    async def forecast() -> Any:
        return await broker.api("GET", "/v1/activity/forecast")

    await told(session, lambda view: view["state"] == "ready")
    await broker.api("POST", "/v1/sessions/ann/main/stop")
    answer = await broker.api("POST", "/v1/activity/import", habit("ann"))
    assert answer["new"] == 10
    view = await told(session, lambda view: view["state"] == "ready")
    assert view["warm"] is True
    (foreseen,) = (await told(forecast, lambda found: found["expected"]))["expected"]
    assert (foreseen["user"], foreseen["action"]) == ("ann", "prewarmed")
    await broker.session("ann")
    timeline = await broker.api("GET", "/v1/sessions/ann/main/timeline")
    assert timeline["bringups"][0]["path"] == "user_warm"
    found = await told(forecast, lambda found: found["counts"]["hit"] == 1)
    assert (found["counts"]["miss"], found["counts"]["wasted"], found["expected"]) == (0, 0, [])
    assert await broker.metric('cortex_forecast_total{result="hit"}') == 1


async def test_what_users_did_outlives_a_restart(broker: BrokerProcess) -> None:
    await broker.session("bob")
    await broker.stop()
    await broker.start()
    found = await broker.api("GET", "/v1/activity")
    assert [one["user"] for one in found["users"]] == ["bob"]
    await broker.api("DELETE", "/v1/users/bob")
    assert (await broker.api("GET", "/v1/activity"))["users"] == []
