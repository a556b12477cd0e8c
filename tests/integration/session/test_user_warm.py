"""A user's own warm sandbox: made ready ahead or kept, claimed by the first who asks; and what idling costs."""

from __future__ import annotations

import asyncio

import pytest

from broker.errors import Code, CortexError
from broker.metrics import BRINGUP, IDLE_SECONDS, POOL_CLAIMS
from tests.integration.session.resting import DAY, attached, box_of, claims, paused, state_of
from tests.integration.session.rig import Client, counters, rig, until


async def test_what_intent_brought_up_is_claimed_by_the_first_who_asks() -> None:
    async with rig() as world:
        await world.registry.create("ann", "main", None)
        session = world.registry.held("ann", "main")
        assert session is not None
        await session.stop()
        before, observed = claims(), BRINGUP.labels("user_warm", "fake")._sum.get()
        await world.registry.prewarm("ann", "main", announced=True)
        await until(lambda: session.state == "ready")
        assert session.warm
        assert (session.view()["warm"], session.view()["intent"]) == (True, "announced")
        assert session.timeline()[0]["intent"] == "announced"
        assert claims() == before, "nobody has asked yet"
        assert world.registry.warm() == [("demo", "hot")]
        await world.registry.create("ann", "main", None)
        assert (claims(), session.warm) == (before + 1, False)
        client = await attached(world, session)
        assert claims() == before + 1, "its client is the one who asked"
        newest = session.timeline()[0]
        assert (newest["path"], newest["outcome"], newest["stages"]) == ("user_warm", "ready", [])
        assert 0 < BRINGUP.labels("user_warm", "fake")._sum.get() - observed < 0.1
        session.detach(client)
        assert session.warm, "kept after its user left"
        await attached(world, session)
        assert claims() == before + 2


async def test_a_paused_one_is_claimed_when_it_is_awake() -> None:
    async with rig() as world:
        session = await world.ready()
        session.detach(await attached(world, session))
        await world.passes(60)
        assert world.registry.warm() == [("demo", "paused")]
        before = claims()
        client = Client()
        session.attach(client)
        assert claims() == before
        (await session.open_stream(client.attach)).close()
        assert claims() == before + 1
        newest = session.timeline()[0]
        assert (newest["path"], newest["outcome"]) == ("user_warm", "ready")
        assert [stage["stage"] for stage in newest["stages"]] == ["resume"]


async def test_a_user_who_comes_and_goes_does_not_push_out_how_it_was_started() -> None:
    async with rig(session={"timeline_length": 3}) as world:
        session = await world.ready()
        for _ in range(9):
            session.detach(await attached(world, session))
        assert [entry["path"] for entry in session.timeline()] == ["user_warm", "cold"]


async def test_what_a_request_starts_is_cold_whoever_is_expected() -> None:
    async with rig() as world:
        before = claims()
        session = await world.session()
        session.prewarm()
        await session.wait_ready()
        await attached(world, session)
        assert claims() == before
        assert [(entry["path"], entry["intent"]) for entry in session.timeline()] == [("cold", "")]


async def test_who_is_expected_and_does_not_come_costs_a_while_only() -> None:
    async with rig(pool={"forecast": {"lead_s": 240}}) as world:
        session = await world.ready()
        await session.stop()
        await world.passes(DAY)
        await world.registry.prewarm("ann", "main")
        await until(lambda: session.state == "ready")
        await world.passes(60)
        assert state_of(session) == "paused"
        await world.registry.prewarm("ann", "main")
        await world.passes(0)
        assert state_of(session) == "paused", "one who is not here yet is no reason to wake it"
        await world.passes(239)
        assert state_of(session) == "paused"
        await world.passes(1)
        assert state_of(session) == "stopped"


async def test_who_is_announced_finds_it_awake_and_fresh() -> None:
    async with rig() as world:
        session = await paused(world)
        before = claims()
        await world.registry.prewarm("ann", "main", announced=True)
        await until(lambda: session.state == "ready")
        assert (session.warm, claims()) == (True, before)
        await world.put("env", {"A": "1"})
        world.clock.now += world.config.session.config_max_age_s
        assembled = session._configuration.assembled_at
        await world.registry.prewarm("ann", "main", announced=True)
        await until(lambda: session._configuration.assembled_at > assembled)


async def test_a_forecast_takes_nothing_from_the_pool() -> None:
    def cold() -> float:
        return float(POOL_CLAIMS.labels("cold", "hit")._value.get())

    async with rig() as world:
        await (await world.ready()).stop()
        await (await world.ready("bob")).stop()
        await world.warm()
        before = cold(), world.pool.cold
        for user, announced, left in (("ann", False, 1), ("bob", True, 0)):
            session = await world.registry.prewarm(user, "main", announced=announced)
            await until(lambda session=session: session.state == "ready")  # type: ignore[misc]
            assert len(world.pool.boxes) == left
            newest = session.timeline()[0]
            assert (newest["path"], newest["intent"]) == (
                ("generic_warm", "announced") if announced else ("cold", "forecast")
            )
        assert (cold(), world.pool.cold) == before


async def test_intent_makes_a_session_only_where_it_is_told_to() -> None:
    async with rig() as world:
        with pytest.raises(CortexError) as caught:
            await world.registry.prewarm("ann", "main")
        assert caught.value.code is Code.NO_SESSION
        session = await world.registry.prewarm("ann", "main", create=True)
        await until(lambda: session.state == "ready")
        with pytest.raises(CortexError) as caught:
            await world.registry.prewarm("ann", "main", "other", create=True)
        assert caught.value.code is Code.SESSION_CONFLICT


async def test_the_warm_path_of_a_claim_touches_nothing() -> None:
    async with rig() as world:
        session = await world.ready()
        session.detach(await attached(world, session))
        world.store.broken = world.driver.broken = True
        before, hits = counters(), claims()
        client = Client()
        session.attach(client)
        (await session.open_stream(client.attach)).close()
        assert counters() == before
        assert claims() == hits + 1
        world.store.broken = world.driver.broken = False


async def test_idle_time_is_counted_and_priced() -> None:
    def told() -> tuple[float, float]:
        ready, paused = (IDLE_SECONDS.labels(state)._value.get() for state in ("ready", "paused"))
        return ready, paused

    async with rig(pool={"cost_per_hour": 36.0}) as world:
        before = told()
        session = await world.ready()
        client = await attached(world, session)
        await world.passes(500)
        session.detach(client)
        await world.passes(60)
        await world.passes(40)
        session.tick()
        idle = session.view()["idle"]
        assert (idle["ready_s"], idle["paused_s"], idle["cost"]) == (60.0, 40.0, 1.0)
        assert (idle["idle_s"], idle["next_look_s"]) == (100.0, 20.0)
        assert (told()[0] - before[0], told()[1] - before[1]) == (60.0, 40.0)


async def test_a_turn_without_a_client_is_not_idle() -> None:
    async with rig() as world:
        session = await world.ready()
        world.box.open_turns = 1
        await box_of(session).link.probe()
        await world.passes(500)
        assert session.view()["idle"]["ready_s"] == 0.0
        assert session.view()["idle"]["cost"] is None


async def test_few_are_put_to_rest_at_once() -> None:
    async with rig() as world:
        driver, running, gate = world.driver.inner, 0, asyncio.Event()
        pause = driver.pause

        async def slow(ref: str) -> None:
            nonlocal running
            running += 1
            await gate.wait()
            await pause(ref)

        driver.pause = slow
        sessions = await asyncio.gather(*(world.ready(f"u{number}") for number in range(12)))
        resting = asyncio.ensure_future(world.passes(60))
        await until(lambda: running == 4)
        others = [session for session in sessions if not session._resting.going]
        for session in others:
            # Whoever waits for its turn serves its user meanwhile.
            client = Client()
            session.attach(client)
            (await session.open_stream(client.attach)).close()
        gate.set()
        await resting
        assert running == 4
        assert sorted(session.state for session in sessions) == ["paused"] * 4 + ["ready"] * 8


async def test_a_session_that_leaves_memory_leaves_no_timer() -> None:
    async with rig() as world:
        session = await world.ready()
        assert session._idling._timer is not None
        await world.registry.close()
        assert session._idling._timer is None
        session._idling.look()
        session._resting.soon()
        assert len(session._tasks) == 0
