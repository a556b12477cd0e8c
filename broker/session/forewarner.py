"""The look at who will come: every ``interval_s`` it says who is expected and, told to, is ready for them.

In mode ``forecast`` nothing is done; what would have been done is held against who came all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

import structlog

from broker.config import PoolConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import FORECAST, FORECAST_READY, PREPARED
from broker.session.activity import DAY, HOUR, Arrival, Pattern, hour_of_week, quiet
from broker.session.forecast import Choice, Expected, Outlook, choose, expected
from broker.session.ledger import Ledger, Outcome

log = structlog.get_logger(__name__)

CALL_S = 30.0
"""Deadline of each thing that is done for one user."""
AGAIN_S = float(DAY)
RETRY_S = float(HOUR)
"""Until a user is looked after again, when all was well and when something was not."""
REMEMBERED = 100
LEAST_DAYS = 7
"""Of history, before generic warm sandboxes are counted by the hour of the week."""

Action = Literal["would prewarm", "prewarmed", "no session", "failed", "left out"]


class Preparer(Protocol):
    """What may be done for users who are expected."""

    async def up(self, users: Sequence[str]) -> Collection[str]:
        """Those of them who have a sandbox that is up, or comes up. Raises ``CortexError``."""

    def room(self) -> int:
        """Bytes that warm sandboxes may take beyond those there are; below 0 when they take too much."""

    def size(self, user: str) -> int:
        """Bytes of the user's sandbox, about."""

    async def prewarm(self, user: str) -> bool:
        """Begins to bring the user's sandbox up, or keeps it a while longer; False: they have no session.
        Raises ``CortexError``."""

    async def let_go(self, user: str) -> None:
        """The sandbox that was brought up is needed for somebody likelier; one that is in use stays.
        Raises ``CortexError``."""

    async def prepare(self, user: str) -> Mapping[str, str]:
        """Sees to what the next bring-up needs; by what it is, "" or what is wrong. Raises ``CortexError``."""

    def load(self, share: float | None) -> None:
        """So many come in the next hour, as a share of the mean hour; None: nobody knows."""


class Patterns(Protocol):
    """``session.recorder.Activity``."""

    @property
    def patterns(self) -> Sequence[Pattern]: ...
    @property
    def week(self) -> Sequence[float]: ...
    @property
    def days_known(self) -> float: ...
    def take_arrivals(self) -> list[Arrival]: ...


class Forewarner:
    """``settings``: of the moment; ``clock``: seconds since the epoch."""

    def __init__(
        self, activity: Patterns, settings: Callable[[], PoolConfig], clock: Callable[[], float] = time.time
    ) -> None:
        self._activity = activity
        self._settings = settings
        self._clock = clock
        self._tasks = TaskOwner("forewarner")
        self._closing = asyncio.Event()
        self._ledger = Ledger()
        self._made: set[str] = set()
        """Whose sandbox was brought up here and not asked for since."""
        self._up: set[str] = set()
        """Who had one without that, at the last look."""
        self._told: list[tuple[Expected, Action]] = []
        self._looked_at = 0.0
        self._shared: float | None = None
        self._due: dict[str, float] = {}
        self._prepared: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)

    def start(self, preparer: Preparer) -> None:
        """Begins to look; ``preparer`` does what has to be done."""
        self._tasks.start(self._run(preparer), "look")

    async def close(self) -> None:
        """Looks no more; what was brought up stays."""
        self._closing.set()
        await self._tasks.close()

    def forget(self, user: str) -> None:
        """Drops what is in memory of a user."""
        self._ledger.forget(user)
        self._made.discard(user)
        self._up.discard(user)
        self._due.pop(user, None)
        self._told = [told for told in self._told if told[0].user != user]
        kept = [entry for entry in self._prepared if entry["user"] != user]
        self._prepared.clear()
        self._prepared.extend(kept)

    async def _run(self, preparer: Preparer) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings().forecast.interval_s):
                    await self._closing.wait()
                return
            except TimeoutError:
                await self.look(preparer)

    # -- one look ------------------------------------------------------------------------------

    async def look(self, preparer: Preparer) -> None:
        """Judges the last forecasts, makes new ones and, in mode ``on``, acts on them. Errors are logged."""
        settings, now = self._settings(), self._clock()
        arrivals = self._activity.take_arrivals()
        if settings.forecast.mode == "off":
            self._told, self._looked_at = [], now
            self._load(preparer, None)
            return
        self._judge(arrivals, now)
        patterns = list(self._activity.patterns)
        try:
            up = set(await preparer.up([pattern.user for pattern in patterns]))
        except CortexError as error:
            log.error("forecast_failed", error=str(error), hint=error.hint)
            return
        others = up - self._made
        choice = self._choose(preparer, patterns, up, now)
        acting = settings.forecast.mode == "on"
        self._told = [(one, await self._be_ready(preparer, one.user, acting=acting)) for one in choice.chosen]
        self._told += [(one, "left out") for one in choice.left_out]
        for one in choice.left_out:
            await self._evict(preparer, one.user, up)
        for one, action in self._told:
            if action in ("would prewarm", "prewarmed"):
                self._ledger.expect(one, now)
        self._up = others
        self._looked_at = now
        self._load(preparer, self._share(settings, now) if acting else None)
        if acting:
            await self._look_after(preparer, patterns, now)

    def _judge(self, arrivals: Sequence[Arrival], now: float) -> None:
        for arrival in arrivals:
            covered = arrival.announced or arrival.user in self._up
            outcome = self._ledger.arrived(arrival.user, arrival.at, up=covered)
            self._made.discard(arrival.user)
            self._count(outcome)
        watched = {pattern.user for pattern in self._activity.patterns}
        self._ledger.only(watched)
        self._made &= watched
        for outcome in self._ledger.sweep(now):
            self._made.discard(outcome.user)
            self._count(outcome)

    def _count(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            FORECAST.labels(outcome.result).inc()
            FORECAST_READY.labels(outcome.result).inc(outcome.ready_s)
            log.info("forecast", **asdict(outcome))

    def _choose(self, preparer: Preparer, patterns: Sequence[Pattern], up: Collection[str], now: float) -> Choice:
        """Whoever is up without our doing needs no forecast."""
        settings = self._settings()
        found = []
        for pattern in patterns:
            user = pattern.user
            if user in up and user not in self._made:
                continue
            faith = 1.0 if user in self._ledger else self._ledger.faith(user)
            outlook = Outlook(settings.forecast.lead_s, settings.idle.longest_keep_s, faith)
            one = expected(pattern, now, outlook)
            if one is not None:
                found.append(one)
        ours = sum(preparer.size(user) for user in self._made if user in up)
        room, most = preparer.room() + ours, settings.forecast.top_users
        return choose(found, preparer.size, room=room, most=most, ready=self._made)

    async def _be_ready(self, preparer: Preparer, user: str, *, acting: bool) -> Action:
        if not acting:
            return "would prewarm"
        try:
            async with asyncio.timeout(CALL_S):
                there = await preparer.prewarm(user)
        except (CortexError, TimeoutError) as error:
            log.warning("prewarm_failed", user=user, error=str(error) or "it took too long")
            return "failed"
        if not there:
            return "no session"
        self._made.add(user)
        return "prewarmed"

    async def _evict(self, preparer: Preparer, user: str, up: Collection[str]) -> None:
        """There is no more room for somebody for whom there was."""
        self._ledger.withdraw(user)
        if user in self._made and user in up:
            try:
                async with asyncio.timeout(CALL_S):
                    await preparer.let_go(user)
            except (CortexError, TimeoutError) as error:
                log.warning("let_go_failed", user=user, error=str(error) or "it took too long")
        self._made.discard(user)

    def _share(self, settings: PoolConfig, now: float) -> float | None:
        """How many come when the lead is over, beside the mean hour of the week."""
        week = self._activity.week
        mean = sum(week) / len(week)
        if mean <= 0 or self._activity.days_known < LEAST_DAYS:
            return None
        return week[hour_of_week(int((now + settings.forecast.lead_s) // HOUR))] / mean

    def _load(self, preparer: Preparer, share: float | None) -> None:
        if share != self._shared:
            self._shared = share
            preparer.load(share)

    # -- at quiet times ------------------------------------------------------------------------

    async def _look_after(self, preparer: Preparer, patterns: Sequence[Pattern], now: float) -> None:
        """One user a look, the most active first; at a quiet hour, or when they have waited for one for a day."""
        users = [pattern.user for pattern in patterns]
        self._due = {user: min(self._due.get(user, now), now + AGAIN_S) for user in users}
        calm = quiet(self._activity.week, int(now // HOUR))
        user = next((user for user in users if self._due[user] <= now - (0 if calm else AGAIN_S)), None)
        if user is None:
            return
        try:
            async with asyncio.timeout(CALL_S):
                found = dict(await preparer.prepare(user))
        except TimeoutError:
            found = {"all": f"it took longer than {CALL_S:g} s"}
        except CortexError as error:
            found = {"all": str(error)} if error.code is not Code.NO_SESSION else {}
        for what, problem in found.items():
            PREPARED.labels(what, "failed" if problem else "ready").inc()
        wrong = any(found.values())
        self._due[user] = now + (RETRY_S if wrong else AGAIN_S)
        self._prepared.append({"user": user, "at": now, "found": found})
        if wrong:
            log.warning("not_prepared", user=user, **{what: problem for what, problem in found.items() if problem})

    # -- for operators -------------------------------------------------------------------------

    def view(self) -> dict[str, Any]:
        """Who is expected, what was done, and how often that was right; see ``control.schema.Forecast``."""
        settings, now = self._settings().forecast, self._clock()
        return {
            "mode": settings.mode,
            "lead_s": settings.lead_s,
            "looked_at": self._looked_at or None,
            "users": len(self._activity.patterns),
            "days_known": round(self._activity.days_known, 2),
            "quiet": quiet(self._activity.week, int(now // HOUR)),
            "expected": [{**asdict(one), "action": action} for one, action in self._told],
            "counts": dict(self._ledger.counts),
            "ready_s": {result: round(seconds, 1) for result, seconds in self._ledger.ready_s.items()},
            "recent": [asdict(outcome) for outcome in reversed(self._ledger.recent)],
            "prepared": list(reversed(self._prepared)),
        }
