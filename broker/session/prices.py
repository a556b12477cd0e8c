"""What calls cost, and who has spent what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from broker.config_gateway import BudgetsConfig, PriceConfig
from broker.gateway.records import Record

MILLION = 1_000_000
UNCHARGED = ("hit", "coalesced")
"""Answers for which no provider was asked."""

Who = Literal["user", "team"]


def price_of(prices: Mapping[str, PriceConfig], model: str) -> PriceConfig | None:
    """The price by the model's name, else by the longest ``prefix*`` that it begins with."""
    exact = prices.get(model)
    if exact is not None:
        return exact
    fits = [key for key in prices if key.endswith("*") and model.startswith(key[:-1])]
    return prices[max(fits, key=len)] if fits else None


def cost_of(price: PriceConfig | None, call: Record) -> float:
    """USD. Tokens read from the provider's cache and written to it are part of ``call.input``."""
    if price is None or call.cached in UNCHARGED:
        return 0.0
    read, write = call.cache_read or 0, call.cache_write or 0
    fresh = max(0, (call.input or 0) - read - write)
    total = fresh * price.input + (call.output or 0) * price.output
    total += read * (price.input if price.cache_read is None else price.cache_read)
    total += write * (price.input if price.cache_write is None else price.cache_write)
    return total / MILLION


def period(kind: Literal["day", "month"], now: float) -> tuple[float, float]:
    """Begin and end of the period in which ``now`` is, in UTC; seconds since the epoch."""
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if kind == "day":
        return day.timestamp(), (day + timedelta(days=1)).timestamp()
    first = day.replace(day=1)
    return first.timestamp(), (first + timedelta(days=32)).replace(day=1).timestamp()


class Budgets:
    """What everybody has spent in the period that is, and who has spent it all."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.end = 0.0
        self._spent: dict[Who, dict[str, float]] = {"user": {}, "team": {}}

    def load(self, span: tuple[float, float], users: Mapping[str, float], teams: Mapping[str, float]) -> None:
        """Begins with what was spent in the period before now."""
        self.begin, self.end = span
        self._spent = {"user": dict(users), "team": dict(teams)}

    def add(self, at: float, user: str, team: str, cost: float) -> None:
        """A call that ended at ``at``; outside of the period it counts for nothing."""
        if cost <= 0 or not self.begin <= at < self.end:
            return
        names: dict[Who, str] = {"user": user, "team": team}
        for who, name in names.items():
            if name:
                self._spent[who][name] = self._spent[who].get(name, 0.0) + cost

    def forget(self, user: str) -> None:
        """The user is erased."""
        self._spent["user"].pop(user, None)

    def over(self, limits: BudgetsConfig) -> tuple[frozenset[str], frozenset[str]]:
        """Users and teams that have spent what they may."""
        return self._over("user", limits.user_usd), self._over("team", limits.team_usd)

    def _over(self, who: Who, limit: float) -> frozenset[str]:
        if not limit:
            return frozenset()
        return frozenset(name for name, cost in self._spent[who].items() if cost >= limit)
