"""A journal file has one owner at any time, or is closed."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from broker.sandbox.grants import Grants
from broker.sandbox.journal_files import JournalFiles, Segment


class SlowFiles(JournalFiles):
    """On a disk that hangs until told."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.go = threading.Event()
        self.opened: list[Segment] = []

    def open(self, segment: int) -> Segment:
        self.go.wait(10)
        self.opened.append(super().open(segment))
        return self.opened[-1]


async def test_a_file_that_is_opened_for_nobody_is_closed(tmp_path: Path) -> None:
    files, violations = SlowFiles(tmp_path), list[str]()
    near, far = socket.socketpair()
    grants = Grants("a", violations.append)
    giving = asyncio.ensure_future(grants.give(near, files, -1))
    await asyncio.sleep(0)
    giving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await giving
    files.go.set()
    async with asyncio.timeout(5):
        while not files.opened or os.path.exists(f"/proc/self/fd/{files.opened[0].fd}"):
            await asyncio.sleep(0.001)
    near.close()
    far.close()


async def test_two_at_a_time_on_a_disk_that_hangs(tmp_path: Path) -> None:
    files, violations = SlowFiles(tmp_path), list[str]()
    near, far = socket.socketpair()
    grants = Grants("a", violations.append)
    giving = [asyncio.ensure_future(grants.give(near, files, -1)) for _ in range(3)]
    await asyncio.wait(giving, return_when=asyncio.FIRST_COMPLETED)
    assert violations == ["journal"]
    files.go.set()
    await asyncio.gather(*giving)
    near.close()
    far.close()
