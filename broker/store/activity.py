"""What users did, by minute; and by hour, made from it in the same transaction.

Rows travel as one JSON array a statement: a thousand statements would each cost a change of threads,
and whoever has to write waits for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from broker.metrics import ACTIVITY_WRITES
from broker.store.db import Database, Statement, Transaction

SLICE = 500
"""Rows written in one transaction."""
PAGE = 250
"""Rows read at once."""
PRUNED_USERS = 20
"""Users whose old rows are deleted in one transaction."""


@dataclass(frozen=True, order=True)
class Tally:
    """What a user did in one minute. ``minute``: since the epoch; ``first``, ``last``: seconds within it."""

    minute: int
    first: int
    kind: str
    user: str
    count: int
    last: int


@dataclass(frozen=True)
class UserTotal:
    """``minutes``: in which the user was there; ``uses``: all of them; ``hour``: the last, since the epoch."""

    user: str
    minutes: int
    uses: int
    hour: int


@dataclass(frozen=True)
class HourTotal:
    """One hour over everybody."""

    hour: int
    users: int
    uses: int


_ROWS = (
    "INSERT INTO activity (user, minute, kind, count, first, last) "
    "SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5 FROM json_each(?) WHERE true "
    "ON CONFLICT (user, minute, kind) DO UPDATE SET first = min(first, excluded.first), "
    "last = max(last, excluded.last), "
)
_ADD = f"{_ROWS} count = count + excluded.count"
# What is there already is not written again: the number of changed rows says what was new.
_MERGE = (
    f"{_ROWS} count = max(count, excluded.count) "
    "WHERE excluded.count > count OR excluded.first < first OR excluded.last > last"
)
_HOURS = (
    "INSERT INTO activity_hours (hour, user, minutes, uses) "
    "SELECT t.hour, t.user, count(DISTINCT CASE WHEN a.kind <> 'intent' THEN a.minute END), "
    "sum(CASE WHEN a.kind <> 'intent' THEN a.count ELSE 0 END) "
    "FROM (SELECT DISTINCT value ->> 0 AS user, (value ->> 1) / 60 AS hour FROM json_each(?)) AS t "
    "JOIN activity AS a ON a.user = t.user AND a.minute BETWEEN t.hour * 60 AND t.hour * 60 + 59 "
    "GROUP BY t.hour, t.user "
    "ON CONFLICT (hour, user) DO UPDATE SET minutes = excluded.minutes, uses = excluded.uses"
)


class ActivityStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, tallies: Sequence[Tally]) -> None:
        """Counts them on top of what is there, at most ``SLICE`` of them: all or none."""

        async def work(transaction: Transaction) -> None:
            ACTIVITY_WRITES.inc()
            for sql, params in _statements(_ADD, tallies):
                await transaction.execute(sql, params)

        await self._db.transaction(work)

    async def merge(self, tallies: Sequence[Tally]) -> int:
        """Counts them unless they are there already; returns how many rows that changed. Merging again changes none."""
        changed = 0
        for begin in range(0, len(tallies), SLICE):
            counts = await self._db.write(*_statements(_MERGE, tallies[begin : begin + SLICE]))
            changed += counts[0]
        return changed

    async def page(self, user: str, after: tuple[int, str], until: int) -> list[Tally]:
        """At most ``PAGE`` rows of ``user`` after (minute, kind) and before minute ``until``, in that order."""
        rows = await self._db.read(
            "SELECT minute, first, kind, user, count, last FROM activity "
            "WHERE user = ? AND (minute, kind) > (?, ?) AND minute < ? ORDER BY minute, kind LIMIT ?",
            (user, *after, until, PAGE),
        )
        return [Tally(*row) for row in rows]

    async def top(self, since_hour: int, until_hour: int, limit: int) -> list[UserTotal]:
        """The most active users, by minutes in which they were there."""
        rows = await self._db.read(
            "SELECT user, sum(minutes) AS total, sum(uses), max(hour) FROM activity_hours "
            "WHERE hour >= ? AND hour < ? GROUP BY user HAVING total > 0 ORDER BY total DESC, user LIMIT ?",
            (since_hour, until_hour, limit),
        )
        return [UserTotal(*row) for row in rows]

    async def hours(self, since_hour: int, until_hour: int) -> list[HourTotal]:
        """Each hour in which somebody was there."""
        rows = await self._db.read(
            "SELECT hour, count(*), sum(uses) FROM activity_hours "
            "WHERE hour >= ? AND hour < ? AND minutes > 0 GROUP BY hour ORDER BY hour",
            (since_hour, until_hour),
        )
        return [HourTotal(*row) for row in rows]

    async def prune(self, before_hour: int) -> int:
        """Deletes what is older, the users one after the other in short transactions; returns how many rows."""
        deleted = 0
        while True:

            async def some(transaction: Transaction) -> tuple[int, int]:
                users = await transaction.query(
                    "SELECT DISTINCT user FROM activity_hours WHERE hour < ? LIMIT ?", (before_hour, PRUNED_USERS)
                )
                names = json.dumps([user for (user,) in users])
                mine = "user IN (SELECT value FROM json_each(?))"
                rows = await transaction.execute(
                    f"DELETE FROM activity WHERE {mine} AND minute < ?", (names, before_hour * 60)
                )
                await transaction.execute(f"DELETE FROM activity_hours WHERE hour < ? AND {mine}", (before_hour, names))
                return len(users), rows

            users, rows = await self._db.transaction(some)
            deleted += rows
            if users < PRUNED_USERS:
                return deleted


def forget(user: str) -> tuple[Statement, ...]:
    """The statements that erase a user's activity."""
    return ("DELETE FROM activity WHERE user = ?", (user,)), ("DELETE FROM activity_hours WHERE user = ?", (user,))


def _statements(sql: str, tallies: Sequence[Tally]) -> tuple[Statement, Statement]:
    rows = json.dumps([[one.user, one.minute, one.kind, one.count, one.first, one.last] for one in tallies])
    return (sql, (rows,)), (_HOURS, (rows,))
