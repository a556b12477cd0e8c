"""Activity in the store: counted once, added up by the hour, bounded in time, gone with its user."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.store.activity import PAGE, SLICE, ActivityStore, HourTotal, Tally, UserTotal
from broker.store.db import Database
from broker.store.users import UserStore
from tests.unit.broker.store.aio import in_database

ALL = 10**9


def tally(user: str, minute: int, kind: str = "request", count: int = 1, first: int = 0, last: int = 0) -> Tally:
    return Tally(minute, first, kind, user, count, last)


async def everything(store: ActivityStore, user: str) -> list[Tally]:
    return await store.page(user, (-1, ""), ALL)


async def test_what_is_added_counts_on_top(db: Database) -> None:
    store = ActivityStore(db)
    await store.add([tally("ann", 61, count=2, first=30, last=40)])
    await store.add([tally("ann", 61, count=3, first=10, last=35), tally("ann", 61, "end", first=59, last=59)])
    assert await everything(store, "ann") == [
        tally("ann", 61, "end", first=59, last=59),
        tally("ann", 61, count=5, first=10, last=40),
    ]


async def test_what_is_merged_twice_counts_once(db: Database) -> None:
    store = ActivityStore(db)
    rows = [tally("ann", minute, count=2) for minute in range(2 * SLICE + 1)]
    assert await store.merge(rows) == len(rows)
    assert await store.merge(rows) == 0
    assert await store.merge([tally("ann", 0, count=1), tally("ann", 1, count=9)]) == 1
    assert [one.count for one in await everything(store, "ann")][:3] == [2, 9, 2]


async def test_hours_count_minutes_and_uses_but_no_intents(db: Database) -> None:
    store = ActivityStore(db)
    await store.add([tally("ann", 59), tally("ann", 60, count=4), tally("ann", 60, "start"), tally("ann", 70, "end")])
    await store.add([tally("bob", 61), tally("cat", 62, "intent")])
    await store.merge([tally("ann", 60, count=4)])
    assert await store.hours(0, ALL) == [HourTotal(0, 1, 1), HourTotal(1, 2, 7)]
    assert await store.hours(1, 2) == [HourTotal(1, 2, 7)]
    assert await store.top(0, ALL, 10) == [UserTotal("ann", 3, 7, 1), UserTotal("bob", 1, 1, 1)]
    assert await store.top(0, 1, 10) == [UserTotal("ann", 1, 1, 0)]
    assert await store.top(0, ALL, 1) == [UserTotal("ann", 3, 7, 1)]


async def test_pages_follow_each_other(db: Database) -> None:
    store = ActivityStore(db)
    rows = [tally("ann", minute) for minute in range(PAGE + 2)]
    await store.merge([*rows, tally("bob", 5)])
    first = await everything(store, "ann")
    assert len(first) == PAGE
    rest = await store.page("ann", (first[-1].minute, first[-1].kind), PAGE + 1)
    assert [one.minute for one in rest] == [PAGE]


async def test_the_past_is_deleted_of_everybody(db: Database) -> None:
    store = ActivityStore(db)
    users = [f"u{number}" for number in range(45)]
    await store.merge([tally(user, minute) for user in users for minute in (10, 59, 60, 200)])
    assert await store.prune(1) == 2 * len(users)
    assert await store.prune(1) == 0
    assert [one.minute for one in await everything(store, "u44")] == [60, 200]
    assert [one.hour for one in await store.hours(0, ALL)] == [1, 3]


async def test_erasing_a_user_erases_their_activity(db: Database) -> None:
    store = ActivityStore(db)
    await store.merge([tally("ann", 1), tally("bob", 1)])
    await UserStore(db).delete("ann")
    assert await everything(store, "ann") == []
    assert await store.hours(0, ALL) == [HourTotal(0, 1, 1)]
    assert len(await everything(store, "bob")) == 1


TALLIES = st.builds(
    tally,
    st.sampled_from(["a", "b'; --", "ü"]),
    st.integers(0, 200),
    st.sampled_from(["intent", "start", "request", "end"]),
    st.integers(1, 9),
    st.integers(0, 29),
    st.integers(30, 59),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(TALLIES, max_size=20), max_size=4))
def test_hours_are_always_the_sum_of_minutes(batches: list[list[Tally]]) -> None:
    async def check(db: Database) -> None:
        store = ActivityStore(db)
        for batch in batches:
            await store.add(batch)
        uses: dict[int, int] = {}
        there: dict[int, set[str]] = {}
        for one in (one for batch in batches for one in batch if one.kind != "intent"):
            uses[one.minute // 60] = uses.get(one.minute // 60, 0) + one.count
            there.setdefault(one.minute // 60, set()).add(one.user)
        assert await store.hours(0, ALL) == [HourTotal(hour, len(there[hour]), uses[hour]) for hour in sorted(uses)]

    in_database(check)
