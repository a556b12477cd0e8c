"""The wall clock is set a day on or back: no session, warm sandbox or configuration suffers from it."""

from __future__ import annotations

import pytest

from broker.session.session import Session
from tests.integration.session.resting import DAY, attached, paused, state_of
from tests.integration.session.rig import Rig, rig, until
from tests.integration.session.test_pool import house

pytestmark = pytest.mark.parametrize("jump", [DAY, -DAY])


async def looked_after(world: Rig, *sessions: Session) -> None:
    """What the registry does now and then, and all that follows from it."""
    await world.registry._look()
    await until(lambda: all(session._mailbox.idle for session in sessions))


async def test_idle_time_is_what_has_passed(jump: float) -> None:
    async with rig() as world:
        used, left = await world.ready("used"), await world.ready("left")
        client = await attached(world, used)
        left.detach(await attached(world, left))
        before = list(world.engine.sandboxes)
        world.clock.now += jump
        await looked_after(world, used, left)
        await world.passes(59)
        assert [state_of(one) for one in (used, left)] == ["ready", "ready"]
        await world.passes(1)
        assert [state_of(one) for one in (used, left)] == ["ready", "paused"]
        world.clock.now += jump
        await looked_after(world, used, left)
        await world.passes(59)
        assert [state_of(one) for one in (used, left)] == ["ready", "paused"]
        assert (client.closed, list(world.engine.sandboxes)) == (None, before)
        await world.passes(1)
        assert [state_of(one) for one in (used, left)] == ["ready", "stopped"]


async def test_one_that_sleeps_is_woken_as_ever(jump: float) -> None:
    async with rig() as world:
        session = await paused(world)
        world.clock.now += jump
        await looked_after(world, session)
        assert state_of(session) == "paused"
        client = await attached(world, session)
        assert (client.closed, state_of(session)) == (None, "ready")
        assert session.view()["idle"]["paused_s"] == 0


async def test_a_configuration_is_refreshed_once_and_not_kept_for_a_day(jump: float) -> None:
    """Whatever its age seems to be; the sandbox hears of nothing, since nothing differs."""
    async with rig() as world:
        session = await world.ready()
        session.detach(await attached(world, session))
        binds = len(world.box.binds)
        world.clock.now += jump
        for _ in range(3):
            session.detach(await attached(world, session))
            await looked_after(world, session)
            assert session._configuration.assembled_at == world.clock.now
        assert len(world.box.binds) == binds


async def test_a_session_that_left_memory_comes_back(jump: float) -> None:
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        world.clock.now += jump
        await looked_after(world)
        again = await world.ready()
        assert again.id == session.id
        assert state_of(again) == "ready"


async def test_warm_sandboxes_stay_and_are_claimed(jump: float) -> None:
    async with house(target=2) as here:
        await here.reaches(1, 1)
        before = set(here.world.engine.sandboxes)
        here.world.clock.now += jump
        here.pool.settings_changed()
        await here.reaches(1, 1)
        assert set(here.world.engine.sandboxes) == before
        assert await here.ready("ann") == "generic_warm"
        await here.reaches(1, 1)
