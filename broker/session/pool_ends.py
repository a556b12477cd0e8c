"""How warm sandboxes leave the pool for good: a few at a time, and again until it works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from broker.errors import CortexError
from broker.host.tasks import TaskOwner
from broker.session.sandbox import Sandbox
from broker.session.shelf import Shelf

log = structlog.get_logger(__name__)

AT_ONCE = 4
END_S = 60.0
"""Deadline of putting one away."""
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""Pauses after one could not be put away."""


class Ends:
    """``changed`` hears of every end, and of every one that did not come about. ``closed``: no more are begun."""

    def __init__(self, tasks: TaskOwner, *, changed: Callable[[], None]) -> None:
        self.closed = False
        self._tasks = tasks
        self._changed = changed
        self._turns = asyncio.Semaphore(AT_ONCE)

    def end(self, shelf: Shelf, box: Sandbox, reason: str) -> None:
        """Begins to put it away."""
        log.info("warm_sandbox_ends", agent=shelf.agent, slot=box.slot.id, reason=reason)
        shelf.ends(box)
        self._tasks.start(self._put_away(shelf, box), f"end.{box.slot.id}")

    def left(self, shelf: Shelf, box: Sandbox) -> None:
        """One that could neither be made nor put away; when the pool closes it is for the next broker."""
        shelf.ends(box, stuck=True)
        if not self.closed:
            self._tasks.start(self._put_away(shelf, box), f"end.{box.slot.id}")

    async def _put_away(self, shelf: Shelf, box: Sandbox) -> None:
        """Until it is gone: what is left of it has memory, a slot and a row."""
        pause = FIRST_RETRY_S
        while not await self._gone(shelf, box):
            shelf.ends(box, stuck=True)
            self._changed()
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)
        shelf.ended(box)
        self._changed()

    async def _gone(self, shelf: Shelf, box: Sandbox) -> bool:
        async with self._turns:
            try:
                async with asyncio.timeout(END_S):
                    await box.put_away(grace_s=0)
            except (CortexError, OSError, TimeoutError) as error:
                log.warning("warm_sandbox_not_ended", agent=shelf.agent, slot=box.slot.id, error=str(error))
                return False
            except Exception:
                log.exception("put_away_crashed", agent=shelf.agent, slot=box.slot.id)
                return False
        return True
