"""Calls to providers, each counted once; what those to models add up to by the hour; and how soon models answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

from broker.store.db import Database, Statement, Transaction

By = Literal["user", "team", "model", "provider", "hour", "day"]
HOUR = 3600
DAY_HOURS = 24
MAX_ROWS = 1000
SLICE = 2000
"""Rows deleted in one transaction."""


@dataclass(frozen=True)
class UsedCall:
    """One call. Tokens: see ``broker.gateway.meter``; ``at``: seconds since the epoch, when it ended."""

    id: str
    at: float
    user: str
    team: str
    workspace: str
    agent: str
    provider: str
    model: str
    endpoint: str
    status: int
    outcome: str
    cached: str
    input: int | None
    output: int | None
    cache_read: int | None
    cache_write: int | None
    reasoning: int | None
    cost_usd: float
    duration_s: float
    queue_s: float
    ttft_s: float | None
    estimated: bool = False


@dataclass(frozen=True)
class UsageFilter:
    """What to add up; ``since``, ``until``: hours since the epoch, the latter left out. Empty: everything."""

    since: int = 0
    until: int = 2**40
    equal: Mapping[Literal["user", "team", "provider", "model"], str] = field(default_factory=dict)


@dataclass(frozen=True)
class UsageSum:
    """``key``: a name, or the begin of an hour or day as seconds since the epoch; ``cached``: calls that no provider
    was asked for; ``estimated``: those whose tokens no provider has said; ``duration_s``, ``ttft_s``: added up, the
    latter of ``ttft_calls``."""

    key: str | int
    calls: int
    errors: int
    cached: int
    estimated: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    reasoning: int
    cost_usd: float
    duration_s: float
    ttft_s: float
    ttft_calls: int


@dataclass(frozen=True)
class SpeedRow:
    """``ttft_s`` None: the last call failed; ``count``: calls that it is made of; ``at``: of the last."""

    provider: str
    model: str
    ttft_s: float | None
    count: int
    at: float


_COLUMNS = tuple(UsedCall.__dataclass_fields__)
_INSERT = (
    f"INSERT INTO usage_calls ({', '.join(_COLUMNS)}) "
    f"SELECT {', '.join(f'value ->> {place}' for place in range(len(_COLUMNS)))} FROM json_each(?) WHERE true "
    "ON CONFLICT (id) DO NOTHING RETURNING id"
)
_COUNTS = ("input", "output", "cache_read", "cache_write", "reasoning", "cost_usd", "duration_s", "ttft_s")
_SUMS = ("calls", "errors", "cached", "estimated", *_COUNTS, "ttft_calls")
_TOTALS = ", ".join(
    f"total({name})" if name.endswith(("_s", "_usd")) else f"coalesce(sum({name}), 0)" for name in _COUNTS
)
_HOURS = (
    f"INSERT INTO usage_hours (hour, user, team, provider, model, {', '.join(_SUMS)}) "
    f"SELECT CAST(at AS INTEGER) / {HOUR}, user, team, provider, model, "
    "count(*), sum(outcome <> 'ok' OR status >= 400), sum(cached IN ('hit', 'coalesced')), sum(estimated), "
    f"{_TOTALS}, count(ttft_s) FROM usage_calls WHERE id IN (SELECT value FROM json_each(?)) "
    "AND endpoint IN ('generate', 'embed') GROUP BY 1, 2, 3, 4, 5 "
    "ON CONFLICT (hour, user, team, provider, model) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in _SUMS)
)
_KEYS: dict[By, str] = {
    "user": "user",
    "team": "team",
    "model": "model",
    "provider": "provider",
    "hour": f"hour * {HOUR}",
    "day": f"hour / {DAY_HOURS} * {DAY_HOURS * HOUR}",
}


class UsageStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, calls: Sequence[UsedCall]) -> frozenset[str]:
        """Counts those that are not known, all or none; returns their ids."""
        rows = json.dumps([astuple(call) for call in calls])

        async def work(transaction: Transaction) -> frozenset[str]:
            fresh = frozenset(name for (name,) in await transaction.query(_INSERT, (rows,)))
            if fresh:
                await transaction.execute(_HOURS, (json.dumps(sorted(fresh)),))
            return fresh

        return await self._db.transaction(work)

    async def sums(self, wanted: UsageFilter, by: By, limit: int = MAX_ROWS) -> list[UsageSum]:
        """Added up by ``by``: times in their order, else what costs most first, then what takes most tokens."""
        where = "".join(f" AND {name} = ?" for name in wanted.equal)
        order = "1" if by in ("hour", "day") else "sum(cost_usd) DESC, sum(input + output) DESC, sum(calls) DESC, 1"
        rows = await self._db.read(
            f"SELECT {_KEYS[by]}, {', '.join(f'sum({name})' for name in _SUMS)} "
            f"FROM usage_hours WHERE hour >= ? AND hour < ?{where} GROUP BY 1 ORDER BY {order} LIMIT ?",
            (wanted.since, wanted.until, *wanted.equal.values(), limit),
        )
        return [UsageSum(*row) for row in rows]

    async def answered(self, limit: int) -> list[tuple[str, str]]:
        """Providers and models of which answers came, the latest last; ``limit`` of them."""
        rows = await self._db.read(
            "SELECT provider, model FROM usage_hours WHERE calls > errors "
            "GROUP BY 1, 2 ORDER BY max(hour) DESC LIMIT ?",
            (limit,),
        )
        return [(provider, model) for provider, model in reversed(rows)]

    async def spent(self, by: Literal["user", "team"], since_hour: int) -> dict[str, float]:
        """USD by name."""
        rows = await self._db.read(
            f"SELECT {by}, sum(cost_usd) FROM usage_hours WHERE hour >= ? AND {by} <> '' GROUP BY 1", (since_hour,)
        )
        return dict(rows)

    async def prune(self, calls_before: float, hours_before: int) -> None:
        """Deletes what is older: calls that ended before a time, sums before an hour."""
        for sql, before in (
            ("DELETE FROM usage_calls WHERE id IN (SELECT id FROM usage_calls WHERE at < ? LIMIT ?)", calls_before),
            (
                "DELETE FROM usage_hours WHERE (hour, user, team, provider, model) IN "
                "(SELECT hour, user, team, provider, model FROM usage_hours WHERE hour < ? LIMIT ?)",
                hours_before,
            ),
        ):
            while (await self._db.write((sql, (before, SLICE))))[0] == SLICE:
                pass

    async def speeds(self) -> list[SpeedRow]:
        """All that are known."""
        rows = await self._db.read("SELECT provider, model, ttft_s, count, at FROM model_speed")
        return [SpeedRow(*row) for row in rows]

    async def put_speeds(self, speeds: Sequence[SpeedRow]) -> None:
        """Replaces them."""
        rows: Any = json.dumps([astuple(speed) for speed in speeds])
        await self._db.write(
            (
                "INSERT OR REPLACE INTO model_speed (provider, model, ttft_s, count, at) "
                "SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(?)",
                (rows,),
            )
        )


def forget(user: str) -> tuple[Statement, ...]:
    """The statements that erase a user's usage."""
    return ("DELETE FROM usage_calls WHERE user = ?", (user,)), ("DELETE FROM usage_hours WHERE user = ?", (user,))
