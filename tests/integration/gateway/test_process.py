"""The process itself: its lock, its end without a broker, what it holds and what it does not know."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.gateway.support import rig


def gateway(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "broker.gateway", *arguments]


def test_without_a_broker_it_ends_when_told_so(tmp_path: Path) -> None:
    done = subprocess.run(gateway("--link", str(tmp_path / "no"), "--alone", "0.2"), capture_output=True, timeout=20)
    assert done.returncode == 0
    assert b"no_broker_for_too_long" in done.stderr


async def test_a_second_one_does_not_start() -> None:
    async with rig() as gw:
        lock = str(gw.link.path) + ".lock"
        command = gateway("--link", str(gw.link.path), "--lock", lock)
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=20)
        assert done.returncode == os.EX_TEMPFAIL
        assert gw.link.connected


async def test_it_has_no_secret_of_the_brokers_environment() -> None:
    os.environ["CORTEX_TEST_SECRET"] = "hidden-in-the-environment"
    try:
        async with rig() as gw:
            assert b"hidden" not in Path(f"/proc/{gw.link.peer_pid}/environ").read_bytes()
            assert b"hidden" not in Path(f"/proc/{gw.link.peer_pid}/cmdline").read_bytes()
    finally:
        del os.environ["CORTEX_TEST_SECRET"]


def test_it_never_loads_the_store_or_the_settings() -> None:
    code = "import sys, broker.gateway.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20).stdout.split()
    assert "broker.gateway.table" in loaded
    assert not {"sqlite3", "aiosqlite", "pydantic", "aiohttp", "broker.config", "broker.settings"} & set(loaded)
    assert not [name for name in loaded if name.startswith(("broker.store", "broker.sandbox", "broker.session"))]
