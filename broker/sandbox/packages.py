"""The shelf of shared MCP packages: entries that start with npx and the like become absolute paths.

A package is installed once, by a builder sandbox that no tenant ever had, published by rename and
mounted read-only into every sandbox. A session never waits for it: an entry whose package is not
there yet is left out, and the session is told when it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from broker.config import Config
from broker.errors import CortexError
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.slots import Slots


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
    async def put(self, spec: str, key: str, bins: dict[str, str], version: str) -> None: ...


class BuilderNetwork(Protocol):
    """``broker.gateway.link.GatewayLink``: lets a builder reach the registries."""

    async def put_slot(
        self,
        slot: str,
        incarnation: int,
        identity: dict[str, Any],
        providers: dict[str, Any],
        egress: dict[str, Any],
        fds: tuple[int, int],
    ) -> None: ...
    async def drop_slot(self, slot: str) -> None: ...


@dataclass
class Resolved:
    """MCP servers ready to start. ``pending``: specs being installed, their servers left out;
    ``failed``: server name → why it was left out."""

    servers: list[dict[str, Any]] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    failed: dict[str, CortexError] = field(default_factory=dict)


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
    ) -> None:
        raise NotImplementedError

    async def resolve(
        self, servers: Sequence[Mapping[str, Any]], *, on_done: Callable[[str, CortexError | None], None] | None = None
    ) -> Resolved:
        """Rewrites ACP ``McpServer`` objects (stdio: name, command, args, env) that name a public package.

        Others pass as they are. Never waits for an install: ``on_done(spec, error)`` is called for each
        spec in ``pending`` when its install has ended; resolving again then gives its server.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Ends running installs and removes their sandboxes."""
        raise NotImplementedError
