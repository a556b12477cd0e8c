"""Lines of a descriptor beside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import pytest

from broker.cli.stdio import LineReader, write_all
from broker.errors import Code, CortexError


async def test_lines_come_whole_whatever_the_chunks() -> None:
    read, write = os.pipe()
    lines = LineReader(read, limit=1000)
    for chunk in (b"on", b"e\n\ntw", b"o\nlast"):
        os.write(write, chunk)
    os.close(write)
    async with asyncio.timeout(5):
        found = [await lines.next() for _ in range(6)]
    assert found == [b"one", b"", b"two", b"last", None, None]
    os.close(read)


async def test_a_file_and_dev_null_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\nb\n")
    for path, expected in ((tmp_path / "f", [b"a", b"b", None]), (Path(os.devnull), [None])):
        fd = os.open(path, os.O_RDONLY)
        lines = LineReader(fd, limit=10)
        assert [await lines.next() for _ in expected] == expected
        os.close(fd)


async def test_a_line_without_end_is_an_error() -> None:
    read, write = os.pipe()
    lines = LineReader(read, limit=100)
    os.write(write, b"x" * 101)
    with pytest.raises(CortexError) as caught:
        await lines.next()
    assert caught.value.code is Code.BODY_TOO_LARGE
    assert await lines.next() is None
    os.close(write)
    os.close(read)


async def test_reading_ahead_is_bounded() -> None:
    read, write = os.pipe()
    lines = LineReader(read, limit=2**20, ahead=2)
    os.set_blocking(write, False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100 * 4096:
            sent += os.write(write, b"x" * 4095 + b"\n")
            await asyncio.sleep(0.001)
    assert sent < 50 * 4096
    os.close(write)
    async with asyncio.timeout(5):
        while await lines.next() is not None:
            sent -= 4096
    assert sent == 0
    os.close(read)


async def test_a_wait_for_a_line_can_be_ended() -> None:
    read, write = os.pipe()
    lines = LineReader(read, limit=10)
    asyncio.get_running_loop().call_soon(lines.end)
    assert await lines.next() is None
    os.close(write)


def test_all_is_written_to_a_slow_reader() -> None:
    read, write = os.pipe()
    writer = threading.Thread(target=write_all, args=(write, b"y" * 2**20))
    writer.start()
    size = 0
    while size < 2**20:
        size += len(os.read(read, 4096))
    writer.join(5)
    assert not writer.is_alive()
