from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.metrics import REGISTRY
from broker.store.db import FILE_NAME, Database, Transaction, migrations, statements_of
from tests import host

PUT = "INSERT INTO packages (spec, key, bins, version, created_at) VALUES (?, ?, '{}', '', 0)"


def count(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


async def pragma(db: Database, connection: str, name: str) -> Any:
    rows = list(await getattr(db, connection).execute_fetchall(f"PRAGMA {name}"))
    return rows[0][0]


async def test_connections_are_set_for_durability(db: Database) -> None:
    assert await pragma(db, "_writer", "journal_mode") == "wal"
    assert await pragma(db, "_writer", "synchronous") == 2
    assert await pragma(db, "_reader", "query_only") == 1
    assert await pragma(db, "_reader", "wal_autocheckpoint") == 0
    assert await pragma(db, "_writer", "mmap_size") == 0


async def test_files_are_private(db: Database) -> None:
    await db.write((PUT, ("a", "k")))
    modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in db.path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(db.path.parent.stat().st_mode) == 0o700


async def test_read_sees_what_a_write_returned_for(db: Database) -> None:
    assert await db.write((PUT, ("a", "k")), (PUT, ("b", "k"))) == [1, 1]
    assert await db.read("SELECT spec FROM packages ORDER BY spec") == [("a",), ("b",)]


async def test_a_failed_transaction_leaves_nothing(db: Database) -> None:
    with pytest.raises(CortexError) as caught:
        await db.write((PUT, ("a", "k")), (PUT, ("a", "again")))
    assert caught.value.code is Code.STORE_ERROR
    assert await db.read("SELECT * FROM packages") == []
    await db.write((PUT, ("a", "k")))


async def test_an_error_of_the_work_undoes_it_and_passes(db: Database) -> None:
    async def work(transaction: Transaction) -> None:
        await transaction.execute(PUT, ("a", "k"))
        raise LookupError("mine")

    with pytest.raises(LookupError):
        await db.transaction(work)
    assert await db.read("SELECT * FROM packages") == []


async def test_a_cancelled_caller_does_not_tear_a_transaction(db: Database) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def work(transaction: Transaction) -> None:
        await transaction.execute(PUT, ("a", "k"))
        inside.set()
        await go_on.wait()
        await transaction.execute(PUT, ("b", "k"))

    caller = asyncio.get_running_loop().create_task(db.transaction(work))
    await inside.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    await db.write((PUT, ("c", "k")))
    assert await db.read("SELECT spec FROM packages ORDER BY spec") == [("a",), ("b",), ("c",)]


async def test_concurrent_writes_take_turns(db: Database) -> None:
    await asyncio.gather(*(db.write((PUT, (f"{number}", "k")), (PUT, (f"x{number}", "k"))) for number in range(50)))
    assert await db.read("SELECT count(*) FROM packages") == [(100,)]


async def test_reads_and_writes_are_counted(db: Database) -> None:
    reads, writes = count("cortex_store_reads_total"), count("cortex_store_writes_total")
    await db.read("SELECT 1")
    await db.write((PUT, ("a", "k")), (PUT, ("b", "k")))
    assert count("cortex_store_reads_total") - reads == 1
    assert count("cortex_store_writes_total") - writes == 1


async def test_the_reader_cannot_write(db: Database) -> None:
    with pytest.raises(CortexError) as caught:
        await db.read("DELETE FROM packages")
    assert caught.value.code is Code.STORE_ERROR


async def test_a_second_broker_is_refused(db: Database) -> None:
    with pytest.raises(CortexError) as caught:
        await Database.open(db.path.parent)
    assert caught.value.code is Code.STORE_LOCKED
    assert str(os.getpid()) in caught.value.what
    await db.close()
    again = await Database.open(db.path.parent)
    await again.close()


async def test_a_closed_store_says_so_and_close_is_idempotent(db: Database) -> None:
    await db.close()
    await db.close()
    with pytest.raises(CortexError) as caught:
        await db.read("SELECT 1")
    assert caught.value.code is Code.STORE_ERROR
    with pytest.raises(CortexError):
        await db.write((PUT, ("a", "k")))


async def test_writes_that_wait_while_it_closes_are_told(db: Database) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def work(transaction: Transaction) -> None:
        inside.set()
        await go_on.wait()
        await transaction.execute(PUT, ("a", "k"))

    loop = asyncio.get_running_loop()
    first = loop.create_task(db.transaction(work))
    await inside.wait()
    second = loop.create_task(db.write((PUT, ("b", "k"))))
    await asyncio.sleep(0)
    closing = loop.create_task(db.close())
    await asyncio.sleep(0)
    go_on.set()
    await first
    with pytest.raises(CortexError) as caught:
        await second
    assert caught.value.code is Code.STORE_ERROR
    await closing
    raw = sqlite3.connect(db.path)
    assert ("a",) in raw.execute("SELECT spec FROM packages").fetchall()
    raw.close()


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    await (await Database.open(tmp_path)).close()
    raw = sqlite3.connect(tmp_path / FILE_NAME)
    raw.execute("PRAGMA user_version = 999")
    raw.close()
    with pytest.raises(CortexError) as caught:
        await Database.open(tmp_path)
    assert caught.value.code is Code.STORE_ERROR
    assert "999" in caught.value.what
    raw = sqlite3.connect(tmp_path / FILE_NAME)
    raw.execute(f"PRAGMA user_version = {len(migrations())}")
    raw.close()
    await (await Database.open(tmp_path)).close()


async def test_a_damaged_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 500)
    with pytest.raises(CortexError) as caught:
        await Database.open(tmp_path)
    assert caught.value.code is Code.STORE_ERROR
    assert "backup" in caught.value.hint


async def test_every_migration_is_whole_statements() -> None:
    for script in migrations():
        assert "".join("".join(statements_of(script)).split()) == "".join(script.split())


_KILLED = """
import asyncio, sys
from pathlib import Path
from broker.store.db import Database
async def main():
    db = await Database.open(Path(sys.argv[1]))
    for number in range(100000):
        await db.write(("INSERT INTO packages (spec, key, bins, version, created_at) VALUES (?, 'k', '{}', '', 0)",
                        (str(number),)))
        print(number, flush=True)
asyncio.run(main())
"""


async def test_a_killed_broker_loses_nothing_acknowledged(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout as lines:
        said = [next(lines) for _ in range(40)]
        child.kill()
        said += list(lines)
    last = max(int(line) for line in said if line.endswith("\n") and line.strip().isdigit())
    db = await Database.open(tmp_path)
    rows = await db.read("SELECT count(*), max(CAST(spec AS INTEGER)) FROM packages")
    await db.close()
    assert rows[0][1] >= last
    assert rows[0][0] == rows[0][1] + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with host.small_disk(tmp_path / "disk", "1m") as place:
        yield place


async def fill(db: Database) -> None:
    for number in range(100):
        await db.write((PUT, (f"{number}", "x" * 50_000)))


async def test_a_full_disk_refuses_writes_and_heals(small_disk: Path) -> None:
    db = await Database.open(small_disk)
    try:
        await db.write((PUT, ("first", "k")))
        with pytest.raises(CortexError) as caught:
            await fill(db)
        assert caught.value.code is Code.DISK_FULL
        assert await db.read("SELECT key FROM packages WHERE spec = 'first'") == [("k",)]
        host.grow(small_disk, "8m")
        await db.write((PUT, ("after", "x" * 50_000)))
        assert await db.read("SELECT count(*) FROM packages WHERE spec = 'after'") == [(1,)]
    finally:
        await db.close()


async def test_writes_that_wait_share_a_commit_and_each_has_its_own_answer(db: Database) -> None:
    await db.write(("CREATE TABLE t (a INTEGER PRIMARY KEY) STRICT", ()))
    await db.write(("INSERT INTO t VALUES (7)", ()))
    commits = 0

    def traced(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    await db._writer.set_trace_callback(traced)
    bad = {3: (7,), 11: ("text",), 20: (2**70,), 30: (object(),)}
    answers = await asyncio.gather(
        *(db.write(("INSERT INTO t VALUES (?)", bad.get(number, (number + 100,)))) for number in range(40)),
        return_exceptions=True,
    )
    assert {number for number, answer in enumerate(answers) if answer != [1]} == set(bad)
    assert isinstance(answers[3], CortexError)
    assert await db.read("SELECT count(*) FROM t") == [(37,)]
    commits = 0
    await asyncio.gather(*(db.write(("INSERT INTO t VALUES (?)", (number,))) for number in range(1000, 1040)))
    assert commits <= 2


async def test_of_several_statements_all_or_none_even_in_a_shared_commit(db: Database) -> None:
    await db.write(("CREATE TABLE t (a INTEGER PRIMARY KEY) STRICT", ()))
    insert = "INSERT INTO t VALUES (?)"
    answers = await asyncio.gather(
        db.write((insert, (1,)), (insert, (2,))),
        db.write((insert, (3,)), (insert, (1,))),
        db.write((insert, (4,))),
        return_exceptions=True,
    )
    assert [isinstance(answer, CortexError) for answer in answers] == [False, True, False]
    assert await db.read("SELECT a FROM t ORDER BY a") == [(1,), (2,), (4,)]


async def test_a_cancelled_caller_keeps_nobody_else_from_their_answer(db: Database) -> None:
    await db.write(("CREATE TABLE t (a INTEGER PRIMARY KEY) STRICT", ()))
    tasks = [asyncio.ensure_future(db.write(("INSERT INTO t VALUES (?)", (number,)))) for number in range(10)]
    await asyncio.sleep(0)
    tasks[4].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer for number, answer in enumerate(answers) if number != 4] == [[1]] * 9
    assert await db.read("SELECT count(*) FROM t") == [(10,)]


async def test_what_still_waits_when_the_store_closes_is_told_so(db: Database) -> None:
    await db.write(("CREATE TABLE t (a INTEGER PRIMARY KEY) STRICT", ()))
    tasks = [asyncio.ensure_future(db.write(("INSERT INTO t VALUES (?)", (number,)))) for number in range(200)]
    await asyncio.sleep(0)
    await db.close()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(answer == [1] or isinstance(answer, CortexError) for answer in answers)


async def test_a_write_after_an_undo_that_failed_is_a_transaction_of_its_own(db: Database) -> None:
    await db.write(("CREATE TABLE t (a INTEGER PRIMARY KEY) STRICT", ()))
    await db._writer.execute_fetchall("BEGIN IMMEDIATE")
    await db._writer.execute_fetchall("INSERT INTO t VALUES (1)")
    await db.write(("INSERT INTO t VALUES (2)", ()))
    assert await db.read("SELECT a FROM t") == [(2,)]
