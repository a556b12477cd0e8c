"""Real agents without real providers: the stand-in as a process, and the settings that send agents to it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.config import GatewayConfig
from tests.e2e.conftest import need_docker, short_directory
from tests.e2e.harness import IMAGE, ROOT, BrokerProcess, running

KEYS = {name: f"real-key-of-{name}-4f1d" for name in ("anthropic", "openai", "gemini")}
"""The credentials that only the gateway may know."""


def need_agents(*names: str) -> None:
    """Skips, or fails where CI requires the agents, unless the image holds all of ``names``."""
    need_docker()
    test = " && ".join(f"test -x /opt/agents/bin/{name}" for name in names)
    asked = subprocess.run(["docker", "run", "--rm", "--network", "none", IMAGE, "sh", "-c", test], timeout=60)
    if asked.returncode == 0:
        return
    why = f"{IMAGE} does not hold {', '.join(names)}: run `make image`"
    if os.environ.get("CORTEX_TEST_CLI") == "required":
        pytest.fail(why)
    pytest.skip(why)


class StandIn:
    """``python -m tests.standin`` at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def requests(self, provider: str) -> list[dict[str, Any]]:
        """What ``provider`` was asked since the last ``forget``, oldest first."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/_requests") as response:
            found: list[dict[str, Any]] = await response.json()
        return [request for request in found if request["provider"] == provider]

    async def forget(self) -> None:
        async with aiohttp.ClientSession() as http, http.delete(f"{self.url}/_requests") as response:
            response.raise_for_status()


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    """It ends with its standard input, so also when the tests are killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.standin", "--until-eof"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(20):
        url = (await process.stdout.readline()).decode().strip()
    try:
        yield StandIn(url)
    finally:
        process.stdin.close()
        async with asyncio.timeout(20):
            await process.wait()


def agents_config(directory: Path, url: str) -> str:
    """The agents as config.toml ships them, with providers at ``url`` and their keys in files."""
    shipped = (ROOT / "config.toml").read_text()
    agents = shipped[shipped.index("\n[agents.claude]") : shipped.index("\n[defaults]")]
    # Where the package registry is a mirror, its address may be an inner one.
    config = f"[gateway]\nprivate_hosts = {json.dumps(GatewayConfig().allowed_hosts)}\n"
    for name, key in KEYS.items():
        file = directory / f"{name}.key"
        file.write_text(key)
        file.chmod(0o600)
        config += (
            f'[gateway.providers.{name}]\nkind = "{name}"\nbase_url = "{url}/{name}"\ncredential_file = "{file}"\n'
            f"websocket = {str(name == 'openai').lower()}\n"
        )
    return config + agents


@asynccontextmanager
async def broker_and_stand_in(more: str = "") -> AsyncIterator[tuple[BrokerProcess, StandIn]]:
    """A broker on the docker driver that knows every shipped agent. ``more``: tables of its configuration."""
    with short_directory() as directory:
        async with (
            stand_in() as providers,
            running(directory, "docker", agents_config(directory, providers.url) + more) as broker,
        ):
            yield broker, providers
