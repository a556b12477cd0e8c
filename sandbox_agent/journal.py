"""The journal: an append-only log in files that the broker opens and passes in.

What is appended is in the page cache after ``flush`` (it survives every process here) and on disk
when ``synced`` has passed it. A position is one integer, ``segment << 40 | offset``, so that
positions can be compared. Seq goes up by one a record; every opening skips ``SEQ_GAP`` numbers,
so that what a power failure took away is never numbered twice within an epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sandbox_agent import records
from sandbox_agent.records import Record
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import Grant

GrantFn = Callable[[int], Awaitable[tuple[int, Grant]]]
"""Asks the broker for a segment's file; returns its descriptor, which is then the caller's."""

SEQ_GAP = 2**20
PROMPT_SYNC_S = 0.005
SYNC_S = 2.0
"""Longest time that a record stays only in the page cache."""
READ_BYTES = 128 * 1024
HARD_LIMIT = 4
"""A segment may grow to so many times its size while the broker gives no next one."""
BACKOFF_S = (0.05, 2.0)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_STATE_KINDS = frozenset((records.PROMPT, records.STARTED, records.END, records.CONVERSATION, records.CLIENT))
_SHIFT = 40
_OFFSET = 2**_SHIFT - 1


class JournalFull(Exception):
    """No space. Nothing of the flush is in the file; it may be tried again."""


class JournalFailed(Exception):
    """The journal cannot be trusted any more (a failed sync, an unreadable file). Final."""


class JournalGone(Exception):
    """The position is in a segment that is no longer kept."""


@dataclass
class Segment:
    """An open file. ``end``: offset behind its last whole record."""

    number: int
    fd: int
    end: int


@dataclass
class Found:
    """What a file holds: its ``HEAD`` body (None: no whole one), the records that make up state, its end."""

    head: dict[str, Any] | None
    state: list[Record]
    seq: int
    end: int


class Journal:
    """Open it once; then ``append``, ``flush``, ``read``. Everything but ``open`` is synchronous.

    ``snapshot`` gives the state that a new file begins with. ``on_synced`` is called whenever
    ``synced`` has moved, ``on_failed`` once when the journal has failed.
    """

    def __init__(
        self,
        grant: GrantFn,
        *,
        segment_bytes: int,
        tasks: TaskOwner,
        snapshot: Callable[[], dict[str, Any]],
        on_synced: Callable[[], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.epoch = 0
        self.seq = 0
        self.synced = 0
        self.full = False
        self.failed = ""
        self._grant = grant
        self._segment_bytes = segment_bytes
        self._tasks = tasks
        self._snapshot = snapshot
        self._on_synced = on_synced
        self._on_failed = on_failed
        self._segments: dict[int, Segment] = {}
        self._last = Segment(-1, -1, 0)
        self._next: Segment | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._dirty: set[int] = set()
        self._doomed: list[int] = []
        self._syncing: asyncio.Future[None] | None = None
        self._sync_wanted = False
        self._sync_timer: asyncio.TimerHandle | None = None
        self._rolling = False
        self._closed = False
        self._pool = ThreadPoolExecutor(1, "journal")

    # -- opening ---------------------------------------------------------------------------------

    async def open(self) -> tuple[dict[str, Any], list[Record]]:
        """The state at the head of the newest file and the records since that change it.

        Waits for the broker as long as it takes. Raises ``JournalFailed`` for a journal of a newer format.
        """
        fd, grant = await self._granted(-1)
        self._last = self._segments[grant.segment] = Segment(grant.segment, fd, 0)
        for number in range(grant.segment - 1, grant.first - 1, -1):
            try:
                older, _ = await self._grant(number)
            except (OSError, WireError, EOFError) as error:
                log.warning("journal segment %d is not to be had: %s", number, error)
                break
            self._segments[number] = Segment(number, older, os.fstat(older).st_size)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._load)
        except OSError as error:
            raise JournalFailed(f"the journal cannot be read: {error}") from error

    def _load(self) -> tuple[dict[str, Any], list[Record]]:
        newest = examine(self._last.fd)
        head, state, seq = newest.head, newest.state, newest.seq
        for number in sorted((n for n in self._segments if n < self._last.number), reverse=True):
            if head is not None:
                break
            older = examine(self._segments[number].fd)
            head, state, seq = older.head, older.state + state, max(older.seq, seq)
        self._last.end = newest.end
        os.ftruncate(self._last.fd, newest.end)
        os.fdatasync(self._last.fd)
        head = head or {}
        if head.get("format", records.FORMAT) != records.FORMAT:
            raise JournalFailed("the journal was written by a newer version")
        self.epoch = head.get("epoch") or new_epoch()
        self.seq = seq + SEQ_GAP if seq else 0
        self.synced = self.tail
        return head.get("state", {}), state

    def begin(self) -> None:
        """Marks the opening; call it when the state has been taken over. Never raises."""
        if self._last.end == 0:
            self._append_head()
        self.append(records.OPENED, b"{}")
        with contextlib.suppress(JournalFull, JournalFailed):
            self.flush()

    async def _granted(self, number: int) -> tuple[int, Grant]:
        pause, longest = BACKOFF_S
        while True:
            try:
                return await self._grant(number)
            except (OSError, WireError, EOFError) as error:
                log.warning("no journal segment yet: %s", error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(longest, pause * 2)

    # -- writing ---------------------------------------------------------------------------------

    @property
    def tail(self) -> int:
        """Where the next record will be."""
        return (self._last.number << _SHIFT) + self._last.end + self._pending_bytes

    @property
    def written(self) -> int:
        """Behind the last record that is in the file."""
        return (self._last.number << _SHIFT) + self._last.end

    @property
    def oldest(self) -> int:
        """The first position that is kept."""
        return min(self._segments, default=0) << _SHIFT

    def take_seq(self) -> int:
        """The next seq, for a message that is stamped with it before it is appended, or not journaled at all."""
        self.seq += 1
        if self.seq % (SEQ_GAP // 2) == 0:
            mark, self.seq = self.seq, self.seq + 1
            self.append(records.MARK, b"{}", seq=mark)
        return self.seq

    def append(
        self, kind: int, body: bytes, *, seq: int = 0, conversation: int = 0, target: int = 0, flags: int = 0
    ) -> int:
        """Adds a record to what ``flush`` will write; returns its position. ``seq`` 0: takes the next."""
        head = records.header(kind, flags, seq or self.take_seq(), conversation, target, body)
        at = self.tail
        if self.failed:  # nothing will ever be written again
            return at
        self._pending += (head, body)
        self._pending_bytes += len(head) + len(body)
        return at

    def flush(self) -> bool:
        """Writes what was appended; False: nothing was. Raises ``JournalFull`` (it is all kept for the next
        try), ``JournalFailed``."""
        if self.failed:
            raise JournalFailed(self.failed)
        if not self._pending:
            return False
        segment = self._last
        if segment.end > HARD_LIMIT * self._segment_bytes and self._next is None:
            self.full = True
            self._maybe_roll()
            raise JournalFull("the broker gives no new journal segment")
        self._write(segment)
        segment.end += self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        self.full = False
        self._dirty.add(segment.fd)
        if self._sync_timer is None and self._syncing is None:
            self._sync_timer = asyncio.get_running_loop().call_later(SYNC_S, self.sync)
        if self._next is not None:
            asyncio.get_running_loop().call_soon(self._switch)
        elif segment.end > self._segment_bytes:
            self._maybe_roll()
        return True

    def _write(self, segment: Segment) -> None:
        parts = self._pending if len(self._pending) <= 1000 else [b"".join(self._pending)]
        try:
            done = os.writev(segment.fd, parts)
            if done < self._pending_bytes:
                rest = memoryview(b"".join(parts))[done:]
                while rest:
                    rest = rest[os.write(segment.fd, rest) :]
        except OSError as error:
            self._write_failed(segment, error)

    def _write_failed(self, segment: Segment, error: OSError) -> None:
        try:
            os.ftruncate(segment.fd, segment.end)
        except OSError as second:
            self._fail(f"the journal cannot be cut back: {second}")
            raise JournalFailed(self.failed) from error
        if error.errno in FULL:
            self.full = True
            raise JournalFull(str(error)) from error
        self._fail(f"the journal cannot be written: {error}")
        raise JournalFailed(self.failed) from error

    def discard(self, position: int) -> None:
        """Takes back what was appended from ``position`` on and not flushed; its seqs stay used."""
        while self._pending and self.tail > position:
            body, head = self._pending.pop(), self._pending.pop()
            self._pending_bytes -= len(head) + len(body)

    # -- syncing ---------------------------------------------------------------------------------

    def sync_soon(self) -> None:
        """``sync`` in ``PROMPT_SYNC_S``: the thread that syncs must not compete with the prompt it is for."""
        loop = asyncio.get_running_loop()
        if self._sync_timer is not None:
            if self._sync_timer.when() <= loop.time() + PROMPT_SYNC_S:
                return
            self._sync_timer.cancel()
        self._sync_timer = loop.call_later(PROMPT_SYNC_S, self.sync)

    def sync(self) -> None:
        """Brings all that is written to disk, off the loop; one sync at a time."""
        if self._sync_timer is not None:
            self._sync_timer.cancel()
            self._sync_timer = None
        self._sync_wanted = True
        if self._syncing is None and not self.failed and self._dirty:
            self._sync_wanted = False
            reached, self._dirty, files = self.written, set(), sorted(self._dirty)
            loop = asyncio.get_running_loop()
            self._syncing = loop.run_in_executor(self._pool, _sync_files, files)
            self._syncing.add_done_callback(lambda done: self._sync_done(done, reached))

    def _sync_done(self, done: asyncio.Future[None], reached: int) -> None:
        self._syncing = None
        for fd in self._doomed:
            os.close(fd)
        self._doomed = []
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:  # a sync that failed once may lie when it is tried again
            self._fail(f"the journal cannot be brought to disk: {error}")
            return
        self.synced = max(self.synced, reached)
        if self._sync_wanted and self._dirty:
            self.sync()
        elif self._dirty and self._sync_timer is None:
            self._sync_timer = asyncio.get_running_loop().call_later(SYNC_S, self.sync)
        self._on_synced()

    def _fail(self, what: str) -> None:
        if not self.failed:
            self.failed = what
            self._pending, self._pending_bytes = [], 0
            log.error("%s", what)
            asyncio.get_running_loop().call_soon(self._on_failed, what)

    # -- segments --------------------------------------------------------------------------------

    def _append_head(self) -> None:
        head = {"format": records.FORMAT, "epoch": self.epoch, "state": self._snapshot()}
        self.append(records.HEAD, json.dumps(head, separators=(",", ":")).encode())

    def _maybe_roll(self) -> None:
        if not self._rolling and self._next is None:
            self._rolling = True
            self._tasks.start(self._roll(), "journal_roll", on_error=self._roll_failed)

    def _roll_failed(self, error: BaseException) -> None:
        self._rolling = False
        log.error("no new journal segment: %s", error)

    async def _roll(self) -> None:
        fd, grant = await self._granted(self._last.number + 1)
        self._rolling = False
        self._next = Segment(grant.segment, fd, 0)
        for number in [n for n in self._segments if n < grant.first]:
            self._drop(self._segments.pop(number).fd)
        self._switch()

    def _drop(self, fd: int) -> None:
        self._dirty.discard(fd)
        if self._syncing is not None:
            self._doomed.append(fd)
        else:
            os.close(fd)

    def _switch(self) -> None:
        """Begins the next file. Called by the loop only: within somebody's flush the state may be behind what
        was just written, and the file would begin with it. With records pending the next flush calls again."""
        if self._pending or self.failed or self._next is None:
            return
        segment, self._next = self._next, None
        if os.fstat(segment.fd).st_size:
            self._fail(f"journal segment {segment.number} is new and yet not empty")
        self._last = self._segments[segment.number] = segment
        self._append_head()
        with contextlib.suppress(JournalFull, JournalFailed):
            self.flush()

    # -- reading ---------------------------------------------------------------------------------

    def read(self, position: int, limit: int = READ_BYTES) -> tuple[list[Record], int]:
        """Some records from ``position`` on and the position behind them; ``at`` and ``end`` are positions.

        The position does not move at the end of what is written. Raises ``JournalGone``, ``JournalFailed``.
        """
        number, offset = position >> _SHIFT, position & _OFFSET
        segment = self._segments.get(number)
        if segment is None:
            raise JournalGone(f"segment {number} is no longer kept")
        while offset >= segment.end:
            if segment.number + 1 not in self._segments:
                return [], position
            segment, offset = self._segments[segment.number + 1], 0
        try:
            data = os.pread(segment.fd, min(limit, segment.end - offset), offset)
            size = records.needed(data, 0)
            if size > len(data):
                data = os.pread(segment.fd, min(size, segment.end - offset), offset)
        except OSError as error:
            raise JournalFailed(f"the journal cannot be read: {error}") from error
        base = (segment.number << _SHIFT) + offset
        found = [record.moved(base) for record in records.read_all(data)]
        return found, found[-1].end if found else base + len(data)  # no record in all of it: damage, step over it

    async def close(self) -> None:
        """Syncs what is written and closes the files, none under a thread that still works on it."""
        if self._sync_timer is not None:
            self._sync_timer.cancel()
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._pool, int)
        if self._syncing is not None:
            with contextlib.suppress(OSError):
                await self._syncing
        if self._dirty and not self.failed:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().run_in_executor(self._pool, _sync_files, sorted(self._dirty))
        self._dirty = set()
        for segment in [*self._segments.values(), *([self._next] if self._next else [])]:
            os.close(segment.fd)
        self._segments, self._next = {}, None
        self.failed = self.failed or "the journal is closed"
        self._pool.shutdown(wait=False)


def _sync_files(files: list[int]) -> None:
    for fd in files:
        os.fdatasync(fd)


def new_epoch() -> int:
    """A number that no other journal of this session has had; fits in 53 bits."""
    return int(time.time()) << 20 | random.getrandbits(20)


def examine(fd: int) -> Found:
    """Reads a whole file. Raises ``OSError``."""
    size = os.fstat(fd).st_size
    if size == 0:
        return Found(None, [], 0, 0)
    head: dict[str, Any] | None = None
    state: list[Record] = []
    seq = end = 0
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as data:
        for record in records.read_all(data):
            if record.at == 0 and record.kind == records.HEAD:
                head = json.loads(record.body)
            if record.kind in _STATE_KINDS:
                state.append(record)
            seq, end = max(seq, record.seq), record.end
    return Found(head, state, seq, end)
