"""Connections opened ahead: from the start on, and again when they were used, idled out or were lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from broker.errors import CortexError
from broker.host.tasks import TaskOwner

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


class Prewarm:
    """Calls ``open_one`` while ``wanting``. It pauses, longer each time, when that fails or when the other side
    closes connections that nobody has used yet."""

    def __init__(self, count: int, wanting: Callable[[], bool], open_one: Callable[[], Awaitable[None]]) -> None:
        self.count = count
        self.pause_s = 0.0
        self._wanting = wanting
        self._open_one = open_one
        self._wake = asyncio.Event()
        self._wake.set()
        self._in_vain = False
        self._task: asyncio.Task[None] | None = None

    def start(self, tasks: TaskOwner) -> None:
        self._task = tasks.start(self._run(), "prewarm")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def wake(self) -> None:
        """One fewer may be idle."""
        self._wake.set()

    def content(self) -> None:
        """The other side keeps connections: one was used, or kept for as long as was wanted."""
        self.pause_s = 0.0
        if self._wanting():
            self._wake.set()

    def lost_unused(self) -> None:
        """A connection was closed from afar before any use."""
        self._in_vain = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanting():
                if self._in_vain:
                    await self._pause()
                try:
                    await self._open_one()
                except CortexError:
                    self._in_vain = True

    async def _pause(self) -> None:
        self._in_vain = False
        self.pause_s = min(max(FIRST_PAUSE_S, self.pause_s * 2), MAX_PAUSE_S)
        await asyncio.sleep(self.pause_s * random.uniform(0.5, 1.0))
