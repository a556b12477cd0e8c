"""A world around each driver."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from broker.host.tasks import TaskOwner
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.fake import FakeDriver, FakeEngine
from tests.integration.sandbox import kinds
from tests.integration.sandbox.rig import DIALLER, Rig, rig

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
MINE = ("test_driver_conformance", "test_isolation", "test_docker_trouble", "test_process_driver")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Drivers are tried on the loop that the broker runs on."""
    return {"uvloop": uvloop.new_event_loop} if item.path.stem in MINE else {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    made = FakeEngine()
    yield made
    await made.close()


@pytest.fixture
async def world(request: pytest.FixtureRequest, engine: FakeEngine) -> AsyncIterator[Rig]:
    kind = str(request.param)
    checks: dict[str, Callable[[], str]] = {"docker": kinds.docker_missing, "process": kinds.bwrap_missing}
    missing = checks[kind]() if kind in checks else ""
    if missing:
        pytest.skip(missing)

    def fake(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
        return FakeDriver(engine, installation=installation)

    make = {"docker": kinds.make_docker, "process": kinds.make_process, "plain": kinds.make_plain, "fake": fake}[kind]
    async with rig(kind, make) as made:
        (made.base / "packages").mkdir()
        shutil.copy(DIALLER, made.base / "packages")
        yield made
