"""How the sandbox of a session ends: noticed, told to whoever waits or is attached, put away."""

from __future__ import annotations

import asyncio

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner, first_of
from broker.session.attempts import Attempts
from broker.session.clients import Clients
from broker.session.custody import Custody
from broker.session.life import Life
from broker.session.mailbox import Mailbox
from broker.session.sandbox import Sandbox, how_ended
from broker.session.state import Event

log = structlog.get_logger(__name__)


class Ends:
    """All but ``watch`` and ``lose_soon`` are for the actor alone. ``error``: why the last sandbox ended."""

    def __init__(
        self, life: Life, clients: Clients, custody: Custody, attempts: Attempts, mailbox: Mailbox, tasks: TaskOwner
    ) -> None:
        self.error: CortexError | None = None
        self._life = life
        self._clients = clients
        self._custody = custody
        self._attempts = attempts
        self._mailbox = mailbox
        self._tasks = tasks
        self._watching: asyncio.Task[None] | None = None

    def watch(self, box: Sandbox) -> None:
        """From now on the sandbox's end is an event like any other; one that no longer answers has ended too."""
        self._watching = self._tasks.start(self._watch(box), "watch")

    async def _watch(self, box: Sandbox) -> None:
        try:
            exit_, why = await first_of(box.runtime.driver.wait(box.ref), box.unresponsive())
        except CortexError as error:
            # Its link ends too, a little later.
            log.warning("sandbox_not_watched", session=self._life.row.id, slot=box.slot.id, error=str(error))
        else:
            reason = f"the sandbox {how_ended(exit_)}" if exit_ is not None else str(why)
            self._mailbox.post(lambda: self.lose(box, reason))

    def lose_soon(self, box: Sandbox, reason: str, code: Code = Code.SANDBOX_DIED) -> None:
        """``lose`` when the actor comes to it; however often it is said, it is done once."""
        self._mailbox.post_once(f"lose.{box.slot.id}", lambda: self.lose(box, reason, code))

    async def lose(self, box: Sandbox, reason: str, code: Code = Code.SANDBOX_DIED) -> None:
        """Its sandbox is dead or out of reach: put it away; the next client starts a new one.

        A bring-up notices by itself, and says more.
        """
        if box is not self._custody.box or self._life.state not in ("ready", "paused"):
            return
        log.warning("sandbox_lost", session=self._life.row.id, slot=box.slot.id, reason=reason)
        why = CortexError(code, reason[:400], hint="connect again: the session starts anew")
        await self.stop(why, served=self._life.state == "paused")

    async def stop(self, why: CortexError, *, served: bool = False) -> None:
        """Ends what runs and puts away what is left. ``served``: clients that still wait for a stream stay; whoever
        says so sees to it that they get one. Raises why that cannot be done."""
        if (self._life.state == "stopped" and self._custody.left is None) or not self._life.may(Event.STOP):
            return
        await self._end(why, Event.STOPPED, served=served)

    async def fail(self, error: CortexError) -> None:
        """It cannot be brought up, or a bug ended it."""
        if self._life.may(Event.FAILED):
            log.warning("session_failed", session=self._life.row.id, error=str(error), hint=error.hint)
            await self._end(error, Event.FAILED)

    async def _end(self, why: CortexError, event: Event, *, served: bool = False) -> None:
        """Whoever waits or is attached hears it first; then the sandbox is put away.

        Raises why that could not be done; the session has failed then, and it is tried again later.
        """
        life, self.error = self._life, why
        reason = str(why)[:1000]
        was_ready = life.state in ("ready", "paused")
        await self._attempts.cancel()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if life.may(Event.STOP):
            await life.move(Event.STOP, reason)
        if was_ready or event is Event.STOPPED:
            self._clients.rouse()
            self._clients.close(why.code.close_code, why.close_reason(), served=served)
        left = await self._custody.put_away()
        if left is None:
            await life.move(event, reason, slot="")
            return
        await life.move(
            Event.FAILED, f"{reason}; its sandbox could not be put away yet, it is tried again: {left}"[:1500]
        )
        if event is Event.STOPPED:
            raise left

    async def tidy(self) -> None:
        """Puts away what was left of an earlier sandbox, while nothing runs."""
        if self._life.state in ("stopped", "failed"):
            await self._custody.tidy()
