from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.host.watch import watch


async def test_a_replaced_file_is_seen_and_a_refused_change_does_not_end_the_watch(tmp_path: Path) -> None:
    seen: asyncio.Queue[set[Path]] = asyncio.Queue()
    started = asyncio.Event()
    refuse = True

    async def on_change(paths: set[Path]) -> None:
        seen.put_nowait(paths)
        if refuse:
            raise CortexError(Code.BAD_CONFIG, "no", hint="mend it")

    loop = asyncio.get_running_loop()
    task = loop.create_task(watch(tmp_path, on_change, started=started))
    await asyncio.wait_for(started.wait(), 5)
    (tmp_path / "draft").write_text("a")
    os.replace(tmp_path / "draft", tmp_path / "config.toml")
    assert tmp_path / "config.toml" in await asyncio.wait_for(seen.get(), 10)
    refuse = False
    (tmp_path / "node_modules").write_text("b")
    assert tmp_path / "node_modules" in await asyncio.wait_for(seen.get(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)


async def test_a_directory_that_is_missing_or_goes_is_an_error(tmp_path: Path) -> None:
    async def on_change(paths: set[Path]) -> None: ...

    with pytest.raises(CortexError) as caught:
        await watch(tmp_path / "none", on_change)
    assert "exist" in caught.value.hint
    started = asyncio.Event()
    place = tmp_path / "place"
    place.mkdir()
    task = asyncio.get_running_loop().create_task(watch(place, on_change, started=started))
    await asyncio.wait_for(started.wait(), 5)
    place.rmdir()
    with pytest.raises(CortexError):
        await asyncio.wait_for(task, 10)
