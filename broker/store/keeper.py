"""Keeps the vault's keys: which there are when the broker starts, and how they are changed while it runs.

A key is durable in its file before anything is sealed with it, and leaves the file only when no
blob names it; so a broker killed at any point opens everything, and goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.store.db import Database
from broker.store.keys import MAX_KEYS, KeyFile, new_key
from broker.store.sealed import Keyring
from broker.store.vault import KEY_IDS, Batch, Vault

BATCH = 64
"""Rows that are sealed anew in one transaction; other writes go between."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Rotated:
    """How a rotation ended. ``refused``: blobs that did not open; their keys are kept."""

    key: str
    sealed: int
    refused: int
    dropped: tuple[str, ...]
    kept: tuple[str, ...]


async def open_vault(
    db: Database, file: KeyFile, fingerprint_key: bytes, clock: Callable[[], float] = time.time
) -> Vault:
    """The vault of a store, with the keys of ``file``, which is made where nothing is sealed yet.

    Raises ``VAULT_KEY`` when the keys are not those of the store, or cannot be used; nothing is changed
    then. Raises ``VAULT_TAMPERED``.
    """
    ring = await asyncio.to_thread(file.read)
    used: set[bytes] = {key for (key,) in await db.read(KEY_IDS)}
    if ring is None:
        if used or file.passed:
            raise _missing(file, used)
        ring = await asyncio.to_thread(file.create)
        log.info("vault_key_made", file=str(file.path), key=ring.first.id.hex())
    if used - ring.ids:
        raise _foreign(file, used - ring.ids)
    vault = Vault(db, ring, fingerprint_key, clock)
    await vault.open_canary(must=bool(used))
    return vault


def _missing(file: KeyFile, used: set[bytes]) -> CortexError:
    return CortexError(
        Code.VAULT_KEY,
        f"the vault's key file {file.path} is not there",
        cause=f"credentials are stored that only key {_names(used)} opens" if used else None,
        hint="bring it back from your copy; or give the store up: move cortex.db away, and store credentials again",
    )


def _foreign(file: KeyFile, unknown: set[bytes]) -> CortexError:
    return CortexError(
        Code.VAULT_KEY,
        f"{file.path} does not hold the key that stored credentials are sealed with",
        cause=f"key {_names(unknown)} is missing",
        hint="add that key as a further line of the file, from your copy; nothing was changed",
    )


def _names(ids: set[bytes]) -> str:
    return ", ".join(sorted(key.hex() for key in ids))


class Keeper:
    """Changes the keys of ``vault``; one rotation at a time."""

    def __init__(self, vault: Vault, file: KeyFile) -> None:
        self.vault = vault
        self._file = file
        self._turn = asyncio.Lock()
        self._tasks = TaskOwner("keeper")

    @classmethod
    async def open(cls, db: Database, file: KeyFile, fingerprint_key: bytes) -> Keeper:
        """Of the vault that ``open_vault`` opens; what a killed broker left half done, or an operator's new first
        key, is carried through in the background."""
        keeper = cls(await open_vault(db, file, fingerprint_key), file)
        keeper.start()
        return keeper

    def start(self) -> None:
        """See ``open``."""
        self._tasks.start(self._resume(), "resume", on_error=_stopped)

    async def rotate(self) -> Rotated:
        """A new key, and everything sealed with it; then the old ones go. Goes on when the caller leaves.

        Raises ``VAULT_KEY_READ_ONLY``, ``VAULT_KEY``, and what the store raises; then it may be called again.
        """
        return await asyncio.shield(self._tasks.start(self._rotate(), "rotate", on_error=_stopped))

    async def _rotate(self) -> Rotated:
        async with self._turn:
            if self._file.passed:
                raise _read_only(self._file)
            ring = self.vault.ring
            on_disk = await asyncio.to_thread(self._file.read)
            if on_disk is None or on_disk.ids != ring.ids or len(ring.keys) >= MAX_KEYS:
                raise CortexError(
                    Code.VAULT_KEY,
                    f"{self._file.path} is not as the broker left it, or full",
                    hint="restart the broker: it reads the file anew, seals with its first key and drops unused ones",
                )
            fresh = Keyring((new_key(), *ring.keys))
            await asyncio.to_thread(self._file.replace, fresh)
            self.vault.ring = fresh
            log.info("vault_key_made", file=str(self._file.path), key=fresh.first.id.hex())
            return await self._carry_through()

    async def _resume(self) -> None:
        async with self._turn:
            if len(self.vault.ring.keys) > 1:
                await self._carry_through()

    async def _carry_through(self) -> Rotated:
        vault, ring = self.vault, self.vault.ring
        await vault.seal_canary()
        sealed = refused = 0
        for key in await vault.keys_in_use() - {ring.first.id}:
            batch = Batch(more=True, last=("", ""))
            while batch.more:
                batch = await vault.reseal(key, batch.last, BATCH)
                sealed, refused = sealed + batch.sealed, refused + batch.refused
        used = await vault.keys_in_use()
        kept = Keyring(tuple(key for key in ring.keys if key is ring.first or key.id in used))
        unused = ring.ids - kept.ids
        if unused and not self._file.passed:
            await asyncio.to_thread(self._file.replace, kept)
            vault.ring = kept
        done = Rotated(
            key=ring.first.id.hex(),
            sealed=sealed,
            refused=refused,
            dropped=() if self._file.passed else tuple(sorted(key.hex() for key in unused)),
            kept=tuple(key.id.hex() for key in vault.ring.keys),
        )
        log.info("vault_rotated", key=done.key, sealed=sealed, refused=refused, dropped=done.dropped, kept=done.kept)
        return done

    async def view(self) -> list[tuple[str, int]]:
        """The ids of the keys, the one that seals first, and how many credentials each seals."""
        counts = await self.vault.counts()
        return [(key.id.hex(), counts.get(key.id, 0)) for key in self.vault.ring.keys]

    @property
    def path(self) -> Path:
        """Where the keys are."""
        return self._file.path

    async def close(self) -> None:
        """A rotation that runs is left where it is; the next start goes on with it."""
        await self._tasks.close()
        await self.vault.close()


def _stopped(error: BaseException) -> None:
    log.error(
        "vault_rotation_stopped", error=str(error), hint="what is sealed opens all the same; it goes on at a start"
    )


def _read_only(file: KeyFile) -> CortexError:
    return CortexError(
        Code.VAULT_KEY_READ_ONLY,
        f"the vault's keys come from systemd ({file.path}); the broker cannot change them",
        hint="put a new key on the first line of the file that LoadCredential=cortex-vault.key names, the old ones "
        "below it, and restart the broker: it seals everything with the new one; `cortex vault status` says when "
        "the old ones may go",
    )
