"""Who waits for the end of a container, on virtual time: whatever becomes of its event, they hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from broker.config import DockerConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.docker_engine import Engine
from tests.virtual import run


class LossyEngine:
    """An engine with one container, whose event stream can be ``cut`` and never comes back."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"Status": "running"}
        self.shows = 0
        self.cut = asyncio.Event()

    async def info(self, *, timeout_s: float) -> dict[str, Any]:
        return {}

    async def image_id(self, name: str) -> str:
        return "image"

    async def show(self, ref: str) -> dict[str, Any]:
        self.shows += 1
        return {"State": self.state}

    async def logs(self, ref: str, lines: int) -> str:
        return "its last words"

    async def ended(self, label: str, on_up: Callable[[], None], on_end: Callable[[str], None]) -> None:
        if self.cut.is_set():
            await asyncio.Event().wait()
        on_up()
        await self.cut.wait()
        raise CortexError(Code.ENGINE_DOWN, "the stream has ended", hint="wait")

    async def close(self) -> None:
        return


def play(scene: Callable[[DockerDriver, LossyEngine], Awaitable[None]]) -> None:
    """Runs ``scene`` with a driver that is open."""

    async def whole() -> None:
        tasks, engine = TaskOwner("docker"), LossyEngine()
        driver = DockerDriver(DockerConfig(), installation="i", node="n", tasks=tasks)
        driver._engine = cast(Engine, engine)
        await driver.open()
        await scene(driver, engine)
        await driver.close()
        await tasks.close()

    run(whole())


async def waits(driver: DockerDriver) -> asyncio.Future[Any]:
    """Somebody who waits, and has seen it run."""
    waiter = asyncio.ensure_future(driver.wait("c"))
    await asyncio.sleep(0.01)
    assert not waiter.done()
    return waiter


def test_whoever_comes_after_an_event_was_lost_hears_of_the_end_and_so_do_all() -> None:
    async def scene(driver: DockerDriver, engine: LossyEngine) -> None:
        first = await waits(driver)
        engine.cut.set()
        await asyncio.sleep(0.01)
        engine.state = {"Status": "exited", "ExitCode": 9}
        async with asyncio.timeout(0.1):
            assert (await driver.wait("c")).tail == "its last words"
        assert (await first).code == 9

    play(scene)


def test_whoever_joins_while_events_come_costs_the_engine_no_call() -> None:
    async def scene(driver: DockerDriver, engine: LossyEngine) -> None:
        waiters = [await waits(driver) for _ in range(3)]
        await asyncio.sleep(10)
        assert engine.shows == 1
        for waiter in waiters:
            waiter.cancel()

    play(scene)


def test_a_driver_that_closes_tells_whoever_waits() -> None:
    async def scene(driver: DockerDriver, engine: LossyEngine) -> None:
        waiters = [await waits(driver), await waits(driver)]
        await driver.close()
        for waiter in (*waiters, driver.wait("c")):
            with pytest.raises(CortexError) as caught:
                await waiter
            assert caught.value.code is Code.ENGINE_DOWN

    play(scene)
