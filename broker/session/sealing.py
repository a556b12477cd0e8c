"""Credential files that the agent of one sandbox has changed, on their way into the vault."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from broker.errors import CortexError
from broker.host.tasks import TaskOwner
from sandbox_agent.wire.messages import Refreshed

log = structlog.get_logger(__name__)

MAX_PATHS = 8
RETRY_S = (0.5, 30.0)
"""First and longest pause while the vault cannot be written."""


class Sealing:
    """One file at a time, the latest of each path. ``keep`` returns when it is durable, or raises ``CortexError``."""

    def __init__(self, slot: str, keep: Callable[[Refreshed], Awaitable[None]]) -> None:
        self._slot = slot
        self._keep = keep
        self._waiting: dict[str, Refreshed] = {}
        self._tasks = TaskOwner(f"sealing.{slot}")
        self._work: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._rests = asyncio.Event()
        """Nothing is being kept: all is, or it cannot be now."""

    def heard(self, refreshed: Refreshed) -> None:
        """The agent has changed a file."""
        if refreshed.path not in self._waiting and len(self._waiting) >= MAX_PATHS:
            log.warning("refreshed_dropped", slot=self._slot, why=f"over {MAX_PATHS} paths wait")
            return
        self._waiting[refreshed.path] = refreshed
        if self._work is None:
            self._work = self._tasks.start(self._keep_all(), "keep")

    async def drain(self, timeout: float) -> None:
        """Returns when all is kept, or cannot be now, or after ``timeout`` seconds; what is not is still tried again:
        the sandbox may be gone by then, and with it the only token that its provider still takes."""
        if self._work is None:
            return
        self._rests.clear()
        self._hurry.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._rests.wait()
        self._hurry.clear()

    async def close(self) -> None:
        """What is not kept by now is told again to the next broker. Idempotent."""
        await self._tasks.close()

    async def _keep_all(self) -> None:
        pause = RETRY_S[0]
        try:
            while self._waiting:
                refreshed = self._waiting.pop(next(iter(self._waiting)))
                try:
                    await self._keep(refreshed)
                    pause = RETRY_S[0]
                except CortexError as error:
                    again = error.code.retryable
                    log.error("refreshed_not_kept", slot=self._slot, error=str(error), hint=error.hint, again=again)
                    if again:
                        self._waiting.setdefault(refreshed.path, refreshed)
                        await self._rest(pause)
                        pause = min(pause * 2, RETRY_S[1])
        finally:
            self._work = None
            self._rests.set()

    async def _rest(self, pause: float) -> None:
        if self._hurry.is_set():
            self._hurry.clear()
            self._rests.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._hurry.wait()
