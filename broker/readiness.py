"""Whether this broker can take new work."""

from __future__ import annotations

import asyncio
from pathlib import Path

from broker.errors import CortexError
from broker.gateway.link import GatewayLink
from broker.host.files import short_of_space
from broker.sandbox.driver import SandboxDriver
from broker.store.db import Database


async def readiness(db: Database, driver: SandboxDriver, gateway: GatewayLink, state_dir: Path) -> dict[str, str]:
    """By what it depends on: "" is good, else what is wrong. Each call has the deadline of its own library."""
    checks = {
        "store": "",
        "disk": await asyncio.to_thread(short_of_space, state_dir),
        "engine": "",
        "gateway": "" if gateway.connected else "the gateway is not connected",
    }
    try:
        await db.read("SELECT 1")
    except CortexError as error:
        checks["store"] = str(error)
    try:
        await driver.list()
    except CortexError as error:
        checks["engine"] = f"{error}; {error.hint}"
    return checks
