"""Few places for many: shares are kept, no place stays empty that somebody may have, and lines take turns."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.lines import Job, Lines

PLACES, SHARE = 4, 2
WHO = st.sampled_from(["a", "b", "c", ""])
STEPS = st.lists(st.tuples(st.sampled_from(["come", "come", "join", "leave"]), WHO, st.integers(0, 50)), max_size=80)


class Model:
    def __init__(self) -> None:
        self.lines = Lines(PLACES, SHARE)
        self.jobs: list[Job] = []
        self.wanted: dict[Job, set[str]] = {}

    def come(self, whose: str) -> Job:
        job = Job()
        self.jobs.append(job)
        self.wanted[job] = {whose}
        self.lines.enter(job, whose)
        return job

    def step(self, what: str, whose: str, number: int) -> None:
        if what == "come" or not self.jobs:
            self.come(whose)
            return
        job = self.jobs[number % len(self.jobs)]
        if what == "join":
            if job.waits:
                self.wanted[job].add(whose)
            self.lines.enter(job, whose)
        else:
            self.jobs.remove(job)
            self.lines.leave(job)

    def held(self, whose: str | None = None) -> int:
        return sum(job.place.done() for job in self.jobs if whose is None or job.whose == whose)

    def check(self) -> None:
        assert self.held() <= PLACES
        for whose in "abc":
            assert self.held(whose) <= SHARE
        if self.held() < PLACES:
            left = {whose for job in self.jobs if job.waits for whose in self.wanted[job]}
            assert all(whose and self.held(whose) == SHARE for whose in left)


@given(STEPS)
def test_shares_are_kept_and_no_place_stays_empty_that_somebody_may_have(steps: list[tuple[str, str, int]]) -> None:
    async def run() -> None:
        model = Model()
        for step in steps:
            model.step(*step)
            model.check()
        while model.jobs:
            served = [job for job in model.jobs if job.place.done()]
            assert served, "somebody waits for ever"
            for job in served:
                model.jobs.remove(job)
                model.lines.leave(job)
            model.check()
        assert not model.lines._lines
        assert not model.lines._held

    asyncio.run(run())


async def test_lines_take_turns() -> None:
    model = Model()
    flood = [model.come("") for _ in range(10)]
    one, two = model.come("a"), model.come("b")
    model.lines.leave(flood[0])
    model.lines.leave(flood[1])
    model.lines.leave(flood[2])
    assert [job.place.done() for job in (flood[4], one, two, flood[5])] == [True, True, True, False]


async def test_work_that_two_want_is_done_in_the_line_that_comes_first() -> None:
    model = Model()
    for _ in range(SHARE):
        model.come("a")
    job = model.come("a")
    model.lines.enter(job, "b")
    assert job.whose == "b"
    model.lines.enter(job, "c")
    assert "c" not in model.lines._lines


async def test_work_that_is_not_wanted_any_more_takes_no_place() -> None:
    model = Model()
    busy = [model.come("") for _ in range(PLACES)]
    given_up, next_one, cancelled = model.come("a"), model.come("a"), model.come("b")
    model.lines.leave(given_up)
    cancelled.place.cancel()
    model.lines.leave(busy[0])
    assert next_one.place.done()
    assert given_up.whose is None
    model.lines.leave(busy[1])
    assert cancelled.whose is None
