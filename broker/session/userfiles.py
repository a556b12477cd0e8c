"""The watched directory of per-user files: what changes in it reaches the sessions of that user."""

from __future__ import annotations

from pathlib import Path

import structlog

from broker.host.tasks import TaskOwner
from broker.session.port import RegistryPort
from broker.session.sources import touched

log = structlog.get_logger(__name__)


class UserFiles:
    """``directory`` holds ``USER/SECTION.toml``."""

    def __init__(self, directory: Path, registry: RegistryPort, tasks: TaskOwner) -> None:
        self._directory = directory
        self._registry = registry
        self._tasks = tasks

    async def changed(self, paths: set[Path]) -> None:
        """Has the users of ``paths`` apply what changed; waits for none of them."""
        for user in touched(self._directory, paths):
            # Each on its own: a session that is starting up makes nobody else wait.
            self._tasks.start(self._apply(user), "user_changed")

    async def _apply(self, user: str) -> None:
        for applied in await self._registry.config_changed(user, "files"):
            log.info("user_config_applied", user=user, state=applied.state)
