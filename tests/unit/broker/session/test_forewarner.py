"""The look at who will come: what is done for whom, in which mode, and how it is judged afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from broker.config import ForecastConfig, PoolConfig
from broker.errors import Code, CortexError
from broker.metrics import FORECAST, PREPARED
from broker.session.activity import DAY, HOUR, WEEK_HOURS, Arrival, Pattern, hour_of_week, pattern_of
from broker.session.forewarner import AGAIN_S, RETRY_S, Forewarner
from broker.store.activity import Tally
from tests.unit.broker.session.test_activity import MONDAY, days

COMES = float((MONDAY + 240 + 9) * HOUR + 5 * 60)
"""Ann comes each day at 9:05; this is the day after what is known."""


class Known:
    """The ``Patterns`` of a test."""

    def __init__(self, *patterns: Pattern) -> None:
        self.patterns: Sequence[Pattern] = list(patterns)
        self.week: list[float] = [0.0] * WEEK_HOURS
        self.days_known = 0.0
        self.arrivals: list[Arrival] = []

    def take_arrivals(self) -> list[Arrival]:
        arrivals, self.arrivals = self.arrivals, []
        return arrivals


class Prepares:
    """A ``Preparer`` that notes what it was asked."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.prewarmed = asyncio.Event()
        self.free = 1000
        self.calls: list[tuple[str, Any]] = []
        self.broken: CortexError | None = None
        self.strangers: set[str] = set()
        self.found: dict[str, str] = {"home": "", "packages": "", "credentials": ""}

    async def up(self, users: Sequence[str]) -> Collection[str]:
        if self.broken is not None:
            raise self.broken
        return self.running & set(users)

    def room(self) -> int:
        return self.free

    def size(self, user: str) -> int:
        return 100

    async def prewarm(self, user: str) -> bool:
        self.calls.append(("prewarm", user))
        self.prewarmed.set()
        if user in self.strangers:
            return False
        if user.startswith("bad"):
            raise CortexError(Code.ENGINE_DOWN, "no engine", hint="start it")
        if user not in self.running:
            self.free -= 100
        self.running.add(user)
        return True

    async def let_go(self, user: str) -> None:
        self.calls.append(("let_go", user))
        self.running.discard(user)
        self.free += 100

    async def prepare(self, user: str) -> Mapping[str, str]:
        self.calls.append(("prepare", user))
        return self.found

    def load(self, share: float | None) -> None:
        self.calls.append(("load", share))

    def of(self, what: str) -> list[Any]:
        return [value for name, value in self.calls if name == what]


class Rig:
    def __init__(self, *users: str, mode: str = "on") -> None:
        self.known = Known(*(pattern_of(user, named(days(*range(10)), user)) for user in users or ("ann",)))
        self.preparer = Prepares()
        self.settings = PoolConfig(forecast=ForecastConfig.model_validate({"mode": mode}))
        self.now = COMES - 3000
        self.warner = Forewarner(self.known, lambda: self.settings, lambda: self.now)

    async def look(self, at: float) -> list[tuple[str, str]]:
        """A look at that time; who is expected and what is done."""
        self.now = at
        await self.warner.look(self.preparer)
        return [(one["user"], one["action"]) for one in self.warner.view()["expected"]]

    def came(self, user: str, at: float, *, announced: bool = False) -> None:
        self.known.arrivals.append(Arrival(user, at, 3600.0, announced))
        self.preparer.running.add(user)

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.warner.view()["counts"]
        return counts


def named(tallies: list[Tally], user: str) -> list[Tally]:
    return [Tally(one.minute, one.first, one.kind, user, one.count, one.last) for one in tallies]


async def test_a_forecast_alone_does_nothing_and_is_judged() -> None:
    rig = Rig(mode="forecast")
    before = FORECAST.labels("hit")._value.get()
    assert await rig.look(COMES - 200) == []
    assert await rig.look(COMES - 100) == [("ann", "would prewarm")]
    assert await rig.look(COMES - 40) == [("ann", "would prewarm")]
    rig.came("ann", COMES + 10)
    assert await rig.look(COMES + 20) == []
    assert rig.counts == {"hit": 1, "miss": 0, "wasted": 0}
    assert rig.warner.view()["ready_s"]["hit"] == 110
    assert FORECAST.labels("hit")._value.get() == before + 1
    assert rig.preparer.calls == []


async def test_told_to_it_brings_up_and_keeps_up_until_the_user_comes() -> None:
    rig = Rig()
    for at in (COMES - 100, COMES - 40, COMES + 20):
        assert await rig.look(at) == [("ann", "prewarmed")]
    assert rig.preparer.of("prewarm") == ["ann"] * 3
    rig.came("ann", COMES + 30)
    assert await rig.look(COMES + 80) == []
    assert rig.counts["hit"] == 1
    rig.preparer.running.clear()
    await rig.look(COMES + 140)
    assert rig.counts == {"hit": 1, "miss": 0, "wasted": 0}


async def test_who_does_not_come_is_waste_and_believed_less() -> None:
    rig = Rig()
    await rig.look(COMES - 100)
    assert await rig.look(COMES + 2000) == []
    assert rig.counts == {"hit": 0, "miss": 0, "wasted": 1}
    assert rig.warner.view()["recent"][0]["result"] == "wasted"
    rig.preparer.running.clear()
    assert await rig.look(COMES + DAY - 100) == [], "half of the probability is not enough"


async def test_who_comes_unexpected_is_a_miss_unless_they_needed_no_forecast() -> None:
    rig = Rig("ann", "bob", "cat")
    rig.preparer.running.add("bob")
    await rig.look(COMES - 3000)
    for user in ("ann", "bob"):
        rig.came(user, COMES - 2990)
    rig.came("cat", COMES - 2990, announced=True)
    await rig.look(COMES - 2940)
    assert rig.counts == {"hit": 0, "miss": 1, "wasted": 0}
    assert rig.warner.view()["recent"][0]["user"] == "ann"


async def test_who_is_up_without_our_doing_is_not_expected() -> None:
    rig = Rig()
    rig.preparer.running.add("ann")
    assert await rig.look(COMES - 100) == []
    assert rig.preparer.of("prewarm") == []


async def test_room_is_for_the_likeliest_and_a_likelier_one_takes_it() -> None:
    rig = Rig("ann")
    rig.preparer.free = 100
    assert await rig.look(COMES - 110) == [("ann", "prewarmed")]
    surer = pattern_of("bob", named(days(*range(-20, 10), minute=4), "bob"))
    rig.known.patterns = [*rig.known.patterns, surer]
    told = await rig.look(COMES - 100)
    assert told == [("ann", "prewarmed"), ("bob", "left out")], "what is there counts double"
    told = await rig.look(COMES + 60 + 540)
    assert rig.preparer.running == {"ann"}
    assert told[0] == ("ann", "prewarmed")
    rig.preparer.free = -100
    assert await rig.look(COMES + 60 + 560) == [("ann", "left out")]
    assert rig.preparer.of("let_go") == ["ann"]
    rig.came("ann", COMES + 60 + 570)
    await rig.look(COMES + 3000)
    assert rig.counts == {"hit": 0, "miss": 1, "wasted": 0}, "nothing was ready any more, and nothing to the end"


async def test_at_most_so_many_as_are_looked_at() -> None:
    rig = Rig("ann", "bob", "cat")
    rig.settings = PoolConfig(forecast=ForecastConfig(mode="on", top_users=2))
    told = await rig.look(COMES - 100)
    assert [action for _, action in told] == ["prewarmed", "prewarmed", "left out"]


async def test_whom_nothing_could_be_done_for_is_not_counted_as_expected() -> None:
    rig = Rig("bad", "stranger", "ann")
    rig.preparer.strangers.add("stranger")
    assert sorted(await rig.look(COMES - 100)) == [("ann", "prewarmed"), ("bad", "failed"), ("stranger", "no session")]
    for user in ("bad", "stranger", "ann"):
        rig.came(user, COMES)
    await rig.look(COMES + 60)
    assert rig.counts == {"hit": 1, "miss": 2, "wasted": 0}


async def test_an_error_ends_one_look_only() -> None:
    rig = Rig()
    rig.preparer.broken = CortexError(Code.STORE_ERROR, "no store", hint="wait")
    assert await rig.look(COMES - 100) == []
    rig.preparer.broken = None
    assert await rig.look(COMES - 50) == [("ann", "prewarmed")]


async def test_switched_off_it_forgets_what_it_saw() -> None:
    rig = Rig(mode="off")
    rig.came("ann", COMES)
    assert await rig.look(COMES - 100) == []
    assert (rig.known.arrivals, rig.preparer.of("prewarm"), rig.counts["miss"]) == ([], [], 0)


async def test_who_is_looked_at_no_more_is_not_judged() -> None:
    rig = Rig("ann", "bob")
    await rig.look(COMES - 100)
    rig.known.patterns = rig.known.patterns[:1]
    rig.came("ann", COMES)
    await rig.look(COMES + 5000)
    assert rig.counts == {"hit": 1, "miss": 0, "wasted": 0}


async def test_pools_follow_the_hour_of_the_week_once_it_is_known() -> None:
    rig = Rig()
    rig.known.week = [1.0] * WEEK_HOURS
    rig.known.week[hour_of_week(MONDAY + 10)] = 85.0
    await rig.look((MONDAY + 168 + 8) * HOUR)
    assert rig.preparer.of("load") == []
    rig.known.days_known = 7.0
    await rig.look((MONDAY + 168 + 8) * HOUR)
    await rig.look((MONDAY + 168 + 8) * HOUR + 60)
    await rig.look((MONDAY + 168 + 10) * HOUR - 100)
    assert rig.preparer.of("load") == [pytest.approx(168 / 252), pytest.approx(85 * 168 / 252)]
    rig.settings = PoolConfig(forecast=ForecastConfig(mode="forecast"))
    await rig.look((MONDAY + 168 + 10) * HOUR)
    assert rig.preparer.of("load")[-1] is None


async def test_active_users_are_looked_after_one_a_look_at_quiet_times_once_a_day() -> None:
    rig = Rig("ann", "bob")
    night = float((MONDAY + 240 + 3) * HOUR)
    rig.known.week = [0.0 if hour % 24 < 6 else 2.0 for hour in range(WEEK_HOURS)]
    before = PREPARED.labels("home", "ready")._value.get()
    await rig.look(night - 4 * HOUR)
    assert rig.preparer.of("prepare") == []
    for number in range(4):
        await rig.look(night + 60 * number)
    assert rig.preparer.of("prepare") == ["ann", "bob"]
    assert PREPARED.labels("home", "ready")._value.get() == before + 2
    await rig.look(night + AGAIN_S)
    assert rig.preparer.of("prepare") == ["ann", "bob", "ann"]
    assert [entry["user"] for entry in rig.warner.view()["prepared"]] == ["ann", "bob", "ann"]


async def test_what_is_wrong_is_tried_again_within_the_hour() -> None:
    rig = Rig()
    rig.preparer.found = {"home": "", "packages": "npx x: no such package"}
    await rig.look(COMES - 9000)
    await rig.look(COMES - 9000 + RETRY_S - 1)
    assert rig.preparer.of("prepare") == ["ann"]
    await rig.look(COMES - 9000 + RETRY_S)
    assert rig.preparer.of("prepare") == ["ann", "ann"]


async def test_who_never_sees_a_quiet_hour_is_looked_after_all_the_same() -> None:
    rig = Rig()
    rig.known.week = [0.0] * 100 + [1.0] * 68
    busy = float((MONDAY + 168 + 100) * HOUR)
    await rig.look(busy)
    await rig.look(busy + AGAIN_S - 1)
    assert rig.preparer.of("prepare") == []
    await rig.look(busy + AGAIN_S)
    assert rig.preparer.of("prepare") == ["ann"]


async def test_a_user_is_forgotten_whole() -> None:
    rig = Rig()
    await rig.look(COMES - 100)
    rig.warner.forget("ann")
    view = rig.warner.view()
    assert (view["expected"], view["prepared"], view["recent"]) == ([], [], [])
    rig.known.patterns = []
    await rig.look(COMES + 3000)
    assert rig.counts == {"hit": 0, "miss": 0, "wasted": 0}


async def test_it_looks_by_itself_and_ends_when_closed() -> None:
    rig = Rig()
    rig.settings = PoolConfig(forecast=ForecastConfig(mode="on", interval_s=0.001))
    rig.now = COMES - 100
    rig.warner.start(rig.preparer)
    await rig.preparer.prewarmed.wait()
    await rig.warner.close()
