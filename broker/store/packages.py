"""The index of the shelf of MCP packages: which spec lies under which key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.store.db import Database


@dataclass(frozen=True)
class PackageRow:
    """One installed package. ``key``: its directory on the shelf; ``bins``: command → path below it."""

    spec: str
    key: str
    bins: dict[str, str]
    version: str


class PackageStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock

    async def get(self, spec: str) -> PackageRow | None:
        """The package that ``spec`` was resolved to."""
        rows = await self._db.read("SELECT spec, key, bins, version FROM packages WHERE spec = ?", (spec,))
        return PackageRow(rows[0][0], rows[0][1], json.loads(rows[0][2]), rows[0][3]) if rows else None

    async def put(self, spec: str, key: str, bins: Mapping[str, str], version: str) -> None:
        """Inserts or replaces."""
        await self._db.write(
            (
                "INSERT INTO packages (spec, key, bins, version, created_at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (spec) DO UPDATE SET key = excluded.key, bins = excluded.bins, "
                "version = excluded.version, created_at = excluded.created_at",
                (spec, key, json.dumps(dict(bins)), version, self._clock()),
            )
        )

    async def list(self) -> list[PackageRow]:
        """All packages, by spec."""
        rows = await self._db.read("SELECT spec, key, bins, version FROM packages ORDER BY spec")
        return [PackageRow(spec, key, json.loads(bins), version) for spec, key, bins, version in rows]
