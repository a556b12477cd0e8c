"""What is noted is written soon, once, and makes patterns; nothing is lost when the disk is full for a while."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from broker.config import ForecastConfig
from broker.errors import Code, CortexError
from broker.metrics import ACTIVITY_DROPPED, ACTIVITY_WRITES, STORE_READS, STORE_WRITES
from broker.session import recorder
from broker.session.activity import DAY, HOUR, Arrival
from broker.session.recorder import FORGET_S, REFRESH_S, Activity
from broker.store.activity import ActivityStore, HourTotal, Tally, UserTotal
from broker.store.db import Database
from broker.store.users import UserStore

NOW = 1_700_000_000.0


class Store(ActivityStore):
    """The real one, on whose disk there may be no room."""

    full = False
    unreadable = False
    meanwhile: Callable[[], None] | None = None

    async def top(self, since_hour: int, until_hour: int, limit: int) -> list[UserTotal]:
        if self.unreadable:
            raise CortexError(Code.STORE_ERROR, "it is damaged", hint="restore it")
        return await super().top(since_hour, until_hour, limit)

    async def add(self, tallies: Sequence[Tally]) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        if self.full:
            raise CortexError(Code.DISK_FULL, "the disk is full", hint="free space")
        await super().add(tallies)


class Rig:
    """An ``Activity`` on a real store and a clock of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.store = Store(db)
        self.now = NOW
        self.settings = ForecastConfig(mode="on")
        self.activity = Activity(self.store, lambda: self.settings, lambda: self.now)

    async def rows(self, user: str) -> list[Tally]:
        return await self.store.page(user, (-1, ""), 10**9)

    async def uses(self, user: str, *times: float) -> None:
        """Uses at these times, each written at once."""
        for at in times:
            self.now = at
            self.activity.note(user, at, "request")
            await self.activity.turn()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    db = await Database.open(tmp_path)
    yield Rig(db)
    await db.close()


def counters() -> tuple[float, float]:
    found = [metric.collect() for metric in (STORE_READS, STORE_WRITES)]
    return next(iter(found[0])).samples[0].value, next(iter(found[1])).samples[0].value


async def test_noting_and_asking_touch_no_store(rig: Rig) -> None:
    await rig.uses("ann", *(NOW + number * 600 for number in range(5)))
    before, writes = counters(), ACTIVITY_WRITES._value.get()
    for _ in range(1000):
        rig.activity.note("ann", rig.now, "request")
    assert rig.activity.keep_for("ann", rig.now) is not None
    assert counters() == before
    await rig.activity.turn()
    assert counters()[1] == before[1] + 1, "one transaction for all"
    assert ACTIVITY_WRITES._value.get() == writes + 1


async def test_what_was_noted_is_added_up_by_minute(rig: Rig) -> None:
    minute = NOW // 60 * 60
    for second in (30, 10, 59):
        rig.activity.note("ann", minute + second, "request")
    rig.activity.note("ann", minute + 60, "end")
    await rig.activity.turn()
    rig.activity.note("ann", minute + 5, "request")
    await rig.activity.turn()
    number = int(minute // 60)
    assert await rig.rows("ann") == [
        Tally(number, 5, "request", "ann", 4, 59),
        Tally(number + 1, 0, "end", "ann", 1, 0),
    ]


async def test_a_stop_writes_what_was_noted(rig: Rig) -> None:
    rig.activity.start()
    rig.activity.note("ann", NOW, "start")
    await rig.activity.close()
    assert len(await rig.rows("ann")) == 1


async def test_a_full_disk_loses_nothing(rig: Rig) -> None:
    await rig.activity.turn()
    rig.store.full = True
    rig.activity.note("ann", NOW, "request")
    rig.activity.note("bob", NOW, "request")
    await rig.activity.turn()
    rig.activity.note("ann", NOW, "request")
    rig.activity.forget("bob")
    await rig.activity.close()
    assert await rig.rows("ann") == []
    rig.store.full = False
    await rig.activity.turn()
    assert [one.count for one in await rig.rows("ann")] == [2]
    assert await rig.rows("bob") == []


async def test_who_is_erased_while_it_is_written_does_not_come_back(rig: Rig) -> None:
    rig.store.full = True
    rig.store.meanwhile = lambda: rig.activity.forget("ann")
    for user in ("ann", "bob"):
        rig.activity.note(user, NOW, "request")
    await rig.activity.turn()
    rig.store.full, rig.store.meanwhile = False, None
    await rig.activity.turn()
    assert (await rig.rows("ann"), len(await rig.rows("bob"))) == ([], 1)


async def test_more_than_may_wait_is_dropped_and_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_WAITING", 3)
    before = next(iter(ACTIVITY_DROPPED.collect())).samples[0].value
    for number in range(5):
        rig.activity.note(f"u{number}", NOW, "request")
    rig.activity.note("u0", NOW, "request")
    assert next(iter(ACTIVITY_DROPPED.collect())).samples[0].value == before + 2
    await rig.activity.turn()
    assert await rig.store.hours(0, 10**9) == [HourTotal(int(NOW // HOUR), 3, 4)]


async def test_patterns_are_of_the_most_active(rig: Rig) -> None:
    rig.settings = ForecastConfig(mode="on", top_users=2)
    for number, user in enumerate(("ann", "bob", "cat")):
        await rig.activity.merge([Tally(int(NOW // 60) - 60 * n, 0, "request", user, 1, 0) for n in range(3 - number)])
    await rig.activity.turn()
    assert [pattern.user for pattern in rig.activity.patterns] == ["ann", "bob"]
    assert [total.user for total in await rig.activity.most_active(5)] == ["ann", "bob", "cat"]
    assert sum(rig.activity.week) == 6
    assert 0.08 < rig.activity.days_known < 0.13


async def test_a_pattern_grows_with_what_is_noted(rig: Rig) -> None:
    await rig.uses("ann", NOW)
    rig.now = NOW + REFRESH_S + 1
    await rig.activity.turn()
    assert rig.activity.take_arrivals() == [], "what the store held is no arrival"
    start = rig.now + 3600
    await rig.uses("ann", *(start + number * 300 for number in range(6)))
    assert rig.activity.keep_for("ann", rig.now) == pytest.approx(1.1 * 76 * 60)
    arrivals = rig.activity.take_arrivals()
    assert [arrival.at for arrival in arrivals][:2] == [start, start + 300]
    assert rig.activity.take_arrivals() == []
    stored = await rig.activity.pattern("ann")
    live = rig.activity.patterns[0]
    assert (stored.hours, stored.idle.bins(), stored.last_use) == (live.hours, live.idle.bins(), live.last_use)


async def test_what_nobody_asked_to_forecast_is_not_kept_by(rig: Rig) -> None:
    await rig.uses("ann", *(NOW + number * 300 for number in range(8)))
    rig.now += REFRESH_S + 1
    await rig.activity.turn()
    assert rig.activity.keep_for("ann", rig.now) is not None
    rig.settings = ForecastConfig(mode="off")
    assert rig.activity.keep_for("ann", rig.now) is None
    assert rig.activity.keep_for("bob", rig.now) is None


async def test_a_log_is_taken_over_once_and_only_its_lately(rig: Rig) -> None:
    await rig.activity.turn()
    minute = int(NOW // 60)
    old, new, ahead = minute - 15 * 1440, minute - 1440, minute + 3 * 1440
    tallies = [Tally(at, 0, "request", "ann", 2, 5) for at in (old, new, ahead)]
    assert await rig.activity.merge(tallies) == (1, 1, 1)
    assert await rig.activity.merge(tallies) == (0, 1, 1)
    await rig.activity.turn()
    assert [pattern.user for pattern in rig.activity.patterns] == ["ann"]
    assert await rig.activity.by_hour() == {new // 60: (1, 2)}


async def test_the_past_goes_once_a_day(rig: Rig) -> None:
    await rig.uses("ann", NOW, NOW + 3600)
    rig.now = NOW + 14 * DAY + 3600
    await rig.activity.turn()
    assert len(await rig.rows("ann")) == 1
    rig.now += DAY
    await rig.activity.turn()
    assert await rig.rows("ann") == []


async def test_a_clock_that_jumps_back_keeps_reading(rig: Rig) -> None:
    await rig.uses("ann", NOW + 10 * DAY)
    await rig.uses("bob", NOW)
    await rig.uses("bob", NOW + 1)
    assert [pattern.user for pattern in rig.activity.patterns] == ["bob"]


async def test_who_is_erased_is_forgotten_at_once(rig: Rig) -> None:
    await rig.uses("ann", NOW, NOW + 600)
    rig.now += REFRESH_S + 1
    await rig.uses("ann", rig.now, rig.now + 120)
    rig.activity.note("ann", rig.now, "end")
    rig.activity.forget("ann")
    await UserStore(rig.db).delete("ann")
    rig.activity.note("ann", rig.now + 1, "end")
    await rig.activity.turn()
    assert (rig.activity.patterns, rig.activity.take_arrivals(), await rig.rows("ann")) == ([], [], [])
    rig.now += FORGET_S + 1
    await rig.uses("ann", rig.now)
    assert len(await rig.rows("ann")) == 1, "who comes back is a new user"


async def test_a_store_that_cannot_be_read_is_told_and_tried_again(rig: Rig) -> None:
    await rig.activity.merge([Tally(int(NOW // 60), 0, "request", "ann", 1, 0)])
    rig.store.unreadable = True
    await rig.activity.turn()
    assert not rig.activity.patterns
    rig.store.unreadable = False
    rig.now += REFRESH_S + 1
    await rig.activity.turn()
    assert rig.activity.patterns


def test_an_arrival_is_ordered_by_its_time() -> None:
    activity = Activity(None, ForecastConfig)  # type: ignore[arg-type]
    late, early = (Arrival("ann", at, 60.0, False) for at in (20.0, 10.0))
    activity._arrivals.extend([late, early])
    assert activity.take_arrivals() == [early, late]
