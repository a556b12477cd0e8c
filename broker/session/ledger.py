"""Whether forecasts came true: what was expected, held against who came. Pure; seconds since the epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from broker.session.forecast import Expected

Result = Literal["hit", "miss", "wasted"]
REMEMBERED = 100
LOST_FAITH = 0.5
"""What a wrong forecast leaves of a user's probabilities."""
LEAST_FAITH = 0.05


@dataclass(frozen=True)
class Outcome:
    """hit: came while expected; miss: came though not; wasted: did not come. ``ready_s``: time that a sandbox waited
    (or would have) from ``since`` on."""

    user: str
    result: Result
    at: float
    since: float
    ready_s: float
    source: str


@dataclass(frozen=True)
class _Open:
    expected: Expected
    since: float


class Ledger:
    """Open forecasts, one a user, and how the last ones ended."""

    def __init__(self) -> None:
        self.counts: dict[Result, int] = {"hit": 0, "miss": 0, "wasted": 0}
        self.ready_s: dict[Result, float] = dict.fromkeys(self.counts, 0.0)
        self.recent: deque[Outcome] = deque(maxlen=REMEMBERED)
        self._open: dict[str, _Open] = {}
        self._faith: dict[str, float] = {}

    def __contains__(self, user: str) -> bool:
        return user in self._open

    def faith(self, user: str) -> float:
        """Share of the user's probabilities to believe in: halved by each forecast in vain, whole again after a hit."""
        return self._faith.get(user, 1.0)

    def expect(self, expected: Expected, now: float) -> None:
        """Opens a forecast from ``now`` on; one that is open is only moved in its end."""
        known = self._open.get(expected.user)
        self._open[expected.user] = _Open(expected, known.since if known else now)

    def open_for(self, user: str) -> tuple[float, float] | None:
        """Since when and until when the user is expected."""
        known = self._open.get(user)
        return (known.since, known.expected.end) if known else None

    def arrived(self, user: str, at: float, *, up: bool = False) -> Outcome | None:
        """The user came, at a whole second; None when that needed no forecast, since a sandbox was ``up`` or the coming
        announced."""
        self._close_if_over(user, at)
        known = self._open.pop(user, None)
        if known is not None and int(known.since) <= at:
            self._faith.pop(user, None)
            return self._ended(known, "hit", at)
        if up:
            return None
        return self._told(Outcome(user, "miss", at, at, 0.0, ""))

    def sweep(self, now: float) -> list[Outcome]:
        """Closes the forecasts whose time is over."""
        closed = (self._close_if_over(user, now) for user in list(self._open))
        return [outcome for outcome in closed if outcome is not None]

    def withdraw(self, user: str) -> None:
        """Takes a forecast back: nobody was, or would have been, ready for the user."""
        self._open.pop(user, None)

    def only(self, users: Collection[str]) -> None:
        """Drops what is open of users at whom nobody looks any more, and believes in them again."""
        for known in (self._open, self._faith):
            for user in [user for user in known if user not in users]:
                del known[user]

    def forget(self, user: str) -> None:
        """Drops what is known of a user."""
        self._open.pop(user, None)
        self._faith.pop(user, None)
        kept = [outcome for outcome in self.recent if outcome.user != user]
        self.recent.clear()
        self.recent.extend(kept)

    def _close_if_over(self, user: str, now: float) -> Outcome | None:
        known = self._open.get(user)
        if known is None or now <= known.expected.end:
            return None
        del self._open[user]
        self._faith[user] = max(LEAST_FAITH, self.faith(user) * LOST_FAITH)
        return self._ended(known, "wasted", known.expected.end)

    def _ended(self, known: _Open, result: Result, at: float) -> Outcome:
        ready = max(0.0, at - known.since)
        return self._told(Outcome(known.expected.user, result, at, known.since, ready, known.expected.source))

    def _told(self, outcome: Outcome) -> Outcome:
        self.counts[outcome.result] += 1
        self.ready_s[outcome.result] += outcome.ready_s
        self.recent.append(outcome)
        return outcome
