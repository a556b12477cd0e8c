"""Who holds the sandbox of a session, and what could not be put away yet, so that no home is ever forgotten."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from broker.errors import CortexError
from broker.session.mailbox import crashed
from broker.session.sandbox import Sandbox

log = structlog.get_logger(__name__)


class Custody:
    """``box``: the sandbox that serves, or is on its way. ``left``: one that the engine (or the disk) did not
    let go of; it has the home, so none is started beside it. ``grace_s``: what a sandbox gets to end."""

    def __init__(self, session_id: str, grace_s: Callable[[], float]) -> None:
        self._session = session_id
        self._grace_s = grace_s
        self.box: Sandbox | None = None
        self.left: Sandbox | None = None

    async def put_away(self) -> CortexError | None:
        """Puts ``box`` away; None when nothing is left, else why it stays."""
        box, self.box = self.box, None
        if box is not None:
            self.left = box
        try:
            await self.tidy()
        except CortexError as error:
            return error
        except Exception as error:
            log.exception("put_away_crashed", session=self._session)
            return crashed(error)
        return None

    async def tidy(self) -> None:
        """Puts away what was left. Raises ``CortexError`` while that cannot be done."""
        left = self.left
        if left is None:
            return
        try:
            await left.put_away(grace_s=self._grace_s())
        except CortexError as error:
            log.error("put_away_failed", session=self._session, slot=left.slot.id, error=str(error), hint=error.hint)
            raise
        self.left = None

    async def let_go(self) -> None:
        """Closes the broker's ends; sandboxes go on."""
        for box in (self.box, self.left):
            if box is not None:
                await box.let_go()
