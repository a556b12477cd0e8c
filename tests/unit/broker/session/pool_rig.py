"""A pool over sandboxes that only the fake engine knows, on virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from broker.config import Config
from broker.errors import Code, CortexError
from broker.host.memory import HostMemory
from broker.sandbox.driver import SandboxSpec
from broker.sandbox.fake import FakeDriver, FakeEngine, Script
from broker.sandbox.reconcile import Adopted
from broker.session.pool import Pool
from broker.session.sandbox import NOBODY, Runtime, Sandbox
from broker.session.shelf import Shelf
from broker.session.warm import OnLeft, OnLost
from sandbox_agent.wire.messages import Status

GIB = 2**30
NOWHERE = Path("/nowhere")


def down() -> CortexError:
    return CortexError(Code.ENGINE_DOWN, "the engine is down", hint="start it")


def no_image() -> CortexError:
    return CortexError(Code.IMAGE_MISSING, "the image is not there", hint="build it")


class Box(Sandbox):
    """A sandbox without sockets, slot and store. ``quiet``: it leaves questions unanswered."""

    def __init__(self, world: World, agent: str, ref: str, number: int, on_lost: OnLost) -> None:
        runtime = cast(Runtime, world.runtime)
        slot, link = cast(Any, SimpleNamespace(id=f"s{number}")), cast(Any, SimpleNamespace(connected=True))
        super().__init__(
            runtime, NOBODY, slot, 1, cast(Any, None), link, lambda status: None, lambda reason: on_lost(self, reason)
        )
        self.world = world
        self.ref, self.agent = ref, agent
        self.boot_hash, self.recipe = world.boot(agent), world.warmer.recipe(agent)
        self.status = Status("ready", ahead=world.warmer.ahead)
        self.quiet = asyncio.Event()
        self.ends: list[str] = []

    async def pause(self) -> None:
        await self.world.pause_gate.wait()
        await super().pause()

    async def unresponsive(self) -> str:
        await self.quiet.wait()
        return "it left 2 questions unanswered"

    async def put_away(self, *, grace_s: float) -> None:
        assert not self.ends, f"{self.ref} was put away after {self.ends}"
        assert grace_s == 0
        await asyncio.sleep(self.world.end_s)
        if self.world.end_error is not None:
            raise self.world.end_error
        await self.runtime.driver.remove(self.ref)
        self.ends.append("put_away")

    async def let_go(self) -> None:
        self.ends.append("let_go")


@dataclass
class FakeWarmer:
    """A ``Warmer``. ``seconds``: how long one takes; ``error``: raised then; ``ahead``: of new ones; ``hook`` is
    called when one is begun."""

    world: World
    seconds: float = 1.0
    error: Exception | None = None
    refused: CortexError | None = None
    ahead: str = "open"
    version: str = "1"
    made: list[Box] = field(default_factory=list)
    under_way: Counter[str] = field(default_factory=Counter)
    begun: int = 0
    most: int = 0
    hook: Callable[[str], None] = lambda agent: None

    def recipe(self, agent: str) -> str:
        if self.refused is not None:
            raise self.refused
        return f"{agent}-{self.version}"

    async def make(self, agent: str, on_lost: OnLost, on_left: OnLeft = lambda box: None) -> Sandbox:
        self.under_way[agent] += 1
        self.begun += 1
        self.most = max(self.most, self.under_way.total())
        try:
            self.hook(agent)
            recipe, boot = self.recipe(agent), self.world.boot(agent)
            await asyncio.sleep(self.seconds)
            if self.error is not None:
                if self.world.end_error is not None:
                    on_left(await self._box(agent, on_lost))
                raise self.error
            box = await self._box(agent, on_lost)
            box.recipe, box.boot_hash = recipe, boot
            return box
        finally:
            self.under_way[agent] -= 1

    async def _box(self, agent: str, on_lost: OnLost) -> Box:
        number = next(self.world.numbers)
        spec = SandboxSpec(f"s{number}", 1, NOWHERE, NOWHERE, NOWHERE, 1)
        ref = await self.world.driver.create(spec)
        await self.world.driver.start(ref)
        self.made.append(Box(self.world, agent, ref, number, on_lost))
        return self.made[-1]

    async def adopt(self, adopted: Adopted, on_lost: OnLost, on_left: OnLeft = lambda box: None) -> Sandbox:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return await self._box(adopted.record.agent, on_lost)


class World:
    """``tree``: of the settings; ``host``: the host's memory; ``end_error``: why none can be put away; ``pause_gate``:
    pauses wait for it."""

    def __init__(self, **pool: Any) -> None:
        self.engine = FakeEngine(Script(hello=False))
        self.driver = FakeDriver(self.engine)
        self.runtime = SimpleNamespace(config=lambda: self.config, driver=self.driver)
        self.numbers = itertools.count(1)
        self.host = HostMemory(64 * GIB, 32 * GIB)
        self.end_s = 0.2
        self.pause_gate = asyncio.Event()
        self.pause_gate.set()
        self.end_error: CortexError | None = None
        self.users: list[tuple[str, str]] = []
        self.warmer = FakeWarmer(self)
        self.taken: list[Box] = []
        self.configure(**pool)
        self.make_pool()

    def configure(self, **pool: Any) -> None:
        """Settings of [pool]; ``agents`` replaces [pool.agents]."""
        agents = {name: {"command": [name]} for name in ("a", "b")}
        self.config = Config.model_validate({"agents": agents, "pool": pool})

    def make_pool(self) -> None:
        loop = asyncio.get_running_loop()
        self.pool = Pool(
            cast(Runtime, self.runtime),
            self.warmer,
            users=lambda: self.users,
            clock=loop.time,
            memory=lambda: self.host,
            chance=lambda: 1.0,
        )

    def boot(self, agent: str) -> str:
        return f"boot-{agent}-{self.warmer.version}"

    def take(self, agent: str = "a", boot: str | None = None) -> Box | None:
        """Claims one; none twice."""
        box = self.pool.take(agent, self.boot(agent) if boot is None else boot)
        if box is not None:
            assert isinstance(box, Box)
            assert box not in self.taken
            assert not box.ends
            assert box.ref in self.engine.sandboxes
            self.taken.append(box)
        return box

    def shelf(self, agent: str = "a") -> Shelf:
        return self.pool._shelves[agent]

    def sizes(self, agent: str = "a") -> dict[str, int]:
        """Without what is 0."""
        return {state: count for state, count in self.shelf(agent).sizes().items() if count}

    async def filled(self, seconds: float = 300.0) -> None:
        """Starts the pool and lets time pass."""
        self.pool.start()
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """No task is left, and every box is either let go, put away or somebody's."""
        await self.pool.close()
        for box in self.warmer.made:
            assert (box in self.taken) != bool(box.ends), (box.ref, box.ends)
        await self.engine.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
