"""Pausing, stopping and waking a session that nobody asks for. For its actor alone.

Before a pause or a stop client frames are held at a boundary and the agent server is asked twice: a
message that a client sent just before has been taken by the second answer. Whoever asks for the
session meanwhile is heard, and nothing is done, or it is undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.session.claims import Claims
from broker.session.clients import Clients
from broker.session.custody import Custody
from broker.session.ends import Ends
from broker.session.idle import Action
from broker.session.idling import Idling
from broker.session.life import Life
from broker.session.mailbox import Mailbox
from broker.session.sandbox import PROBE_S, Sandbox
from broker.session.state import Event
from broker.session.timeline import Timeline

log = structlog.get_logger(__name__)


class Resting:
    """``rouse`` is called when a client that is held has something to say. ``lane``: few sessions of a broker are put
    to rest at a time, since the engine has users to serve. ``going``: a pause or a stop is under way, so that nobody
    may use the sandbox; whoever asks for it meanwhile is noted by ``idling``."""

    def __init__(
        self,
        life: Life,
        clients: Clients,
        custody: Custody,
        ends: Ends,
        idling: Idling,
        claims: Claims,
        *,
        mailbox: Mailbox,
        tasks: TaskOwner,
        lane: asyncio.Semaphore,
        rouse: Callable[[], None],
    ) -> None:
        self.going = False
        self._life = life
        self._clients = clients
        self._custody = custody
        self._ends = ends
        self._idling = idling
        self._claims = claims
        self._mailbox = mailbox
        self._tasks = tasks
        self._lane = lane
        self._lined_up = False
        self._rouse = rouse

    def soon(self) -> None:
        """Something is due: ``settle`` when its turn has come."""
        if not self._lined_up and not self._life.closed:
            self._lined_up = True
            self._tasks.start(self._in_turn(), "rest")

    async def _in_turn(self) -> None:
        try:
            async with self._lane:
                await self._mailbox.ask(self.settle)
        except CortexError as error:
            log.warning("rest_put_off", session=self._life.row.id, error=str(error))
            self._idling.postpone()
        finally:
            self._lined_up = False
        self._idling.look()

    async def settle(self) -> None:
        """Does what is due now, if it still is."""
        box = self._custody.box
        if box is None or self._idling.action is Action.STAY:
            return
        self.going = True
        self._clients.rest(self._rouse)
        try:
            if await self._nothing_under_way(box):
                await self._do(box)
        except CortexError as error:
            log.warning("session_not_put_to_rest", session=self._life.row.id, error=str(error), hint=error.hint)
            self._idling.postpone()
        finally:
            self.going = False
            if self._life.state != "paused":
                self._clients.rouse()
            self._life.told()

    async def _nothing_under_way(self, box: Sandbox) -> bool:
        if self._life.state == "paused":
            return True
        for _ in range(2):
            status = await box.link.probe(timeout=PROBE_S)
            if status.open_turns or status.pending:
                self._idling.used()
                return False
        return True

    async def _do(self, box: Sandbox) -> None:
        action = self._idling.action
        if action is Action.STAY:
            return
        if action is Action.PAUSE:
            await self._pause(box)
            return
        idle = self._idling.idle_s
        await self._ends.stop(
            CortexError(
                Code.SESSION_STOPPED, f"nobody used the session for {idle:.0f} s", hint="connect again to start it"
            ),
            served=True,
        )

    async def _pause(self, box: Sandbox) -> None:
        try:
            await box.pause()
        except CortexError:
            await self._undo(box)
            raise
        log.info("session_paused", session=self._life.row.id, slot=box.slot.id)
        self._life.step(Event.PAUSE, f"nobody used it for {self._idling.idle_s:.0f} s")
        self._claims.asked = self._claims.asked and bool(self._clients)

    async def _undo(self, box: Sandbox) -> None:
        """It may be paused all the same, and nobody would notice."""
        try:
            await box.resume()
        except CortexError as error:
            self._ends.lose_soon(box, f"it could be neither paused nor resumed: {error}")

    async def wake(self, timeline: Timeline, refresh: Callable[[], Awaitable[None]] | None, hold_s: float) -> bool:
        """Lets a paused sandbox go on; ``refresh`` brings it the changes that it has missed, before clients are heard
        again, but for ``hold_s`` seconds at most. False: it could not be resumed and is put away."""
        box = self._custody.box
        assert box is not None, "a paused session has a sandbox"
        try:
            with timeline.stage("resume"):
                await box.resume()
        except CortexError as error:
            timeline.finish(error.code.slug)
            why = CortexError(
                Code.SANDBOX_DIED, "the paused sandbox could not be resumed", cause=error, hint="connect again"
            )
            with suppress(CortexError):  # what cannot be put away yet keeps the next one from starting, and says so
                await self._ends.stop(why, served=True)
            return False
        self._life.step(Event.RESUME, "")
        timer = asyncio.get_running_loop().call_later(hold_s, self._clients.rouse)
        try:
            if refresh is not None:
                with timeline.stage("refresh"):
                    await refresh()
        finally:
            timer.cancel()
            self._clients.rouse()
        timeline.finish("ready")
        self._idling.look()
        return True
