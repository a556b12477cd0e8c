"""When one user is there: hours of the week, times away, and how long after a word of intent they come.

Pure; times are seconds since the epoch, hours count from it too, and a week begins on Monday, 00:00 UTC.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from broker.session.histogram import RULES, IdleHistogram, Rules
from broker.store.activity import Tally

Kind = Literal["intent", "start", "request", "end"]
"""intent: somebody said that the user will come; start, end: of a connection or session; request: a turn."""
KINDS: tuple[Kind, ...] = get_args(Kind)

MINUTE, HOUR, DAY, WEEK = 60, 3600, 86_400, 604_800
WEEK_HOURS = 168
_MONDAY = 72
"""The epoch began on a Thursday."""
DAILY = 0.95
"""Weight of a day in the pattern of the week, beside that of the day after it."""
PRIOR = 1.0
"""Weight of "was not there" that every hour begins with, and of the day's pattern in that of the week."""
LONGEST_LEAD = float(HOUR)
"""Who comes later than this after a word of intent comes for another reason."""
LEADS = 64


class ActivityPort(Protocol):
    """Where sessions say what their users do, and ask how long to keep what is theirs."""

    def note(self, user: str, at: float, kind: Kind) -> None:
        """Remembers that something happened; no I/O, never fails. ``at``: seconds since the epoch."""

    def keep_for(self, user: str, now: float) -> float | None:
        """Seconds after a use for which the user's sandbox is worth keeping; None: they have no pattern."""


class NoActivity:
    """Remembers nothing."""

    def note(self, user: str, at: float, kind: Kind) -> None:
        return

    def keep_for(self, user: str, now: float) -> float | None:
        return None


def hour_of_week(hour: int) -> int:
    """0 is Monday 00:00 to 01:00 UTC. ``hour``: since the epoch."""
    return (hour + _MONDAY) % WEEK_HOURS


@dataclass(frozen=True)
class Hour:
    """An hour in which the user was there: minutes with a use, and of these the first and last, 0 to 59."""

    minutes: int
    first: int
    last: int

    def joined(self, other: Hour) -> Hour:
        """Both together."""
        return Hour(self.minutes + other.minutes, min(self.first, other.first), max(self.last, other.last))


@dataclass(frozen=True)
class Arrival:
    """Somebody came: after ``away`` seconds, ``announced`` by a word of intent within the last hour."""

    user: str
    at: float
    away: float
    announced: bool


class Leads:
    """How long after a word of intent the user came."""

    def __init__(self) -> None:
        self.intents = 0
        self.followed = 0
        self._seconds: deque[float] = deque(maxlen=LEADS)
        self._open: float | None = None

    def intent(self, at: float) -> None:
        """Somebody said so. Said again while it waits, the first counts."""
        if self._open is None or not 0 <= at - self._open <= LONGEST_LEAD:
            self._open = at
            self.intents += 1

    def use(self, at: float) -> bool:
        """The user came; whether that had been said."""
        opened, self._open = self._open, None
        if opened is None or not 0 <= at - opened <= LONGEST_LEAD:
            return False
        self.followed += 1
        self._seconds.append(at - opened)
        return True

    @classmethod
    def joined(cls, several: Iterable[Leads]) -> Leads:
        """All of them together; of the times, as many as are kept of one."""
        made = cls()
        for one in several:
            made.intents += one.intents
            made.followed += one.followed
            made._seconds.extend(one._seconds)
        return made

    def view(self) -> dict[str, Any]:
        """Counts, and median and 90th percentile in seconds."""
        known = sorted(self._seconds)
        return {
            "intents": self.intents,
            "followed": self.followed,
            "median_s": statistics.median(known) if known else None,
            "p90_s": known[min(len(known) - 1, int(0.9 * len(known)))] if known else None,
        }


class Pattern:
    """What is known of one user; fed with their tallies in order of time.

    Uses less than a minute apart are one use. What comes late still counts for its hour.
    """

    def __init__(self, user: str, rules: Rules = RULES) -> None:
        self.user = user
        self.idle = IdleHistogram(rules)
        self.leads = Leads()
        self.hours: dict[int, Hour] = {}
        self.first_use = 0.0
        self.last_use = 0.0
        """0: never."""
        self.minutes = 0
        self._last_minute = -1

    def feed(self, tally: Tally) -> Arrival | None:
        """One tally more; the arrival, when the user had been away for a minute at least."""
        at, end = tally.minute * MINUTE + tally.first, tally.minute * MINUTE + tally.last
        if tally.kind == "intent":
            self.leads.intent(at)
            return None
        if not self.last_use:
            self.first_use = at
        self._count(tally)
        announced = self.leads.use(at)
        away = at - self.last_use
        # A clock that was an hour ahead would else have the user there until it is as late again.
        if self.last_use and -HOUR < away < MINUTE:
            self.last_use = max(self.last_use, end)
            return None
        if self.last_use and away > 0:
            self.idle.age(int(at // DAY) - int(self.last_use // DAY))
            self.idle.add(away / MINUTE)
        known, self.last_use = bool(self.last_use), float(end)
        return Arrival(self.user, float(at), max(0.0, away), announced) if known else None

    def _count(self, tally: Tally) -> None:
        hour, minute = divmod(tally.minute, 60)
        fresh = int(tally.minute != self._last_minute)
        self._last_minute = tally.minute
        self.minutes += fresh
        found = Hour(fresh, minute, minute)
        self.hours[hour] = self.hours[hour].joined(found) if hour in self.hours else found

    def forget(self, before: float) -> None:
        """Drops hours that are older."""
        limit = int(before // HOUR)
        for hour in [hour for hour in self.hours if hour < limit]:
            del self.hours[hour]

    def probability(self, hour: int, now: int | None = None) -> float:
        """That the user is there in that hour, judged by the hours before ``now`` (by default before it): the same of
        earlier weeks, backed by the same of earlier days. 0 to 1; 0 for who was never there at that time of day."""
        seen = hour if now is None else now
        day = _share(self.hours, hour, seen, 24)
        return _share(self.hours, hour, seen, WEEK_HOURS, backed=day)

    def offsets(self, hour: int) -> tuple[int, int] | None:
        """First and last minute of that hour at which the user used to come; None when they never did.

        Hours that only went on from the one before say nothing about coming, where there are others.
        """
        same = [other for other in _before(self.hours, hour, 24) if other in self.hours]
        came = [self.hours[other].first for other in same if other - 1 not in self.hours]
        firsts = came or [self.hours[other].first for other in same]
        return (min(firsts), max(firsts)) if firsts else None

    def week(self, now: int) -> list[float]:
        """Probability by hour of week, for the week that begins with the hour ``now``."""
        found = [0.0] * WEEK_HOURS
        for hour in range(now, now + WEEK_HOURS):
            found[hour_of_week(hour)] = self.probability(hour, now)
        return found


def _before(hours: Mapping[int, Hour], hour: int, step: int) -> range:
    """The same hour of days or weeks before, back to the first that is known."""
    return range(hour - step, min(hours, default=hour) - 1, -step)


def _share(hours: Mapping[int, Hour], hour: int, now: int, step: int, backed: float = 0.0) -> float:
    """Weighted share of the hours before, ``step`` apart, in which somebody was there."""
    there, seen = PRIOR * backed, PRIOR
    for other in _before(hours, hour, step):
        if other < now:
            weight = DAILY ** ((hour - other) / 24)
            seen += weight
            there += weight if other in hours else 0.0
    return there / seen


def pattern_of(user: str, tallies: Iterable[Tally], rules: Rules = RULES) -> Pattern:
    """The pattern that tallies in order of time make."""
    pattern = Pattern(user, rules)
    for tally in tallies:
        pattern.feed(tally)
    return pattern


def by_hour_of_week(counts: Mapping[int, float]) -> list[float]:
    """Mean by hour of week of counts by hour; hours without a count, between the first and last, are zeros."""
    sums, seen = [0.0] * WEEK_HOURS, [0] * WEEK_HOURS
    if counts:
        for hour in range(min(counts), max(counts) + 1):
            sums[hour_of_week(hour)] += counts.get(hour, 0.0)
            seen[hour_of_week(hour)] += 1
    return [total / max(1, times) for total, times in zip(sums, seen, strict=True)]


def peaks(week: Sequence[float], most: int = 5) -> list[int]:
    """The busiest hours of the week, the busiest first, each above the mean and its neighbours' equal at least."""
    mean = sum(week) / len(week)
    tops = [
        place
        for place, value in enumerate(week)
        if value > mean and value >= week[place - 1] and value >= week[(place + 1) % len(week)]
    ]
    return sorted(tops, key=lambda place: (-week[place], place))[:most]


def quiet(week: Sequence[float], hour: int) -> bool:
    """Whether no more happens in an hour (since the epoch) than in the mean hour of the week."""
    return week[hour_of_week(hour)] <= sum(week) / len(week)
