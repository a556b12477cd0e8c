"""GET /v1/usage and `cortex usage`."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from broker.store.usage import UsageStore
from tests.unit.broker.cli.test_verbs import Run, run
from tests.unit.broker.control.conftest import Api, api
from tests.unit.broker.store.test_usage import CALL

__all__ = ["api", "run"]
AT = 1_767_225_600.0
"""2026-01-01T00:00:00Z."""


@pytest.fixture
async def used(api: Api) -> Api:
    store = UsageStore(api.control.users._db)
    await store.add(
        [
            replace(CALL, id="1", at=AT),
            replace(CALL, id="2", at=AT + 3600, ttft_s=None, outcome="cut", cost_usd=0.0, estimated=True),
            replace(CALL, id="3", at=AT + 86_400, user="bob", team="", model="haiku", cached="hit", cost_usd=0.25),
        ]
    )
    return api


async def test_usage_is_added_up_with_a_total(used: Api) -> None:
    status, told = await used.call("GET", "/v1/usage")
    assert (status, told["by"], [row["key"] for row in told["rows"]]) == (200, "user", ["ann", "bob"])
    assert told["rows"][0] == {
        "key": "ann", "calls": 2, "errors": 1, "cached": 0, "estimated": 1, "input": 200, "output": 20,
        "cache_read": 120, "cache_write": 0, "reasoning": 0, "cost_usd": 0.5, "mean_s": 2.0, "mean_ttft_s": 0.25,
    }  # fmt: skip
    assert (told["total"]["calls"], told["total"]["cost_usd"], told["total"]["mean_ttft_s"]) == (3, 0.75, 0.25)


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("by=team", ["red", ""]),
        ("by=model&user=bob", ["haiku"]),
        ("by=user&team=", ["bob"]),
        ("by=user&model=sonnet&provider=anthropic", ["ann"]),
        ("by=hour&user=ann", ["2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"]),
        ("by=day", ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
        ("by=hour&from=2026-01-01T01:30:00Z&to=2026-01-02", ["2026-01-01T01:00:00Z"]),
        ("by=user&from=2027-01-01T00:00:00", []),
    ],
)
async def test_what_is_asked_for(used: Api, query: str, keys: list[str]) -> None:
    status, told = await used.call("GET", f"/v1/usage?{query}")
    assert (status, [row["key"] for row in told["rows"]]) == (200, keys)


async def test_times_without_a_zone_are_utc_wherever_the_broker_is(used: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        _, told = await used.call("GET", "/v1/usage?by=hour&from=2026-01-01T01:00&to=2026-01-01T02:00")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert [row["key"] for row in told["rows"]] == ["2026-01-01T01:00:00Z"]


@pytest.mark.parametrize("query", ["by=week", "from=then", "user=a/b", "until=2026-01-01", "nobody=1"])
async def test_nonsense_is_refused(api: Api, query: str) -> None:
    assert (await api.call("GET", f"/v1/usage?{query}"))[0] == 400


async def test_it_is_for_operators(api: Api) -> None:
    assert (await api.call("GET", "/v1/usage", headers={}))[0] == 401


async def test_nothing_of_an_erased_user_is_left(used: Api) -> None:
    assert (await used.call("DELETE", "/v1/users/ann"))[0] == 200
    assert [row["key"] for row in (await used.call("GET", "/v1/usage"))[1]["rows"]] == ["bob"]


async def test_the_verb_prints_a_table(run: Run, used: Api) -> None:
    status, out, _ = await run("usage", "--by", "day", "--from", "2026-01-01")
    assert status == 0
    head, first, second, total = out.splitlines()
    assert head.split()[:2] == ["day", "calls"]
    assert first.split() == ["2026-01-01", "2", "1", "0", "1", "200", "120", "0", "20", "0.5000", "2.00", "0.25"]
    assert second.split()[:2] == ["2026-01-02", "1"]
    assert total.split()[:4] == ["all", "of", "these", "3"]
    status, out, _ = await run("usage", "--user", "bob", "--json")
    assert json.loads(out)["rows"][0]["key"] == "bob"
    status, out, err = await run("usage", "--user", "nobody")
    assert (status, out) == (0, "")
    assert "no calls" in err
    assert (await run("usage", "--by", "week"))[0] == 1
