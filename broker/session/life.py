"""Where a session is in its life: what its row says, what everybody sees, and whoever waits for a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from broker.errors import CortexError
from broker.metrics import SESSIONS
from broker.session.port import State
from broker.session.state import Event, advance, allowed
from broker.store.sessions import SessionRow, SessionStore

log = structlog.get_logger(__name__)


class Life:
    """``clock`` gives seconds since the epoch, ``generation`` the configuration's of now.

    ``since``: when the state last changed. ``closed``: the session has left memory. ``stored``: the state that the
    stored row tells; "" while there is none, as of a ``new`` one.
    """

    def __init__(
        self,
        store: SessionStore,
        row: SessionRow,
        clock: Callable[[], float],
        generation: Callable[[], int],
        *,
        new: bool = False,
    ) -> None:
        self.row = row
        self.stored = "" if new else row.state
        self.state: State = "stopped"
        self.reason = row.reason
        self.since = clock()
        self.closed = False
        self._store = store
        self._clock = clock
        self._generation = generation
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        SESSIONS.labels(self.state).inc()

    def may(self, event: Event) -> bool:
        """Whether ``event`` leads anywhere from here."""
        return allowed(self.state, event)

    async def move(self, event: Event, reason: str, **fields: Any) -> None:
        """The next state: durable first, then visible."""
        await self.save(state=advance(self.state, event), reason=reason, **fields)
        self.step(event, reason)

    def step(self, event: Event, reason: str) -> None:
        """The next state, visible at once."""
        following = advance(self.state, event)
        SESSIONS.labels(self.state).dec()
        self.state = following
        SESSIONS.labels(self.state).inc()
        self.reason = reason
        self.since = self._clock()
        self.told()

    def note(self, **fields: Any) -> None:
        """What the row says from now on; written with its next change."""
        self.row = replace(self.row, **fields)

    async def save(self, **fields: Any) -> None:
        """Writes the row with these fields changed."""
        changed = {"generation": self._generation(), "updated_at": self._clock()}
        async with self._writing:
            row = replace(self.row, **(changed | fields))
            try:
                await self._store.save(row)
                self.stored = row.state
            except CortexError as error:
                # The state in memory is what runs; a store that is full must not stop what works.
                log.error("session_not_saved", session=row.id, error=str(error), hint=error.hint)
            self.row = row

    async def keep(self) -> None:
        """There is a row when it returns. Raises ``CortexError`` when it cannot be written."""
        async with self._writing:
            if not self.stored:
                await self._store.save(self.row)
                self.stored = self.row.state

    def told(self) -> None:
        """Whoever waits looks again."""
        self._changed.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Returns when the session is as wished, or has left memory; the caller has a deadline."""
        while not reached() and not self.closed:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """The session leaves memory."""
        self.closed = True
        self.told()
        SESSIONS.labels(self.state).dec()
