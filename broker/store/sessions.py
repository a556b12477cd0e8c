"""Rows of sessions and of the sandboxes that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from broker.store.db import Database


@dataclass(frozen=True)
class SessionRow:
    """One session. Times are seconds since the epoch; ``config`` is the cached SandboxConfig as JSON.

    ``slot`` is "" when it has no sandbox; ``generation`` counts configuration changes.
    """

    user: str
    workspace: str
    id: str
    agent: str
    state: str
    reason: str
    slot: str
    incarnation: int
    generation: int
    config: bytes | None
    config_at: float
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class SandboxRow:
    """One sandbox. ``role``: session, warm (nobody's yet, of ``agent``) or builder; ``welcomed``: its incarnation
    has its secret; ``boot``: hash of what it was made with."""

    slot: str
    incarnation: int
    driver: str
    ref: str
    user: str
    workspace: str
    role: str
    welcomed: bool
    created_at: float
    agent: str = ""
    boot: str = ""


WARM = "warm"
"""Role of a sandbox that is nobody's yet."""

_SESSION = tuple(item.name for item in fields(SessionRow))
_SANDBOX = tuple(item.name for item in fields(SandboxRow))
_session_values = attrgetter(*_SESSION)
_sandbox_values = attrgetter(*_SANDBOX)
_SESSION_COLUMNS = ", ".join(_SESSION)
_SANDBOX_COLUMNS = ", ".join(_SANDBOX)
_PAGE_COLUMNS = ", ".join("NULL" if name == "config" else name for name in _SESSION)


def _upsert(table: str, columns: Sequence[str], keys: Sequence[str]) -> str:
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in keys)
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) "
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes}"
    )


_SAVE_SESSION = _upsert("sessions", _SESSION, ("user", "workspace"))
_SAVE_SANDBOX = _upsert("sandboxes", _SANDBOX, ("slot",))


def _sandbox(row: tuple[Any, ...]) -> SandboxRow:
    slot, incarnation, driver, ref, user, workspace, role, welcomed, created_at, agent, boot = row
    return SandboxRow(slot, incarnation, driver, ref, user, workspace, role, bool(welcomed), created_at, agent, boot)


class SessionStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def get(self, user: str, workspace: str) -> SessionRow | None:
        """The session's row, with its cached configuration."""
        rows = await self._db.read(
            f"SELECT {_SESSION_COLUMNS} FROM sessions WHERE user = ? AND workspace = ?", (user, workspace)
        )
        return SessionRow(*rows[0]) if rows else None

    async def save(self, row: SessionRow) -> None:
        """Inserts or replaces by user and workspace; durable when it returns."""
        await self._db.write((_SAVE_SESSION, _session_values(row)))

    async def delete(self, user: str, workspace: str) -> None:
        """Idempotent."""
        await self._db.write(("DELETE FROM sessions WHERE user = ? AND workspace = ?", (user, workspace)))

    async def page(self, after: tuple[str, str] = ("", ""), limit: int = 100) -> list[SessionRow]:
        """At most ``limit`` rows after (user, workspace), in that order, each with ``config`` None."""
        return [
            SessionRow(*row)
            for row in await self._db.read(
                f"SELECT {_PAGE_COLUMNS} FROM sessions WHERE (user, workspace) > (?, ?) "
                "ORDER BY user, workspace LIMIT ?",
                (*after, limit),
            )
        ]

    async def of_user(self, user: str) -> list[SessionRow]:
        """All sessions of one user, each with ``config`` None."""
        rows = await self._db.read(f"SELECT {_PAGE_COLUMNS} FROM sessions WHERE user = ? ORDER BY workspace", (user,))
        return [SessionRow(*row) for row in rows]

    async def sandbox_get(self, slot: str) -> SandboxRow | None:
        """The sandbox in ``slot``."""
        rows = await self._db.read(f"SELECT {_SANDBOX_COLUMNS} FROM sandboxes WHERE slot = ?", (slot,))
        return _sandbox(rows[0]) if rows else None

    async def sandboxes(self) -> list[SandboxRow]:
        """All sandboxes of this node."""
        return [_sandbox(row) for row in await self._db.read(f"SELECT {_SANDBOX_COLUMNS} FROM sandboxes ORDER BY slot")]

    async def sandbox_save(self, row: SandboxRow) -> None:
        """Inserts or replaces by slot; durable when it returns."""
        await self._db.write((_SAVE_SANDBOX, _sandbox_values(row)))

    async def sandbox_welcomed(self, slot: str, incarnation: int) -> bool:
        """Notes that this incarnation was given its secret. False: it was before, or is not the slot's."""
        (changed,) = await self._db.write(
            (
                "UPDATE sandboxes SET welcomed = 1 WHERE slot = ? AND incarnation = ? AND welcomed = 0",
                (slot, incarnation),
            )
        )
        return changed == 1

    async def sandbox_claim(self, slot: str, incarnation: int, user: str, workspace: str) -> bool:
        """Makes a warm sandbox that of a session; durable when it returns. False: it is not there, or not warm any
        more, so it may not be claimed."""
        (changed,) = await self._db.write(
            (
                "UPDATE sandboxes SET role = 'session', user = ?, workspace = ? "
                "WHERE slot = ? AND incarnation = ? AND role = 'warm'",
                (user, workspace, slot, incarnation),
            )
        )
        return changed == 1

    async def sandbox_delete(self, slot: str) -> None:
        """Idempotent."""
        await self._db.write(("DELETE FROM sandboxes WHERE slot = ?", (slot,)))
