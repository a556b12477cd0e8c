"""Configuration sections of users, as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker.store.activity import forget as forget_activity
from broker.store.db import Database
from broker.store.usage import forget as forget_usage


@dataclass(frozen=True)
class StoredSection:
    """One section. ``version`` counts its writes from 1; ``updated_at``: seconds since the epoch."""

    value: dict[str, Any]
    version: int
    updated_at: float


class UserStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock

    async def sections(self, user: str) -> dict[str, dict[str, Any]]:
        """All sections that the user has, by name, in one query."""
        rows = await self._db.read("SELECT section, value FROM sections WHERE user = ?", (user,))
        return {section: json.loads(value) for section, value in rows}

    async def section(self, user: str, section: str) -> StoredSection | None:
        """One section with its version."""
        rows = await self._db.read(
            "SELECT value, version, updated_at FROM sections WHERE user = ? AND section = ?", (user, section)
        )
        return StoredSection(json.loads(rows[0][0]), rows[0][1], rows[0][2]) if rows else None

    async def put_section(self, user: str, section: str, value: dict[str, Any]) -> int:
        """Replaces a section, already validated; returns its new version."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        rows = await self._db.write_returning(
            "INSERT INTO sections (user, section, value, version, updated_at) VALUES (?, ?, ?, 1, ?) "
            "ON CONFLICT (user, section) DO UPDATE SET value = excluded.value, version = version + 1, "
            "updated_at = excluded.updated_at RETURNING version",
            (user, section, text, self._clock()),
        )
        return int(rows[0][0])

    async def delete(self, user: str) -> None:
        """Erases the user's sections, credentials, tokens, hook receipts, activity and usage, all or none.

        Sessions are the registry's; a vault that is open has erased the credentials before.
        """
        await self._db.write(
            ("DELETE FROM sections WHERE user = ?", (user,)),
            ("DELETE FROM credentials WHERE user = ?", (user,)),
            ("DELETE FROM tokens WHERE user = ?", (user,)),
            ("DELETE FROM hook_receipts WHERE user = ?", (user,)),
            *forget_activity(user),
            *forget_usage(user),
        )
