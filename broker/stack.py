"""What sessions are made of, from the driver up to the registry: opened in order, taken over, reloaded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog

from broker.config import Config
from broker.errors import CortexError
from broker.gateway.child import GatewayChild
from broker.gateway.link import GatewayLink
from broker.host.tasks import TaskOwner
from broker.sandbox.drivers import make_driver, sandbox_uid
from broker.sandbox.packages import PackageShelf
from broker.sandbox.reconcile import reconcile
from broker.sandbox.slots import Slots
from broker.session.assembly import Assembler
from broker.session.credentials import VaultCredentials
from broker.session.directory import Solo
from broker.session.egress_view import EgressView
from broker.session.foresight import Foresight
from broker.session.policies import Policies
from broker.session.pool import Pool
from broker.session.preparation import Preparation
from broker.session.providers import BuilderNetwork, Credentials, FileCredentials
from broker.session.registry import Registry
from broker.session.sandbox import Runtime
from broker.session.sources import FilesSource, HttpSource, StoreSource
from broker.session.usage import Accounting
from broker.session.warm import WarmMaker
from broker.store.activity import ActivityStore
from broker.store.db import Database
from broker.store.identity import Identity
from broker.store.keeper import Keeper
from broker.store.keys import KeyFile
from broker.store.packages import PackageStore
from broker.store.sessions import WARM, SessionStore
from broker.store.usage import UsageStore
from broker.store.users import UserStore

log = structlog.get_logger(__name__)

GATEWAY_WAIT_S = 5.0


class Stack:
    """``open`` opens it all; ``closing`` then closes what was opened, whatever failed on the way."""

    def __init__(
        self, config: Callable[[], Config], tasks: TaskOwner, closing: AsyncExitStack, db: Database, identity: Identity
    ) -> None:
        self._config = config
        self._tasks = tasks
        self._closing = closing
        self._db = db
        self._identity = identity
        self._store = SessionStore(db)
        self._credentials: Credentials = FileCredentials()
        self.foresight = Foresight(ActivityStore(db), lambda: config().pool)
        self.egress = EgressView()
        self.usage = Accounting(UsageStore(db), config)
        self.keeper: Keeper | None = None
        """Of the vault; None where sandboxes are not isolated."""

    async def open(self) -> None:
        """Raises ``CortexError``."""
        await self._open_driver()
        await self._open_vault()
        await self._open_gateway()
        self._open_sessions()

    async def _open_vault(self) -> None:
        if not self.driver.isolated:
            # The agent could read the keys, so there are none.
            return
        file = KeyFile.at(Path(self._config().vault.key_file), os.environ)
        self.keeper = await Keeper.open(self._db, file, self._identity.key)
        self._closing.push_async_callback(self.keeper.close)
        credentials = VaultCredentials(
            self.keeper.vault,
            self._config,
            self._credentials,
            changed=lambda user: self.registry.config_changed(user, "credentials"),
            awake=lambda user: self.registry.awake(user),
        )
        self._closing.push_async_callback(credentials.close)
        credentials.start()
        self._credentials = credentials

    async def _open_driver(self) -> None:
        config = self._config()
        self.slots = Slots(state_dir(config), uid=sandbox_uid(config))
        self.slots.check()
        self.driver = make_driver(config, self._identity.id, self._tasks, self.slots)
        self._closing.push_async_callback(self.driver.close)
        await self.driver.open()

    async def _open_gateway(self) -> None:
        config = self._config()
        await self.usage.open()
        self.gateway = GatewayLink(
            Path(config.gateway.link),
            self._tasks,
            settings=lambda: self._config().gateway,
            on_report=self._reported,
        )
        self.gateway.spent = self.usage.spent
        self.usage.start(self.gateway)
        self._closing.push_async_callback(self.usage.close)
        self._closing.push_async_callback(self.gateway.close)
        self._policies = Policies(self.gateway, self._config, self._tasks)
        await self._policies.start()
        await self.gateway.start()
        self._child = GatewayChild(
            self.gateway, self._tasks, log_level=config.broker.log_level, log_format=config.broker.log_format
        )
        self._closing.push_async_callback(self._stop_gateway)
        if config.gateway.mode == "child":
            await self._child.start()

    def _reported(self, facts: Mapping[str, Any]) -> None:
        """The gateway tells something by itself."""
        if facts["kind"] == "egress":
            self.egress.heard(facts)
        elif facts["kind"] == "usage":
            self.usage.heard(facts)
        else:
            log.info("gateway_report", **facts)

    def _open_sessions(self) -> None:
        config = self._config()
        shelf = PackageShelf(
            driver=self.driver,
            slots=self.slots,
            index=PackageStore(self._db),
            network=BuilderNetwork(self.gateway, self._config),
            config=self._config,
            installation_key=self._identity.key,
        )
        web_app = HttpSource(self._config)
        sources = (FilesSource(users_dir(config)), web_app, StoreSource(UserStore(self._db)))
        runtime = Runtime(
            config=self.usage.resolved,
            driver=self.driver,
            slots=self.slots,
            gateway=self.gateway,
            store=self._store,
            assembler=Assembler(sources, self._config),
            shelf=shelf,
            credentials=self._credentials,
            installation_key=self._identity.key,
            image=made_from(config),
            activity=self.foresight.activity,
            egress=self.egress,
        )
        self.pool = Pool(runtime, WarmMaker(runtime), users=lambda: self.registry.warm())
        self.registry = Registry(runtime, Solo(config.broker.node), pool=self.pool)
        self._preparation = Preparation(runtime, self.registry, self.pool, lambda: self._config().pool.agents)
        # Sessions that are let go of note it.
        for part in (self.foresight, web_app, shelf, self.pool, self.registry):
            self._closing.push_async_callback(part.close)
        self.registry.start()

    async def take_over(self) -> None:
        """What the last broker left running goes on; what nobody knows any more goes away."""
        rows = await self._store.sandboxes()
        outcome = await reconcile(self.driver, self.slots, rows, self._store.sandbox_delete)
        warm = [adopted for adopted in outcome.adopted if adopted.record.role == WARM]
        settling = [self.pool.adopt(adopted) for adopted in warm]
        settling += await self.registry.adopt_all([adopted for adopted in outcome.adopted if adopted not in warm])
        self.pool.start()
        self.foresight.start(self._preparation)
        self._closing.push_async_callback(self.foresight.stop_looking)
        self._tasks.start(self._complete_table(settling), "gateway_table")
        self._tasks.start(self.slots.empty_trash(), "empty_trash")

    async def _complete_table(self, settling: Sequence[asyncio.Task[None]]) -> None:
        """Told too early, a gateway that lived on would cut the model calls of turns that go on."""
        if settling:
            await asyncio.wait(settling)
        await self.gateway.table_complete()

    async def meet_gateway(self) -> None:
        """A start waits for the gateway, so that the first session need not; without one it serves all the same."""
        try:
            await self.gateway.wait_connected(GATEWAY_WAIT_S)
        except CortexError as error:
            log.error("gateway_missing", error=str(error), hint=error.hint)

    async def settings_changed(self) -> None:
        """config.toml is another one now."""
        self.usage.settings_changed()
        self.registry.settings_reloaded()
        self.pool.settings_changed()
        await self.gateway.settings_changed()
        self._policies.settings_changed()

    async def _stop_gateway(self) -> None:
        """It stays for the sandboxes that go on."""
        try:
            needed = bool(self.slots.ids())
        except CortexError as error:
            log.error("state_unreadable", error=str(error), hint=error.hint)
            needed = False
        if not needed:
            await self._child.stop(2.0)


def made_from(config: Config) -> str:
    """What the driver makes sandboxes from, as far as config.toml says: part of the boot hash."""
    sandbox = config.sandbox
    settings = sandbox.docker if sandbox.driver == "docker" else sandbox.process
    return f"{sandbox.driver} {settings.model_dump_json(exclude={'host', 'call_timeout_s'})}"


def state_dir(config: Config) -> Path:
    """Where durable state is."""
    return _resolved(config.broker.state_dir)


def users_dir(config: Config) -> Path:
    """The watched directory of per-user files."""
    return _resolved(config.broker.users_dir)


def _resolved(path: Path | None) -> Path:
    assert path is not None, "settings.load resolves every directory"
    return path
