from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest_asyncio

from tests.integration.sandbox_agent.harness import Broker, Sandbox, welcome


@pytest_asyncio.fixture
async def root() -> AsyncIterator[Path]:
    """A short path: a socket's name has to fit in 107 bytes."""
    place = Path(tempfile.mkdtemp(prefix="cx"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest_asyncio.fixture
async def sandbox(root: Path) -> AsyncIterator[Sandbox]:
    made = Sandbox(root)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def broker(root: Path, sandbox: Sandbox) -> AsyncIterator[Broker]:
    made = Broker(sandbox.socks, root / "journal", replace(welcome(), home=str(sandbox.home)))
    await made.start()
    yield made
    await made.stop()
