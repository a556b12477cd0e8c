"""The shelf of shared MCP packages: entries that start with npx and the like become absolute paths.

A package is installed once, by a builder sandbox that no tenant ever had, published by rename and
mounted read-only into every sandbox. A session never waits for it: an entry whose package is not
there yet is left out, and the session is told when it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from broker.config import Config
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import PACKAGES
from broker.sandbox.builder import Builder, BuilderNetwork
from broker.sandbox.driver import PACKAGES_DIR, SandboxDriver
from broker.sandbox.package_calls import PackageCall, parse
from broker.sandbox.shelf_files import Package
from broker.sandbox.slots import Slots

__all__ = ["BuilderNetwork", "PackageIndex", "PackageShelf", "Resolved"]

log = structlog.get_logger(__name__)

Done = Callable[[str, CortexError | None], None]

_MAX_INSTALLS = 64
"""Installs that run or wait."""
_MAX_FAILURES = 256
_FIRST_RETRY = 30.0
_LAST_RETRY = 3600.0


class PackageRecord(Protocol):
    """One installed package as the store knows it. ``bins``: command name → path below its directory."""

    @property
    def key(self) -> str: ...
    @property
    def bins(self) -> Mapping[str, str]: ...
    @property
    def version(self) -> str: ...


class PackageIndex(Protocol):
    """``broker.store.packages.PackageStore``."""

    async def get(self, spec: str) -> PackageRecord | None: ...
    async def put(self, spec: str, key: str, bins: Mapping[str, str], version: str) -> None: ...


@dataclass
class Resolved:
    """MCP servers ready to start. ``pending``: specs being installed, their servers left out;
    ``failed``: server name → why it was left out."""

    servers: list[dict[str, Any]] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    failed: dict[str, CortexError] = field(default_factory=dict)


@dataclass
class _Failure:
    error: CortexError
    pause: float
    retry_at: float


class PackageShelf:
    """Installed packages and running installs. ``config`` gives the settings of now."""

    def __init__(
        self,
        *,
        driver: SandboxDriver,
        slots: Slots,
        index: PackageIndex,
        network: BuilderNetwork,
        config: Callable[[], Config],
        installation_key: bytes,
        max_builds: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = slots.packages_dir
        self._driver = driver
        self._index = index
        self._builder = Builder(
            driver=driver, slots=slots, network=network, config=config, installation_key=installation_key
        )
        self._clock = clock
        self._tasks = TaskOwner("packages")
        self._builds = asyncio.Semaphore(max_builds)
        self._installs: dict[str, list[Done]] = {}
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    async def resolve(self, servers: Sequence[Mapping[str, Any]], *, on_done: Done | None = None) -> Resolved:
        """Rewrites ACP ``McpServer`` objects (stdio: name, command, args, env) that name a public package.

        Others pass as they are. Never waits for an install: ``on_done(spec, error)`` is called for each
        spec in ``pending`` when its install has ended; resolving again then gives its server.
        Raises ``CortexError`` of the store.
        """
        resolved = Resolved()
        for server in servers:
            call = _call(server)
            if call is None:
                resolved.servers.append(dict(server))
                continue
            package = await self._installed(call.spec)
            if package is not None:
                self._place(server, call, package, resolved)
            elif (failure := self._failed(call.spec)) is not None:
                resolved.failed[str(server["name"])] = failure
            else:
                self._want(server, call, on_done, resolved)
        return resolved

    async def _installed(self, spec: str) -> PackageRecord | None:
        if spec in self._installs:
            return None
        package = await self._index.get(spec)
        if package is None or not (self._root / package.key).is_dir():
            return None
        return package

    def _place(self, server: Mapping[str, Any], call: PackageCall, package: PackageRecord, resolved: Resolved) -> None:
        path = call.choose(package.bins)
        if path is None:
            resolved.failed[str(server["name"])] = CortexError(
                Code.PACKAGE_FAILED,
                f"{call.spec} has no command {call.command or call.name!r}",
                hint=f"it has: {', '.join(sorted(package.bins))[:200]}",
            )
            return
        inside = PACKAGES_DIR if self._driver.isolated else self._root
        command = f"{inside}/{package.key}/{path}"
        resolved.servers.append({**server, "command": command, "args": list(call.args)})

    def _failed(self, spec: str) -> CortexError | None:
        failure = self._failures.get(spec)
        if failure is None or spec in self._installs or self._clock() >= failure.retry_at:
            return None
        return failure.error

    def _want(self, server: Mapping[str, Any], call: PackageCall, on_done: Done | None, resolved: Resolved) -> None:
        spec = call.spec
        if spec not in self._installs:
            if len(self._installs) >= _MAX_INSTALLS:
                resolved.failed[str(server["name"])] = CortexError(
                    Code.PACKAGE_FAILED,
                    f"{spec} was not installed: too many installs wait",
                    hint="write the section again when they are done",
                )
                return
            self._installs[spec] = []
            self._tasks.start(self._install(call), "install", on_error=lambda error: self._crashed(spec, error))
        if on_done is not None and on_done not in self._installs[spec]:
            self._installs[spec].append(on_done)
        if spec not in resolved.pending:
            resolved.pending.append(spec)

    async def _install(self, call: PackageCall) -> None:
        try:
            async with self._builds:
                package = await self._builder.build(call)
            await self._index.put(call.spec, package.key, package.bins, package.version)
        except CortexError as error:
            self._ended(call.spec, None, error)
        else:
            self._ended(call.spec, package, None)

    def _crashed(self, spec: str, error: BaseException) -> None:
        log.error("package_install_crashed", spec=spec, exc_info=error)
        self._ended(
            spec,
            None,
            CortexError(Code.INTERNAL, f"{spec} could not be installed", hint="see the broker's log", cause=error),
        )

    def _ended(self, spec: str, package: Package | None, error: CortexError | None) -> None:
        if package is not None:
            self._failures.pop(spec, None)
            PACKAGES.labels("installed").inc()
            log.info("package_installed", spec=spec, version=package.version, key=package.key)
        elif error is not None:
            self._remember(spec, error)
            PACKAGES.labels("failed").inc()
            log.warning("package_failed", spec=spec, error=str(error))
        for done in self._installs.pop(spec, []):
            done(spec, error)

    def _remember(self, spec: str, error: CortexError) -> None:
        """The same package is not tried again for a while, longer each time."""
        before = self._failures.pop(spec, None)
        pause = min(_LAST_RETRY, before.pause * 2) if before else _FIRST_RETRY
        self._failures[spec] = _Failure(error, pause, self._clock() + pause)
        while len(self._failures) > _MAX_FAILURES:
            self._failures.popitem(last=False)

    async def close(self) -> None:
        """Ends running installs and removes their sandboxes."""
        await self._tasks.close(timeout=10.0)


def _call(server: Mapping[str, Any]) -> PackageCall | None:
    command, args = server.get("command"), server.get("args", [])
    if not isinstance(command, str):
        return None
    env = {str(item["name"]): str(item["value"]) for item in server.get("env", [])}
    return parse(command, args, env)
