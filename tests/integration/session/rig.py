"""Sessions with the real store, slots, links and reconcile, over sandboxes that are fake."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from math import inf
from os import geteuid
from pathlib import Path
from typing import Any, cast

from broker.config import Config
from broker.errors import Code, CortexError
from broker.gateway.link import Egress, GatewayLink, Provider
from broker.metrics import SANDBOX_CALLS, STATE_WRITES, STORE_READS, STORE_WRITES
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.fake import FakeDriver, FakeEngine, FakeSandbox, Script
from broker.sandbox.packages import PackageShelf
from broker.sandbox.reconcile import Outcome, reconcile
from broker.sandbox.slots import Slots, home_key
from broker.session.assembly import Assembler
from broker.session.directory import Solo
from broker.session.providers import BuilderNetwork, FileCredentials
from broker.session.registry import Registry
from broker.session.sandbox import Runtime, Sandbox
from broker.session.session import Session
from broker.session.sources import StoreSource
from broker.session.warm import WarmMaker
from broker.store.db import Database
from broker.store.packages import PackageStore
from broker.store.sessions import SessionStore
from broker.store.users import UserStore
from sandbox_agent.wire.messages import Attach

KEY = b"k" * 32
QUICK: dict[str, Any] = {
    "session": {"config_timeout_s": 2, "bringup_timeout_s": 10, "bind_timeout_s": 5},
    "sandbox": {"hello_timeout_s": 2, "stop_timeout_s": 0.2},
    "agents": {"other": {"command": ["other"]}},
}


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Breakable:
    """Passes everything on to ``inner`` until it is ``broken``; then every method raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.broken:
                raise AssertionError(f"{type(self.inner).__name__}.{name} was called")
            return value(*args, **kwargs)

        return call


class FakeGateway(GatewayLink):
    """A gateway that acknowledges at once. ``slots``: what it was told, by slot."""

    def __init__(self) -> None:
        self.slots: dict[str, tuple[Mapping[str, str] | None, Mapping[str, Provider], Egress]] = {}
        self.puts = 0
        self.error: CortexError | None = None

    async def put_slot(
        self,
        slot: str,
        incarnation: int,
        identity: Mapping[str, str] | None,
        providers: Mapping[str, Provider],
        egress: Egress,
        fds: tuple[int, int] | None = None,
    ) -> None:
        if self.error is not None:
            raise self.error
        self.puts += 1
        self.slots[slot] = (identity, providers, egress)

    async def drop_slot(self, slot: str) -> None:
        if self.error is not None:
            raise self.error
        self.slots.pop(slot, None)


class Client:
    """An attached client that remembers what was done to it."""

    _number = 0

    def __init__(self) -> None:
        Client._number += 1
        self.connection = f"c{Client._number}"
        self.holding = False
        self.holds = 0
        self.closed: tuple[int, str] | None = None
        self.spoke_at = -inf
        self.on_speech: Callable[[], None] | None = None

    def hold(self, on_speech: Callable[[], None] | None = None) -> None:
        self.holding = True
        self.holds += 1
        self.on_speech = on_speech or self.on_speech

    def release(self) -> None:
        self.holding = False
        self.on_speech = None

    def speak(self, at: float = -inf) -> None:
        """It has something for the agent."""
        self.spoke_at = at
        if self.on_speech is not None:
            self.on_speech()

    def notify(self, message: bytes) -> None:
        json.loads(message)

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)

    @property
    def attach(self) -> Attach:
        return Attach(connection=self.connection, protocol="acp")


class Shelf:
    """Warm sandboxes that a test has made; handed out as ``session.pool`` does, oldest first."""

    def __init__(self) -> None:
        self.boxes: list[Sandbox] = []
        self.cold = 0

    def take(self, agent: str, boot: str) -> Sandbox | None:
        fit = [box for box in self.boxes if (box.agent, box.boot_hash) == (agent, boot)]
        if not fit:
            return None
        self.boxes.remove(fit[0])
        return fit[0]

    @contextmanager
    def yielding(self) -> Iterator[None]:
        self.cold += 1
        yield


class Rig:
    """One broker's sessions. ``engine`` and ``base`` outlive a ``restart``."""

    def __init__(self, base: Path, changes: dict[str, Any]) -> None:
        self.base = base
        self.tree = merged(QUICK, changes)
        self.config = Config.model_validate(self.tree)
        self.clock, self.steady = Clock(), Clock()
        self.engine = FakeEngine()
        self.gateway = FakeGateway()
        self.slots = Slots(base, uid=geteuid())
        self.slots.check()

    async def open(self) -> Rig:
        self.db = await Database.open(self.base)
        self.users = UserStore(self.db)
        self.rows = SessionStore(self.db)
        self.driver = Breakable(FakeDriver(self.engine))
        self.store = Breakable(self.rows)
        self._make()
        return self

    def _make(self) -> None:
        driver = cast(SandboxDriver, self.driver)
        self.shelf = PackageShelf(
            driver=driver,
            slots=self.slots,
            index=PackageStore(self.db),
            network=BuilderNetwork(self.gateway, lambda: self.config),
            config=lambda: self.config,
            installation_key=KEY,
        )
        self.sources: list[Any] = [StoreSource(self.users)]
        self.runtime = Runtime(
            config=lambda: self.config,
            driver=driver,
            slots=self.slots,
            gateway=self.gateway,
            store=cast(SessionStore, self.store),
            assembler=Assembler(self.sources, lambda: self.config),
            shelf=self.shelf,
            credentials=FileCredentials(),
            installation_key=KEY,
            image="fake",
        )
        self.warmer = WarmMaker(self.runtime)
        self.pool = Shelf()
        self.registry = Registry(self.runtime, Solo("n1"), self.clock, self.pool, steady=self.steady)

    async def warm(self, agent: str = "demo") -> Sandbox:
        """One more warm sandbox."""
        box = await self.warmer.make(agent, lambda box, reason: self.pool.boxes.remove(box))
        self.pool.boxes.append(box)
        return box

    async def passes(self, seconds: float) -> None:
        """Time in which nothing happens; timers that are due by then ring."""
        self.clock.now += seconds
        self.steady.now += seconds
        sessions = list(self.registry._sessions.values())
        for idling in (session._idling for session in sessions):
            if idling._timer is not None and idling._due <= self.steady.now:
                idling._timer.cancel()
                idling._timed()
        await until(lambda: all(one._mailbox.idle and not one._resting._lined_up for one in sessions))

    def configure(self, changes: dict[str, Any]) -> None:
        self.tree = merged(self.tree, changes)
        self.config = Config.model_validate(self.tree)

    async def session(self, user: str = "ann", workspace: str = "main") -> Session:
        """Created; its bring-up has begun."""
        session, _ = await self.registry.create(user, workspace, None)
        assert isinstance(session, Session)
        return session

    async def ready(self, user: str = "ann", workspace: str = "main") -> Session:
        session = await self.session(user, workspace)
        await session.wait_ready()
        return session

    async def written(self, state: str, *, slot: str, user: str = "ann", workspace: str = "main") -> None:
        """Returns when the session's row says so; a bring-up does not wait for it."""
        async with asyncio.timeout(5):
            while (row := await self.rows.get(user, workspace)) is None or (row.state, row.slot) != (state, slot):
                await asyncio.sleep(0.002)

    async def put(self, section: str, value: dict[str, Any], user: str = "ann") -> list[Any]:
        """As the control API does it: stored, then applied."""
        await self.users.put_section(user, section, value)
        return list(await self.registry.config_changed(user, section))

    @property
    def box(self) -> FakeSandbox:
        """The one sandbox that there is."""
        (box,) = self.engine.sandboxes.values()
        return box

    def calls(self, name: str) -> int:
        return sum(1 for call, _ in self.engine.calls if call == name)

    async def restart(self) -> Outcome:
        """The broker ends and another one starts: sandboxes, disk and store stay."""
        await self.let_go()
        await self.db.close()
        self.slots = Slots(self.base, uid=geteuid())
        self.gateway = FakeGateway()
        await self.open()
        outcome = await reconcile(
            cast(SandboxDriver, self.driver), self.slots, await self.rows.sandboxes(), self.rows.sandbox_delete
        )
        for adopted in outcome.adopted:
            try:
                if adopted.record.role == "warm":
                    self.pool.boxes.append(await self.warmer.adopt(adopted, lambda box, reason: None))
                else:
                    await self.registry.adopt(adopted)
            except CortexError as error:
                outcome.failed[adopted.slot.id] = str(error)
        return outcome

    async def let_go(self) -> None:
        await self.registry.close()
        for box in self.pool.boxes:
            await box.let_go()
        await self.shelf.close()

    async def close(self) -> None:
        await self.let_go()
        await self.engine.close()
        await self.db.close()

    async def assert_at_rest(self, *users: str) -> None:
        """Nothing runs, nothing is left over, and the homes are where they belong."""
        assert self.slots.ids() == []
        assert await self.rows.sandboxes() == []
        assert self.engine.sandboxes == {}
        assert self.gateway.slots == {}
        for user in users:
            assert self.slots.has_home(home_key(user, "main"))


@asynccontextmanager
async def rig(**changes: Any) -> AsyncIterator[Rig]:
    before = asyncio.all_tasks()
    base = Path(tempfile.mkdtemp(prefix="ctx-", dir="/tmp"))
    made = Rig(base, changes)
    try:
        yield await made.open()
    finally:
        await made.close()
        shutil.rmtree(base, ignore_errors=True)
    leaked = {task for task in asyncio.all_tasks() - before if not _of_the_test(task)}
    assert not leaked, leaked


def _of_the_test(task: asyncio.Task[Any]) -> bool:
    """Done, or what a state machine leaves the rig with."""
    return task.done() or getattr(task.get_coro(), "__name__", "") in ("wait_for", "aclose")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


async def until(reached: Callable[[], bool], limit_s: float = 8.0) -> None:
    """Looks again and again; the deadline fails the test."""
    async with asyncio.timeout(limit_s):
        while not reached():
            await asyncio.sleep(0.002)


def counters() -> dict[str, float]:
    """What a warm message leaves alone."""
    found = {}
    for metric in (STORE_READS, STORE_WRITES, SANDBOX_CALLS, STATE_WRITES):
        for family in metric.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    found[f"{sample.name}{sorted(sample.labels.items())}"] = sample.value
    return found


async def echo(sock: socket.socket, text: bytes = b"hi") -> bytes:
    """Sends one masked text frame and returns what comes back."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, bytes((0x81, 0x80 | len(text))) + bytes(4) + text)
    async with asyncio.timeout(5):
        answer = await loop.sock_recv(sock, 1024)
    return answer[2:]


def engine_down() -> CortexError:
    return CortexError(Code.ENGINE_DOWN, "the engine is down", hint="start it")


def script(**fields: Any) -> Script:
    return Script(**fields)
