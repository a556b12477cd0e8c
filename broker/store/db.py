"""The SQLite database: one connection that writes, one that reads, one broker per state directory.

Every commit is synced (WAL, ``synchronous=FULL``), so what a write returned for is durable. The
write-ahead log is checkpointed by the writing connection alone: SQLite before 3.51.3 can lose
commits when two connections checkpoint at once.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
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
MAX_WAITING = 10_000
"""Transactions that may wait for their turn."""
MAX_BATCH = 64
"""Of them in one commit."""
BAD_VALUES = (ValueError, TypeError, OverflowError)
"""What Python's sqlite3 raises for a parameter that it cannot bind, besides its own errors."""

_COMMON_PRAGMAS = ("busy_timeout = 5000", "mmap_size = 0", "trusted_schema = OFF")
_WRITER_PRAGMAS = (*_COMMON_PRAGMAS, "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON")
_READER_PRAGMAS = (*_COMMON_PRAGMAS, "query_only = ON", "wal_autocheckpoint = 0")

log = structlog.get_logger(__name__)


class Transaction:
    """What a transaction's callable may do."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def execute(self, sql: str, params: Params = ()) -> int:
        """Runs a statement; returns the number of rows it changed."""
        # Of a cursor's rowcount the worker thread would have to be asked twice.
        before = self._connection.total_changes
        await self._connection.execute_fetchall(sql, params)
        return self._connection.total_changes - before

    async def query(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """Runs a statement that returns rows."""
        return [tuple(row) for row in await self._connection.execute_fetchall(sql, params)]


@dataclass(eq=False)
class _Waiting:
    """Statements that are to be one transaction, and who waits for what they changed."""

    statements: tuple[Statement, ...]
    done: asyncio.Future[list[int]]

    def tell(self, outcome: list[int] | Exception) -> None:
        """Once; what is told later is dropped."""
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
            # Its caller may have been cancelled, and does not look at it then.
            self.done.exception()
        else:
            self.done.set_result(outcome)


class Database:
    """Made by ``open``; closed by ``close``."""

    def __init__(self, path: Path, writer: aiosqlite.Connection, reader: aiosqlite.Connection, lock_fd: int) -> None:
        self.path = path
        self._writer = writer
        self._reader = reader
        self._lock_fd = lock_fd
        self._turn = asyncio.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._pumping = False
        self._tasks = TaskOwner("store")
        self._closed = False

    @classmethod
    async def open(cls, state_dir: Path) -> Database:
        """Locks ``state_dir`` (made 0700 if missing), opens and migrates ``cortex.db`` in it.

        Raises ``CortexError``: ``STORE_LOCKED`` when another broker runs on it, ``STORE_ERROR`` when
        the file is damaged or newer than this program, ``DISK_FULL``.
        """
        if sqlite3.sqlite_version_info < SAFE_SQLITE:
            log.warning("sqlite_old", version=sqlite3.sqlite_version, wanted=".".join(map(str, SAFE_SQLITE)))
        path = state_dir / FILE_NAME
        with mapped("open the store"):
            async with AsyncExitStack() as undo:
                lock_fd = _lock(state_dir)
                undo.callback(os.close, lock_fd)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                writer = await _connect(path, _WRITER_PRAGMAS)
                undo.push_async_callback(writer.close)
                await migrate(writer)
                reader = await _connect(path, _READER_PRAGMAS)
                undo.pop_all()
        return cls(path, writer, reader, lock_fd)

    async def read(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """One query that only reads; sees every write that has returned."""
        self._check_open()
        STORE_READS.inc()
        with mapped("read the store"):
            return [tuple(row) for row in await self._reader.execute_fetchall(sql, params)]

    async def write(self, *statements: Statement) -> list[int]:
        """Runs ``statements`` as one transaction; returns how many rows each changed.

        When it returns they are durable; when it raises, nothing has happened. Cancelling the caller stops nothing.
        What waits meanwhile shares a commit: it is the sync that takes the time.
        """
        self._check_open()
        if len(self._waiting) >= MAX_WAITING:
            raise _overloaded()
        STORE_WRITES.inc()
        mine = _Waiting(statements, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if not self._pumping:
            self._pumping = True
            self._tasks.start(self._pump(), "writes")
        return await asyncio.shield(mine.done)

    async def _pump(self) -> None:
        """Carries out what waits, as much as there is at a time."""
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                async with self._turn:
                    self._check_open()
                    batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                    await self._carry_out(batch)
        except CortexError as error:
            log.debug("writes_refused", error=str(error))
        finally:
            self._pumping = False
            for each in (*batch, *self._waiting):
                each.tell(_closed())
            self._waiting.clear()

    async def _carry_out(self, batch: list[_Waiting]) -> None:
        try:
            results = await self._together(batch)
        except (CortexError, *BAD_VALUES) as error:
            if len(batch) == 1:
                batch[0].tell(error)
                return
            # It may be the fault of one of them: each on its own.
            for each in batch:
                await self._carry_out([each])
        else:
            for each, result in zip(batch, results, strict=True):
                each.tell(result)

    async def _together(self, batch: list[_Waiting]) -> list[list[int]]:
        async def work(transaction: Transaction) -> list[list[int]]:
            return [[await transaction.execute(sql, params) for sql, params in each.statements] for each in batch]

        with mapped("write the store"):
            if len(batch) == 1 and len(batch[0].statements) == 1 and not self._writer.in_transaction:
                # A statement on its own is a transaction, unless one could not be undone.
                return await work(Transaction(self._writer))
            return await _in_transaction(self._writer, work)

    async def write_returning(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """One statement with RETURNING, in a transaction of its own."""
        return await self.transaction(lambda transaction: transaction.query(sql, params))

    async def transaction(self, work: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        """Runs ``work`` in one transaction: committed when it returns, undone when it raises.

        Cancelling the caller does not stop a transaction that has begun.
        """
        self._check_open()
        if len(self._tasks) >= MAX_WAITING:
            raise _overloaded()
        # The task outlives a cancelled caller, who then does not hear of its error.
        task = self._tasks.start(self._transact(work), "transaction", on_error=lambda error: None)
        return await asyncio.shield(task)

    async def _transact(self, work: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        async with self._turn:
            self._check_open()
            STORE_WRITES.inc()
            with mapped("write the store"):
                return await _in_transaction(self._writer, work)

    async def close(self) -> None:
        """Lets the transaction that runs end, checkpoints, closes, unlocks the state directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        async with self._turn:
            try:
                with mapped("close the store"):
                    await self._reader.close()
                    await self._writer.close()
            finally:
                os.close(self._lock_fd)
        await self._tasks.close()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()


def _closed() -> CortexError:
    return CortexError(Code.STORE_ERROR, "the store is closed", hint="the broker is stopping; try again")


def _overloaded() -> CortexError:
    return CortexError(Code.STORE_ERROR, "too many writes wait for the store", hint="the disk is slow; try again later")


async def migrate(connection: aiosqlite.Connection) -> None:
    """Brings the schema up to date, one transaction a step. Raises ``CortexError`` when it is newer."""
    steps = migrations()
    rows = list(await connection.execute_fetchall("PRAGMA user_version"))
    version = int(rows[0][0])
    if version > len(steps):
        raise CortexError(
            Code.STORE_ERROR,
            f"the store has schema {version}, this program knows {len(steps)}",
            hint="run the newer cortex again, or restore a backup made with this version",
        )
    for number, script in enumerate(steps[version:], version + 1):

        async def step(transaction: Transaction, script: str = script, number: int = number) -> None:
            for statement in statements_of(script):
                await transaction.execute(statement)
            await transaction.execute(f"PRAGMA user_version = {number}")

        await _in_transaction(connection, step)


def migrations() -> list[str]:
    """The scripts ``migrations/NNN_name.sql`` in order; NNN counts from 001 without gaps."""
    folder = resources.files("broker.store") / "migrations"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".sql")), key=lambda item: item.name)
    for number, item in enumerate(found, 1):
        if not item.name.startswith(f"{number:03d}_"):
            raise RuntimeError(f"migration {item.name} is not number {number}")
    return [item.read_text(encoding="utf-8") for item in found]


def statements_of(script: str) -> list[str]:
    """The statements of a script; each ends at the end of a line."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part.strip())
            part = ""
    return found


@contextmanager
def mapped(doing: str) -> Iterator[None]:
    """Turns errors of SQLite and of the file system into ``CortexError``."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        code = getattr(error, "sqlite_errorcode", None)
        # SHMSIZE: no room for the WAL's index.
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise CortexError(
                Code.DISK_FULL,
                f"cannot {doing}: the disk is full",
                cause=error,
                hint="free space on the file system of broker.state_dir; nothing that was stored is lost",
            ) from error
        hint = "see the broker's log"
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            hint = f"{FILE_NAME} is damaged; restore it from a backup"
        elif isinstance(error, PermissionError) or code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            hint = "broker.state_dir and all in it has to belong to the broker's user"
        raise CortexError(Code.STORE_ERROR, f"cannot {doing}", cause=error, hint=hint) from error


def _lock(state_dir: Path) -> int:
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise CortexError(
            Code.STORE_LOCKED,
            f"another broker{f' (pid {owner})' if owner else ''} runs on {state_dir}",
            hint="stop it, or give this one a broker.state_dir of its own",
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


async def _connect(path: Path, pragmas: Sequence[str]) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(path, isolation_level=None, cached_statements=256)
    try:
        for pragma in pragmas:
            await connection.execute_fetchall(f"PRAGMA {pragma}")
    except BaseException:
        await connection.close()
        raise
    return connection


async def _in_transaction(connection: aiosqlite.Connection, work: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
    if connection.in_transaction:
        await connection.execute_fetchall("ROLLBACK")
    await connection.execute_fetchall("BEGIN IMMEDIATE")
    try:
        result = await work(Transaction(connection))
        await connection.execute_fetchall("COMMIT")
    except BaseException:
        if connection.in_transaction:
            await connection.execute_fetchall("ROLLBACK")
        raise
    return result
