"""A control API on a real socket, with a real store and a fake registry."""

from __future__ import annotations

import base64
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker.access import Access
from broker.config import Config
from broker.control.api import ControlServer
from broker.control.routes import Control
from broker.session.foresight import Foresight
from broker.session.pool_view import Facts, view
from broker.session.usage import Accounting
from broker.store.activity import ActivityStore
from broker.store.db import Database
from broker.store.keeper import Keeper
from broker.store.keys import KeyFile
from broker.store.tokens import TokenStore
from broker.store.usage import UsageStore
from broker.store.users import UserStore
from tests.unit.broker.control.fakes import FakeRegistry

ADMIN = "admin-token-that-is-long-enough-to-be-one"
HOOK_KEY = b"0123456789abcdef0123456789abcdef"


@dataclass
class Api:
    """The API as a client sees it, and what stands behind it."""

    url: str
    http: aiohttp.ClientSession
    registry: FakeRegistry
    access: Access
    clock: list[float]
    health: dict[str, str]
    control: Control
    pool: dict[str, Any]

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status and JSON; as an operator unless headers are given."""
        headers = options.pop("headers", {"Authorization": f"Bearer {ADMIN}"})
        async with self.http.request(method, self.url + path, json=body, headers=headers, **options) as response:
            return response.status, await response.json(content_type=None)

    async def hook(self, body: Mapping[str, Any], hook_id: str = "msg_1", **changes: Any) -> tuple[int, Any]:
        """A signed hook call."""
        raw = json.dumps(body).encode()
        headers = sign(raw, hook_id, changes.pop("at", self.clock[0])) | changes
        async with self.http.post(f"{self.url}/v1/hooks/session", data=raw, headers=headers) as response:
            return response.status, await response.json(content_type=None)


def sign(raw: bytes, hook_id: str, at: float, key: bytes = HOOK_KEY) -> dict[str, str]:
    """Standard Webhooks headers for ``raw``."""
    signature = base64.b64encode(hmac.digest(key, f"{hook_id}.{int(at)}.".encode() + raw, "sha256")).decode()
    return {"webhook-id": hook_id, "webhook-timestamp": str(int(at)), "webhook-signature": f"v1,AAAA v1,{signature}"}


def empty_pool() -> dict[str, Any]:
    """The view of a broker without pools."""
    return view([], [], Facts(2**30, 2**30, 0, 0.0, "", "", False, 0.0))


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    db = await Database.open(tmp_path / "state")
    config, clock, health = Config(), [time.time()], {"store": ""}
    access = Access(
        TokenStore(db), lambda: config, bytes(32), lambda: clock[0], admin_token=ADMIN, hook_keys=(b"x" * 24, HOOK_KEY)
    )

    async def checks() -> Mapping[str, str]:
        return health

    registry = FakeRegistry()
    keeper = await Keeper.open(db, KeyFile(tmp_path / "state" / "vault.key"), bytes(32))
    foresight = Foresight(ActivityStore(db), lambda: config.pool, lambda: clock[0])
    front, pool = "ws://127.0.0.1:1", empty_pool()
    usage = Accounting(UsageStore(db), lambda: config, lambda: clock[0])
    control = Control(
        registry, access, UserStore(db), lambda: config, lambda: front, checks, keeper, foresight, lambda: pool, usage
    )
    server = ControlServer(control)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "c.sock"))
    unix.listen()
    await server.start(listener, unix)
    async with aiohttp.ClientSession() as http:
        yield Api(url, http, registry, access, clock, health, control, pool)
    await server.close()
    await registry.tasks.close()
    await keeper.close()
    await foresight.close()
    await db.close()
