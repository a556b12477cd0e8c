"""Sessions that nobody uses: paused, stopped, woken.

With the default settings: paused after 60 s, or 900 s with clients; kept for 120 s, for 300 s when busy.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from tests.integration.session.resting import DAY, attached, box_of, claims, paused, state_of, turns
from tests.integration.session.rig import Client, echo, engine_down, rig, until


async def test_a_session_that_nobody_uses_is_paused_and_then_stopped() -> None:
    async with rig() as world:
        session = await world.ready()
        await world.passes(59)
        assert state_of(session) == "ready"
        await world.passes(1)
        assert (session.state, world.box.liveness) == ("paused", "paused")
        assert "60 s" in session.view()["reason"]
        await world.passes(59)
        assert state_of(session) == "paused"
        await world.passes(1)
        assert state_of(session) == "stopped"
        assert "nobody used the session for 120 s" in session.view()["reason"]
        await world.assert_at_rest("ann")
        await session.wait_ready()
        assert world.calls("create") == 2


async def test_a_credential_that_is_erased_while_it_is_paused_is_gone_before_it_wakes(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-old")
    provider = {"kind": "openai", "base_url": "https://api.example", "credential_file": str(key)}
    async with rig(gateway={"providers": {"p": provider}}) as world:
        session = await paused(world)
        slot = box_of(session).slot.id
        assert world.gateway.slots[slot][1]["p"].credential == "sk-old"
        fresh = tmp_path / "fresh"
        fresh.write_text("")
        fresh.rename(key)
        (applied,) = await world.registry.config_changed("ann", "credentials")
        assert (state_of(session), applied.state) == ("paused", "stored")
        assert world.gateway.slots[slot][1]["p"].credential == ""


async def test_timers_do_it_by_themselves() -> None:
    async with rig(pool={"idle": {"pause_after_s": 0.05, "fallback_keep_s": 0.1}}) as world:
        world.registry._steady = asyncio.get_running_loop().time
        session = await world.ready()
        await until(lambda: session.state == "stopped")
        assert world.calls("pause") == 1
        await world.assert_at_rest("ann")


async def test_a_clock_that_jumps_ends_nothing_early() -> None:
    async with rig() as world:
        session = await world.ready()
        for jump in (DAY, -2 * DAY):
            world.clock.now += jump
            session._idling.look()
            await world.registry._look()
            await world.passes(1)
            assert state_of(session) == "ready"


async def test_one_that_was_busy_is_kept_longer() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        await turns(world, session, 4)
        session.detach(client)
        await world.passes(299)
        assert state_of(session) == "paused"
        await world.passes(1)
        assert state_of(session) == "stopped"


async def test_pings_and_reads_keep_nothing() -> None:
    async with rig() as world:
        session = await paused(world)
        session.view()
        assert await world.registry.load("ann", "main") is session
        await world.registry.list()
        session.tick()
        await world.passes(60)
        assert state_of(session) == "stopped"


async def test_the_pattern_of_a_user_decides_how_long_theirs_is_kept() -> None:
    asked: list[tuple[str, float]] = []

    class Activity:
        def note(self, user: str, at: float, kind: str) -> None:
            noted.append((user, kind))

        def keep_for(self, user: str, now: float) -> float:
            asked.append((user, now))
            return 600.0

    noted: list[tuple[str, str]] = []
    async with rig() as world:
        object.__setattr__(world.runtime, "activity", Activity())
        session = await world.ready()
        client = await attached(world, session)
        await turns(world, session, 1)
        session.detach(client)
        at = world.clock()
        await world.passes(599)
        assert state_of(session) == "paused"
        await world.passes(1)
        assert state_of(session) == "stopped"
        assert asked[-1] == ("ann", at)
        assert noted == [("ann", kind) for kind in ("start", "start", "request", "end")]


async def test_a_turn_keeps_it_as_it_is_and_its_end_counts_as_use() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        world.box.open_turns = world.box.turns = 1
        await box_of(session).link.probe()
        session.detach(client)
        await world.passes(DAY)
        assert state_of(session) == "ready"
        world.box.open_turns = 0
        await box_of(session).link.probe()
        await world.passes(59)
        assert state_of(session) == "ready"
        await world.passes(1)
        assert state_of(session) == "paused"


@pytest.mark.parametrize("what", ["open_turns", "pending"])
async def test_what_began_just_now_is_found_before_a_pause(what: str) -> None:
    """The broker learns of turns a little late, and of other requests only when it asks."""
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        setattr(world.box, what, 1)
        await world.passes(900)
        assert state_of(session) == "ready"
        assert world.calls("pause") == 0
        assert not client.holding
        setattr(world.box, what, 0)
        await box_of(session).link.probe()
        await world.passes(900)
        assert state_of(session) == "paused"


async def test_what_was_still_on_its_way_is_found_by_the_second_question() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        link, asked = box_of(session).link, 0
        probe = link.probe

        async def late(*, timeout: float = 5.0) -> Any:
            nonlocal asked
            asked += session._resting.going
            world.box.open_turns = int(asked == 2)
            return await probe(timeout=timeout)

        link.probe = late  # type: ignore[method-assign]
        await world.passes(900)
        assert state_of(session) == "ready"
        assert (asked, world.calls("pause"), client.holding) == (2, 0, False)


async def test_a_package_install_keeps_it_as_it_is() -> None:
    async with rig() as world:
        gate, build = asyncio.Event(), world.shelf._builder.build

        async def slow(call: Any) -> Any:
            await gate.wait()
            return await build(call)

        world.shelf._builder.build = slow  # type: ignore[method-assign]
        server = {"command": "npx", "args": ["-y", "some-server@1.0.0"]}
        await world.users.put_section("ann", "mcp", {"mcpServers": {"s": server}})
        session = await world.ready()
        await world.passes(DAY)
        assert state_of(session) == "ready"
        gate.set()
        await until(lambda: not session._configuration.pending and session._mailbox.idle)
        await world.passes(60)
        await until(lambda: session.state in ("paused", "stopped"))


async def test_silent_clients_are_held_and_their_next_message_wakes_it() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        await world.passes(899)
        assert state_of(session) == "ready"
        await world.passes(1)
        assert state_of(session) == "paused"
        assert client.holding
        await world.passes(30 * DAY)
        assert state_of(session) == "paused"
        client.speak(world.steady())
        await until(lambda: session.state == "ready")
        assert not client.holding
        assert client.closed is None
        assert world.box.liveness == "running"
        await world.passes(899)
        assert state_of(session) == "ready"


async def test_a_client_that_speaks_is_not_silent() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        for _ in range(4):
            await world.passes(800)
            client.spoke_at = world.steady()
        assert state_of(session) == "ready"
        assert world.calls("pause") == 0


async def test_a_new_client_is_served_as_on_a_ready_session() -> None:
    async with rig(pool={"idle": {"fallback_keep_s": 5000}}) as world:
        session = await paused(world)
        clients = [Client() for _ in range(20)]
        for client in clients:
            session.attach(client)
            assert client.holding
        first, *others = (session.open_stream(client.attach) for client in clients)
        socks = [await first, *await asyncio.gather(*others)]
        assert state_of(session) == "ready"
        assert world.calls("resume") == 1
        assert not any(client.holding for client in clients)
        assert await echo(socks[0]) == b"hi"
        for sock in socks:
            sock.close()
        # The timer was set anew, though when it woke they had no stream yet.
        await world.passes(900)
        assert state_of(session) == "paused"


async def test_a_create_wakes_it_and_a_configuration_change_does_not() -> None:
    async with rig() as world:
        session = await paused(world)
        (applied,) = await world.put("mcp", {"mcpServers": {"fs": {"command": "/bin/fs"}}})
        assert (applied.state, applied.effect) == ("stored", {})
        world.configure({"session": {"permission_policy": "allow"}})
        world.registry.settings_reloaded()
        await until(lambda: session._mailbox.idle)
        assert state_of(session) == "paused"
        binds = len(world.box.binds)
        await world.registry.create("ann", "main", None)
        await session.wait_ready()
        # Whoever comes finds what was changed meanwhile.
        assert len(world.box.binds) == binds + 1
        assert set(world.box.binds[-1].parts) == {"mcp"}
        newest = session.timeline()[0]
        assert (newest["path"], newest["outcome"]) == ("user_warm", "ready")
        assert [stage["stage"] for stage in newest["stages"]] == ["resume", "refresh"]


async def test_a_wake_that_cannot_refresh_serves_what_there_is() -> None:
    async with rig() as world:
        session = await paused(world)
        await world.put("env", {"A": "1"})
        world.box.script.bind_error = "config.invalid"
        await session.wait_ready()
        assert state_of(session) == "ready"
        assert "refused" in session.view()["warnings"][0]


async def test_sources_that_hang_hold_clients_of_a_woken_session_for_a_while_only() -> None:
    async with rig(session={"bind_hold_s": 0.05, "config_timeout_s": 60}) as world:
        session = await world.ready()
        client, gate = await attached(world, session), asyncio.Event()
        await world.passes(900)
        await world.put("env", {"A": "1"})

        async def hangs(user: str, last: Any) -> Any:
            await gate.wait()
            return last

        world.runtime.assembler.assemble = hangs  # type: ignore[method-assign]
        client.speak(world.steady())
        await until(lambda: not client.holding)
        assert not session._mailbox.idle
        gate.set()


async def test_probes_stand_still_while_it_is_paused() -> None:
    async with rig(sandbox={"probe_interval_s": 0.02}) as world:
        session = await paused(world)
        asked = 0

        async def probe(timeout: float = 0) -> Any:
            nonlocal asked
            asked += 1
            raise CortexError(Code.SANDBOX_DIED, "no answer", hint="wait")

        link = box_of(session).link
        real, link.probe = link.probe, probe  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(until(lambda: asked > 1 or session.state != "paused"), 0.2)
        link.probe = real  # type: ignore[method-assign]
        await session.wait_ready()
        assert state_of(session) == "ready"


async def test_a_question_that_a_pause_left_unanswered_is_not_held_against_it() -> None:
    async with rig(sandbox={"probe_interval_s": 0.03}) as world:
        box = box_of(await world.ready())
        answers: list[str] = []

        async def probe(timeout: float = 0) -> Any:
            answers.append("none")
            # Each is asked while it runs, and not answered because it is paused by then.
            await box.pause()
            await box.resume()
            raise CortexError(Code.SANDBOX_DIED, "no answer", hint="wait")

        box.link.probe = probe  # type: ignore[method-assign]
        watching = asyncio.ensure_future(box.unresponsive())
        await until(lambda: len(answers) > 5)
        assert not watching.done()
        watching.cancel()


async def test_whoever_comes_while_it_is_being_paused_is_served() -> None:
    async with rig() as world:
        session = await world.ready()
        client, late = await attached(world, session), Client()
        begun, gate, driver = asyncio.Event(), asyncio.Event(), world.driver.inner
        pause = driver.pause

        async def slow(ref: str) -> None:
            begun.set()
            await gate.wait()
            await pause(ref)

        driver.pause = slow
        resting = asyncio.ensure_future(world.passes(900))
        await until(begun.is_set)
        assert client.holding
        session.attach(late)
        opening = asyncio.ensure_future(session.open_stream(late.attach))
        client.speak(world.steady())
        await asyncio.sleep(0)
        assert not opening.done()
        gate.set()
        sock = await opening
        assert await echo(sock) == b"hi"
        sock.close()
        await resting
        assert state_of(session) == "ready"
        assert world.box.liveness == "running"
        assert not client.holding
        assert not late.holding


@pytest.mark.parametrize("how", ["speaks", "waits"])
async def test_whoever_comes_before_the_pause_keeps_it_from_happening(how: str) -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        link, gate = box_of(session).link, asyncio.Event()
        probe = link.probe

        async def slow(*, timeout: float = 0) -> Any:
            await gate.wait()
            return await probe(timeout=5)

        link.probe = slow  # type: ignore[method-assign]
        resting = asyncio.ensure_future(world.passes(900))
        await until(lambda: client.holding)
        if how == "speaks":
            client.speak(world.steady())
        waiting = asyncio.ensure_future(session.wait_ready() if how == "waits" else asyncio.sleep(0))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(resting, waiting)
        assert state_of(session) == "ready"
        assert not client.holding
        assert world.calls("pause") == 0


async def test_whoever_comes_while_it_is_being_stopped_gets_a_new_one() -> None:
    async with rig() as world:
        session = await paused(world)
        gate, driver, late = asyncio.Event(), world.driver.inner, Client()
        stop = driver.stop

        async def slow(ref: str, grace_s: float) -> None:
            await gate.wait()
            await stop(ref, grace_s)

        driver.stop = slow
        resting = asyncio.ensure_future(world.passes(60))
        await until(lambda: session._resting.going)
        session.attach(late)
        opening = asyncio.ensure_future(session.open_stream(late.attach))
        gate.set()
        sock = await opening
        assert await echo(sock) == b"hi"
        sock.close()
        await resting
        assert late.closed is None
        assert world.calls("create") == 2


async def test_a_pause_that_fails_changes_nothing_and_is_tried_again_later() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        driver = world.driver.inner
        pause = driver.pause

        async def fails(ref: str) -> None:
            await pause(ref)
            raise engine_down()

        driver.pause = fails
        await world.passes(900)
        assert state_of(session) == "ready"
        assert world.box.liveness == "running"
        assert not client.holding
        driver.pause = pause
        await world.passes(29)
        assert state_of(session) == "ready"
        await world.passes(1)
        assert state_of(session) == "paused"


async def test_a_sandbox_that_can_be_neither_paused_nor_resumed_is_replaced() -> None:
    async with rig() as world:
        session = await world.ready()
        driver = world.driver.inner

        async def fails(ref: str) -> None:
            raise engine_down()

        driver.pause = driver.resume = fails
        await world.passes(60)
        await until(lambda: session.state == "stopped")
        assert "neither paused nor resumed" in session.view()["reason"]


async def test_one_that_died_while_it_was_paused_is_replaced_for_whoever_comes() -> None:
    async with rig() as world:
        session = await world.ready()
        client, late = await attached(world, session), Client()
        await world.passes(900)
        before, failed = claims("failed"), world.box
        driver = world.driver.inner

        async def gone(ref: str) -> None:
            raise CortexError(Code.SANDBOX_DIED, "it is dead", hint="start another")

        driver.resume = gone
        session.attach(late)
        sock = await session.open_stream(late.attach)
        assert await echo(sock) == b"hi"
        sock.close()
        assert world.box is not failed
        assert late.closed is None
        assert client.closed is not None
        assert "connect again" in client.closed[1]
        assert claims("failed") == before, "its client was there all the time: that was no claim"


async def test_a_claim_of_one_that_is_dead_is_counted_as_failed() -> None:
    async with rig() as world:
        session = await paused(world)
        before = claims("failed"), claims()
        await world.engine.end(world.box.ref)
        session.wake()
        await session.wait_ready()
        assert (claims("failed"), claims()) == (before[0] + 1, before[1])
        assert [entry["outcome"] for entry in session.timeline()] == ["ready", "sandbox.died", "ready"]


async def test_the_end_of_a_paused_sandbox_is_noticed() -> None:
    async with rig() as world:
        session = await paused(world)
        await world.engine.end(world.box.ref)
        await until(lambda: session.state == "stopped")
        await world.assert_at_rest("ann")


async def test_whoever_comes_when_a_paused_sandbox_dies_gets_another() -> None:
    async with rig() as world:
        session = await paused(world)
        late = Client()
        session.on_lost(box_of(session), "it died")
        session.attach(late)
        sock = await session.open_stream(late.attach)
        assert await echo(sock) == b"hi"
        sock.close()
        assert late.closed is None


async def test_an_operator_stops_a_paused_session() -> None:
    async with rig() as world:
        session = await world.ready()
        client = await attached(world, session)
        await world.passes(900)
        await session.stop()
        assert state_of(session) == "stopped"
        assert client.closed is not None
        await world.assert_at_rest("ann")
        assert world.calls("resume") == 1, "it is asked to end, so it has to run"


async def test_a_sandbox_that_is_paused_when_the_broker_ends_is_taken_over() -> None:
    async with rig() as world:
        session = await paused(world)
        box = world.box
        outcome = await world.restart()
        assert (len(outcome.adopted), outcome.failed) == (1, {})
        again = world.registry.held("ann", "main")
        assert again is not None
        assert again is not session
        await again.wait_ready()
        assert world.box is box
        assert (box.liveness, world.calls("create")) == ("running", 1)
        # Its clients are expected back; when none comes, it goes the way of all.
        await world.passes(59)
        assert state_of(again) == "ready"
        await world.passes(1)
        assert state_of(again) == "paused"
