"""START HERE: the life of the broker, top to bottom: build, start, run, reload, drain, stop.

The only module that sees every other. What is started first is stopped last; a stop ends no
sandbox: agents go on working and the next broker takes them over.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from broker.access import Access
from broker.config import Config
from broker.control import keyfiles
from broker.control.api import ControlServer
from broker.control.routes import Control
from broker.errors import CortexError
from broker.front.door import FrontDoor
from broker.host import logs
from broker.host.files import raise_file_limit
from broker.host.lag import LagMeter
from broker.host.listen import listen, require_local, url
from broker.host.signals import Signals
from broker.host.systemd import Notifier, feed_watchdog, listen_fds
from broker.host.tasks import TaskOwner
from broker.host.watch import watch
from broker.metrics import CONFIG_RELOADS
from broker.readiness import readiness
from broker.session.registry import Registry
from broker.session.sections import default_problems
from broker.session.userfiles import UserFiles
from broker.settings import Loaded, changed, load
from broker.stack import Stack, state_dir, users_dir
from broker.store.db import Database
from broker.store.identity import load as load_identity
from broker.store.tokens import TokenStore
from broker.store.users import UserStore

log = structlog.get_logger(__name__)

LAG_LIMIT_S = 5.0
"""Loop lag at which the watchdog is no longer fed."""
CHECKS = (default_problems,)
"""Checks of the settings by layers above them."""


class Broker:
    """One broker. ``start`` and ``stop`` for tests and the demo; ``run`` for a service."""

    registry: Registry
    access: Access
    admin_token: str
    control_url: str
    front_url: str

    def __init__(self, loaded: Loaded, overrides: Mapping[str, object] | None = None) -> None:
        self._loaded = loaded
        self._overrides = dict(overrides or {})
        self._tasks = TaskOwner("broker")
        self._notifier = Notifier()
        self._passed = listen_fds()
        self._lag = LagMeter()
        self._open = AsyncExitStack()
        """What has to be closed, whatever fails on the way."""
        self._stopping = asyncio.Event()

    def config(self) -> Config:
        """The settings of the moment."""
        return self._loaded.config

    # -- start ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens everything, from the store outwards. Raises ``CortexError``; then call ``stop``."""
        raise_file_limit()
        self._lag.start()
        self._open.callback(self._lag.stop)
        await self._open_state()
        self.stack = Stack(self.config, self._tasks, self._open, self.db, self.identity)
        await self.stack.open()
        self.registry = self.stack.registry
        await self.stack.take_over()
        await self.stack.meet_gateway()
        await self._open_doors()
        # What is there now stays: the collector need not walk it while clients wait.
        gc.collect()
        gc.freeze()
        await self._watch()
        log.info("started", front=self.front_url, control=self.control_url, driver=self.config().sandbox.driver)

    async def _open_state(self) -> None:
        config = self.config()
        assert config.broker.runtime_dir is not None, "settings.load resolves every directory"
        config.broker.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.db = await Database.open(state_dir(config))
        self._open.push_async_callback(self.db.close)
        self._open.push_async_callback(self._tasks.close)
        self.identity = await asyncio.to_thread(load_identity, state_dir(config))
        self.users = UserStore(self.db)

    async def _open_doors(self) -> None:
        config = self.config()
        token, secrets = Path(config.control.admin_token_file), Path(config.control.hook_secrets_file)
        self.admin_token = await asyncio.to_thread(keyfiles.admin_token, token, make=True)
        hook_keys = await asyncio.to_thread(keyfiles.hook_keys, secrets, make=True)
        self.access = Access(
            TokenStore(self.db), self.config, self.identity.key, admin_token=self.admin_token, hook_keys=hook_keys
        )
        front = listen(config.front.listen, "front.listen", self._passed)
        control = listen(config.control.listen, "control.listen", self._passed)
        if not self.stack.driver.isolated:
            require_local(front, "front.listen")
            require_local(control, "control.listen")
        self.front_url, self.control_url = url(front, "ws"), url(control, "http")
        about = (self.registry, self.access, self.users, self.config, lambda: self.front_url, self.health)
        stack = self.stack
        parts = (stack.keeper, stack.foresight, stack.pool.view, stack.usage, stack.egress)
        self.control = ControlServer(Control(*about, *parts))
        self._open.push_async_callback(self.control.close)
        await self.control.start(*control)
        self.front = FrontDoor(self.registry, self.access, self.config, self._tasks)
        self._open.push_async_callback(self.front.close)
        await self.front.start(front)

    async def _watch(self) -> None:
        """Returns when changes are seen from."""
        directory = users_dir(self.config())
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        files = UserFiles(directory, self.registry, self._tasks)
        users, file = asyncio.Event(), asyncio.Event()
        self._tasks.start(watch(directory, files.changed, recursive=True, started=users), "watch_users")
        await users.wait()
        if self._loaded.path is not None:
            self._tasks.start(watch(self._loaded.path.parent, self._file_changed, started=file), "watch_config")
            await file.wait()

    async def health(self) -> dict[str, str]:
        """What readiness depends on: "" is good, else what is wrong."""
        return await readiness(self.db, self.stack.driver, self.stack.gateway, state_dir(self.config()))

    # -- changes while running -----------------------------------------------------------------

    async def _file_changed(self, paths: set[Path]) -> None:
        if self._loaded.path in paths:
            await self.reload()

    async def reload(self) -> None:
        """Validates the file anew and swaps the tree; a wrong file changes nothing."""
        if self._loaded.path is None:
            return
        self._notifier.reloading()
        try:
            new = await asyncio.to_thread(load, self._loaded.path, os.environ, overrides=self._overrides, checks=CHECKS)
        except CortexError as error:
            CONFIG_RELOADS.labels("refused").inc()
            log.error("reload_refused", error=str(error), hint=error.hint, problems=error.details.get("problems"))
        else:
            keys, need_restart = changed(self._loaded.config, new.config)
            self._loaded = new
            CONFIG_RELOADS.labels("applied").inc()
            log.info("reloaded", changed=keys, need_restart=need_restart)
            if "broker.log_level" in keys:
                logs.set_level(new.config.broker.log_level)
            if keys:
                await self.stack.settings_changed()
        self._notifier.ready(self._status())

    # -- run and stop --------------------------------------------------------------------------

    async def run(self) -> int:
        """Serves until SIGTERM or SIGINT; SIGHUP reloads; a second signal forces. Returns the exit status."""
        forced = asyncio.Event()

        def reload_soon() -> None:
            self._tasks.start(self.reload(), "reload")

        with Signals(stop=self._stopping.set, force=forced.set, reload=reload_soon):
            try:
                await self.start()
                self._notifier.ready(self._status())
                self._tasks.start(feed_watchdog(self._notifier, self._healthy), "watchdog")
                await self._stopping.wait()
                self._notifier.stopping("closing clients")
                await self._drain(forced)
            finally:
                await self.stop()
        return 0

    def _healthy(self) -> bool:
        self._notifier.status(self._status())
        return self._lag.take_worst() < LAG_LIMIT_S

    def _status(self) -> str:
        states = self.registry.states()
        return f"{sum(states.values())} sessions held, {states.get('ready', 0)} ready, {len(self.front)} connections"

    async def _drain(self, forced: asyncio.Event) -> None:
        """Clients are told to come back, which they do to the next broker."""
        limit = self.config().broker.drain_timeout_s
        closing = self._tasks.start(self.front.close(1012, timeout=limit), "drain")
        waiting = self._tasks.start(forced.wait(), "forced")
        await asyncio.wait((closing, waiting), return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """Lets go of everything, from the doors inwards; sandboxes go on, and their gateway. Idempotent."""
        await self._open.aclose()
