"""A session's life with a sandbox that behaves, and with one that does not."""

from __future__ import annotations

import asyncio
import socket

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.slots import home_key
from sandbox_agent.wire.messages import Attach
from tests.integration.session.rig import Client, counters, echo, engine_down, rig, until


async def test_a_created_session_becomes_ready_by_itself() -> None:
    async with rig() as world:
        session, created = await world.registry.create("ann", "main", None)
        assert created
        assert (session.state, session.view()["state"]) == ("starting", "starting")
        await until(lambda: session.state == "ready")
        assert world.registry.states() == {"ready": 1}
        await world.written("ready", slot=world.box.spec.slot)
        (timeline,) = session.timeline()
        assert timeline["outcome"] == "ready"
        assert {"assemble", "place", "start", "hello", "bind", "agent"} <= {s["stage"] for s in timeline["stages"]}
        assert world.gateway.slots[world.box.spec.slot][0] == {
            "user": "ann",
            "workspace": "main",
            "session": session.id,
            "agent": "demo",
            "team": "",
        }


async def test_fifty_creates_at_once_make_one_row_and_one_sandbox() -> None:
    async with rig() as world:
        found = await asyncio.gather(*(world.registry.create("ann", "main", None) for _ in range(50)))
        assert len({id(session) for session, _ in found}) == 1
        assert [created for _, created in found].count(True) == 1
        await asyncio.gather(*(session.wait_ready() for session, _ in found))
        assert len((await world.registry.list())[0]) == 1
        assert world.calls("create") == 1


async def test_clients_that_come_together_share_one_bringup() -> None:
    async with rig() as world:
        session = await world.session()
        clients = [Client() for _ in range(100)]
        for client in clients:
            session.attach(client)
        socks = await asyncio.gather(*(session.open_stream(client.attach) for client in clients))
        assert world.calls("create") == 1
        assert {attach.connection for attach in world.box.attached} <= {client.connection for client in clients}
        assert await echo(socks[0]) == b"hi"
        for sock in socks:
            sock.close()


async def test_each_user_and_workspace_has_a_sandbox_of_its_own() -> None:
    async with rig() as world:
        await asyncio.gather(world.ready("ann"), world.ready("bob"), world.ready("ann", "two"))
        assert len(world.engine.sandboxes) == 3
        assert sorted(world.slots.owners().values()) == sorted(
            home_key(*names) for names in (("ann", "main"), ("bob", "main"), ("ann", "two"))
        )


async def test_the_warm_path_touches_nothing() -> None:
    async with rig() as world:
        session = await world.ready()
        world.store.broken = world.driver.broken = True
        world.gateway.error = engine_down()
        await world.db.close()
        before = counters()
        for _ in range(3):
            client = Client()
            session.attach(client)
            sock = await session.open_stream(client.attach)
            assert await echo(sock) == b"hi"
            sock.close()
            session.detach(client)
            assert world.registry.held("ann", "main") is session
        assert counters() == before
        world.store.broken = world.driver.broken = False
        world.gateway.error = None


async def test_the_other_protocol_is_refused() -> None:
    async with rig() as world:
        session = await world.ready()
        with pytest.raises(CortexError) as caught:
            await session.open_stream(Attach(connection="c", protocol="raw"))
        assert caught.value.code is Code.WRONG_PROTOCOL


async def test_a_stop_puts_everything_away_and_the_next_client_starts_anew() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        await session.stop()
        assert session.state == "stopped"
        assert client.closed is not None
        assert client.closed[0] == Code.SESSION_STOPPED.close_code
        await world.assert_at_rest("ann")
        session.detach(client)
        again = Client()
        session.attach(again)
        (await session.open_stream(again.attach)).close()
        assert world.calls("create") == 2


async def test_a_stop_during_a_bringup() -> None:
    async with rig() as world:
        world.engine.script.hello = False
        session = await world.session()
        waiting = asyncio.gather(session.wait_ready(), session.wait_ready(), return_exceptions=True)
        await until(lambda: world.calls("start") == 1)
        await session.stop()
        assert [error.code for error in await waiting if isinstance(error, CortexError)] == [Code.SESSION_STOPPED] * 2
        assert session.timeline()[0]["outcome"] == "cancelled"
        await world.assert_at_rest("ann")
        world.engine.script.hello = True
        await session.wait_ready()


async def test_delete_erases_home_journal_and_row() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        await world.registry.delete("ann", "main")
        assert client.closed is not None
        await world.assert_at_rest()
        assert not world.slots.has_home(home_key("ann", "main"))
        assert world.registry.held("ann", "main") is None
        with pytest.raises(CortexError) as caught:
            await world.registry.load("ann", "main")
        assert caught.value.code is Code.NO_SESSION
        with pytest.raises(CortexError) as caught:
            await session.wait_ready()
        assert caught.value.code is Code.NO_SESSION


async def test_clients_that_come_during_a_delete_start_nothing() -> None:
    async with rig() as world:
        session = await world.ready()
        deleting = asyncio.gather(world.registry.delete("ann", "main"))
        late = []
        while not deleting.done():
            client = Client()
            session.attach(client)
            late.append(asyncio.ensure_future(session.open_stream(client.attach)))
            await asyncio.sleep(0)
            session.detach(client)
        await deleting
        # One that came while it was ready may still have got its stream; it ends with the sandbox.
        for found in await asyncio.gather(*late, return_exceptions=True):
            if isinstance(found, socket.socket):
                found.close()
            else:
                assert isinstance(found, CortexError)
        assert any(isinstance(task.exception(), CortexError) for task in late)
        await world.assert_at_rest()
        assert world.calls("create") == 1


async def test_a_session_whose_agent_is_gone_can_be_deleted() -> None:
    async with rig() as world:
        await (await world.registry.create("ann", "main", "other"))[0].wait_ready()
        await world.registry.held("ann", "main").stop()  # type: ignore[union-attr]
        await world.registry.close()
        world.tree["agents"] = {}
        world.configure({})
        world._make()
        with pytest.raises(CortexError) as caught:
            await world.registry.load("ann", "main")
        assert caught.value.code is Code.UNKNOWN_AGENT
        await world.registry.delete("ann", "main")
        assert (await world.registry.list())[0] == []


async def test_an_agent_taken_out_of_the_settings_ends_no_running_session() -> None:
    async with rig() as world:
        session, _ = await world.registry.create("ann", "main", "other")
        await session.wait_ready()
        world.tree["agents"] = {}
        world.configure({})
        world.registry.settings_reloaded()
        await until(lambda: bool(session.view()["warnings"]))
        assert session.state == "ready"
        assert session.view()["protocol"] == "acp"
        client = Client()
        session.attach(client)
        (await session.open_stream(client.attach)).close()


async def test_erasing_a_user_leaves_the_others() -> None:
    async with rig() as world:
        await asyncio.gather(world.ready("ann"), world.ready("ann", "two"), world.ready("bob"))
        assert await world.registry.erase_user("ann") == 2
        assert [view["user"] for view in (await world.registry.list())[0]] == ["bob"]
        assert len(world.engine.sandboxes) == 1


async def test_names_and_agents_are_checked() -> None:
    async with rig() as world:
        for user, workspace, agent, code in (
            ("..", "main", None, Code.BAD_USER_ID),
            ("ann", "a/b", None, Code.BAD_USER_ID),
            ("ann", "main", "nope", Code.UNKNOWN_AGENT),
        ):
            with pytest.raises(CortexError) as caught:
                await world.registry.create(user, workspace, agent)
            assert caught.value.code is code
            assert caught.value.hint
        await world.session()
        with pytest.raises(CortexError) as caught:
            await world.registry.create("ann", "main", "other")
        assert caught.value.code is Code.SESSION_CONFLICT


async def test_clients_are_bounded() -> None:
    async with rig(front={"max_clients_per_session": 2}) as world:
        session = await world.ready()
        session.attach(Client())
        session.attach(Client())
        with pytest.raises(CortexError) as caught:
            session.attach(Client())
        assert caught.value.code is Code.SESSION_BUSY


async def test_a_sandbox_that_dies_is_replaced_for_the_next_client() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        await world.engine.end(world.box.ref, 137)
        await until(lambda: session.state == "stopped")
        assert client.closed is not None
        assert client.closed[0] == Code.SANDBOX_DIED.close_code
        assert "connect again" in client.closed[1]
        assert "137" in session.view()["reason"]
        await world.assert_at_rest("ann")
        await session.wait_ready()
        assert world.box.spec.incarnation == 2


async def test_a_sandbox_whose_link_is_lost_is_replaced() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        session.on_lost(session._custody.box, "it flooded")  # type: ignore[arg-type]
        await until(lambda: session.state == "stopped")
        assert "it flooded" in session.view()["reason"]
        assert client.closed is not None
        await world.assert_at_rest("ann")


async def test_an_agent_that_fails_later_ends_the_session_with_its_code() -> None:
    async with rig() as world:
        session = await world.ready()
        client = Client()
        session.attach(client)
        world.box.agent = "failed"
        box = session._custody.box
        assert box is not None
        await box.link.probe()
        await until(lambda: session.state == "stopped")
        assert client.closed is not None
        assert client.closed[1].startswith("agent.failed")


async def test_a_flood_of_bad_news_does_not_fill_the_mailbox() -> None:
    async with rig(session={"bind_timeout_s": 1}) as world:
        session = await world.ready()
        box = session._custody.box
        assert box is not None
        world.box.script.bind_hangs = True
        changing = asyncio.gather(world.put("env", {"A": "1"}))
        await until(lambda: len(world.box.binds) == 2)
        world.box.agent = "failed"
        for _ in range(200):
            await box.link.probe()
        await session.stop()
        await changing
        await world.assert_at_rest("ann")


async def test_a_sandbox_without_streams_is_not_kept_as_ready() -> None:
    async with rig() as world:
        world.engine.script.stream_hangs = True
        session = await world.ready()
        client = Client()
        session.attach(client)
        box = session._custody.box
        assert box is not None
        session._without_streams(box)
        await until(lambda: session.state == "stopped")
        assert "no stream" in session.view()["reason"]
        await world.assert_at_rest("ann")


async def test_a_stopped_session_leaves_memory_after_a_while_and_comes_back() -> None:
    async with rig() as world:
        session = await world.ready()
        await session.stop()
        await world.registry._look()
        assert world.registry.held("ann", "main") is session
        world.clock.now += world.config.session.unload_after_s + 1
        await world.registry._look()
        assert world.registry.held("ann", "main") is None
        assert len(session._tasks) == 0
        views, _ = await world.registry.list()
        assert [view["state"] for view in views] == ["stopped"]
        again = await world.registry.load("ann", "main")
        assert again.id == session.id
        with pytest.raises(CortexError):
            await session.stop()


async def test_what_is_ready_or_attached_stays_in_memory() -> None:
    async with rig() as world:
        ready = await world.ready()
        attached = await world.session("bob")
        await attached.stop()
        attached._clients.add(Client())
        world.clock.now += 10 * world.config.session.unload_after_s
        await world.registry._look()
        assert world.registry.held("ann", "main") is ready
        assert world.registry.held("bob", "main") is attached


async def test_a_crash_is_contained_in_its_session() -> None:
    async with rig() as world:
        session, other = await world.ready(), await world.ready("bob")
        client = Client()
        session.attach(client)

        async def crash() -> None:
            raise ZeroDivisionError("a bug")

        with pytest.raises(CortexError) as caught:
            await session._mailbox.ask(crash)
        assert caught.value.code is Code.INTERNAL
        await until(lambda: session.state == "failed")
        assert client.closed is not None
        assert client.closed[1].startswith("broker.internal")
        assert other.state == "ready"
        await session.wait_ready()
        assert world.calls("create") == 3


async def test_whoever_waits_for_an_answer_is_told_when_the_session_leaves_memory() -> None:
    async with rig() as world:
        world.engine.script.hello = False
        session = await world.session()
        gate = asyncio.Event()
        asked = [asyncio.ensure_future(session._mailbox.ask(gate.wait)) for _ in range(3)]
        waiting = asyncio.ensure_future(session.wait_ready())
        await until(lambda: world.calls("start") == 1)
        await world.registry.close()
        for task in (*asked, waiting):
            with pytest.raises(CortexError):
                await asyncio.wait_for(task, 5)
