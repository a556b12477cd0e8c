"""What the pool does with a warm sandbox while it has it: watches, measures, pauses and resumes it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from broker.errors import CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.driver import SandboxDriver
from broker.session.sandbox import how_ended
from broker.session.shelf import Member, Shelf

log = structlog.get_logger(__name__)


class Care:
    """``lose(shelf, member, reason)`` hears of one that is no good any more, ``changed`` of everything else.

    All that is begun for a member ends with ``Member.let_be``.
    """

    def __init__(
        self,
        driver: SandboxDriver,
        tasks: TaskOwner,
        *,
        lose: Callable[[Shelf, Member, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._tasks = tasks
        self._lose = lose
        self._changed = changed

    def begin(self, shelf: Shelf, member: Member) -> None:
        """Puts it on its shelf and looks after it from now on."""
        member.phase = "paused" if member.box.paused else "hot"
        shelf.put(member)
        for name, work in (("exit", self._exit), ("status", self._status), ("measure", self._measure)):
            self._start(member, work(shelf, member), name)
        self._watch_answers(shelf, member)

    def _start(self, member: Member, work: Coroutine[Any, Any, None], name: str) -> None:
        member.tasks = [task for task in member.tasks if not task.done()]
        member.tasks.append(self._tasks.start(work, f"{name}.{member.box.slot.id}"))

    def _watch_answers(self, shelf: Shelf, member: Member) -> None:
        if member.phase == "hot" and member.probe is None:
            member.probe = self._tasks.start(self._answers(shelf, member), f"probe.{member.box.slot.id}")

    async def _exit(self, shelf: Shelf, member: Member) -> None:
        try:
            ended = await self._driver.wait(member.box.ref)
        except CortexError as error:
            # Its link ends too, a little later.
            log.warning("warm_sandbox_not_watched", slot=member.box.slot.id, error=str(error))
        else:
            self._lose(shelf, member, f"it {how_ended(ended)}")

    async def _answers(self, shelf: Shelf, member: Member) -> None:
        self._lose(shelf, member, await member.box.unresponsive())

    async def _status(self, shelf: Shelf, member: Member) -> None:
        """Its place depends on what its agent server says."""
        box = member.box
        ahead: str | None = None
        while not box.failed:
            if member.ahead != ahead:
                ahead = member.ahead
                shelf.put(member)
                self._changed()
            box.ready.clear()
            await box.ready.wait()
        self._lose(shelf, member, str(box.failed))

    async def _measure(self, shelf: Shelf, member: Member) -> None:
        try:
            shelf.measured(await self._driver.memory(member.box.ref))
        except CortexError as error:
            log.debug("warm_sandbox_not_measured", slot=member.box.slot.id, error=str(error))
        self._changed()

    def pause(self, shelf: Shelf, member: Member) -> None:
        """Begins to; until it is done it cannot be handed out."""
        member.phase = "pausing"
        shelf.put(member)
        if member.probe is not None:
            member.probe.cancel()
            member.probe = None
        self._start(member, self._pausing(shelf, member), "pause")

    async def _pausing(self, shelf: Shelf, member: Member) -> None:
        try:
            await member.box.pause()
        except CortexError as error:
            self._lose(shelf, member, f"it could not be paused: {error}")
        else:
            member.phase = "paused"
            shelf.put(member)
            self._changed()

    def resume(self, shelf: Shelf, member: Member) -> None:
        """Begins to; it can be handed out all the same."""
        member.phase = "resuming"
        shelf.put(member)
        self._start(member, self._resuming(shelf, member), "resume")

    async def _resuming(self, shelf: Shelf, member: Member) -> None:
        try:
            await member.box.resume()
        except CortexError as error:
            self._lose(shelf, member, f"it could not be resumed: {error}")
        else:
            member.phase = "hot"
            shelf.put(member)
            self._watch_answers(shelf, member)
            self._changed()
