"""Credentials of users, sealed at rest (``sealed``): one row a user and provider.

The vault alone writes its rows, so what it read of a user is kept, sealed, until it writes again: a
claim of a user whose credentials are known costs no query. A blob that does not open is refused
and raises an alarm; nothing is ever used in its place.

What is not guarded against: the whole file ``cortex.db`` put back to an older state while no
broker runs. A single row put back is refused as long as the broker that saw the newer one runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import VAULT_ALARMS
from broker.store.db import Database, Transaction
from broker.store.sealed import Broken, Keyring, place, seal, unseal

T = TypeVar("T")
Kind = Literal["api_key", "oauth", "file"]
Mode = Literal["gateway", "file"]

MAX_USERS = 10_000
"""Users whose sealed rows are kept in memory."""
MAX_VERSIONS = 100_000
"""Rows of which the newest version is remembered."""
_TABLE = "credentials"
_CANARY = place("canary", "", "", 0)
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Secret:
    """What is sealed. ``value``: text, or a token set; ``expires_at``: seconds since the epoch, 0: never."""

    kind: Kind
    mode: Mode
    value: str | Mapping[str, Any] = field(repr=False)
    expires_at: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What may be told of a credential. ``version`` grows with every write of any; ``fingerprint`` is keyed.

    ``problem``, ``failures`` and ``retry_at`` are of its renewal; times are seconds since the epoch.
    """

    user: str
    provider: str
    version: int
    kind: Kind
    mode: Mode
    fingerprint: str
    expires_at: float
    problem: str
    failures: int
    retry_at: float
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class Entry:
    """A credential, opened."""

    facts: Facts
    secret: Secret


@dataclass
class Batch:
    """What one step of a re-encryption did. ``more``: there may be rows behind ``last``."""

    more: bool
    last: tuple[str, str]
    sealed: int = 0
    refused: int = 0


@dataclass(frozen=True)
class _Row:
    facts: Facts
    sealed: bytes = field(repr=False)


_FACTS = tuple(item.name for item in fields(Facts))
_READ = f"SELECT {', '.join(_FACTS)}, sealed FROM credentials WHERE user = ? ORDER BY provider"
_WRITE = (
    "INSERT INTO credentials (user, provider, version, kind, mode, fingerprint, key_id, sealed, expires_at, "
    "created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (user, provider) DO UPDATE SET "
    "version = excluded.version, kind = excluded.kind, mode = excluded.mode, fingerprint = excluded.fingerprint, "
    "key_id = excluded.key_id, sealed = excluded.sealed, expires_at = excluded.expires_at, problem = '', "
    "failures = 0, retry_at = 0, updated_at = excluded.updated_at"
)


KEY_IDS = (
    "WITH RECURSIVE ids (id) AS (SELECT min(key_id) FROM credentials UNION ALL "
    "SELECT (SELECT min(key_id) FROM credentials WHERE key_id > id) FROM ids WHERE id IS NOT NULL) "
    "SELECT id FROM ids WHERE id IS NOT NULL"
)
"""The keys that credentials name; costs as many index look-ups, whatever the number of rows."""
_OF_KEY = (
    f"SELECT {', '.join(_FACTS)}, sealed FROM credentials WHERE key_id = ? AND (user, provider) > (?, ?) "
    "ORDER BY user, provider LIMIT ?"
)


class Vault:
    """Opened by ``keeper.open_vault``. Every method raises ``CortexError`` (``STORE_ERROR``, ``DISK_FULL``).

    ``ring``: the keys of the moment; ``fingerprint_key``: the installation's; ``clock``: seconds since the epoch.
    """

    def __init__(
        self, db: Database, ring: Keyring, fingerprint_key: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        self.ring = ring
        self._db = db
        self._fingerprint_key = fingerprint_key
        self._clock = clock
        self._known: OrderedDict[str, tuple[_Row, ...]] = OrderedDict()
        self._newest: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._writes = 0
        self._tasks = TaskOwner("vault")

    # -- reading -------------------------------------------------------------------------------

    async def list(self, user: str) -> list[Facts]:
        """Of all credentials of a user, by provider. Nothing is opened."""
        return [row.facts for row in await self._rows(user)]

    async def facts(self, user: str, provider: str) -> Facts | None:
        """Of one credential."""
        return next((facts for facts in await self.list(user) if facts.provider == provider), None)

    async def get(self, user: str, provider: str) -> Entry | None:
        """One credential, opened. Raises ``VAULT_TAMPERED``."""
        row = await self._row(user, provider)
        if row is not None and self._older(row):
            # It may have been read while the newer one was written; read again, it is the newer one.
            self._known.pop(user, None)
            row = await self._row(user, provider)
        return None if row is None else Entry(row.facts, self._open(row))

    async def _row(self, user: str, provider: str) -> _Row | None:
        return next((row for row in await self._rows(user) if row.facts.provider == provider), None)

    def _older(self, row: _Row) -> bool:
        return row.facts.version < self._newest.get((row.facts.user, row.facts.provider), 0)

    async def _rows(self, user: str) -> tuple[_Row, ...]:
        known = self._known.get(user)
        if known is not None:
            self._known.move_to_end(user)
            return known
        writes = self._writes
        found = await self._db.read(_READ, (user,))
        rows = tuple(_Row(Facts(*row[:-1]), row[-1]) for row in found)
        if writes == self._writes:
            self._known[user] = rows
            if len(self._known) > MAX_USERS:
                self._known.popitem(last=False)
        return rows

    def _open(self, row: _Row) -> Secret:
        facts = row.facts
        if self._older(row):
            raise self._alarm(facts, "rolled_back", "an older version of it was put back")
        try:
            secret = Secret(**json.loads(unseal(self.ring, _place(facts), row.sealed)))
        except Broken as error:
            raise self._alarm(facts, "tampered", str(error)) from None
        if (secret.kind, secret.mode, secret.expires_at) != (facts.kind, facts.mode, facts.expires_at):
            raise self._alarm(facts, "tampered", "what stands beside it was changed")
        self._saw(facts.user, facts.provider, facts.version)
        return secret

    def _alarm(self, facts: Facts, reason: str, cause: str) -> CortexError:
        VAULT_ALARMS.labels(reason).inc()
        log.error("credential_refused", user=facts.user, provider=facts.provider, reason=reason, cause=cause)
        return CortexError(
            Code.VAULT_TAMPERED,
            f"the stored credential of {facts.user} for {facts.provider} is not what was stored",
            cause=cause,
            hint="find out who can write broker.state_dir; then store the credential again",
        )

    def _saw(self, user: str, provider: str, version: int) -> None:
        self._newest[user, provider] = max(version, self._newest.get((user, provider), 0))
        self._newest.move_to_end((user, provider))
        if len(self._newest) > MAX_VERSIONS:
            self._newest.popitem(last=False)

    # -- writing -------------------------------------------------------------------------------

    async def put(self, user: str, provider: str, secret: Secret, *, expect: int | None = None) -> Facts | None:
        """Stores a credential, durable when it returns. ``expect``: only in the place of that version; else None."""

        async def work(transaction: Transaction) -> Facts | None:
            old = await transaction.query(
                "SELECT version, created_at FROM credentials WHERE user = ? AND provider = ?", (user, provider)
            )
            if expect is not None and (not old or old[0][0] != expect):
                return None
            # One sequence for all, so that a version never comes again, after a delete neither.
            bumped = await transaction.query("UPDATE vault SET sequence = sequence + 1 WHERE id = 1 RETURNING sequence")
            facts = self._facts(user, provider, bumped[0][0], secret, old[0][1] if old else None)
            # Sealed in here: writes are one after the other, so none is under a key that was dropped meanwhile.
            key = self.ring.first
            blob = seal(key, _place(facts), json.dumps(asdict(secret)).encode())
            await transaction.execute(_WRITE, _values(facts, key.id, blob))
            return facts

        facts = await self._change(work, user)
        if facts is not None:
            self._saw(user, provider, facts.version)
        return facts

    def _facts(self, user: str, provider: str, version: int, secret: Secret, created_at: float | None) -> Facts:
        now = self._clock()
        return Facts(
            user=user,
            provider=provider,
            version=version,
            kind=secret.kind,
            mode=secret.mode,
            fingerprint=self._fingerprint(user, provider, secret),
            expires_at=secret.expires_at,
            problem="",
            failures=0,
            retry_at=0.0,
            created_at=now if created_at is None else created_at,
            updated_at=now,
        )

    def _fingerprint(self, user: str, provider: str, secret: Secret) -> str:
        """Equal for equal secrets of one user and provider; tells nothing without the installation's key."""
        text = json.dumps(["credential", user, provider, secret.value], sort_keys=True).encode()
        return hmac.digest(self._fingerprint_key, text, hashlib.sha256).hex()[:16]

    async def note_failure(self, facts: Facts, problem: str, retry_at: float) -> None:
        """Notes that its renewal failed, unless it was stored anew meanwhile. ``problem`` is for people."""
        await self._change(
            lambda transaction: transaction.execute(
                "UPDATE credentials SET problem = ?, failures = failures + 1, retry_at = ? "
                "WHERE user = ? AND provider = ? AND version = ?",
                (problem, retry_at, facts.user, facts.provider, facts.version),
            ),
            facts.user,
        )

    async def delete(self, user: str, provider: str) -> bool:
        """Erases a credential; False when there was none."""
        rows = await self._change(
            lambda transaction: transaction.query(
                "DELETE FROM credentials WHERE user = ? AND provider = ? RETURNING version", (user, provider)
            ),
            user,
        )
        for (version,) in rows:
            self._saw(user, provider, version + 1)
        return bool(rows)

    async def erase(self, user: str) -> int:
        """Erases all credentials of a user; how many there were."""
        rows = await self._change(
            lambda transaction: transaction.query(
                "DELETE FROM credentials WHERE user = ? RETURNING provider, version", (user,)
            ),
            user,
        )
        for provider, version in rows:
            self._saw(user, provider, version + 1)
        return len(rows)

    async def _change(self, work: Callable[[Transaction], Coroutine[Any, Any, T]], user: str = "") -> T:
        """A transaction; what was known of ``user`` (of all: "") is forgotten when it is through, also when whoever
        asked for it has left."""
        return await asyncio.shield(self._tasks.start(self._changed(work, user), "write", on_error=lambda error: None))

    async def _changed(self, work: Callable[[Transaction], Coroutine[Any, Any, T]], user: str) -> T:
        try:
            return await self._db.transaction(work)
        finally:
            self._writes += 1
            if user:
                self._known.pop(user, None)
            else:
                self._known.clear()

    # -- keys ----------------------------------------------------------------------------------

    async def open_canary(self, *, must: bool) -> None:
        """Opens the row that shows that store and keys belong together; makes it where it is missing.

        ``must``: there are credentials, so it has to open; else it may be of a key that is gone. Raises
        ``VAULT_TAMPERED``.
        """
        rows = await self._db.read("SELECT key_id, canary FROM vault")
        if not rows or (not must and rows[0][0] not in self.ring.ids):
            await self.seal_canary()
            return
        try:
            unseal(self.ring, _CANARY, rows[0][1])
        except Broken as error:
            VAULT_ALARMS.labels("tampered").inc()
            raise CortexError(
                Code.VAULT_TAMPERED,
                "the vault's canary does not open",
                cause=str(error),
                hint="cortex.db was changed by another program; restore it from a backup",
            ) from None

    async def seal_canary(self) -> None:
        """Seals it with the first key."""
        await self._db.write(
            (
                "INSERT INTO vault (id, sequence, key_id, canary) "
                "VALUES (1, (SELECT coalesce(max(version), 0) FROM credentials), ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET key_id = excluded.key_id, canary = excluded.canary",
                (self.ring.first.id, seal(self.ring.first, _CANARY, b"canary")),
            )
        )

    async def keys_in_use(self) -> set[bytes]:
        """The keys that credentials are sealed with, when all writes that have begun are through."""
        return {key for (key,) in await self._change(lambda transaction: transaction.query(KEY_IDS))}

    async def counts(self) -> dict[bytes, int]:
        """How many credentials each key seals."""
        return dict(await self._db.read("SELECT key_id, count(*) FROM credentials GROUP BY key_id"))

    async def reseal(self, key: bytes, after: tuple[str, str], limit: int) -> Batch:
        """Seals anew, with the first key, what ``key`` seals: ``limit`` rows from the one behind ``after`` on."""

        async def work(transaction: Transaction) -> Batch:
            found = await transaction.query(_OF_KEY, (key, *after, limit))
            batch = Batch(len(found) == limit, after)
            for values in found:
                row = _Row(Facts(*values[:-1]), values[-1])
                batch.last = (row.facts.user, row.facts.provider)
                try:
                    secret = unseal(self.ring, _place(row.facts), row.sealed)
                except Broken as error:
                    self._alarm(row.facts, "tampered", str(error))
                    batch.refused += 1
                    continue
                await transaction.execute(
                    "UPDATE credentials SET key_id = ?, sealed = ? WHERE user = ? AND provider = ?",
                    (self.ring.first.id, seal(self.ring.first, _place(row.facts), secret), *batch.last),
                )
                batch.sealed += 1
            return batch

        return await self._change(work)

    async def close(self) -> None:
        """Nobody is waited for; a write that has begun comes through."""
        await self._tasks.close()


def _place(facts: Facts) -> bytes:
    return place(_TABLE, facts.user, facts.provider, facts.version)


def _values(facts: Facts, key: bytes, blob: bytes) -> tuple[Any, ...]:
    head = (facts.user, facts.provider, facts.version, facts.kind, facts.mode, facts.fingerprint)
    return (*head, key, blob, facts.expires_at, facts.created_at, facts.updated_at)
