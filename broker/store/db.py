"""The SQLite database: one connection that writes, one that reads, one broker per state directory.

Every commit is synced (WAL, ``synchronous=FULL``), so what a write returned for is durable. The
write-ahead log is checkpointed by the writing connection alone: SQLite before 3.51.3 can lose
commits when two connections checkpoint at once.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import STORE_READS, STORE_WRITES

T = TypeVar("T")
Params = Sequence[Any]
Statement = tuple[str, Params]

FILE_NAME = "cortex.db"
LOCK_NAME = "broker.lock"
SAFE_SQLITE = (3, 51, 3)
BUSY_TIMEOUT_MS = 5_000
MAX_WAITING = 10_000

log = structlog.get_logger(__name__)


class Transaction:
    """What a transaction's callable may do; both map errors to ``CortexError``."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def execute(self, sql: str, params: Params = ()) -> int:
        """Runs a statement; returns the number of rows it changed."""
        async with self._connection.execute(sql, params) as cursor:
            return cursor.rowcount

    async def query(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """Runs a statement that returns rows."""
        async with self._connection.execute(sql, params) as cursor:
            return [tuple(row) for row in await cursor.fetchall()]


class Database:
    """Made by ``open``; closed by ``close``, once."""

    def __init__(self, state_dir: Path, lock_fd: int) -> None:
        self.path = state_dir / FILE_NAME
        self._lock_fd = lock_fd
        self._writer: aiosqlite.Connection | None = None
        self._reader: aiosqlite.Connection | None = None
        self._turn = asyncio.Lock()
        self._tasks = TaskOwner("store")

    @classmethod
    async def open(cls, state_dir: Path) -> Database:
        """Locks ``state_dir`` (made 0700 if missing), opens and migrates ``cortex.db`` in it.

        Raises ``CortexError``: ``STORE_LOCKED`` when another broker runs on it, ``STORE_ERROR`` when
        the file is damaged or newer than this program, ``DISK_FULL``.
        """
        raise NotImplementedError

    async def read(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """One query that only reads; sees every write that has returned."""
        raise NotImplementedError

    async def write(self, *statements: Statement) -> list[int]:
        """Runs ``statements`` as one transaction; returns how many rows each changed. Durable, or nothing happened."""
        raise NotImplementedError

    async def write_returning(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """One statement with RETURNING, in a transaction of its own."""
        raise NotImplementedError

    async def transaction(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Runs ``work`` in one transaction: committed when it returns, undone when it raises.

        Cancelling the caller does not stop a transaction that has begun.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Ends what runs, checkpoints, closes and lets go of the state directory. Idempotent."""
        raise NotImplementedError
