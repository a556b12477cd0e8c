from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

from broker.config import PoolConfig
from broker.session.activity import Kind
from broker.session.clients import Clients
from broker.session.idle import Action
from broker.session.idling import AT_ONCE, RETRY_S, Idling
from sandbox_agent.wire.messages import Status


class World:
    """One session's idling; time is what the test says, and acts are counted."""

    def __init__(self, **pool: Any) -> None:
        self.now = 1000.0
        self.life = SimpleNamespace(state="ready", closed=False)
        self.config = PoolConfig.model_validate(pool)
        self.at_work = False
        self.acts = 0
        self.noted: list[Kind] = []
        self.asked = 0
        self.pattern: float | None = None
        self.idling = Idling(
            "ann",
            self.life,  # type: ignore[arg-type]
            Clients(lambda: 9),
            config=lambda: self.config,
            activity=self,
            at_work=lambda: self.at_work,
            act=self._act,
            clock=lambda: self.now + 5e8,
            steady=lambda: self.now,
        )

    def _act(self) -> None:
        self.acts += 1

    def note(self, user: str, at: float, kind: Kind) -> None:
        self.noted.append(kind)

    def keep_for(self, user: str, now: float) -> float | None:
        self.asked += 1
        assert now == pytest.approx(self.now + 5e8, abs=600)
        return self.pattern

    def says(self, *, turns: int, open_turns: int = 0) -> None:
        self.idling.heard(Status("ready", turns=turns, open_turns=open_turns))

    @property
    def due_in(self) -> float:
        return self.idling._due - self.now


async def test_a_timer_is_set_once_and_left_alone_while_the_session_is_used() -> None:
    world = World()
    world.idling.used()
    world.idling.look()
    timer = world.idling._timer
    assert world.due_in == 60
    for _ in range(100):
        world.now += 0.5
        world.idling.used()
        world.idling.look()
    assert world.idling._timer is timer
    # It rings too early, finds that out and is set again.
    world.now += 10
    assert timer is not None
    timer.cancel()
    world.idling._timed()
    assert (world.acts, world.due_in) == (0, 50)
    world.idling.close()


async def test_a_timer_that_would_ring_too_late_is_set_anew() -> None:
    world = World(idle={"pause_after_s": 500})
    world.idling.used()
    world.idling.look()
    assert world.due_in == 120
    world.config = PoolConfig.model_validate({"idle": {"fallback_keep_s": 20}})
    world.idling.settings_changed()
    assert world.due_in == 20
    world.idling.close()


async def test_turns_that_were_there_before_do_not_count() -> None:
    world = World()
    world.idling.came_up(adopted=True)
    world.says(turns=70)
    assert world.noted == []
    world.says(turns=72)
    assert world.noted == ["request", "request"]
    world.says(turns=0)
    world.says(turns=1)
    assert len(world.noted) == 3
    world.says(turns=2**60)
    assert len(world.noted) == 3 + AT_ONCE, "a sandbox may say what it likes"
    world.idling.close()


async def test_the_pattern_is_asked_for_once_after_each_use() -> None:
    world = World()
    world.pattern = 600.0
    world.idling.used()
    for _ in range(5):
        world.now += 1
        world.idling.look()
    assert world.asked == 1
    world.life.state = "paused"
    actions = []
    for seconds in (590, 5):
        world.now += seconds
        actions.append(world.idling.action)
    assert actions == [Action.STAY, Action.STOP]
    world.idling.close()


async def test_what_could_not_be_done_is_put_off() -> None:
    world = World()
    world.idling.used()
    world.now += 60
    world.idling.look()
    assert world.acts == 1
    world.idling.postpone()
    assert (world.acts, world.due_in) == (1, RETRY_S)
    world.now += RETRY_S
    world.idling.look()
    assert world.acts == 2
    world.idling.close()


async def test_work_that_ends_is_followed_by_a_look() -> None:
    world = World()
    world.idling.used()
    world.at_work = True
    world.now += 500
    world.idling.look()
    assert world.idling._timer is None
    world.at_work = False
    world.idling.watch()
    assert world.acts == 1
    world.idling.watch()
    assert world.acts == 2, "what is due is due until it is done"
    world.idling.close()


async def test_one_that_was_never_used_is_idle_since_it_was_roused() -> None:
    world = World()
    assert world.idling.view()["idle_s"] is None
    world.idling.expected()
    world.now += 7
    assert world.idling.idle_s == 7
    assert world.idling._used_at == -inf
    world.idling.close()


async def test_one_that_has_left_memory_does_nothing_more() -> None:
    world = World()
    world.idling.used()
    world.life.closed = True
    world.idling.close()
    world.now += 500
    world.idling.look()
    assert (world.acts, world.idling._timer) == (0, None)
