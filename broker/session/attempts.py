"""The bring-ups of a session: done beside its actor, one at a time, and remembered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.session.bringup import BringUp, Prepared
from broker.session.mailbox import Mailbox, crashed
from broker.session.timeline import USER_WARM, Timeline

log = structlog.get_logger(__name__)

CANCEL_S = 10.0
"""Longest that a cancelled bring-up may take to let go."""

Work = Callable[[BringUp], Awaitable[Prepared]]
OnUp = Callable[[BringUp, Prepared], Awaitable[None]]
OnFailed = Callable[[CortexError], Awaitable[None]]


class Attempts:
    """``make`` gives a bring-up for a timeline; ``length``: timelines that are remembered."""

    def __init__(
        self,
        session_id: str,
        make: Callable[[Timeline], BringUp],
        tasks: TaskOwner,
        mailbox: Mailbox,
        *,
        length: int,
    ) -> None:
        self._session = session_id
        self._make = make
        self._tasks = tasks
        self._mailbox = mailbox
        self._timelines: deque[Timeline] = deque(maxlen=length)
        self._bringup: BringUp | None = None
        self._task: asyncio.Task[None] | None = None

    def note(self, timeline: Timeline) -> Timeline:
        """Remembers one. A claim that had nothing to wait for takes the place of the one before it, so that a user who
        comes and goes does not push out how the session was started."""
        if self._timelines and _is_plain(timeline) and _is_plain(self._timelines[0]):
            self._timelines.popleft()
        self._timelines.appendleft(timeline)
        return timeline

    def begin(self, timeline: Timeline, work: Work, *, on_up: OnUp, on_failed: OnFailed) -> asyncio.Task[None]:
        """Starts one; the task ends with it. The actor hears of its end through its mailbox, unless it is cancelled."""
        self.note(timeline)
        bringup = self._bringup = self._make(timeline)
        self._task = self._tasks.start(self._do(bringup, work, on_up, on_failed), "bringup")
        return self._task

    async def _do(self, bringup: BringUp, work: Work, on_up: OnUp, on_failed: OnFailed) -> None:
        try:
            prepared = await work(bringup)
        except CortexError as error:
            failed = error
        except OSError as error:
            failed = CortexError(
                Code.STORE_ERROR, "the host refused a step of the bring-up", cause=error, hint="run `cortex doctor`"
            )
        except Exception as error:
            log.exception("bringup_crashed", session=self._session)
            failed = crashed(error)
        else:
            self._post(bringup, lambda: on_up(bringup, prepared))
            return
        bringup.timeline.finish(failed.code.slug)
        self._post(bringup, lambda: on_failed(failed))

    def _post(self, bringup: BringUp, tell: Callable[[], Awaitable[None]]) -> None:
        async def command() -> None:
            if bringup is self._bringup:
                await tell()

        self._mailbox.post(command)

    async def cancel(self) -> None:
        """Ends what is under way; the actor does not hear of it."""
        task, self._task = self._task, None
        bringup, self._bringup = self._bringup, None
        if task is not None and not task.done():
            task.cancel()
            _, stuck = await asyncio.wait((task,), timeout=CANCEL_S)
            if stuck:
                log.error("bringup_stuck", session=self._session)
        if bringup is not None and bringup.timeline.outcome == "running":
            bringup.timeline.finish("cancelled")

    def view(self) -> list[dict[str, Any]]:
        """Newest first."""
        return [timeline.view() for timeline in self._timelines]


def _is_plain(timeline: Timeline) -> bool:
    return timeline.path == USER_WARM and not timeline.stages
