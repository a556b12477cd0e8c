from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.integration.sandbox_agent.mux.kit import Place


@pytest_asyncio.fixture
async def place(root: Path) -> AsyncIterator[Place]:
    root.mkdir(exist_ok=True)
    made = Place(root)
    async with made.running():
        yield made
