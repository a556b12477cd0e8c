from __future__ import annotations

import asyncio
import errno
import os
import resource
from pathlib import Path

import pytest

from sandbox_agent import watch
from sandbox_agent.watch import Watch


class Watched:
    """A watch and how often it was called."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.watch = Watch(self.changed.set)

    async def seen(self) -> None:
        async with asyncio.timeout(10):
            await self.changed.wait()
        self.changed.clear()


async def test_writes_renames_and_removals_of_a_watched_name_are_seen(tmp_path: Path) -> None:
    it = Watched()
    it.watch.set({str(tmp_path): frozenset({"key"})})
    key = tmp_path / "key"
    key.write_text("a")
    await it.seen()
    with key.open("a") as file:  # still open
        file.write("b")
        file.flush()
        await it.seen()
    (tmp_path / "other").write_text("c")
    (tmp_path / "other").rename(key)
    await it.seen()
    key.unlink()
    await it.seen()
    it.watch.close()
    it.watch.close()


async def test_other_names_call_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAUSE_S", 0.0)
    it = Watched()
    calls = 0

    def changed() -> None:
        nonlocal calls
        calls += 1
        it.changed.set()

    it.watch = Watch(changed)
    it.watch.set({str(tmp_path): frozenset({"key"})})
    for number in range(50):
        (tmp_path / f"other{number}").write_text("x")
    key = os.open(tmp_path / "key", os.O_CREAT)
    await it.seen()
    assert calls == 1
    os.close(key)
    it.watch.close()


async def test_what_is_not_there_is_left_out_and_what_is_a_link_too(tmp_path: Path) -> None:
    it = Watched()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = frozenset({"key"})
    it.watch.set({str(tmp_path / name): names for name in ("none", "file", "loop", "link")})
    assert it.watch._names == {}
    it.watch.close()


async def test_a_directory_that_goes_is_seen_and_another_can_take_its_place(tmp_path: Path) -> None:
    it = Watched()
    inner = tmp_path / "inner"
    inner.mkdir()
    wanted = {str(inner): frozenset({"key"})}
    it.watch.set(wanted)
    inner.rmdir()
    await it.seen()
    inner.mkdir()
    it.watch.set(wanted)
    assert len(it.watch._names) == 1
    (inner / "key").write_text("")
    await it.seen()
    inner.rename(tmp_path / "aside")
    inner.mkdir()
    it.watch.set(wanted)
    held = Path(f"/proc/self/fdinfo/{it.watch._fd}").read_text().count("inotify wd")
    assert held == len(it.watch._names) == 1, "the one that was moved is no longer watched"
    (inner / "key").write_text("")
    await it.seen()
    it.watch.close()


async def test_too_many_events_are_a_change(tmp_path: Path) -> None:
    it = Watched()
    it.watch.set({str(tmp_path): frozenset({"key"})})
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(limit // 2 + 1):  # a create and a delete each
        os.close(os.open(tmp_path / "x", os.O_CREAT))
        os.unlink(tmp_path / "x")
    await it.seen()
    it.watch.close()


async def test_a_host_without_watches_is_an_error_of_the_system(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.open("/dev/null", os.O_RDONLY)
    os.close(held)
    resource.setrlimit(resource.RLIMIT_NOFILE, (held, hard))
    try:
        with pytest.raises(OSError) as caught:
            Watch(lambda: None).set({str(tmp_path): frozenset()})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE


async def test_nothing_to_watch_takes_nothing() -> None:
    it = Watch(lambda: None)
    it.set({})
    assert it._fd == -1
    it.close()
