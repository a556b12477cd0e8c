"""Attach tokens, by hash only, and receipts of the web app's hook calls."""

from __future__ import annotations

from dataclasses import dataclass

from broker.store.db import Database


@dataclass(frozen=True)
class TokenRow:
    """One token. ``hash``: SHA-256 digest; ``expires_at``: seconds since the epoch."""

    hash: bytes
    user: str
    workspace: str
    expires_at: float
    revoked: bool


@dataclass(frozen=True)
class Receipt:
    """A hook call that was answered. ``body_hash``: SHA-256 of its body."""

    id: str
    user: str
    workspace: str
    body_hash: bytes
    at: float


class TokenStore:
    """Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def put(self, hash: bytes, user: str, workspace: str, expires_at: float) -> None:
        """Stores a token; a known hash stays as it is, so that nothing revives a revoked one."""
        await self._db.write(
            (
                "INSERT INTO tokens (hash, user, workspace, expires_at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (hash) DO NOTHING",
                (hash, user, workspace, expires_at),
            )
        )

    async def get(self, hash: bytes) -> TokenRow | None:
        """The token, expired and revoked ones too until they are pruned."""
        rows = await self._db.read(
            "SELECT hash, user, workspace, expires_at, revoked FROM tokens WHERE hash = ?", (hash,)
        )
        if not rows:
            return None
        found, user, workspace, expires_at, revoked = rows[0]
        return TokenRow(found, user, workspace, expires_at, bool(revoked))

    async def revoke(self, user: str, workspace: str) -> int:
        """Revokes all tokens of a session; returns how many were not revoked before."""
        (count,) = await self._db.write(
            ("UPDATE tokens SET revoked = 1 WHERE user = ? AND workspace = ? AND revoked = 0", (user, workspace))
        )
        return count

    async def prune(self, now: float) -> int:
        """Deletes tokens that have expired; returns how many."""
        (count,) = await self._db.write(("DELETE FROM tokens WHERE expires_at <= ?", (now,)))
        return count

    async def receipt_get(self, id: str) -> Receipt | None:
        """The receipt of webhook ``id``."""
        rows = await self._db.read("SELECT id, user, workspace, body_hash, at FROM hook_receipts WHERE id = ?", (id,))
        return Receipt(*rows[0]) if rows else None

    async def receipt_put(self, id: str, user: str, workspace: str, body_hash: bytes, at: float) -> bool:
        """Stores a receipt; False when webhook ``id`` already has one, which then stays."""
        (count,) = await self._db.write(
            (
                "INSERT INTO hook_receipts (id, user, workspace, body_hash, at) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO NOTHING",
                (id, user, workspace, body_hash, at),
            )
        )
        return count == 1

    async def receipts_prune(self, before: float) -> int:
        """Deletes receipts older than ``before``; returns how many."""
        (count,) = await self._db.write(("DELETE FROM hook_receipts WHERE at < ?", (before,)))
        return count
