"""Usage in the store: each call counted once, added up by the hour, bounded in time, gone with its user."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.store.db import Database
from broker.store.usage import SLICE, SpeedRow, UsageFilter, UsageStore, UsedCall
from broker.store.users import UserStore
from tests.unit.broker.store.aio import in_database

EVERYTHING = UsageFilter()
CALL = UsedCall(
    id="b-1",
    at=7200.5,
    user="ann",
    team="red",
    workspace="main",
    agent="claude",
    provider="anthropic",
    model="sonnet",
    endpoint="generate",
    status=200,
    outcome="ok",
    cached="",
    input=100,
    output=10,
    cache_read=60,
    cache_write=None,
    reasoning=None,
    cost_usd=0.5,
    duration_s=2.0,
    queue_s=0.0,
    ttft_s=0.25,
)


async def test_what_is_told_twice_counts_once(db: Database) -> None:
    store = UsageStore(db)
    other = replace(CALL, id="b-2", ttft_s=None, outcome="cut", input=None, estimated=True)
    assert await store.add([replace(CALL, id="b-3", endpoint="list")]) == {"b-3"}
    assert await store.add([CALL]) == {"b-1"}
    assert await store.add([CALL, other]) == {"b-2"}
    assert await store.add([CALL, other]) == frozenset()
    (found,) = await store.sums(EVERYTHING, "user")
    assert (found.key, found.calls, found.errors, found.input, found.output) == ("ann", 2, 1, 100, 20)
    assert found.estimated == 1
    assert (found.cache_read, found.cache_write, found.cost_usd, found.duration_s) == (120, 0, 1.0, 4.0)
    assert (found.ttft_s, found.ttft_calls) == (0.25, 1)


async def test_sums_by_each_thing_with_filters(db: Database) -> None:
    store = UsageStore(db)
    bob = replace(CALL, id="b-2", user="bob", team="", model="haiku", at=100_000.0, cost_usd=2.0, cached="hit")
    await store.add([CALL, bob])
    keys = {
        by: [one.key for one in await store.sums(EVERYTHING, by)]
        for by in ("user", "team", "model", "provider", "hour", "day")
    }
    assert keys == {
        "user": ["bob", "ann"],
        "team": ["", "red"],
        "model": ["haiku", "sonnet"],
        "provider": ["anthropic"],
        "hour": [7200, 97_200],
        "day": [0, 86_400],
    }
    assert [one.key for one in await store.sums(UsageFilter(since=3), "user")] == ["bob"]
    assert [one.key for one in await store.sums(UsageFilter(until=3), "user")] == ["ann"]
    assert [one.key for one in await store.sums(UsageFilter(equal={"user": "ann", "team": "red"}), "model")] == [
        "sonnet"
    ]
    assert await store.sums(UsageFilter(equal={"user": "ann", "model": "haiku"}), "user") == []
    assert [one.cached for one in await store.sums(EVERYTHING, "user", limit=1)] == [1]
    assert await store.spent("user", 0) == {"ann": 0.5, "bob": 2.0}
    assert await store.spent("team", 0) == {"red": 0.5}
    assert await store.spent("user", 3) == {"bob": 2.0}


async def test_models_that_have_answered_are_known_the_latest_last(db: Database) -> None:
    store = UsageStore(db)
    never = replace(CALL, id="b-2", model="none", status=404)
    earlier = replace(CALL, id="b-3", model="haiku", at=10.0)
    await store.add([CALL, never, earlier, replace(never, id="b-4", model="sonnet", at=8000.0)])
    assert await store.answered(9) == [("anthropic", "haiku"), ("anthropic", "sonnet")]
    assert await store.answered(1) == [("anthropic", "sonnet")]


async def test_the_past_is_deleted(db: Database) -> None:
    store = UsageStore(db)
    old = [replace(CALL, id=f"b-{number}", user=f"u{number}") for number in range(SLICE + 1)]
    await store.add([*old, replace(CALL, id="new", at=10_800.0)])
    await store.prune(calls_before=10_000.0, hours_before=0)
    assert (await store.sums(EVERYTHING, "provider"))[0].calls == SLICE + 2
    # Forgotten calls would count again; the one that is known does not.
    assert await store.add([old[0], replace(CALL, id="new")]) == {"b-0"}
    await store.prune(calls_before=0.0, hours_before=3)
    assert [one.key for one in await store.sums(EVERYTHING, "hour")] == [10_800]


async def test_usage_goes_with_its_user(db: Database) -> None:
    store = UsageStore(db)
    await store.add([CALL, replace(CALL, id="b-2", user="bob")])
    await UserStore(db).delete("ann")
    assert [one.key for one in await store.sums(EVERYTHING, "user")] == ["bob"]
    assert await db.read("SELECT user FROM usage_calls") == [("bob",)]


async def test_speeds_are_kept(db: Database) -> None:
    store = UsageStore(db)
    rows = [SpeedRow("p", "a", 0.5, 3, 10.0), SpeedRow("p", "b", None, 1, 11.0)]
    await store.put_speeds(rows)
    await store.put_speeds([rows[0], replace(rows[1], ttft_s=0.1)])
    assert sorted(await store.speeds(), key=lambda row: row.model) == [rows[0], replace(rows[1], ttft_s=0.1)]


CALLS = st.builds(
    lambda number, user, hour, tokens, cost: replace(
        CALL, id=f"b-{number}", user=user, at=hour * 3600.0, input=tokens, cost_usd=cost
    ),
    st.integers(0, 9),
    st.sampled_from(["ann", "bob"]),
    st.integers(0, 3),
    st.none() | st.integers(0, 10**9),
    st.sampled_from([0.0, 0.25, 1.0]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(CALLS, max_size=6, unique_by=lambda call: call.id), max_size=5))
def test_sums_are_those_of_the_first_word_on_each_call(batches: list[list[UsedCall]]) -> None:
    async def work(db: Database) -> None:
        store = UsageStore(db)
        first: dict[str, UsedCall] = {}
        for batch in batches:
            fresh = await store.add(batch)
            assert fresh == {call.id for call in batch} - first.keys()
            first = {call.id: call for call in batch} | first
        found = {one.key: one for one in await store.sums(EVERYTHING, "user")}
        assert found.keys() == {call.user for call in first.values()}
        for user, one in found.items():
            mine = [call for call in first.values() if call.user == user]
            assert (one.calls, one.input) == (len(mine), sum(call.input or 0 for call in mine))
            assert one.cost_usd == pytest.approx(sum(call.cost_usd for call in mine))

    in_database(work)
