from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.harness import IMAGE, BrokerProcess, running


def docker_missing() -> str:
    """Why containers cannot be run here; "" when they can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    asked = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, text=True, timeout=20)
    return "" if asked.returncode == 0 else f"no engine or no image {IMAGE}: run `make image`"


def need_docker() -> None:
    """Skips, or fails where CI requires Docker."""
    why = docker_missing()
    if why and os.environ.get("CORTEX_TEST_DOCKER") == "required":
        pytest.fail(why)
    if why:
        pytest.skip(why)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory with a short path: socket names fit in 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="cx-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the test's own."""
    with short_directory() as directory:
        yield directory


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def driver(request: pytest.FixtureRequest) -> str:
    """Both drivers; process runs unisolated only where bubblewrap is missing."""
    if request.param == "docker":
        need_docker()
    return str(request.param)


def process_config() -> str:
    """Where bubblewrap cannot run, the plain driver is allowed."""
    bwrap = shutil.which("bwrap")
    works = bwrap is not None and (
        subprocess.run([bwrap, "--ro-bind", "/", "/", "--unshare-all", "true"], capture_output=True).returncode == 0
    )
    return "" if works else "[sandbox.process]\nallow_unisolated = true\n"


@pytest.fixture
async def broker(place: Path, driver: str) -> AsyncIterator[BrokerProcess]:
    """A running broker with the demo agent."""
    async with running(place, driver, process_config()) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(driver: str) -> AsyncIterator[BrokerProcess]:
    """One broker for the tests of a module that neither kill nor reconfigure it; each has users of its own."""
    with short_directory() as directory:
        async with running(directory, driver, process_config()) as process:
            yield process
