"""Policies replayed on what users did: how many would have waited for a cold start, and what keeping warm would cost.

Pure. The clock ticks in minutes. A use is *cold* when nothing was warm in its minute; the first of each user is. What
is warm in a minute without a use is *idle*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from broker.session.forecast import SHORT_REST
from broker.session.histogram import RULES, IdleHistogram, Rules

DAY = 1440
FIXED = (10, 20, 60)
FALLBACK = 10
"""Minutes that a user without a pattern is kept."""

REST = SHORT_REST / 60
"""What Cortex does: see ``forecast.SHORT_REST``."""

Policy = Callable[[IdleHistogram], tuple[int, int]]
"""From what is known to the first and last minute after a use in which to be warm."""


@dataclass(frozen=True)
class Replayed:
    """``cold`` of ``uses``; ``cold_p75``: that share for the user who has it worse than three in four; ``idle``:
    minutes."""

    policy: str
    users: int
    uses: int
    cold: int
    cold_p75: float
    idle: int

    @property
    def cold_share(self) -> float:
        return self.cold / self.uses if self.uses else 0.0


def fixed(keep: int) -> Policy:
    """Kept ``keep`` minutes after each use."""
    return lambda histogram: (0, keep)


def hybrid(fallback: int = FALLBACK, *, rest: float = 0) -> Policy:
    """The hybrid histogram; ``fallback`` minutes for whom it says nothing; nothing is let go for less than ``rest``."""

    def policy(histogram: IdleHistogram) -> tuple[int, int]:
        window = histogram.window()
        if window is None:
            return 0, fallback
        return math.floor(window.start) if window.start >= rest else 0, math.ceil(window.end)

    return policy


def standard(fallback: int = FALLBACK) -> dict[str, Policy]:
    """What is compared, by name."""
    policies = {f"fixed {keep} min": fixed(keep) for keep in FIXED}
    policies[f"hybrid, else {fallback} min"] = hybrid(fallback)
    policies[f"the same, rests of {REST:g} min at least"] = hybrid(fallback, rest=REST)
    return policies


def replay(
    name: str, policy: Policy, users: Mapping[str, Sequence[int]], *, until: int | None = None, rules: Rules = RULES
) -> Replayed:
    """``users``: minutes with a use, ascending. What is warm after the last use counts up to ``until``, by default
    the end of the day of the last use of all."""
    last = max((minutes[-1] for minutes in users.values() if minutes), default=0)
    end = until if until is not None else (last // DAY + 1) * DAY
    cold = idle = uses = 0
    shares = []
    for minutes in users.values():
        if minutes:
            mine, waiting = _one(policy, minutes, end, rules)
            cold, idle, uses = cold + mine, idle + waiting, uses + len(minutes)
            shares.append(mine / len(minutes))
    shares.sort()
    worse = shares[int(0.75 * len(shares))] if shares else 0.0
    return Replayed(name, len(shares), uses, cold, worse, idle)


def _one(policy: Policy, minutes: Sequence[int], end: int, rules: Rules) -> tuple[int, int]:
    """Cold starts and idle minutes of one user."""
    histogram = IdleHistogram(rules)
    cold, idle = 1, 0
    for this, following in zip(minutes, [*minutes[1:], None], strict=True):
        first, last = policy(histogram)
        gap = (end if following is None else following) - this
        idle += max(0, min(last, gap - 1) - max(first, 1) + 1)
        if following is not None:
            cold += not first <= gap <= last
            histogram.age(following // DAY - this // DAY)
            histogram.add(gap)
    return cold, idle
