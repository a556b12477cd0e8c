"""Bring-ups and ends that fail: a clear error, everything put away, and another try that works."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.driver import SandboxSpec
from broker.sandbox.fake import FakeSandbox
from broker.sandbox.slots import home_key
from broker.session.session import Session
from broker.store.sessions import SessionRow
from tests import host
from tests.integration.session.rig import Client, Rig, engine_down, rig, until

SHORT: dict[str, Any] = {"sandbox": {"hello_timeout_s": 0.3}, "session": {"bringup_timeout_s": 2}}


def image_missing() -> CortexError:
    return CortexError(Code.IMAGE_MISSING, "no image", hint="make image")


def engine_fails_at_start(world: Rig) -> None:
    world.engine.script.start_error = engine_down()


def engine_fails_at_create(world: Rig) -> None:
    world.engine.script.create_error = image_missing()


def never_calls(world: Rig) -> None:
    world.engine.script.hello = False


def talks_garbage(world: Rig) -> None:
    world.engine.script.garbage = b"\x00\x00\x00\x05hello"


def dies_after_hello(world: Rig) -> None:
    world.engine.script.die_after_hello = 3


def agent_missing(world: Rig) -> None:
    world.engine.script.agent_fails = "agent.not_in_image"


def agent_fails(world: Rig) -> None:
    world.engine.script.agent_fails = "agent.failed"


def bind_refused(world: Rig) -> None:
    world.engine.script.bind_error = "config.invalid_section"


def bind_unanswered(world: Rig) -> None:
    world.engine.script.bind_hangs = True
    world.configure({"session": {"bind_timeout_s": 0.3}})


def gateway_down(world: Rig) -> None:
    world.gateway.error = CortexError(Code.GATEWAY_DOWN, "down", hint="look at its log")


def disk_full() -> CortexError:
    return CortexError(Code.DISK_FULL, "full", hint="free space")


def row_refused(world: Rig) -> None:
    async def full(row: object) -> None:
        raise disk_full()

    world.store.inner.sandbox_save = full


FAILURES: list[tuple[Callable[[Rig], None], Code]] = [
    (engine_fails_at_start, Code.ENGINE_DOWN),
    (engine_fails_at_create, Code.IMAGE_MISSING),
    (never_calls, Code.BRINGUP_TIMEOUT),
    (talks_garbage, Code.BRINGUP_TIMEOUT),
    (dies_after_hello, Code.SANDBOX_DIED),
    (agent_missing, Code.AGENT_MISSING),
    (agent_fails, Code.AGENT_FAILED),
    (bind_refused, Code.BAD_SECTION),
    (bind_unanswered, Code.BRINGUP_TIMEOUT),
    (gateway_down, Code.GATEWAY_DOWN),
    (row_refused, Code.DISK_FULL),
]


@pytest.mark.parametrize(("spoil", "code"), FAILURES, ids=[spoil.__name__ for spoil, _ in FAILURES])
async def test_a_failed_bringup_says_why_leaves_nothing_and_can_be_tried_again(
    spoil: Callable[[Rig], None], code: Code
) -> None:
    async with rig(**SHORT) as world:
        spoil(world)
        session = await world.session()
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is code
        assert caught.value.hint
        await failed(world, session)
        assert code.slug in session.view()["reason"]
        assert session.timeline()[0]["outcome"] == code.slug
        mend(world)
        client = Client()
        session.attach(client)
        (await session.open_stream(client.attach)).close()
        assert session.view()["reason"] == ""
        assert client.closed is None


async def failed(world: Rig, session: Session) -> None:
    await until(lambda: session.state == "failed" and session._mailbox.idle)
    if world.gateway.error is not None:
        world.gateway.slots.clear()
    await world.assert_at_rest("ann")
    assert [task.get_name() for task in session._tasks._tasks] == [f"session.{session.id}.actor"]


def mend(world: Rig) -> None:
    world.engine.script = type(world.engine.script)()
    world.engine.error = None
    world.gateway.error = None
    world.store.inner.__dict__.pop("sandbox_save", None)


async def test_a_sandbox_that_ends_before_hello_is_noticed_at_once_with_its_last_words() -> None:
    async with rig() as world:
        never_calls(world)
        session = await world.session()
        waiting = asyncio.ensure_future(session.wait_ready())
        await until(lambda: bool(world.engine.sandboxes) and world.box.tasks is not None)
        await world.engine.end(world.box.ref, 42)
        with pytest.raises(CortexError, match="ended with code 42 before its agent server said hello"):
            await waiting
        await failed(world, session)


async def test_a_sandbox_that_ends_while_its_agent_starts_is_noticed_at_once() -> None:
    async with rig() as world:

        class Mute(FakeSandbox):
            """Its agent is never ready."""

            agent = property(lambda self: "starting", lambda self, value: None)

        create = world.driver.inner.create

        async def mute(spec: SandboxSpec) -> str:
            ref: str = await create(spec)
            world.engine.sandboxes[ref].__class__ = Mute
            return ref

        world.driver.inner.create = mute
        session = await world.session()
        waiting = asyncio.ensure_future(session.wait_ready())
        await until(lambda: bool(world.engine.sandboxes) and len(world.box.binds) == 1)
        await world.engine.end(world.box.ref, 9)
        with pytest.raises(CortexError) as caught:
            await asyncio.wait_for(waiting, 3)
        assert caught.value.code is Code.SANDBOX_DIED
        await failed(world, session)


async def test_a_bringup_that_takes_too_long_ends_in_an_error_that_names_the_stage() -> None:
    async with rig(session={"bringup_timeout_s": 0.5}, sandbox={"hello_timeout_s": 30}) as world:
        never_calls(world)
        session = await world.session()
        with pytest.raises(CortexError, match="'hello'") as caught:
            await session.wait_ready()
        assert caught.value.code is Code.BRINGUP_TIMEOUT
        await failed(world, session)


async def test_an_engine_that_hangs_holds_nobody_longer_than_the_deadline() -> None:
    async with rig(session={"bringup_timeout_s": 0.4}) as world:
        made = asyncio.Event()
        create = world.driver.inner.create

        async def hang(spec: SandboxSpec) -> str:
            # The engine makes one and never tells.
            await create(spec)
            made.set()
            return str(await asyncio.Event().wait())

        world.driver.inner.create = hang
        session = await world.session()
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is Code.BRINGUP_TIMEOUT
        assert made.is_set()
        await failed(world, session)
        world.driver.inner.create = create
        await session.wait_ready()


async def test_a_stop_half_way_inside_create_leaves_no_sandbox() -> None:
    async with rig() as world:
        made = asyncio.Event()
        create = world.driver.inner.create

        async def hang(spec: SandboxSpec) -> str:
            await create(spec)
            made.set()
            return str(await asyncio.Event().wait())

        world.driver.inner.create = hang
        session = await world.session()
        await made.wait()
        await session.stop()
        assert session.state == "stopped"
        await world.assert_at_rest("ann")


async def test_slot_and_home_come_back_when_the_sockets_cannot_be_made() -> None:
    async with rig() as world:
        await (await world.ready()).stop()
        key = home_key("ann", "main")
        journal = world.base / "homes" / key / "journal"
        for path in journal.iterdir():
            path.unlink()
        journal.rmdir()
        journal.symlink_to("nowhere/at/all")
        session = await world.session()
        with pytest.raises(CortexError):
            await session.wait_ready()
        await failed(world, session)
        journal.unlink()
        await session.wait_ready()


async def test_an_engine_that_is_down_at_the_end_loses_no_home_and_wedges_nothing() -> None:
    async with rig() as world:
        session = await world.ready()
        (world.slots.get(world.box.spec.slot).home_dir / "work").write_text("dear")  # type: ignore[union-attr]
        world.engine.error = engine_down()
        with pytest.raises(CortexError) as caught:
            await session.stop()
        assert caught.value.code is Code.ENGINE_DOWN
        assert session.state == "failed"
        assert "could not be put away" in session.view()["reason"]
        assert world.slots.owner(world.box.spec.slot) == home_key("ann", "main")
        assert world.gateway.slots == {}
        world.clock.now += 10 * world.config.session.unload_after_s
        await world.registry._look()
        assert world.registry.held("ann", "main") is session
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is Code.ENGINE_DOWN
        world.engine.error = None
        await session.wait_ready()
        home = world.slots.get(world.box.spec.slot).home_dir  # type: ignore[union-attr]
        assert (home / "work").read_text() == "dear"
        assert len(world.engine.sandboxes) == 1


async def test_what_is_left_over_is_put_away_by_itself_when_the_engine_is_back() -> None:
    async with rig() as world:
        session = await world.ready()
        world.engine.error = engine_down()
        with pytest.raises(CortexError):
            await session.stop()
        await world.registry._look()
        await until(lambda: session._mailbox.idle)
        assert len(world.engine.sandboxes) == 1
        world.engine.error = None
        await world.registry._look()
        await until(lambda: session.idle)
        await world.assert_at_rest("ann")


async def test_a_delete_while_the_engine_is_down_is_refused_and_works_later() -> None:
    async with rig() as world:
        await world.ready()
        world.engine.error = engine_down()
        with pytest.raises(CortexError) as caught:
            await world.registry.delete("ann", "main")
        assert caught.value.code is Code.ENGINE_DOWN
        assert (await world.registry.list())[0]
        world.engine.error = None
        await world.registry.delete("ann", "main")
        assert not world.slots.has_home(home_key("ann", "main"))
        assert (await world.registry.list())[0] == []
        await world.assert_at_rest()


async def test_a_bug_while_putting_away_does_not_end_the_actor() -> None:
    async with rig() as world:
        session = await world.ready()
        stop = world.driver.inner.stop

        async def bug(ref: str, grace_s: float) -> None:
            raise KeyError(ref)

        world.driver.inner.stop = bug
        with pytest.raises(CortexError) as caught:
            await session.stop()
        assert caught.value.code is Code.INTERNAL
        world.driver.inner.stop = stop
        await session.wait_ready()
        assert len(world.engine.sandboxes) == 1


async def test_a_bug_in_a_bringup_is_an_error_and_not_a_session_that_starts_for_ever() -> None:
    async with rig() as world:

        async def bug(spec: SandboxSpec) -> str:
            raise KeyError("bug")

        create, world.driver.inner.create = world.driver.inner.create, bug
        session = await world.session()
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is Code.INTERNAL
        await failed(world, session)
        world.driver.inner.create = create
        await session.wait_ready()


async def test_one_failing_session_is_nobody_elses_business() -> None:
    async with rig(**SHORT) as world:
        good = await world.ready("bob")
        never_calls(world)
        bad = await world.session("ann")
        client = Client()
        good.attach(client)
        (await good.open_stream(client.attach)).close()
        with pytest.raises(CortexError):
            await bad.wait_ready()
        assert good.state == "ready"
        assert client.closed is None


async def test_a_create_that_is_cancelled_and_refused_leaves_no_session_without_a_row() -> None:
    async with rig() as world:
        save, asked, refuse = world.rows.save, asyncio.Event(), asyncio.Event()

        async def refused(row: SessionRow) -> None:
            world.store.inner.save = save
            asked.set()
            await refuse.wait()
            raise disk_full()

        world.store.inner.save = refused
        first = asyncio.ensure_future(world.registry.create("ann", "main", None))
        await asked.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(world.registry.create("ann", "main", None))
        await asyncio.sleep(0)
        refuse.set()
        session, created = await second
        assert created
        row = await world.rows.get("ann", "main")
        assert row is not None
        assert row.id == session.id
        await session.wait_ready()


async def test_a_session_whose_create_was_refused_and_could_not_be_undone_is_acknowledged_only_with_a_row() -> None:
    async with rig() as world:
        save, delete = world.rows.save, world.rows.sandbox_delete

        async def refused(row: SessionRow) -> None:
            # There is something to put away by then.
            await until(lambda: world.calls("create") > 0)
            raise disk_full()

        async def kept(slot: str) -> None:
            raise disk_full()

        world.store.inner.save, world.store.inner.sandbox_delete = refused, kept
        for _ in range(2):
            with pytest.raises(CortexError) as caught:
                await world.registry.create("ann", "main", None)
            assert caught.value.code is Code.DISK_FULL
            assert world.registry.held("ann", "main") is not None
        with pytest.raises(CortexError) as caught:
            await world.registry.load("ann", "main")
        assert caught.value.code is Code.DISK_FULL
        world.store.inner.save, world.store.inner.sandbox_delete = save, delete
        session, created = await world.registry.create("ann", "main", None)
        assert created
        assert await world.rows.get("ann", "main") is not None
        await session.wait_ready()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="ctx-small-", dir="/tmp"))
    try:
        with host.small_disk(base, "2m", "nr_inodes=200", "mode=700"):
            yield base
    finally:
        base.rmdir()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


async def test_a_full_disk_is_an_error_with_a_hint_and_ends_nothing_that_runs(small_disk: Path) -> None:
    world = Rig(small_disk, {})
    await world.open()
    try:
        running = await world.ready("bob")
        waiting = await world.ready("ann")
        await waiting.stop()
        full = small_disk / "filler"
        with pytest.raises(OSError, match="No space"):
            fill(full)
        with pytest.raises(CortexError) as caught:
            await (await world.session("ann")).wait_ready()
        assert caught.value.code is Code.DISK_FULL
        assert "free space" in caught.value.hint
        with pytest.raises(CortexError) as refused:
            await world.session("cid")
        assert refused.value.code is Code.DISK_FULL
        assert running.state == "ready"
        client = Client()
        running.attach(client)
        (await running.open_stream(client.attach)).close()
        full.unlink()
        await waiting.wait_ready()
        _, created = await world.registry.create("cid", "main", None)
        assert created
        await world.registry.delete("cid", "main")
        assert len(world.slots.ids()) == 2
    finally:
        await world.close()
