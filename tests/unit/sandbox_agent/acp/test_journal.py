"""The journal on real files."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent import records
from sandbox_agent.journal import SEQ_GAP, Journal, JournalFailed, JournalFull, JournalGone
from sandbox_agent.records import Record
from sandbox_agent.tasks import TaskOwner
from tests import host
from tests.unit.sandbox_agent.acp.kit import Files, open_files

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Log:
    """A journal over a directory, and what it said."""

    def __init__(self, directory: Path, *, segment_bytes: int = 2**20, keep: int = 4) -> None:
        self.files = Files(directory, keep=keep)
        self.tasks = TaskOwner("test")
        self.state: dict[str, Any] = {}
        self.synced = asyncio.Event()
        self.failures: list[str] = []
        self.journal = Journal(
            self.files.grant,
            segment_bytes=segment_bytes,
            tasks=self.tasks,
            snapshot=lambda: self.state,
            on_synced=self.synced.set,
            on_failed=self.failures.append,
        )

    async def open(self) -> tuple[dict[str, Any], list[Record]]:
        found = await self.journal.open()
        self.journal.begin()
        return found

    def add(self, body: bytes, kind: int = records.UPDATE) -> int:
        at = self.journal.append(kind, body)
        self.journal.flush()
        return at

    def add_until_full(self, size: int) -> int:
        """Adds records of ``size`` bytes; returns how many fitted."""
        for count in range(1000):
            try:
                self.add(b'{"n":"%s"}' % (b"y" * size))
            except JournalFull:
                return count
        raise AssertionError("it never was full")

    def bodies(self, kind: int = records.UPDATE) -> list[bytes]:
        found, position = [], self.journal.oldest
        while True:
            some, following = self.journal.read(position)
            found += [record.body for record in some if record.kind == kind]
            if following == position:
                return found
            position = following

    async def close(self) -> None:
        await self.tasks.close()
        await self.journal.close()


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    made = Log(tmp_path / "journal")
    yield made
    await made.close()


async def test_seq_goes_on_in_the_same_epoch_after_a_restart(tmp_path: Path) -> None:
    first = Log(tmp_path)
    await first.open()
    for number in range(5):
        first.add(b'{"n":%d}' % number)
    epoch, seq = first.journal.epoch, first.journal.seq
    await first.close()
    assert not open_files(tmp_path)
    again = Log(tmp_path)
    await again.open()
    assert again.journal.epoch == epoch
    assert seq < again.journal.seq <= seq + SEQ_GAP + 2
    assert again.bodies() == [b'{"n":%d}' % number for number in range(5)]
    await again.close()
    other = Log(tmp_path / "other")
    await other.open()
    assert other.journal.epoch != epoch
    await other.close()


async def test_a_torn_tail_is_cut_and_written_over(tmp_path: Path) -> None:
    first = Log(tmp_path)
    await first.open()
    first.add(b'{"n":0}')
    first.add(b'{"n":1}')
    await first.close()
    [path] = tmp_path.glob("*.seg")
    whole = path.read_bytes()
    for cut in (1, 10, len(b'{"n":1}') + records.HEADER - 1):
        path.write_bytes(whole[:-cut])
        again = Log(tmp_path)
        await again.open()
        again.add(b'{"n":2}')
        assert again.bodies() == [b'{"n":0}', b'{"n":2}']
        await again.close()


async def test_a_damaged_middle_costs_nothing_behind_it(tmp_path: Path) -> None:
    first = Log(tmp_path)
    await first.open()
    ends = [first.add(b'{"n":%d}' % number) for number in range(3)]
    await first.close()
    [path] = tmp_path.glob("*.seg")
    data = bytearray(path.read_bytes())
    data[ends[1] + 5] ^= 0xFF
    path.write_bytes(data)
    again = Log(tmp_path)
    await again.open()
    assert again.bodies() == [b'{"n":0}', b'{"n":2}']
    await again.close()


async def test_a_full_segment_is_followed_by_one_that_begins_with_the_state(tmp_path: Path) -> None:
    log = Log(tmp_path, segment_bytes=2000, keep=3)
    await log.open()
    for number in range(500):
        log.state = {"next_number": number}
        log.add(b'{"n":%03d}' % number)
        for _ in range(3):
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while log.journal._rolling:
            await asyncio.sleep(0)
    names = sorted(path.name for path in tmp_path.glob("*.seg"))
    assert len(names) == 3
    assert len(open_files(tmp_path)) == 3
    bodies = log.bodies()
    assert bodies == [b'{"n":%03d}' % number for number in range(500 - len(bodies), 500)]
    with pytest.raises(JournalGone):
        log.journal.read(0)
    await log.close()
    again = Log(tmp_path)
    state, _ = await again.open()
    assert 0 < state["next_number"] < 500
    assert again.bodies() == bodies
    await again.close()


async def test_a_new_segment_without_its_head_does_not_lose_the_state(tmp_path: Path) -> None:
    log = Log(tmp_path)
    await log.open()
    log.add(b'{"number":7,"key":"k"}', records.CLIENT)
    await log.close()
    fd, grant = await log.files.grant(1)
    os.close(fd)
    assert grant.last == 1
    again = Log(tmp_path)
    _, later = await again.open()
    assert [record.body for record in later] == [b'{"number":7,"key":"k"}']
    assert again.journal.epoch == log.journal.epoch
    assert again.journal.seq > log.journal.seq
    again.add(b'{"n":1}')
    assert again.bodies() == [b'{"n":1}']
    await again.close()


async def test_it_opens_when_the_broker_comes_back(log: Log) -> None:
    log.files.refuse = True
    opening = asyncio.ensure_future(log.open())
    async with asyncio.timeout(5):
        while len(log.files.asked) < 3:
            await asyncio.sleep(0.01)
    log.files.refuse = False
    await opening
    log.add(b"{}")


async def test_without_a_next_segment_it_grows_to_a_limit_and_then_is_full(tmp_path: Path) -> None:
    log = Log(tmp_path, segment_bytes=1000)
    await log.open()
    log.files.refuse = True
    log.add_until_full(80)
    size = os.path.getsize(next(tmp_path.glob("*.seg")))
    assert 4000 < size < 5000
    log.files.refuse = False
    async with asyncio.timeout(5):
        while log.journal.written >> 40 == 0:
            await asyncio.sleep(0.02)
            if not log.journal.failed:
                try:
                    log.journal.flush()
                except JournalFull:
                    continue
    log.add(b'{"z":1}')
    assert log.bodies()[-1] == b'{"z":1}'
    await log.close()


async def test_synced_follows_what_is_written(log: Log) -> None:
    await log.open()
    log.add(b"{}")
    before = log.journal.written
    assert log.journal.synced < before
    log.journal.sync()
    log.add(b"{}")
    await asyncio.wait_for(log.synced.wait(), 5)
    assert before <= log.journal.synced < log.journal.written
    log.synced.clear()
    log.journal.sync()
    await asyncio.wait_for(log.synced.wait(), 5)
    assert log.journal.synced == log.journal.written


async def test_a_failed_sync_is_final(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    await log.open()
    monkeypatch.setattr(os, "fdatasync", fails)
    log.add(b"{}")
    log.journal.sync()
    async with asyncio.timeout(5):
        while not log.failures:
            await asyncio.sleep(0.01)
    assert "bad disk" in log.failures[0]
    with pytest.raises(JournalFailed):
        log.add(b"{}")
    assert log.journal.synced < log.journal.written


async def test_discard_takes_back_what_is_not_flushed(log: Log) -> None:
    await log.open()
    log.add(b'{"n":0}')
    start = log.journal.tail
    log.journal.append(records.UPDATE, b'{"n":1}')
    log.journal.append(records.UPDATE, b'{"n":2}')
    log.journal.discard(start)
    assert log.journal.tail == start
    log.add(b'{"n":3}')
    assert log.bodies() == [b'{"n":0}', b'{"n":3}']


async def test_records_larger_than_a_read_are_read(log: Log) -> None:
    await log.open()
    bodies = [b'{"x":"%s"}' % (b"y" * size) for size in (10, 400_000, 20, 140_000)]
    for body in bodies:
        log.add(body)
    assert log.bodies() == bodies


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs of 256 KiB."""
    with host.small_disk(tmp_path / "disk", "256k") as path:
        yield path


@ROOT
async def test_on_a_full_disk_nothing_is_half_written_and_it_goes_on_when_there_is_space(small_disk: Path) -> None:
    log = Log(small_disk / "journal")
    await log.open()
    count = log.add_until_full(3000)
    path = next((small_disk / "journal").glob("*.seg"))
    assert path.stat().st_size == log.journal.written & (2**40 - 1)
    assert len(log.bodies()) == count
    with pytest.raises(JournalFull):
        log.journal.flush()
    host.grow(small_disk, "1m")
    log.journal.flush()
    assert len(log.bodies()) == count + 1
    await log.close()
    again = Log(small_disk / "journal")
    await again.open()
    assert len(again.bodies()) == count + 1
    await again.close()
