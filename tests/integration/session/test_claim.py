"""Claims: a warm sandbox becomes a session's once, with the home in its slot, or is put away for a cold start."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.fake import FakeSandbox
from broker.sandbox.slots import home_key
from broker.session import claim
from broker.session.sandbox import Sandbox
from tests.integration.session.rig import Client, Rig, echo, engine_down, rig, until

ANN = home_key("ann", "main")


def inside(world: Rig, box: Sandbox) -> FakeSandbox:
    return world.engine.sandboxes[box.ref]


def path(world: Rig) -> str:
    session = world.registry.held("ann", "main")
    assert session is not None
    return str(session.timeline()[0]["path"])


async def test_a_warm_sandbox_is_nobodys() -> None:
    async with rig() as world:
        box = await world.warm()
        fake = inside(world, box)
        assert fake.welcome is not None
        assert fake.welcome.session == ""
        assert "claim" not in fake.applied
        assert box.link.journal is None
        assert world.gateway.slots[box.slot.id][0] is None
        assert world.slots.owner(box.slot.id) is None
        (row,) = await world.rows.sandboxes()
        assert (row.role, row.user, row.agent, row.welcomed) == ("warm", "", "demo", True)


async def test_a_new_users_session_is_a_claim_whose_blank_home_becomes_theirs() -> None:
    async with rig() as world:
        box = await world.warm()
        created = world.calls("create")
        session = await world.ready()
        assert path(world) == "generic_warm"
        assert world.calls("create") == created
        assert world.slots.owner(box.slot.id) == ANN
        bind = inside(world, box).binds[-1]
        assert bind.parts["claim"] == {"session": session.id, "moved": False, "restart": False, "keep_ahead": True}
        identity, _, _ = world.gateway.slots[box.slot.id]
        mine = {"user": "ann", "workspace": "main", "session": session.id}
        assert identity == {**mine, "agent": session.agent, "team": ""}
        (row,) = await world.rows.sandboxes()
        assert (row.role, row.user) == ("session", "ann")
        assert box.link.journal is not None
        assert not await world.rows.sandbox_claim(box.slot.id, box.incarnation, "bob", "main")
        assert await world.rows.sandboxes() == [row]
        client = Client()
        session.attach(client)
        stream = await session.open_stream(client.attach)
        assert await echo(stream) == b"hi"
        stream.close()
        await session.stop()
        await world.assert_at_rest("ann")


async def test_a_returning_users_home_is_moved_in_and_out_again() -> None:
    async with rig() as world:
        session = await world.ready()
        (slot,) = world.slots.ids()
        found = world.slots.get(slot)
        assert found is not None
        (found.home_dir / "mine").write_text("kept")
        await session.stop()
        box = await world.warm()
        await session.wait_ready()
        assert path(world) == "generic_warm"
        assert (box.slot.home_dir / "mine").read_text() == "kept"
        assert inside(world, box).binds[-1].parts["claim"]["moved"] is True
        await session.stop()
        await world.assert_at_rest("ann")


async def test_an_agent_that_does_not_bear_a_new_home_is_started_anew_for_who_has_one() -> None:
    agents = {"picky": {"command": ["picky"], "prewarm": "server", "open_ahead": "new"}}
    async with rig(agents=agents, session={"default_agent": "picky"}) as world:
        session = await world.ready()
        await session.stop()
        box = await world.warm("picky")
        await session.wait_ready()
        claim = inside(world, box).binds[-1].parts["claim"]
        assert (claim["restart"], claim["keep_ahead"]) == (True, False)
        other = await world.warm("picky")
        await world.ready("bob")
        claim = inside(world, other).binds[-1].parts["claim"]
        assert (claim["restart"], claim["keep_ahead"]) == (False, True)


async def test_only_what_differs_from_the_defaults_is_sent() -> None:
    async with rig() as world:
        await world.users.put_section("ann", "mcp", {"mcpServers": {"one": {"command": "one"}}})
        box = await world.warm()
        await world.ready()
        assert inside(world, box).binds[-1].parts.keys() == {"claim", "mcp"}


async def test_a_paused_one_is_resumed() -> None:
    async with rig() as world:
        box = await world.warm()
        await box.pause()
        await world.ready()
        assert path(world) == "generic_warm"
        assert inside(world, box).liveness == "running"
        assert not box.paused


async def test_one_made_with_other_limits_is_not_taken() -> None:
    async with rig() as world:
        await world.warm()
        await world.users.put_section("ann", "limits", {"memory_bytes": 2**28})
        await world.ready()
        assert path(world) == "cold"
        assert len(world.pool.boxes) == 1
        assert world.pool.cold == 1


@pytest.mark.parametrize("warm", [False, True])
async def test_limits_that_were_changed_while_it_was_stopped_hold_at_once(warm: bool) -> None:
    """What is cached says otherwise; a sandbox that was made with it is not what the user gets."""
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        await world.put("limits", {"memory_bytes": 2**28})
        if warm:
            await world.warm()
        await session.wait_ready()
        assert path(world) == "cold"
        assert [box.spec.memory_bytes for box in world.engine.sandboxes.values()] == [2**28]
        assert len(world.slots.ids()) == 1
        await session.stop()
        await world.assert_at_rest("ann")


def dies(world: Rig, box: Sandbox) -> None:
    inside(world, box).script.die_at_claim = True


def refuses(world: Rig, box: Sandbox) -> None:
    inside(world, box).script.bind_error = "config.invalid"


def claimed_before(world: Rig, box: Sandbox) -> None:
    async def gone(*args: object) -> bool:
        return False

    world.store.inner.sandbox_claim = gone


def no_space_for_the_home(world: Rig, box: Sandbox) -> None:
    move = world.slots.adopt_home

    def full(slot: str, key: str) -> bool:
        if slot == box.slot.id:
            raise CortexError(Code.DISK_FULL, "no space", hint="make room")
        return move(slot, key)

    world.slots.adopt_home = full  # type: ignore[method-assign]


def lost(world: Rig, box: Sandbox) -> None:
    box.lost = "hung up"


@pytest.mark.parametrize("trouble", [dies, refuses, claimed_before, no_space_for_the_home, lost])
@pytest.mark.parametrize("returning", [False, True])
async def test_a_claim_that_fails_is_undone_and_the_user_gets_a_cold_start(trouble: object, returning: bool) -> None:
    async with rig() as world:
        if returning:
            session = await world.ready()
            await session.stop()
        box = await world.warm()
        # Each fake has the engine's script; the next one is to be sound.
        fake = inside(world, box)
        fake.script = type(fake.script)()
        trouble(world, box)  # type: ignore[operator]
        session = await world.ready()
        assert path(world) == "cold"
        assert box.ref not in world.engine.sandboxes
        assert world.slots.get(box.slot.id) is None
        assert [row.user for row in await world.rows.sandboxes()] == ["ann"]
        await session.stop()
        await world.assert_at_rest("ann")


async def test_a_failed_claim_that_cannot_be_put_away_keeps_the_home_and_starts_nothing_beside() -> None:
    async with rig() as world:
        box = await world.warm()
        fake = inside(world, box)
        fake.script = type(fake.script)(bind_error="config.invalid")
        session = await world.session()
        world.engine.error = engine_down()
        with pytest.raises(CortexError):
            await session.wait_ready()
        assert world.slots.owner(box.slot.id) in (ANN, None)
        assert len(world.engine.sandboxes) == 1
        world.engine.error = None
        await session.stop()
        await world.assert_at_rest("ann")


async def test_a_claim_is_not_given_up_for_what_a_cold_start_would_wait_for_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig() as world:
        await world.warm()
        limit = 0.3
        monkeypatch.setattr(claim, "TAKE_OVER_S", limit)
        resolve, loop = world.shelf.resolve, asyncio.get_running_loop()

        async def slow(*args: Any, **kwargs: Any) -> Any:
            over = asyncio.Event()
            loop.call_later(2 * limit, over.set)
            await over.wait()
            return await resolve(*args, **kwargs)

        monkeypatch.setattr(world.shelf, "resolve", slow)
        await world.ready()
        assert path(world) == "generic_warm"


async def test_a_claim_whose_steps_hang_is_given_up_for_a_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as world:
        box = await world.warm()
        monkeypatch.setattr(claim, "TAKE_OVER_S", 0.05)

        async def hangs() -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(box, "resume", hangs)
        await world.ready()
        assert path(world) == "cold"


async def test_warm_sandboxes_outlive_the_broker_and_are_claimed_by_the_next() -> None:
    async with rig() as world:
        box = await world.warm()
        await box.pause()
        outcome = await world.restart()
        assert outcome.failed == {}
        (again,) = world.pool.boxes
        assert again.slot.id == box.slot.id
        await world.ready()
        assert path(world) == "generic_warm"


async def test_one_that_was_made_otherwise_does_not_outlive_the_broker() -> None:
    async with rig() as world:
        await world.warm()
        world.configure({"defaults": {"limits": {"memory_bytes": 2**28}}})
        outcome = await world.restart()
        assert len(outcome.failed) == 1
        assert world.engine.sandboxes == {}
        assert world.slots.ids() == []


async def test_a_broker_that_was_killed_before_the_bind_tells_the_agent_server_later() -> None:
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        box = await world.warm()
        assert await world.rows.sandbox_claim(box.slot.id, box.incarnation, "ann", "main")
        world.slots.adopt_home(box.slot.id, ANN)
        outcome = await world.restart()
        assert outcome.failed == {}
        held = world.registry.held("ann", "main")
        assert held is not None
        await held.wait_ready()
        claim = world.box.binds[-1].parts["claim"]
        assert (claim["session"], claim["moved"]) == (held.id, True)
        await held.stop()
        await world.assert_at_rest("ann")


@pytest.mark.parametrize("renames", range(6))
async def test_a_broker_that_was_killed_between_two_renames_loses_no_home(
    renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig() as world:
        session = await world.ready()
        (slot,) = world.slots.ids()
        found = world.slots.get(slot)
        assert found is not None
        (found.home_dir / "mine").write_text("kept")
        await session.stop()
        box = await world.warm()
        assert await world.rows.sandbox_claim(box.slot.id, box.incarnation, "ann", "main")
        left, rename = renames, os.rename

        def count(*args: object, **kwargs: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            rename(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "rename", count)
        try:
            world.slots.adopt_home(box.slot.id, ANN)
        except KeyboardInterrupt:
            done = False
        else:
            done = True
        monkeypatch.undo()
        world.pool.boxes.clear()
        await box.let_go()
        outcome = await world.restart()
        assert outcome.failed == {}
        assert outcome.quarantined == []
        assert len(outcome.adopted) == done
        again = await world.ready()
        (slot,) = world.slots.ids()
        kept = world.slots.get(slot)
        assert kept is not None
        assert (kept.home_dir / "mine").read_text() == "kept"
        await again.stop()
        await world.assert_at_rest("ann")


async def test_a_crowd_on_few_warm_ones() -> None:
    async with rig() as world:
        warm = {(await world.warm()).slot.id for _ in range(10)}
        users = [f"u{number}" for number in range(50)]
        sessions = await asyncio.gather(*(world.ready(user) for user in users))
        paths = [session.timeline()[0]["path"] for session in sessions]
        assert paths.count("generic_warm") == 10
        assert paths.count("cold") == 40
        slots = [session.view()["sandbox"]["slot"] for session in sessions]
        assert len(set(slots)) == 50
        assert warm <= set(slots)


async def test_a_session_that_is_stopped_while_it_is_claimed_keeps_nothing() -> None:
    async with rig() as world:
        box = await world.warm()
        fake = inside(world, box)
        fake.script = type(fake.script)(bind_hangs=True)
        session = await world.session()
        await until(lambda: world.slots.owner(box.slot.id) == ANN)
        await session.stop()
        await world.assert_at_rest("ann")
