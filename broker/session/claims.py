"""Who asks for a session, and whether they find it up: a user's own warm sandbox is claimed by the first."""

from __future__ import annotations

from broker.metrics import POOL_CLAIMS
from broker.session.attempts import Attempts
from broker.session.timeline import USER_WARM, Intent, Timeline


class Claims:
    """``asked``: somebody has asked since the session was made ready ahead, or since its last client left. ``intent``:
    why it was made ready ahead, if it was.

    A claim of a session that has to be woken first is open until it is known how that went.
    """

    def __init__(self, driver: str, attempts: Attempts) -> None:
        self.asked = False
        self.intent: Intent = ""
        self._driver = driver
        self._attempts = attempts
        self._open: Timeline | None = None

    def begun(self) -> Intent:
        """A bring-up begins; why, if nobody has asked."""
        if self.asked:
            self.intent = ""
        return self.intent

    def ask(self, *, warm: bool, serving: bool) -> None:
        """A request: a create, a hook, a client, a prompt over HTTP."""
        self.asked = True
        if not warm:
            return
        self._open = self._timeline()
        if serving:
            self.settle(up=True)

    def timeline(self) -> Timeline:
        """What a wake is timed by: the open claim's, or one of its own when nobody claims it."""
        return self._open or self._timeline()

    def _timeline(self) -> Timeline:
        return self._attempts.note(Timeline(self._driver, path=USER_WARM))

    def settle(self, *, up: bool) -> None:
        """Closes the open claim, if there is one."""
        claim, self._open = self._open, None
        if claim is None:
            return
        if claim.outcome == "running":
            claim.finish("ready" if up else "stopped")
        POOL_CLAIMS.labels("user", "hit" if up else "failed").inc()
