"""What users do, remembered: noted in memory, written every few seconds, and made into patterns of the most active.

``note`` and ``keep_for`` are on users' way and touch memory only. What was noted within the last seconds is
lost when the broker is killed; a stop writes it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import structlog

from broker.config import ForecastConfig
from broker.errors import CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import ACTIVITY_DROPPED
from broker.session.activity import DAY, HOUR, MINUTE, Arrival, Kind, Pattern, by_hour_of_week
from broker.session.forecast import keep_for
from broker.store.activity import PAGE, SLICE, ActivityStore, Tally, UserTotal

log = structlog.get_logger(__name__)

FLUSH_S = 5.0
REFRESH_S = 900.0
"""Between looks at who the most active users are."""
MAX_WAITING = 50_000
"""Tallies that may wait for the disk."""
MAX_ARRIVALS = 10_000
FORGET_S = 60.0
"""The sessions of a user who is erased end within this time."""
FUTURE_S = float(DAY)
"""What lies further ahead of the clock is not believed."""

Key = tuple[str, int, str]


class Activity:
    """``clock`` gives seconds since the epoch; ``settings`` those of the moment."""

    def __init__(
        self, store: ActivityStore, settings: Callable[[], ForecastConfig], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._tasks = TaskOwner("activity")
        self._closing = asyncio.Event()
        self._waiting: dict[Key, list[int]] = {}
        self._patterns: dict[str, Pattern] = {}
        self._arrivals: deque[Arrival] = deque(maxlen=MAX_ARRIVALS)
        self._refresh_at = 0.0
        self._pruned_day = 0
        self._forgotten: dict[str, float] = {}
        """Who was erased, and until when what is noted of them is of their last moments."""
        self.week: list[float] = by_hour_of_week({})
        """Mean number of users by hour of week."""
        self.days_known = 0.0
        """How far back it goes."""

    def start(self) -> None:
        """Begins to write, and reads the patterns of the most active users."""
        self._tasks.start(self._run(), "write")

    async def close(self) -> None:
        """Writes what was noted; logs what could not be written."""
        self._closing.set()
        await self._tasks.close()
        await self._flush_or_log()

    # -- on the way of users -------------------------------------------------------------------

    def note(self, user: str, at: float, kind: Kind) -> None:
        """Remembers that something happened; no I/O, never fails."""
        if self._forgotten and at < self._forgotten.get(user, 0.0):
            return
        minute, second = divmod(int(at), MINUTE)
        key = (user, minute, kind)
        known = self._waiting.get(key)
        if known is not None:
            known[0] += 1
            known[1], known[2] = min(known[1], second), max(known[2], second)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting[key] = [1, second, second]
        else:
            ACTIVITY_DROPPED.inc()

    def keep_for(self, user: str, now: float) -> float | None:
        """Seconds after a use for which the user's sandbox is worth keeping; None: they have no pattern."""
        pattern, mode = self._patterns.get(user), self._settings().mode
        if pattern is None or mode == "off":
            return None
        return keep_for(pattern, prepared=mode == "on")

    # -- what is known -------------------------------------------------------------------------

    @property
    def patterns(self) -> Sequence[Pattern]:
        """Of the most active users, the most active first."""
        return list(self._patterns.values())

    def take_arrivals(self) -> list[Arrival]:
        """Who of them came since the last call, in order."""
        arrivals = sorted(self._arrivals, key=lambda one: one.at)
        self._arrivals.clear()
        return arrivals

    async def pattern(self, user: str) -> Pattern:
        """The pattern of any user, as the store has it. Raises ``CortexError``."""
        return await self._read(user)

    async def most_active(self, limit: int) -> list[UserTotal]:
        """The most active users. Raises ``CortexError``."""
        return await self._store.top(*self._span(), limit)

    async def by_hour(self) -> dict[int, tuple[int, int]]:
        """Users and uses by hour since the epoch. Raises ``CortexError``."""
        return {one.hour: (one.users, one.uses) for one in await self._store.hours(*self._span())}

    async def merge(self, tallies: Sequence[Tally]) -> tuple[int, int, int]:
        """Takes over what a log says; merging it again changes nothing. Returns how many tallies were new, and how
        many were left out as too old or as not yet. Raises ``CortexError``."""
        since, until = self._span()
        old = sum(one.minute < since * 60 for one in tallies)
        new = [one for one in tallies if since * 60 <= one.minute < until * 60]
        changed = await self._store.merge(new)
        self._refresh_at = 0.0
        return changed, old, len(tallies) - old - len(new)

    def forget(self, user: str) -> None:
        """Drops what is in memory of a user; the store's part is erased with the rest of theirs."""
        for key in [key for key in self._waiting if key[0] == user]:
            del self._waiting[key]
        self._patterns.pop(user, None)
        self._forgotten[user] = self._clock() + FORGET_S
        kept = [arrival for arrival in self._arrivals if arrival.user != user]
        self._arrivals.clear()
        self._arrivals.extend(kept)

    # -- what is done every few seconds --------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self.turn()
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._closing.wait()
                return
            except TimeoutError:
                continue

    async def turn(self) -> None:
        """Writes what was noted and, when it is time, reads anew who is active. One at a time; errors are logged."""
        if not await self._flush_or_log():
            return
        now = self._clock()
        self._forgotten = {user: until for user, until in self._forgotten.items() if 0 <= until - now <= FORGET_S}
        try:
            if not 0 <= self._refresh_at - now <= REFRESH_S:
                self._refresh_at = now + REFRESH_S
                await self._refresh()
            if self._pruned_day != int(now // DAY):
                await self._store.prune(self._span()[0])
                self._pruned_day = int(now // DAY)
        except CortexError as error:
            log.error("activity_unreadable", error=str(error), hint=error.hint)

    async def _flush_or_log(self) -> bool:
        try:
            await self._flush()
        except CortexError as error:
            log.error("activity_not_written", waiting=len(self._waiting), error=str(error), hint=error.hint)
            return False
        return True

    async def _flush(self) -> None:
        """Writes what waits, a slice after the other; a slice that cannot be written goes on waiting."""
        while self._waiting:
            taken = {key: self._waiting.pop(key) for key in list(islice(self._waiting, SLICE))}
            tallies = sorted(Tally(minute, n[1], kind, user, n[0], n[2]) for (user, minute, kind), n in taken.items())
            try:
                await self._store.add(tallies)
            except CortexError:
                for key, counted in taken.items():
                    if key[0] not in self._forgotten:
                        _put_back(self._waiting, key, counted)
                raise
            for tally in tallies:
                self._feed(tally)

    def _feed(self, tally: Tally) -> None:
        pattern = self._patterns.get(tally.user)
        arrival = pattern.feed(tally) if pattern is not None else None
        if arrival is not None:
            self._arrivals.append(arrival)

    async def _refresh(self) -> None:
        """Who the most active users are, and their patterns; what is noted meanwhile is fed by the next flush."""
        since, until = self._span()
        hours = await self._store.hours(since, until)
        self.week = by_hour_of_week({one.hour: one.users for one in hours})
        self.days_known = (self._clock() - hours[0].hour * HOUR) / DAY if hours else 0.0
        found: dict[str, Pattern] = {}
        for user in await self._store.top(since, until, self._settings().top_users):
            found[user.user] = await self._read(user.user)
        self._patterns = {user: pattern for user, pattern in found.items() if user not in self._forgotten}

    async def _read(self, user: str) -> Pattern:
        since, until = self._span()
        pattern = Pattern(user)
        after = (since * 60 - 1, "~")
        while True:
            page = await self._store.page(user, after, until * 60)
            for tally in sorted(page):
                pattern.feed(tally)
            if len(page) < PAGE:
                return pattern
            after = (page[-1].minute, page[-1].kind)

    def _span(self) -> tuple[int, int]:
        """The hours that are looked at: from the first of the history to beyond the one of now."""
        now = self._clock()
        return int((now - self._settings().history_days * DAY) // HOUR), int((now + FUTURE_S) // HOUR)


def _put_back(waiting: dict[Key, list[int]], key: Key, counted: list[int]) -> None:
    newer = waiting.get(key)
    if newer is None:
        waiting[key] = counted
    else:
        newer[0] += counted[0]
        newer[1], newer[2] = min(newer[1], counted[1]), max(newer[2], counted[2])
