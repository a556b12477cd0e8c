"""These tests run on uvloop, as the agent server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from tests.unit.sandbox_agent.acp.kit import Bench


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A hub with a scripted agent and a journal in ``tmp_path``; not started."""
    made = Bench(tmp_path)
    yield made
    await made.stop()
