"""Whether one server of a provider is asked: failures in a row open it, one call tries it again. Pure.

closed ── max_fails in a row ──► open ── its rest is over ──► half open ── the trial succeeds ──► closed
                                  ▲                               └── the trial fails: the same rest ──┐
                                  └────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half_open"]
Outcome = Literal["ok", "failed", "neutral"]
"""``neutral``: says nothing of the server, as when the client went away."""

UNHEARD = -1
"""Ticket of a call whose outcome changes nothing."""


class Breaker:
    """``fails``: failures in a row; ``until``: no call before then, while it is open; ``term``: the ticket of
    calls that count now. Times are in seconds."""

    __slots__ = (
        "_fail_timeout_s",
        "_max_fails",
        "_probed_dead",
        "_trial",
        "_trial_failed",
        "_tripped",
        "fails",
        "term",
        "until",
    )

    def __init__(self, max_fails: int, fail_timeout_s: float) -> None:
        self.fails = 0
        self.until = 0.0
        self._max_fails = max_fails
        self._fail_timeout_s = fail_timeout_s
        self.term = 0
        self._tripped = False
        self._trial = False
        self._trial_failed = False
        self._probed_dead = False

    @property
    def closed(self) -> bool:
        """All calls go through."""
        return not self._tripped

    def state(self, now: float) -> State:
        """``half_open``: one call decides."""
        if not self._tripped:
            return "closed"
        return "open" if now < self.until else "half_open"

    def admits(self, now: float) -> bool:
        """A call may begin: closed, or half open with no trial under way."""
        return not self._tripped or (now >= self.until and not self._trial)

    def begun(self, now: float) -> int:
        """A call begins. The ticket goes to ``ended``: calls from before it opened have no say after."""
        if not self._tripped:
            return self.term
        if self.admits(now):
            self._trial = True
            return self.term
        return UNHEARD

    def ended(self, now: float, outcome: Outcome, ticket: int) -> None:
        """The call of ``ticket`` is over, or its answer has begun well."""
        if ticket != self.term:
            return
        if not self._tripped:
            if outcome == "ok":
                self.fails = 0
            elif outcome == "failed":
                self._failed(now)
        elif self._trial:
            self._trial = False
            if outcome == "ok":
                self._close()
            elif outcome == "failed":
                self._failed(now)

    def told(self, now: float, alive: bool) -> None:
        """By a health probe. It never closes the breaker: a server may greet and still fail calls, so a call decides.
        For the same reason it cuts short the first rest, later ones only where probes had failed as well."""
        if not self._tripped:
            if not alive:
                self._failed(now)
        elif self._trial:
            return
        elif not alive:
            self._probed_dead = True
            if now >= self.until:
                self._failed(now)
        elif self._probed_dead or not self._trial_failed:
            self.until = min(self.until, now)

    def _failed(self, now: float) -> None:
        self.fails += 1
        if self._tripped:
            self._trial_failed = True
        elif self.fails < self._max_fails:
            return
        else:
            self._tripped = True
            self._probed_dead = False
        self.term += 1
        self.until = now + self._fail_timeout_s

    def _close(self) -> None:
        self._tripped = False
        self._trial_failed = False
        self.fails = 0
