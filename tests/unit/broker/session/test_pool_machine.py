"""Whatever happens in whatever order: never too many, none lost, none handed out twice, and never silently dead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from structlog.testing import capture_logs

from broker.session.pool import Pool
from sandbox_agent.wire.messages import Status
from tests.unit.broker.session.pool_rig import GIB, Box, World, down, no_image
from tests.virtual import VirtualLoop

T = TypeVar("T")
AGENTS = st.sampled_from(["a", "b"])
SIZES = st.integers(0, 4)
FAULTS: dict[str, Any] = {
    "none": {},
    "engine": {"error": down()},
    "image": {"error": no_image()},
    "bug": {"error": ValueError("a bug")},
    "slow": {"seconds": 30.0},
    "hangs": {"seconds": 10_000.0},
}


class PoolMachine(RuleBasedStateMachine):
    """Two agents. ``too_many`` says when one more was begun than may be."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.starts: list[Any] = []
        self.too_many = ""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        with capture_logs():
            return self.loop.run_until_complete(work)

    @property
    def pool(self) -> Pool:
        return self.world.pool

    @initialize(wanted=SIZES, hot=SIZES)
    def begin(self, wanted: int, hot: int) -> None:
        async def start() -> None:
            self.world = World(agents={"a": {"target": wanted, "hot": hot}, "b": {"target": 1}}, refill_burst=3)
            self.world.warmer.hook = self.one_is_begun
            self.pool.start()

        self.run(start())

    def there(self, agent: str) -> int:
        """Those that exist or are about to, and are nobody's."""
        alive = [box for box in self.world.warmer.made if box.ref in self.world.engine.sandboxes]
        mine = [box for box in alive if box.agent == agent and box not in self.world.taken]
        return len(mine) + self.world.warmer.under_way[agent]

    def one_is_begun(self, agent: str) -> None:
        limits, there = self.world.config.pool.agents.get(agent), self.there(agent)
        stuck = self.world.shelf(agent).stuck
        if limits is None or there > limits.maximum or there - stuck > max(limits.target, limits.minimum):
            self.too_many = f"{there} of {agent}, {stuck} stuck, {limits}"

    # What may happen

    @rule(agent=AGENTS, right=st.booleans(), count=st.integers(1, 3))
    def take(self, agent: str, right: bool, count: int) -> None:
        async def take() -> None:
            for _ in range(count):
                box = self.world.take(agent, None if right else "other")
                if box is not None:
                    assert box.boot_hash == self.world.boot(agent)
                    assert right

        self.run(take())

    def some(self, number: int) -> Box | None:
        boxes = [box for box in self.world.warmer.made if box.ref in self.world.engine.sandboxes]
        return boxes[number % len(boxes)] if boxes else None

    @rule(number=st.integers(0, 50), how=st.sampled_from(["exit", "lost", "failed", "quiet", "opening", "open"]))
    def one_changes(self, number: int, how: str) -> None:
        async def change() -> None:
            box = self.some(number)
            if box is None:
                return
            if how == "exit":
                await self.world.engine.end(box.ref)
            elif how == "lost":
                box.lose("hung up")
            elif how == "quiet":
                box.quiet.set()
            else:
                box.heard(Status("failed") if how == "failed" else Status("ready", ahead=how))

        self.run(change())

    @rule(which=st.sampled_from(sorted(FAULTS)))
    def making_them(self, which: str) -> None:
        warmer = self.world.warmer
        warmer.error = FAULTS[which].get("error")
        warmer.seconds = FAULTS[which].get("seconds", 1.0)

    @rule(down_=st.booleans())
    def the_engine_is(self, down_: bool) -> None:
        self.world.engine.error = down() if down_ else None

    @rule(broken=st.booleans())
    def putting_away_is(self, broken: bool) -> None:
        self.world.end_error = down() if broken else None

    @rule(open_=st.booleans())
    def pauses_are(self, open_: bool) -> None:
        self.world.pause_gate.set() if open_ else self.world.pause_gate.clear()

    @rule(minimum=SIZES, more=SIZES, room=SIZES, hot=SIZES, both=st.booleans())
    def configure(self, minimum: int, more: int, room: int, hot: int, both: bool) -> None:
        agent = {"minimum": minimum, "target": minimum + more, "maximum": minimum + more + room, "hot": hot}
        agents = {"a": agent} | ({"b": {"target": 1}} if both else {})
        self.world.configure(agents=agents, refill_burst=3)
        self.run(self.changed())

    async def changed(self) -> None:
        self.pool.settings_changed()

    @rule(version=st.integers(1, 3), told=st.booleans())
    def recipe_changes(self, version: int, told: bool) -> None:
        self.world.warmer.version = str(version)
        if told:
            self.run(self.changed())

    @rule(image=st.integers(1, 3), missing=st.booleans())
    def image_changes(self, image: int, missing: bool) -> None:
        self.world.engine.image = f"image-{image}"
        self.world.engine.image_error = no_image() if missing else None

    @rule(available=st.sampled_from([0, GIB // 4, GIB, 32 * GIB]))
    def memory_changes(self, available: int) -> None:
        self.world.host = replace(self.world.host, available=available)

    @rule()
    def a_user_starts(self) -> None:
        start = self.pool.yielding()
        start.__enter__()
        self.starts.append(start)

    @rule()
    def a_user_has_started(self) -> None:
        async def leave() -> None:
            if self.starts:
                self.starts.pop().__exit__(None, None, None)

        self.run(leave())

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.06, 1.0, 7.0, 100.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # What has to hold

    @invariant()
    def never_too_many(self) -> None:
        assert not self.too_many

    @invariant()
    def none_is_lost(self) -> None:
        if not hasattr(self, "world"):
            return
        kept = [member.box for shelf in self.pool._shelves.values() for member in shelf]
        kept += [box for shelf in self.pool._shelves.values() for box in shelf.leaving]
        refs = [box.ref for box in (*kept, *self.world.taken)]
        assert len(refs) == len(set(refs))
        assert set(self.world.engine.sandboxes) <= set(refs)

    @invariant()
    def numbers_agree(self) -> None:
        if not hasattr(self, "world"):
            return
        for agent, shelf in self.pool._shelves.items():
            assert shelf.making >= self.world.warmer.under_way[agent] >= 0
            told = shelf.sizes()
            assert told["hot"] + told["paused"] == len(shelf) == len(list(shelf))

    @rule()
    def below_target_with_nothing_in_the_way_one_is_on_its_way(self) -> None:
        """Whenever it is short, breaker closed, no user starting: a refill is under way within the debounce."""

        async def debounced() -> None:
            await asyncio.sleep(self.world.config.pool.debounce_s + 0.001)

        if self.world.engine.error or self.world.engine.image_error or self.starts:
            return
        self.run(debounced())
        now = self.loop.time()
        shelves = self.pool._shelves.values()
        if sum(shelf.making for shelf in shelves) >= self.world.config.pool.refill_concurrency:
            return
        spare = self.world.host.available - self.world.config.pool.reserve_bytes
        spare -= sum(shelf.making * shelf.cost for shelf in shelves)
        if self.pool._bucket.whole(now) < 1 or spare < max((shelf.cost for shelf in shelves), default=0):
            return
        for shelf in shelves:
            if shelf.short == "memory":
                continue  # the host's memory brings no event
            stock = self.pool._stock(shelf, now)
            assert not stock.lacking or stock.tries == 0 or stock.making >= (stock.tries or 99)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.run(self._mended())
            finally:
                self.run(self.world.close())
        self.loop.close()

    async def _mended(self) -> None:
        """All is well again: a while later every shelf is as it should be, without anybody's doing."""
        world = self.world
        world.engine.error = world.engine.image_error = world.end_error = world.warmer.error = None
        world.warmer.seconds, world.warmer.ahead = 1.0, "open"
        world.host = replace(world.host, available=32 * GIB)
        world.pause_gate.set()
        for start in self.starts:
            start.__exit__(None, None, None)
        for box in world.warmer.made:
            if box.status and box.status.ahead == "opening":
                box.heard(Status("ready", ahead="open"))
        await asyncio.sleep(400)  # the longest that a maker may hang, a breaker be open, and an end be retried
        assert not self.too_many
        for agent, limits in world.config.pool.agents.items():
            hot = min(limits.hot, limits.target)
            expected = {"hot": hot, "paused": limits.target - hot}
            assert world.sizes(agent) == {state: count for state, count in expected.items() if count}
            assert world.shelf(agent).short == ""
            assert all(member.box.recipe == world.warmer.recipe(agent) for member in world.shelf(agent))


PoolMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPool = PoolMachine.TestCase
