"""One install of one package: a sandbox that no tenant ever had, used once, its result published by rename."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

import structlog

from broker.config import Config
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.driver import EGRESS_PORT, GATEWAY_PORT, HOME_DIR, SandboxDriver, SandboxSpec
from broker.sandbox.link import Link
from broker.sandbox.package_calls import PackageCall
from broker.sandbox.shelf_files import Package, publish
from broker.sandbox.slots import Slot, Slots
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.messages import Built, Hello, Status, Welcome

log = structlog.get_logger(__name__)

_INCARNATION = 1


class BuilderNetwork(Protocol):
    """Lets a builder reach the package registries (``gateway.allowed_hosts``) and nothing else."""

    async def put_builder(self, slot: str, incarnation: int, fds: tuple[int, int]) -> None:
        """Serves the slot's gateway and egress listeners; returns when acknowledged. Raises ``CortexError``."""

    async def drop_slot(self, slot: str) -> None:
        """Cuts the slot off; returns when acknowledged. Raises ``CortexError``."""


class Builder:
    """Runs builds; each has a slot, a sandbox and a link of its own."""

    def __init__(
        self,
        *,
        driver: SandboxDriver,
        slots: Slots,
        network: BuilderNetwork,
        config: Callable[[], Config],
        installation_key: bytes,
    ) -> None:
        self._driver = driver
        self._slots = slots
        self._network = network
        self._config = config
        self._key = installation_key

    async def build(self, call: PackageCall) -> Package:
        """Installs and publishes. Raises ``CortexError`` (``PACKAGE_FAILED``, or why no sandbox could be had)."""
        slot = self._slots.create(self._slots.new_id())
        run = _Run(self._driver, self._network, slot, SlotSockets(slot, gid=self._slots.gid))
        try:
            built = await self._built(run, call)
            # Published only when nothing that ran in there can still write to it.
            await run.end()
            return await asyncio.to_thread(publish, slot, self._slots, call, built)
        finally:
            if await run.put_away():
                await self._slots.remove(slot.id)

    async def _built(self, run: _Run, call: PackageCall) -> Built:
        config = self._config().sandbox
        link = run.open(self._key, self._welcome(run.slot))
        await self._network.put_builder(run.slot.id, _INCARNATION, run.sockets.fds)
        await run.launch(self._spec(run.slot))
        await link.wait_hello(config.hello_timeout_s)
        built = await link.build(
            call.ecosystem,
            call.package,
            scripts=call.name in config.package_scripts,
            registry=config.npm_registry if call.ecosystem == "npm" else config.pip_index,
            timeout=config.package_timeout_s,
        )
        if not built.ok:
            raise CortexError(
                Code.PACKAGE_FAILED,
                f"{call.spec} could not be installed",
                hint="check its name and version; the registry has to be in gateway.allowed_hosts, and a package "
                "that needs its install scripts in sandbox.package_scripts",
                cause=built.what[-1000:],
            )
        return built

    def _spec(self, slot: Slot) -> SandboxSpec:
        return SandboxSpec(
            slot=slot.id,
            incarnation=_INCARNATION,
            sock_dir=slot.sock_dir,
            vol_dir=slot.vol_dir,
            packages_dir=self._slots.packages_dir,
            uid=self._slots.uid,
            gid=self._slots.gid,
            role="builder",
        )

    def _welcome(self, slot: Slot) -> Welcome:
        isolated = self._driver.isolated
        return Welcome(
            incarnation=_INCARNATION,
            secret=b"",
            home=HOME_DIR if isolated else os.fspath(slot.home_dir),
            gateway_port=GATEWAY_PORT if isolated else 0,
            egress_port=EGRESS_PORT if isolated else 0,
            streams=0,
        )


class _Run:
    """What one build holds, let go of in one order."""

    def __init__(self, driver: SandboxDriver, network: BuilderNetwork, slot: Slot, sockets: SlotSockets) -> None:
        self.slot = slot
        self.sockets = sockets
        self._driver = driver
        self._network = network
        self._tasks = TaskOwner(f"builder.{slot.id}")
        self._link: Link | None = None
        self._asked = False
        self._ref = ""

    def open(self, installation_key: bytes, welcome: Welcome) -> Link:
        """The slot's sockets and a link on them. Raises ``CortexError``."""

        async def on_hello(_link: Link, _hello: Hello) -> Welcome:
            return welcome

        def on_status(status: Status) -> None:
            log.debug("builder_status", slot=self.slot.id, agent=status.agent)

        def on_lost(reason: str) -> None:
            log.warning("builder_lost", slot=self.slot.id, reason=reason)

        self.sockets.open()
        self._link = Link(
            self.sockets,
            _INCARNATION,
            installation_key=installation_key,
            on_hello=on_hello,
            on_status=on_status,
            on_lost=on_lost,
        )
        self._link.start()
        return self._link

    async def launch(self, spec: SandboxSpec) -> None:
        """Creates and starts the sandbox; should it end, the link is closed and whoever waits on it hears why."""
        self._asked = True
        self._ref = await self._driver.create(spec)
        await self._driver.start(self._ref)
        self._tasks.start(self._watch(), "watch")

    async def _watch(self) -> None:
        ended = await self._driver.wait(self._ref)
        if self._link is not None:
            await self._link.close(f"it ended with {ended.code}: {ended.tail[-500:]}")

    async def end(self) -> None:
        """Removes the sandbox; nothing of it runs when this returns. Raises ``CortexError``."""
        await self._tasks.close()
        if self._link is not None:
            await self._link.close("the build is over")
        if self._asked and not self._ref:
            mine = [found.ref for found in await self._driver.list() if found.slot == self.slot.id]
            self._ref = mine[0] if mine else ""
        if self._ref:
            await self._driver.remove(self._ref)
        self._asked, self._ref = False, ""

    async def put_away(self) -> bool:
        """Lets go of all; False when the sandbox may still live, so that its slot has to stay."""
        gone = True
        try:
            await self.end()
        except CortexError as error:
            log.error("builder_not_removed", slot=self.slot.id, error=str(error))
            gone = False
        try:
            await self._network.drop_slot(self.slot.id)
        except CortexError as error:
            log.warning("builder_not_cut_off", slot=self.slot.id, error=str(error))
        self.sockets.close()
        return gone
