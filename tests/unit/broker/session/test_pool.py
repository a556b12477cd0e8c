"""The pool's life on virtual time: claims, refill, pauses, losses, settings, faults, restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from broker.host.memory import HostMemory
from broker.metrics import IDLE_SECONDS, POOL_BREAKER, POOL_REFILLS, POOL_SIZE, POOL_TARGET, REGISTRY
from broker.sandbox.reconcile import Adopted
from broker.session.pool import TICK_S, YIELD_S
from sandbox_agent.wire.messages import Status
from tests.unit.broker.session.pool_rig import GIB, World, down, no_image
from tests.virtual import run

Scene = Callable[[World], Awaitable[None]]
TWO = {"a": {"target": 2, "hot": 1}}


def play(scene: Scene, **pool: Any) -> None:
    """Runs ``scene`` with a pool of these settings, and closes it."""

    async def whole() -> None:
        world = World(**({"agents": TWO} | pool))
        try:
            await scene(world)
        finally:
            await world.close()

    run(whole())


def claims(result: str) -> float:
    return REGISTRY.get_sample_value("cortex_pool_claims_total", {"kind": "generic", "result": result}) or 0.0


def memory(kind: str) -> float | None:
    return REGISTRY.get_sample_value("cortex_pool_memory_bytes", {"kind": kind})


# Claims


def test_as_many_as_wanted_are_made_and_all_but_the_hot_ones_are_paused() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert world.warmer.begun == 2
        assert sorted(box.paused for box in world.warmer.made) == [False, True]
        assert POOL_SIZE.labels("a", "generic", "paused")._value.get() == 1
        assert POOL_TARGET.labels("a")._value.get() == 2

    play(scene)


def test_a_claim_gets_the_hot_one_and_what_is_gone_is_made_up_for() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        hits = claims("hit")
        box = world.take()
        assert box is not None
        assert not box.paused
        assert claims("hit") == hits + 1
        assert world.sizes() == {"paused": 1}
        await asyncio.sleep(0.03)  # well within the debounce: waking is not making
        assert world.sizes() == {"hot": 1}
        await asyncio.sleep(30)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert world.warmer.begun == 3
        assert not box.ends

    play(scene)


def test_the_best_is_handed_out_first() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        plain, opened, asleep = world.warmer.made
        plain.heard(Status("ready", ahead="failed"))
        opened.heard(Status("ready", ahead="open"))
        await asyncio.sleep(1)
        assert [world.take(), world.take(), world.take()] == [opened, plain, asleep]

    play(scene, agents={"a": {"target": 3, "hot": 2}})


def test_two_hundred_at_once_get_ten_and_none_twice() -> None:
    async def scene(world: World) -> None:
        await world.filled(60)
        assert world.sizes() == {"hot": 3, "paused": 7}
        before = claims("hit"), claims("empty")

        async def claim() -> object:
            await asyncio.sleep(0)
            return world.take()

        got = await asyncio.gather(*(claim() for _ in range(200)))
        assert sum(box is not None for box in got) == len(world.taken) == 10
        assert (claims("hit") - before[0], claims("empty") - before[1]) == (10, 190)
        await asyncio.sleep(60)
        assert world.sizes() == {"hot": 3, "paused": 7}
        assert world.warmer.begun == 20

    play(scene, agents={"a": {"target": 10, "hot": 3}}, refill_concurrency=4, refill_burst=100)


def test_one_that_is_just_waking_can_be_had() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        sleeper = next(box for box in world.warmer.made if box.paused)
        cast(Any, sleeper).resume = asyncio.Event().wait
        assert world.take() is not None
        await asyncio.sleep(0.01)
        assert world.take() is sleeper
        assert sleeper.paused  # the claimer resumes it, whatever comes of the pool's own attempt

    play(scene)


def test_one_that_is_falling_asleep_cannot_be_had() -> None:
    """The claimer's resume could be done before the pause that is on its way."""

    async def scene(world: World) -> None:
        world.pause_gate.clear()
        await world.filled(30)
        assert world.sizes() == {"hot": 2}, "it runs still"
        assert world.take() is not None
        assert world.take() is None
        world.pause_gate.set()
        await asyncio.sleep(0.01)
        assert world.take() is not None

    play(scene)


def test_made_with_another_boot_it_is_not_handed_out() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        before = claims("stale")
        assert world.take(boot="other") is None
        assert claims("stale") == before + 1
        assert world.take() is not None

    play(scene)


def test_no_pool_is_no_claim() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        before = [claims(result) for result in ("hit", "empty", "stale")]
        assert world.take("b") is None
        assert world.take("nobody") is None
        assert [claims(result) for result in ("hit", "empty", "stale")] == before

    play(scene)


@pytest.mark.parametrize("how", ["lost", "failed", "hung up"])
def test_one_that_is_no_good_any_more_is_never_handed_out(how: str) -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        bad, good = sorted(world.warmer.made, key=lambda box: box.paused)
        if how == "lost":
            bad.lost = "gone"
        elif how == "failed":
            bad.status = Status("failed", what="no")
        else:
            bad.link.connected = False  # type: ignore[misc]
        assert world.take() is good
        await asyncio.sleep(10)
        assert bad.ends == ["put_away"]
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


# Refill


def test_claims_that_come_at_once_are_made_up_for_together() -> None:
    async def scene(world: World) -> None:
        await world.filled(60)
        for _ in range(3):
            world.take()
            await asyncio.sleep(0.03)
        assert world.warmer.begun == 4
        await asyncio.sleep(0.1 - 0.09 + 0.001)
        assert world.warmer.begun == 7

    play(scene, agents={"a": {"target": 4, "hot": 4}}, debounce_s=0.1, refill_concurrency=8)


def test_not_more_at_once_than_allowed_and_not_faster_than_the_bucket_gives() -> None:
    async def scene(world: World) -> None:
        world.warmer.seconds = 0.01
        world.pool.start()
        await asyncio.sleep(0.5)
        assert world.warmer.begun == 5
        await asyncio.sleep(10)
        assert world.warmer.begun == 10
        assert world.warmer.most == 2
        await asyncio.sleep(100)
        assert world.warmer.begun == 20

    play(scene, agents={"a": {"target": 20, "maximum": 20}}, refill_concurrency=2, refill_burst=5, refill_per_s=0.5)


def test_users_starts_go_first_but_do_not_starve_the_pool() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.warmer.seconds = 0.5
        with world.pool.yielding():
            for _ in range(4):
                assert world.take() is not None
            await asyncio.sleep(YIELD_S - 0.1)
            assert world.warmer.begun == 4
            with world.pool.yielding():
                await asyncio.sleep(0.2)
                assert world.warmer.begun == 5
                await asyncio.sleep(0.5)
                assert (world.warmer.begun, world.warmer.under_way["a"]) == (6, 1)
        await asyncio.sleep(0.01)
        assert world.warmer.under_way["a"] == 2

    play(scene, agents={"a": {"target": 4}})


def test_starts_that_follow_each_other_leave_gaps_for_the_pool() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        assert world.take() is not None
        await asyncio.sleep(0.06)
        begun = world.warmer.begun
        for _ in range(4):
            assert world.take() or True
            with world.pool.yielding():
                await asyncio.sleep(1)
            await asyncio.sleep(0.06)
        assert world.warmer.begun > begun

    play(scene)


def test_memory_bounds_all_pools_together_with_what_users_have() -> None:
    async def scene(world: World) -> None:
        world.engine.memory = GIB
        world.users = [("a", "hot"), ("b", "paused")]
        await world.filled(60)
        assert len(world.shelf("a")) + len(world.shelf("b")) == 4
        assert {world.shelf("a").short, world.shelf("b").short} == {"memory"}
        world.users = []
        await asyncio.sleep(60)
        assert len(world.shelf("a")) + len(world.shelf("b")) == 6
        world.configure(agents={"a": {"target": 8}, "b": {"target": 8}}, memory_bytes=3 * GIB)
        world.pool.settings_changed()
        await asyncio.sleep(60)
        assert len(world.shelf("a")) + len(world.shelf("b")) == 3

    play(scene, agents={"a": {"target": 8}, "b": {"target": 8}}, memory_bytes=6 * GIB)


def test_the_hosts_memory_is_left_alone_and_given_back_when_it_is_needed() -> None:
    async def scene(world: World) -> None:
        await world.filled(60)
        assert len(world.shelf()) == 4
        assert memory("warm") == sum(shelf.cost * len(shelf) for shelf in [world.shelf()])
        world.host = replace(world.host, available=GIB // 4)
        await asyncio.sleep(TICK_S + 1)
        assert world.sizes() == {}
        assert world.shelf().short == "memory"
        assert (memory("warm"), memory("available"), memory("reserve")) == (0, GIB // 4, GIB)
        assert memory("budget") == 32 * GIB
        world.host = replace(world.host, available=2 * GIB)
        await asyncio.sleep(TICK_S + 60)
        assert len(world.shelf()) == 4

    play(scene, agents={"a": {"target": 4}}, reserve_bytes=GIB)


# Those that die


@pytest.mark.parametrize("how", ["exit", "link", "agent", "silence"])
@pytest.mark.parametrize("asleep", [False, True])
def test_one_that_dies_leaves_the_pool_and_is_replaced(how: str, asleep: bool) -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        box = next(box for box in world.warmer.made if box.paused is asleep)
        if how == "exit":
            await world.engine.end(box.ref)
        elif how == "link":
            box.lose("its agent server hung up")
        elif how == "agent":
            box.heard(Status("failed", what="it crashes"))
        else:
            box.quiet.set()
        await asyncio.sleep(0.01)
        if how == "silence" and asleep:
            assert world.sizes() == {"hot": 1, "paused": 1}  # nobody asks one that stands still
            return
        assert box.ref not in [member.box.ref for member in world.shelf()]
        await asyncio.sleep(30)
        assert box.ends == ["put_away"]
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


def test_one_that_was_handed_out_may_die_without_the_pool() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        box = world.take()
        assert box is not None
        await asyncio.sleep(30)
        box.lose("gone")
        box.heard(Status("failed", what="no"))
        box.quiet.set()
        await world.engine.end(box.ref)
        await asyncio.sleep(30)
        assert box.ends == []
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


def test_one_that_cannot_be_put_away_is_tried_again_and_does_not_keep_the_pool_short() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.end_error = down()
        for box in list(world.warmer.made):
            await world.engine.end(box.ref)
        await asyncio.sleep(60)
        assert world.sizes() == {"hot": 1, "paused": 1, "ending": 2}
        assert world.pool.view()["agents"][0]["stuck"] == 2
        for box in world.warmer.made[2:]:
            await world.engine.end(box.ref)
        await asyncio.sleep(60)
        assert world.sizes() == {"ending": 4}
        assert world.shelf().short == "maximum"
        world.end_error = None
        await asyncio.sleep(120)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert all(box.ends == ["put_away"] for box in world.warmer.made[:4])

    play(scene, agents={"a": {"target": 2, "maximum": 4}})


def test_one_that_could_neither_be_made_nor_put_away_is_not_forgotten() -> None:
    async def scene(world: World) -> None:
        world.warmer.error = world.end_error = down()
        with capture_logs():
            world.pool.start()
            await asyncio.sleep(20)
        left = list(world.warmer.made)
        assert left
        assert world.shelf().stuck == len(left)
        assert len(left) <= 4
        world.warmer.error = world.end_error = None
        await asyncio.sleep(200)
        assert all(box.ends == ["put_away"] for box in left)
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene, agents={"a": {"target": 2, "maximum": 4}})


def test_one_that_cannot_be_paused_or_woken_is_replaced() -> None:
    async def scene(world: World) -> None:
        async def fails() -> None:
            raise down()

        await world.filled(30)
        sleeper = next(box for box in world.warmer.made if box.paused)
        cast(Any, sleeper).resume = fails
        assert world.take() is not None
        await asyncio.sleep(30)
        assert sleeper.ends == ["put_away"]
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


def test_a_conversation_that_is_being_opened_is_not_cut_off() -> None:
    async def scene(world: World) -> None:
        world.warmer.ahead = "opening"
        await world.filled(30)
        assert world.sizes() == {"hot": 2}
        world.warmer.made[1].heard(Status("ready", ahead="open"))
        await asyncio.sleep(1)
        assert [box.paused for box in world.warmer.made] == [False, True]

    play(scene)


# Failures


def test_failures_back_off_then_open_the_breaker_and_one_probe_closes_it() -> None:
    async def scene(world: World) -> None:
        world.warmer.error, world.warmer.seconds = down(), 0.0
        failed = POOL_REFILLS.labels("a", "failed")._value.get()
        with capture_logs() as logs:
            world.pool.start()
            await asyncio.sleep(0.5)
            assert world.warmer.begun == 2  # two were under way at once
            await asyncio.sleep(29)
            assert world.warmer.begun == 4
            assert POOL_BREAKER.labels("a")._value.get() == 1
            assert world.pool.view()["agents"][0]["breaker"] == "open"
            await asyncio.sleep(61)
        assert world.warmer.begun == 5
        told = [line["event"] for line in logs if line["log_level"] in ("warning", "error")]
        assert told == ["pool_refill_failed", "pool_breaker_open"]
        assert POOL_REFILLS.labels("a", "failed")._value.get() == failed + 5
        world.warmer.error = None
        await asyncio.sleep(61)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert POOL_BREAKER.labels("a")._value.get() == 0
        assert world.pool.view()["agents"][0]["error"] == ""

    play(scene, breaker_failures=4, breaker_s=60)


def test_a_maker_that_crashes_or_hangs_is_a_failure_like_any() -> None:
    async def scene(world: World) -> None:
        world.warmer.error = ValueError("a bug")
        with capture_logs():
            world.pool.start()
            await asyncio.sleep(2)
            assert "a bug" in world.pool.view()["agents"][0]["error"]
            world.warmer.error, world.warmer.seconds = None, 10_000
            await asyncio.sleep(200)
            assert "was not there in" in world.pool.view()["agents"][0]["error"]
        world.warmer.seconds = 1
        await asyncio.sleep(300)
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


def test_a_look_that_crashes_does_not_keep_the_next_claim_from_being_made_up_for() -> None:
    async def scene(world: World) -> None:
        await world.filled(2 * TICK_S + 1)
        memory, crashed = world.pool._memory, asyncio.Event()

        def crash() -> HostMemory:
            world.pool._memory = memory
            crashed.set()
            raise ValueError("a bug")

        world.pool._memory = crash
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        world.take()
        await crashed.wait()
        world.take()
        await asyncio.sleep(TICK_S / 2)
        assert world.warmer.begun == 4

    play(scene)


def test_an_image_that_is_missing_is_told_once_and_seen_when_it_is_there() -> None:
    async def scene(world: World) -> None:
        world.engine.image_error = no_image()
        with capture_logs() as logs:
            world.pool.start()
            await asyncio.sleep(600)
        told = [line["event"] for line in logs if line["log_level"] in ("warning", "error")]
        assert told == ["pool_image_missing", "pool_breaker_open"]
        assert world.warmer.begun == 0
        assert "not there" in world.pool.view()["image_error"]
        world.engine.image_error = None
        await asyncio.sleep(TICK_S + 5)  # long before the breaker would try again
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene, breaker_s=86_400)


def test_the_engine_goes_away_with_all_sandboxes_and_comes_back() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.engine.error = world.end_error = down()
        for box in list(world.warmer.made):
            await world.engine.end(box.ref)
        await asyncio.sleep(0.1)
        assert world.take() is None
        await asyncio.sleep(120)
        assert world.take() is None
        assert world.sizes() == {"ending": 2}
        world.engine.error = world.end_error = None
        await asyncio.sleep(120)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert set(world.engine.sandboxes) == {member.box.ref for member in world.shelf()}

    play(scene)


def test_a_recipe_that_cannot_be_had_is_told_and_made_nothing_of() -> None:
    async def scene(world: World) -> None:
        world.warmer.refused = no_image()
        await world.filled(100)
        assert world.warmer.begun == 0
        assert "not there" in world.pool.view()["agents"][0]["error"]
        world.warmer.refused = None
        world.pool.settings_changed()
        await asyncio.sleep(10)
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


# Settings


def test_targets_apply_at_once() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.configure(agents={"a": {"target": 5, "hot": 3}, "b": {"target": 1, "hot": 0}})
        world.pool.settings_changed()
        await asyncio.sleep(30)
        assert (world.sizes("a"), world.sizes("b")) == ({"hot": 3, "paused": 2}, {"paused": 1})
        world.configure(agents={"a": {"target": 1, "hot": 0}})
        world.pool.settings_changed()
        await asyncio.sleep(30)
        assert world.sizes("a") == {"paused": 1}
        assert "b" not in world.pool._shelves
        assert REGISTRY.get_sample_value("cortex_pool_target", {"agent": "b"}) is None

    play(scene)


def test_an_agent_is_not_held_up_by_the_end_of_anothers() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.end_s = 50
        world.configure(agents={"a": {"target": 1}, "b": {"target": 1}})
        world.pool.settings_changed()
        await asyncio.sleep(2)
        assert (world.sizes("a"), world.sizes("b")) == ({"hot": 1, "ending": 1}, {"hot": 1})

    play(scene)


def test_what_is_expected_counts_between_the_bounds() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        for count, there in ((9, 4), (0, 1), (3, 3), (None, 2)):
            world.pool.expect("a", count)
            await asyncio.sleep(30)
            assert len(world.shelf()) == there

    play(scene, agents={"a": {"minimum": 1, "target": 2, "maximum": 4}})


def test_what_was_made_with_other_settings_is_not_handed_out_and_is_replaced() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.end_s = 5
        old = list(world.warmer.made)
        world.warmer.version = "2"
        world.pool.settings_changed()
        assert world.take() is None
        await asyncio.sleep(0.5)
        assert world.sizes() == {"ending": 2}  # what is on its way out counts
        await asyncio.sleep(6.5)
        assert all(box.ends == ["put_away"] for box in old)
        assert [box.recipe for box in world.warmer.made[2:]] == ["a-2", "a-2"]
        assert world.take() is not None

    play(scene)


def test_settings_that_change_while_one_is_made() -> None:
    async def scene(world: World) -> None:
        world.pool.start()
        await asyncio.sleep(0.5)
        world.warmer.version = "2"
        await asyncio.sleep(2.5)
        assert {member.box.recipe for member in world.shelf()} == {"a-2"}
        world.warmer.version = "3"
        assert world.take() is None  # whoever comes knows of it before the pool was told
        await asyncio.sleep(30)
        assert {member.box.recipe for member in world.shelf()} == {"a-3"}
        assert world.take() is not None

    play(scene)


def test_an_image_that_was_built_anew_replaces_what_was_made_from_the_old_one() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        old = list(world.warmer.made)
        world.engine.image = "image-2"
        await asyncio.sleep(TICK_S + 30)
        assert all(box.ends == ["put_away"] for box in old)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert world.pool.view()["image"] == "image-2"

    play(scene)


def test_many_old_ones_are_put_away_a_few_at_a_time() -> None:
    async def scene(world: World) -> None:
        await world.filled(60)
        world.end_s = 1
        world.warmer.version = "2"
        world.pool.settings_changed()
        await asyncio.sleep(0.5)
        assert world.shelf().sizes()["ending"] == 12
        await asyncio.sleep(1)
        assert world.shelf().sizes()["ending"] == 8
        await asyncio.sleep(60)
        assert len(world.shelf()) == 12

    play(scene, agents={"a": {"target": 12}}, refill_burst=100)


# Restarts


def found(agent: str = "a", number: int = 1, image: str = "") -> Adopted:
    slot, there = SimpleNamespace(id=f"s{number}"), SimpleNamespace(image=image)
    return cast(Adopted, SimpleNamespace(record=SimpleNamespace(agent=agent), found=there, slot=slot))


def test_those_of_the_last_broker_are_taken_in_before_any_is_made() -> None:
    async def scene(world: World) -> None:
        settled = [world.pool.adopt(found(number=number)) for number in range(2)]
        await world.filled(0.5)
        assert world.warmer.begun == 0
        await asyncio.wait(settled)
        assert len(world.shelf()) == 2
        await asyncio.sleep(30)
        assert world.warmer.begun == 0
        assert world.take() is not None

    play(scene)


def test_one_that_cannot_be_taken_in_is_made_up_for() -> None:
    async def scene(world: World) -> None:
        world.warmer.error = down()
        await world.pool.adopt(found())
        world.warmer.error = None
        await world.filled(30)
        assert world.sizes() == {"hot": 1, "paused": 1}
        assert world.warmer.begun == 2

    play(scene)


def test_one_whose_image_was_built_anew_while_no_broker_ran_goes() -> None:
    async def scene(world: World) -> None:
        world.pool.adopt(found(image=world.engine.image))
        world.pool.adopt(found(number=2, image="sha256:older"))
        await world.filled(30)
        same, older, _ = world.warmer.made
        assert not same.ends
        assert older.ends == ["put_away"]
        assert len(world.shelf()) == 2

    play(scene)


def test_one_of_an_agent_without_a_pool_goes() -> None:
    async def scene(world: World) -> None:
        world.pool.adopt(found("b"))
        await world.filled(30)
        assert world.warmer.made[0].ends == ["put_away"]
        assert "b" not in world.pool._shelves

    play(scene)


def test_closing_lets_them_go_on_and_makes_no_more() -> None:
    async def scene(world: World) -> None:
        await world.filled(30)
        world.take()
        await asyncio.sleep(0.1)
        assert world.warmer.under_way["a"] == 1
        world.end_error = down()
        await world.engine.end(next(iter(world.shelf())).box.ref)
        await asyncio.sleep(0.1)
        await world.pool.close()
        assert world.warmer.under_way["a"] == 0
        assert {box.ends[0] for box in world.warmer.made if box not in world.taken} == {"let_go"}
        assert world.take() is None
        assert REGISTRY.get_sample_value("cortex_pool_target", {"agent": "a"}) is None
        world.pool.settings_changed()
        await asyncio.sleep(100)
        assert world.warmer.under_way["a"] == 0

    play(scene, debounce_s=0.05)


# What operators see


def test_the_view_adds_up() -> None:
    async def scene(world: World) -> None:
        world.users = [("a", "hot"), ("a", "paused"), ("b", "paused")]
        await world.filled(3600)
        world.take()
        world.take(boot="other")
        told = world.pool.view()
        agent, other = told["agents"]
        assert (agent["agent"], agent["target"], agent["minimum"], agent["maximum"]) == ("a", 2, 0, 16)
        assert (agent["hot"], agent["paused"], agent["making"], agent["ending"]) == (0, 1, 0, 0)
        assert agent["users"] == {"hot": 1, "paused": 1}
        assert other["users"] == {"hot": 0, "paused": 1}
        assert agent["claims"] == {"hit": 1, "empty": 0, "stale": 1}
        assert (agent["hit_rate"], agent["recent_hit_rate"], other["hit_rate"]) == (0.5, 0.5, None)
        assert (agent["bytes_each"], agent["measured"]) == (64 * 2**20, True)
        assert agent["memory_bytes"] == 3 * 64 * 2**20
        assert told["claims"]["generic"]["hit"] >= 1
        assert told["memory"]["budget_bytes"] == 32 * GIB
        assert 1.9 < agent["idle_hours"] <= 2.0
        cost = told["cost"]
        assert (cost["per_sandbox_hour"], cost["idle_now_per_hour"]) == (0.5, 2.0)
        users = sum(IDLE_SECONDS.labels(state)._value.get() for state in ("ready", "paused")) / 3600 * 0.5
        assert cost["idle_since_start"] == pytest.approx(1.0 + users, abs=0.01)

    play(scene, cost_per_hour=0.5)


def test_what_users_have_is_gauged_until_it_is_gone() -> None:
    async def scene(world: World) -> None:
        world.users = [("b", "paused")]
        await world.filled(30)
        assert POOL_SIZE.labels("b", "user", "paused")._value.get() == 1
        world.users = []
        await asyncio.sleep(TICK_S + 1)
        assert POOL_SIZE.labels("b", "user", "paused")._value.get() == 0

    play(scene)


def test_a_wall_clock_that_jumps_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> float:
        raise AssertionError("the wall clock was asked")

    async def scene(world: World) -> None:
        monkeypatch.setattr(time, "time", asked)
        await world.filled(30)
        world.warmer.error = down()
        assert world.take() is not None
        await asyncio.sleep(30)
        world.warmer.error = None
        await asyncio.sleep(100)
        monkeypatch.undo()
        assert world.sizes() == {"hot": 1, "paused": 1}

    play(scene)


def test_an_idle_pool_does_next_to_nothing() -> None:
    async def scene(world: World) -> None:
        await world.filled(60)
        world.engine.calls.clear()
        await asyncio.sleep(600)
        assert set(world.engine.calls) == {("prepare_image", "")}
        assert len(world.engine.calls) <= 600 / TICK_S + 1

    play(scene, agents={"a": {"target": 16, "hot": 4}})
