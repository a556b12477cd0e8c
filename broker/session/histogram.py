"""The hybrid histogram: how long one user stays away between two uses, and what to keep warm for it.

Pure. After Shahrad et al., Serverless in the Wild, USENIX ATC 2020, section 4.2. Times are minutes. What
the paper leaves open (least samples, share out of range, weights of days) is ours.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass
from typing import Literal

RANGE = 240
"""Bins of one minute; longer times away are only counted."""


@dataclass(frozen=True)
class Rules:
    """``head``, ``tail``: percentiles; ``margin``: added on both sides; ``variation``: least coefficient of
    variation of the bins for them to mean something; ``outside``: share out of range above which the last
    ``recent`` times are averaged instead, with ``recent_margin``; ``smoothing``: weight of the newest of them;
    ``least``: samples before anything is said; ``daily``: weight that a day loses to the next."""

    head: float = 0.05
    tail: float = 0.99
    margin: float = 0.10
    variation: float = 2.0
    outside: float = 0.5
    recent: int = 10
    recent_margin: float = 0.15
    smoothing: float = 0.3
    least: int = 3
    daily: float = 0.85


RULES = Rules()


@dataclass(frozen=True)
class Window:
    """Warm from ``start`` to ``end`` minutes after the last use; ``start`` 0: it is not let go in between."""

    start: float
    end: float
    source: Literal["histogram", "recent"]


class IdleHistogram:
    """Times away of one user, older days weighing less."""

    def __init__(self, rules: Rules = RULES) -> None:
        self._rules = rules
        self._bins = array("d", bytes(8 * RANGE))
        self._squares = 0.0
        self._recent: deque[float] = deque(maxlen=rules.recent)
        self.inside = 0.0
        """Weight of what fell into the range."""
        self.outside = 0.0
        """Weight of what did not."""

    @property
    def weight(self) -> float:
        """Samples, by the weight of their days."""
        return self.inside + self.outside

    def bins(self) -> list[float]:
        """Weight by minute."""
        return list(self._bins)

    def add(self, minutes: float) -> None:
        """One time away; what is below zero (a clock that jumped) counts as zero."""
        away = max(0.0, minutes)
        self._recent.append(away)
        if away >= RANGE:
            self.outside += 1.0
            return
        place = int(away)
        self._squares += 2 * self._bins[place] + 1
        self._bins[place] += 1.0
        self.inside += 1.0

    def age(self, days: int) -> None:
        """Lets ``days`` pass: what there is weighs less."""
        if days <= 0:
            return
        factor = self._rules.daily ** min(days, 10_000)
        for place in range(RANGE):
            self._bins[place] *= factor
        self._squares *= factor * factor
        self.inside *= factor
        self.outside *= factor

    def variation(self) -> float:
        """Coefficient of variation of the bins: 0 when all are equal, about 15 when one holds everything."""
        if self.inside <= 0:
            return 0.0
        mean = self.inside / RANGE
        return math.sqrt(max(0.0, self._squares / RANGE - mean * mean)) / mean

    def percentile(self, share: float) -> int:
        """The bin within which ``share`` of what is in range lies."""
        left = share * self.inside
        for place, weight in enumerate(self._bins):
            left -= weight
            if left <= 1e-9:
                return place
        return RANGE - 1

    def window(self) -> Window | None:
        """When to be warm after a use; None while there is no pattern to go by."""
        rules = self._rules
        if self.weight < rules.least:
            return None
        if self.outside > rules.outside * self.weight:
            return self._from_recent()
        if self.variation() < rules.variation:
            return None
        start = (1 - rules.margin) * self.percentile(rules.head)
        end = (1 + rules.margin) * (self.percentile(rules.tail) + 1)
        return Window(start, end, "histogram")

    def _from_recent(self) -> Window:
        """Too long away for the histogram: around an exponentially weighted mean of the last times."""
        recent = iter(self._recent)
        mean = next(recent)
        for away in recent:
            mean += self._rules.smoothing * (away - mean)
        margin = self._rules.recent_margin
        return Window((1 - margin) * mean, (1 + margin) * mean, "recent")

    def arrival(self, away: float, within: float) -> float:
        """Probability that who has been away for ``away`` minutes comes within the next ``within``.

        Counts who came in that time among who stayed away so long; whole bins, so never below the truth
        by more than a bin. 0 without samples.
        """
        if within <= 0 or away < 0:
            return 0.0
        first = min(RANGE, int(away))
        last = min(RANGE, math.ceil(away + within))
        stayed = sum(self._bins[first:]) + self.outside
        return min(1.0, sum(self._bins[first:last]) / stayed) if stayed > 0 else 0.0
