"""The broker ends, another one starts: what ran goes on, what cannot is put away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.slots import home_key
from broker.session.session import Session
from broker.store.sessions import SessionRow
from tests.integration.session.rig import Client, Rig, echo, engine_down, rig, until


async def test_a_sandbox_outlives_the_broker_and_is_taken_over() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        before = world.box
        await world.registry.close()
        assert len(session._tasks) == 0
        assert before.liveness == "running"
        assert client.closed is None
        outcome = await world.restart()
        assert (len(outcome.adopted), outcome.failed) == (1, {})
        again = world.registry.held("ann", "main")
        assert again is not None
        assert again.id == session.id
        await again.wait_ready()
        assert world.box is before
        assert (world.calls("create"), world.calls("start")) == (1, 1)
        assert len(before.binds) == 1
        assert world.gateway.slots[before.spec.slot][0] == {
            "user": "ann", "workspace": "main", "session": session.id, "agent": "demo", "team": "",
        }  # fmt: skip
        (timeline,) = again.timeline()
        assert (timeline["path"], timeline["outcome"]) == ("adopted", "ready")
        back = Client()
        again.attach(back)
        sock = await again.open_stream(back.attach)
        assert await echo(sock) == b"hi"
        sock.close()
        await world.put("env", {"A": "1"})
        assert world.box.binds[-1].parts["process"]["env"]["A"] == "1"
        await again.stop()
        await world.assert_at_rest("ann")


async def test_what_changed_meanwhile_is_bound_when_it_is_taken_over() -> None:
    async with rig() as world:
        await world.ready()
        await world.registry.close()
        await world.users.put_section("ann", "mcp", {"mcpServers": {"fs": {"command": "/bin/fs"}}})
        await world.restart()
        await world.registry.held("ann", "main").wait_ready()  # type: ignore[union-attr]
        assert set(world.box.binds[-1].parts) == {"mcp"}


async def test_the_end_of_an_adopted_sandbox_is_noticed() -> None:
    async with rig() as world:
        await world.ready()
        await world.restart()
        session = world.registry.held("ann", "main")
        assert session is not None
        await session.wait_ready()
        await world.engine.end(world.box.ref, 1)
        await until(lambda: session.state == "stopped")
        await world.assert_at_rest("ann")


async def test_an_adopted_sandbox_that_never_redials_is_put_away() -> None:
    async with rig(sandbox={"hello_timeout_s": 0.3}) as world:
        await world.ready()
        world.box.script.hello = False
        await world.restart()
        session = world.registry.held("ann", "main")
        assert session is not None
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is Code.BRINGUP_TIMEOUT
        await until(lambda: session.state == "failed" and session._mailbox.idle)
        await world.assert_at_rest("ann")
        world.engine.script = type(world.engine.script)()
        await session.wait_ready()


async def test_an_adopted_sandbox_whose_agent_is_never_ready_has_a_deadline() -> None:
    async with rig(session={"bringup_timeout_s": 1}) as world:
        await world.ready()
        world.box.agent = "starting"
        await world.restart()
        session = world.registry.held("ann", "main")
        assert session is not None
        with pytest.raises(CortexError, match="'agent'"):
            await session.wait_ready()


async def test_a_sandbox_that_nobody_can_take_over_is_put_away() -> None:
    async with rig() as world:
        session, _ = await world.registry.create("ann", "main", "other")
        await session.wait_ready()
        bob = await world.ready("bob")
        world.tree["agents"] = {}
        world.configure({})
        outcome = await world.restart()
        assert len(outcome.failed) == 1
        assert "no longer configured" in next(iter(outcome.failed.values()))
        assert world.registry.held("ann", "main") is None
        assert world.slots.has_home(home_key("ann", "main"))
        assert [row.user for row in await world.rows.sandboxes()] == ["bob"]
        again = world.registry.held("bob", "main")
        assert again is not None
        await again.wait_ready()
        assert again.id == bob.id
        assert len(world.engine.sandboxes) == 1


async def never_ready(world: Rig) -> Session:
    """One that serves, of which the store does not hear."""
    save = world.rows.save

    async def slow(row: SessionRow) -> None:
        if row.state == "ready":
            await asyncio.Event().wait()
        await save(row)

    world.store.inner.save = slow
    return await world.ready()


async def full(row: SessionRow) -> None:
    raise CortexError(Code.DISK_FULL, "full", hint="free space")


@pytest.mark.parametrize("before", ["stopping", "failed", "ready"])
async def test_what_came_up_is_taken_over_whatever_the_row_said_before(before: str) -> None:
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        row = await world.rows.get("ann", "main")
        assert row is not None
        await world.rows.save(replace(row, state=before))
        await world.restart()
        await never_ready(world)
        sandbox = world.box
        assert (await world.restart()).failed == {}
        again = world.registry.held("ann", "main")
        assert again is not None
        await again.wait_ready()
        assert world.box is sandbox


async def test_what_came_up_is_taken_over_though_the_end_before_was_not_written_to_its_last() -> None:
    async with rig() as world:
        session = await world.ready()
        save = world.rows.save

        async def until_full(row: SessionRow) -> None:
            await save(row)
            world.store.inner.save = full

        world.store.inner.save = until_full
        await session.stop()
        row = await world.rows.get("ann", "main")
        assert row is not None
        assert row.state == "stopping"
        world.store.inner.save = save
        await never_ready(world)
        sandbox = world.box
        assert (await world.restart()).failed == {}
        assert world.box is sandbox


async def test_a_sandbox_of_a_session_that_was_erased_is_put_away() -> None:
    async with rig() as world:
        await world.ready()
        await world.rows.delete("ann", "main")
        outcome = await world.restart()
        assert len(outcome.failed) == 1
        await world.assert_at_rest("ann")


async def test_a_broker_that_ends_during_a_bringup_leaves_nothing_that_stays() -> None:
    async with rig() as world:
        world.engine.script.hello = False
        session = await world.session()
        await until(lambda: world.calls("start") == 1)
        await world.restart()
        assert world.registry.held("ann", "main") is None
        await world.assert_at_rest("ann")
        world.engine.script.hello = True
        assert (await world.ready()).id == session.id


async def test_what_could_not_be_put_away_is_mended_by_the_next_broker() -> None:
    async with rig() as world:
        session = await world.ready()
        ref = world.box.ref
        world.engine.error = engine_down()
        with pytest.raises(CortexError):
            await session.stop()
        world.engine.error = None
        await until(lambda: world.box.liveness == "exited")
        outcome = await world.restart()
        assert outcome.removed == [ref]
        await world.assert_at_rest("ann")
        await world.ready()


async def test_a_stored_session_that_does_not_run_says_so() -> None:
    async with rig() as world:
        await world.ready()
        await world.registry.close()
        await world.engine.close()
        await world.restart()
        views, _ = await world.registry.list()
        assert [(view["state"], view["clients"]) for view in views] == [("stopped", 0)]


async def test_closing_twice_is_harmless() -> None:
    async with rig() as world:
        session = await world.ready()
        await world.registry.close()
        await session.close()
        await world.registry.close()
        assert world.box.liveness == "running"
