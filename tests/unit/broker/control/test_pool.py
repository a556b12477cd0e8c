"""GET /v1/pool and `cortex pool`: what the view says, whole and for people."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.cli.pool import text
from broker.config import PoolAgentConfig
from broker.control.pool import Pool
from broker.session.breaker import Patience
from broker.session.pool_view import Facts, Row, view
from broker.session.shelf import Shelf
from tests.unit.broker.cli.test_verbs import Run, run
from tests.unit.broker.control.conftest import Api, api

__all__ = ["api", "run"]

FACTS = Facts(8 * 2**30, 5 * 2**30, 2**30, 0.25, "sha256:ab", "", False, 100.0)


@pytest.fixture
def busy() -> dict[str, Any]:
    """A pool of which one agent cannot be made."""
    well, ill = Shelf("well"), Shelf("ill")
    well.measured(100 * 2**20)
    for result in ("hit", "hit", "hit", "empty"):
        well.claimed(result)
    well.making = 1
    well.short = "making"
    ill.short = "breaker"
    ill.breaker.failed(90.0, "the image is gone", Patience(1, 5, 60), chance=1, lasting=True)
    settings = PoolAgentConfig(target=2)
    return view([Row(well, settings, 2), Row(ill, settings, 3)], [("well", "paused"), ("other", "hot")], FACTS)


def test_the_answer_has_a_place_for_everything_in_the_view(busy: dict[str, Any]) -> None:
    told = Pool.model_validate(busy)
    assert json.loads(told.model_dump_json()) == json.loads(json.dumps(busy))
    assert not told.model_extra
    assert not any(agent.model_extra for agent in told.agents)


async def test_it_is_for_operators(api: Api, busy: dict[str, Any]) -> None:
    api.pool.update(busy)
    status, told = await api.call("GET", "/v1/pool")
    assert status == 200
    assert told == json.loads(json.dumps(busy))
    assert [agent["agent"] for agent in told["agents"]] == ["ill", "other", "well"]
    status, problem = await api.call("GET", "/v1/pool", headers={})
    assert (status, problem["code"]) == (401, "access.admin_required")


async def test_the_verb_prints_a_table(run: Run, api: Api, busy: dict[str, Any]) -> None:
    api.pool.update(busy)
    status, out, _ = await run("pool")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["well"].split()[1:10] == ["2", "1", "0", "0", "0", "1", "3/4", "75%", "100"]
    assert rows["well"].endswith("being made")
    assert rows["ill"].endswith("cannot be made, breaker open")
    assert "ill: the image is gone; tried again in 50 s" in out
    assert "memory: 360 MiB of 8.0 GiB; the host has 5.0 GiB left, 1.0 GiB are reserved" in out
    assert "idle cost: 0.5 an hour now" in out
    status, out, _ = await run("pool", "--json")
    assert json.loads(out) == json.loads(json.dumps(busy))


async def test_without_a_pool_it_says_how_to_have_one(run: Run) -> None:
    status, out, _ = await run("pool")
    assert status == 0
    assert "[pool.agents.NAME]" in out


def test_one_that_cannot_be_put_away_is_seen(busy: dict[str, Any]) -> None:
    busy["agents"][0]["ending"] = busy["agents"][0]["stuck"] = 2
    assert "2 (2 stuck)" in text(busy)
