"""A Docker Engine that is restarted, killed or held under a pool: nobody waits for ever, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e import engine as engines
from tests.e2e.engine import Engine
from tests.e2e.harness import BrokerProcess, running
from tests.e2e.pools import filled, homes, inits, newest, pooled, run, seen, shell, slots, stop, until
from tests.e2e.test_pool_faults import create

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]
AWAY = ("sandbox.engine_down", "sandbox.engine_timeout", "session.bringup_timeout")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    with engines.directory() as directory:
        made = Engine(directory)
        await made.start()
        try:
            made.load()
            yield made
        finally:
            await made.end()


@asynccontextmanager
async def brokered(place: Path, engine: Engine, *, live_restore: bool) -> AsyncIterator[BrokerProcess]:
    """A pool of one hot and one paused sandbox; ann has a home at rest, dan is at work."""
    await engine.stop()
    await engine.start(live_restore=live_restore)
    config = pooled(2, more="backoff_s = 0.2\nbreaker_s = 1", after=engine.config)
    env = {"CORTEX_SANDBOX__DOCKER__IMAGE": engine.image}
    async with running(place, "docker", config, env=env) as broker:
        try:
            for user in ("ann", "dan"):
                await run(broker, user, f"echo {user} > ~/mine")
            await stop(broker, "ann")
            await rests(broker)
            yield broker
        finally:
            engine.release()
            await engine.start(live_restore=live_restore)
    assert engine.containers() == []


async def rests(broker: BrokerProcess) -> None:
    """One hot, one paused, nothing on its way."""

    async def full() -> bool:
        it = await seen(broker)
        return (it["hot"], it["paused"], it["making"], it["ending"]) == (1, 1, 0, 0)

    await until(broker, full)


async def told_to_wait(broker: BrokerProcess, user: str) -> None:
    status, answer = await create(broker, user)
    assert status in (503, 504), answer
    assert answer["code"] in AWAY, answer
    assert answer["retryable"]
    assert answer["hint"]


async def comes(broker: BrokerProcess, user: str) -> str:
    """Tries until it is served; what is in the home then."""
    async with asyncio.timeout(60):
        while (await create(broker, user))[0] >= 400:
            await asyncio.sleep(0.05)
    said = await run(broker, user, "cat ~/mine")
    assert len(homes(broker, user, "mine")) <= 1
    return said


async def whole(broker: BrokerProcess, engine: Engine) -> None:
    """The pool is full again, and there is nothing that nobody knows."""
    await rests(broker)

    async def as_many() -> bool:
        return len(engine.containers()) == len(slots(broker)) == len(inits(broker, engine.address))

    await until(broker, as_many)
    assert not list((broker.state_dir / "quarantine").iterdir())


async def test_an_engine_that_is_restarted_with_all_that_it_runs(place: Path, engine: Engine) -> None:
    """Warm ones and sessions end with it, users are told to wait; then the pool is filled, homes are as they were."""
    async with brokered(place, engine, live_restore=False) as broker:
        before = slots(broker)
        await engine.stop()
        for user in ("ann", "bob"):
            await told_to_wait(broker, user)
        await until(broker, lambda: _none(broker))
        await until(broker, lambda: _says_why(broker))
        await engine.start()
        assert await comes(broker, "ann") == "ann"
        assert await comes(broker, "dan") == "dan"
        assert await comes(broker, "bob") == "cat: /vol/home/mine: No such file or directory\n(exit code 1)"
        await whole(broker, engine)
        assert not before & slots(broker)
        assert await run(broker, "eve", "echo hello") == "hello"
        assert (await newest(broker, "eve"))["path"] == "generic_warm"
        await whole(broker, engine)


async def _says_why(broker: BrokerProcess) -> bool:
    return bool((await seen(broker))["error"])


async def _none(broker: BrokerProcess) -> bool:
    it = await seen(broker)
    return bool(it["hot"] + it["paused"] == 0)


async def test_an_engine_that_is_killed_and_leaves_containers_alone(place: Path, engine: Engine) -> None:
    """Who can be served without it is served: sessions go on, and a warm sandbox that runs is claimed."""
    async with brokered(place, engine, live_restore=True) as broker, shell(broker, "dan") as dan:
        before = inits(broker, engine.address)
        await engine.kill()
        assert await run(broker, "ann", "cat ~/mine") == "ann"
        assert (await newest(broker, "ann"))["path"] == "generic_warm"
        assert await dan.run("cat ~/mine") == "dan"
        for user in ("bob", "cid"):
            await told_to_wait(broker, user)
        await engine.start(live_restore=True)
        for user in ("bob", "cid"):
            assert "No such file" in await comes(broker, user)
        assert await dan.run("cat ~/mine") == "dan"
        assert await run(broker, "ann", "cat ~/mine") == "ann"
        await whole(broker, engine)
        after = inits(broker, engine.address)
        kept = [(await broker.api("GET", f"/v1/sessions/{user}/main"))["sandbox"]["slot"] for user in ("ann", "dan")]
        assert [after[slot] for slot in kept] == [before[slot] for slot in kept]


async def test_an_engine_that_hangs_while_sandboxes_are_claimed(place: Path, engine: Engine) -> None:
    async with brokered(place, engine, live_restore=True) as broker, shell(broker, "dan") as dan:
        engine.hold()
        assert await run(broker, "ann", "cat ~/mine") == "ann"
        assert (await newest(broker, "ann"))["path"] == "generic_warm"
        await asyncio.gather(*(told_to_wait(broker, user) for user in ("bob", "cid")))
        assert await dan.run("cat ~/mine") == "dan"
        engine.release()
        for user in ("bob", "cid"):
            assert "No such file" in await comes(broker, user)
        await whole(broker, engine)
        assert await dan.run("cat ~/mine") == "dan"


async def test_an_engine_that_is_restarted_while_no_broker_runs(place: Path, engine: Engine) -> None:
    """What is left of the containers is found at the next start, and taken away."""
    async with brokered(place, engine, live_restore=False) as broker:
        await broker.stop()
        await engine.stop()
        await engine.start()
        await broker.start()
        await filled(broker, 2)
        for user in ("ann", "dan"):
            assert await comes(broker, user) == user
        await whole(broker, engine)
