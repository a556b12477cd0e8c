"""Who comes when, and for whom it is worth being ready. Pure; seconds since the epoch.

First the hour of the week; where that says nothing, the hybrid histogram of the user's times away.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from broker.session.activity import HOUR, MINUTE, Pattern

LIKELY = 0.5
"""Least probability at which an hour of the week is acted on."""
SLACK = 600.0
"""Somebody may come so much later in the hour than ever before."""
SHORT_REST = 600.0
"""Who comes back sooner keeps their sandbox: making it anew would hardly save anything."""
LEAST_KEEP = 60.0
INCUMBENT = 2.0
"""What it counts that a sandbox is there already: to let go and make anew costs, and the next look may see it
otherwise."""


@dataclass(frozen=True)
class Expected:
    """A user is expected between ``start`` and ``end``; ``probability``: that it is soon, within twice the
    lead from now; whoever comes later can be prepared for later."""

    user: str
    start: float
    end: float
    probability: float
    source: Literal["hour_of_week", "histogram", "recent"]


@dataclass(frozen=True)
class Outlook:
    """``lead``: how long ahead to be ready; ``longest``: how long to stay so at most; ``faith``: share of a
    probability that is left after forecasts that were wrong, 0 to 1. Seconds."""

    lead: float
    longest: float
    faith: float = 1.0


def expected(pattern: Pattern, now: float, outlook: Outlook) -> Expected | None:
    """When the user will come, if a sandbox should be ready for it now."""
    return _by_hour(pattern, now, outlook) or _by_idle_time(pattern, now, outlook)


def _by_hour(pattern: Pattern, now: float, outlook: Outlook) -> Expected | None:
    """The hour that has begun and the one that the lead reaches into."""
    first = int(now // HOUR)
    for hour in range(first, int((now + outlook.lead) // HOUR) + 1):
        known = pattern.hours.get(hour)
        offsets = None if known else pattern.offsets(hour)
        if offsets is None:
            continue
        likely = pattern.probability(hour) * outlook.faith
        start = hour * HOUR + offsets[0] * MINUTE
        end = min(hour * HOUR + (offsets[1] + 1) * MINUTE + SLACK, start + outlook.longest)
        if likely >= LIKELY and start - outlook.lead <= now < end:
            soon = _overlap(now, 2 * outlook.lead, start, end)
            return Expected(pattern.user, float(start), end, likely * soon, "hour_of_week")
    return None


def _overlap(now: float, ahead: float, start: float, end: float) -> float:
    """The share of what is left of a window that lies within the next ``ahead`` seconds."""
    begin = max(now, start)
    return max(0.0, min(1.0, (now + ahead - begin) / (end - begin)))


def _by_idle_time(pattern: Pattern, now: float, outlook: Outlook) -> Expected | None:
    window = pattern.idle.window()
    away = now - pattern.last_use
    if window is None or not pattern.last_use or away < 0 or window.start * MINUTE < SHORT_REST:
        return None
    start = pattern.last_use + window.start * MINUTE
    end = min(pattern.last_use + window.end * MINUTE, start + outlook.longest)
    if not start - outlook.lead <= now < end:
        return None
    if window.source == "recent":
        soon = _overlap(now, 2 * outlook.lead, start, end)
    else:
        soon = pattern.idle.arrival(away / MINUTE, 2 * outlook.lead / MINUTE)
    return Expected(pattern.user, start, end, soon * outlook.faith, window.source)


def keep_for(pattern: Pattern, *, prepared: bool) -> float | None:
    """Seconds after a use for which a sandbox is worth keeping; None where there is no pattern.

    ``prepared``: one would be made again before the user comes back, so that it may go in between.
    """
    window = pattern.idle.window()
    if window is None:
        return None
    if window.start * MINUTE < SHORT_REST:
        return window.end * MINUTE
    if prepared:
        return LEAST_KEEP
    return window.end * MINUTE if window.source == "histogram" else None


@dataclass(frozen=True)
class Choice:
    """Whom to be ready for, and who was left out for want of room."""

    chosen: tuple[Expected, ...]
    left_out: tuple[Expected, ...]


def choose(
    candidates: Sequence[Expected],
    size: Callable[[str], int],
    *,
    room: int,
    most: int,
    ready: Collection[str] = (),
) -> Choice:
    """Those who fit into ``room`` bytes, ``most`` at most: the highest probability for each byte goes first.

    ``size``: bytes of a user's sandbox; ``ready``: for whom there is one. Who does not fit is passed over for a
    smaller one.
    """
    sizes = {one.user: max(1, size(one.user)) for one in candidates}

    def order(one: Expected) -> tuple[float, float, str]:
        weight = one.probability * (INCUMBENT if one.user in ready else 1.0)
        return -weight / sizes[one.user], one.start, one.user

    chosen: list[Expected] = []
    left_out: list[Expected] = []
    for one in sorted(candidates, key=order):
        if len(chosen) < most and sizes[one.user] <= room:
            chosen.append(one)
            room -= sizes[one.user]
        else:
            left_out.append(one)
    return Choice(tuple(chosen), tuple(left_out))
