"""Activity and forecast as one thing to start, ask and close."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from broker.config import PoolConfig
from broker.session.activity import DAY, HOUR, Leads, by_hour_of_week, peaks
from broker.session.forecast import Outlook, expected, keep_for
from broker.session.forewarner import Forewarner, Preparer
from broker.session.recorder import Activity
from broker.store.activity import ActivityStore, Tally

Peak = Mapping[str, float]


class Foresight:
    """``settings``: of the moment; ``clock``: seconds since the epoch."""

    def __init__(
        self,
        store: ActivityStore,
        settings: Callable[[], PoolConfig],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self.activity = Activity(store, lambda: settings().forecast, clock)
        self._warner = Forewarner(self.activity, settings, clock)

    def start(self, preparer: Preparer) -> None:
        """Begins to write what is noted, and to look at who will come. Sessions may have been noting before."""
        self.activity.start()
        self._warner.start(preparer)

    async def stop_looking(self) -> None:
        """Nothing is done for anybody any more. Idempotent."""
        await self._warner.close()

    async def close(self) -> None:
        """Writes what was noted to the last; close the sessions before. Idempotent."""
        await self._warner.close()
        await self.activity.close()

    def forget(self, user: str) -> None:
        """Drops what is in memory of a user, before the store's part is erased."""
        self.activity.forget(user)
        self._warner.forget(user)

    async def merge(self, tallies: Sequence[Tally]) -> tuple[int, int, int]:
        """See ``Activity.merge``."""
        return await self.activity.merge(tallies)

    def forecast(self) -> dict[str, Any]:
        """Who is expected, and how often forecasts were right; see ``control.activity.Forecast``."""
        return self._warner.view()

    async def overview(self, limit: int) -> dict[str, Any]:
        """Everybody; see ``control.activity.Overview``. Raises ``CortexError``."""
        hours = await self.activity.by_hour()
        week = by_hour_of_week({hour: float(users) for hour, (users, _) in hours.items()})
        return {
            "history_days": self._settings().forecast.history_days,
            "days_known": (self._clock() - min(hours) * HOUR) / DAY if hours else 0.0,
            "uses": sum(uses for _, uses in hours.values()),
            "week": week,
            "peaks": _peaks(week),
            "leads": Leads.joined([pattern.leads for pattern in self.activity.patterns]).view(),
            "users": [
                {"user": one.user, "minutes": one.minutes, "uses": one.uses, "last_hour_at": one.hour * HOUR}
                for one in await self.activity.most_active(limit)
            ],
        }

    async def of_user(self, user: str) -> dict[str, Any]:
        """One user; see ``control.activity.UserActivity``. Raises ``CortexError``."""
        pattern = await self.activity.pattern(user)
        settings, now = self._settings(), self._clock()
        week = pattern.week(int(now // HOUR))
        window = pattern.idle.window()
        one = expected(pattern, now, Outlook(settings.forecast.lead_s, settings.idle.longest_keep_s))
        return {
            "user": user,
            "minutes": pattern.minutes,
            "first_at": pattern.first_use or None,
            "last_at": pattern.last_use or None,
            "week": week,
            "peaks": _peaks(week),
            "leads": pattern.leads.view(),
            "times_away": round(pattern.idle.weight, 2),
            "times_out_of_range": round(pattern.idle.outside, 2),
            "window": asdict(window) if window is not None else None,
            "keep_s": keep_for(pattern, prepared=settings.forecast.mode == "on"),
            "expected": asdict(one) if one is not None else None,
        }


def _peaks(week: Sequence[float]) -> list[Peak]:
    return [{"hour_of_week": place, "value": week[place]} for place in peaks(week)]
