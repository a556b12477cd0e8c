"""The life of a broker, with its real gateway process and sandboxes that are fake."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from broker import app, stack
from broker.app import CHECKS, Broker
from broker.errors import Code, CortexError
from broker.sandbox.fake import FakeDriver, FakeEngine
from broker.session.session import Session
from broker.settings import load


class Place:
    """A state directory and an engine that outlive brokers."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.engine = FakeEngine()
        self.brokers: list[Broker] = []
        self.file = base / "etc" / "config.toml"
        self.users = base / "users"
        self.file.parent.mkdir()
        self.write("")

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.rename(self.file)

    def broker(self, **changes: Any) -> Broker:
        overrides: dict[str, Any] = {
            "broker.state_dir": str(self.base / "state"),
            "broker.runtime_dir": str(self.base / "run"),
            "broker.users_dir": str(self.users),
            "broker.log_level": "error",
            "front.listen": "127.0.0.1:0",
            "control.listen": "127.0.0.1:0",
            "control.admin_token_file": str(self.base / "admin.token"),
            "control.hook_secrets_file": str(self.base / "hook.secrets"),
            "gateway.link": str(self.base / "run" / "gateway.sock"),
            "sandbox.uid": os.geteuid(),
            "sandbox.stop_timeout_s": 0.2,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        made = Broker(load(self.file, {}, overrides=overrides, checks=CHECKS), overrides)
        self.brokers.append(made)
        return made

    async def close(self) -> None:
        for broker in self.brokers:
            await broker.stop()
        await self.engine.close()


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="ctx-", dir="/tmp"))
    made = Place(base)
    monkeypatch.setattr(stack, "make_driver", lambda *args: FakeDriver(made.engine))
    monkeypatch.setattr(app, "raise_file_limit", lambda: None)
    try:
        yield made
    finally:
        await made.close()
        shutil.rmtree(base, ignore_errors=True)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.01)


async def ready(broker: Broker) -> Session:
    session, _ = await broker.registry.create("ann", "main", None)
    await session.wait_ready()
    assert isinstance(session, Session)
    return session


async def test_sandboxes_outlive_a_broker_and_the_next_one_has_them(place: Place) -> None:
    first = place.broker()
    await first.start()
    session = await ready(first)
    await first.stop()
    await first.stop()
    (box,) = place.engine.sandboxes.values()
    assert box.liveness == "running"
    second = place.broker()
    await second.start()
    again = second.registry.held("ann", "main")
    assert again is not None
    assert again.id == session.id
    await again.wait_ready()
    assert list(place.engine.sandboxes.values()) == [box]
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{second.control_url}/readyz") as response:
            assert response.status == 200
        place.engine.error = CortexError(Code.ENGINE_DOWN, "the engine is down", hint="start it")
        assert "start it" in (await second.health())["engine"]
        place.engine.error = None
    await again.stop()
    assert second.stack.slots.ids() == []


async def test_files_that_change_reach_a_running_session(place: Place) -> None:
    broker = place.broker()
    await broker.start()
    session = await ready(broker)
    (box,) = place.engine.sandboxes.values()

    def bound() -> dict[str, str]:
        parts = [bind.parts["process"]["env"] for bind in box.binds if "process" in bind.parts]
        return dict(parts[-1]) if parts else {}

    path = place.users / "ann" / "env.toml"
    path.parent.mkdir()
    path.write_text('A = "user"')
    await until(lambda: bound().get("A") == "user")
    place.write('[defaults.env]\nB = "operator"\n')
    await until(lambda: bound().get("B") == "operator")
    place.write("[defaults.env]\nB = 7\n")
    await broker.reload()
    assert broker.config().defaults.env == {"B": "operator"}
    place.write('[defaults.env]\nB = "mended"\n')
    await until(lambda: bound() == {"A": "user", "B": "mended"})
    assert session.state == "ready"
    await session.stop()


async def test_the_log_level_changes_while_it_runs(place: Place) -> None:
    place.write('[broker]\nlog_level = "error"\n')
    broker = place.broker(broker__log_level=None)
    before = logging.getLogger("broker").level
    await broker.start()
    try:
        place.write('[broker]\nlog_level = "debug"\n')
        await until(lambda: logging.getLogger("broker").level == logging.DEBUG)
    finally:
        logging.getLogger("broker").setLevel(before)
        structlog.reset_defaults()


async def test_a_second_broker_on_the_same_state_is_refused(place: Place) -> None:
    first = place.broker()
    await first.start()
    second = place.broker()
    with pytest.raises(CortexError) as caught:
        await second.start()
    assert caught.value.code is Code.STORE_LOCKED
    await second.stop()
    assert (await first.health())["store"] == ""


async def test_an_address_that_is_taken_is_told_by_its_key_and_leaves_nothing_open(place: Place) -> None:
    first = place.broker()
    await first.start()
    port = first.front_url.rsplit(":", 1)[1]
    second = place.broker(
        front__listen=f"127.0.0.1:{port}",
        broker__state_dir=str(place.base / "other"),
        gateway__link=str(place.base / "run" / "other.sock"),
    )
    with pytest.raises(CortexError) as caught:
        await second.start()
    assert caught.value.code is Code.BAD_CONFIG
    assert "front.listen" in caught.value.what
    await second.stop()
    assert len(second._tasks) == 0


@pytest.mark.parametrize("key", ["front", "control"])
async def test_without_isolation_only_this_host_is_served(
    place: Place, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(stack, "make_driver", lambda *args: FakeDriver(place.engine, isolated=False))
    broker = place.broker(**{f"{key}__listen": "0.0.0.0:0"})
    with pytest.raises(CortexError) as caught:
        await broker.start()
    assert f"{key}.listen is open to other hosts" in caught.value.what
    await broker.stop()
    local = place.broker(**{f"{key}__listen": f"unix:{place.base}/s"})
    await local.start()


async def test_a_signal_ends_it_in_good_order(place: Place) -> None:
    broker = place.broker()
    running = asyncio.ensure_future(broker.run())
    await until(lambda: hasattr(broker, "front") and hasattr(broker, "front_url"))
    await ready(broker)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 10) == 0
    assert [box.liveness for box in place.engine.sandboxes.values()] == ["running"]
    after = place.broker()
    await after.start()
    await after.registry.delete("ann", "main")


async def test_a_stop_closes_everything_although_its_state_is_gone(place: Place) -> None:
    broker = place.broker()
    await broker.start()
    pid = broker.stack.gateway.peer_pid
    shutil.rmtree(broker.stack.slots.packages_dir.parent / "slots")
    await broker.stop()
    with pytest.raises(CortexError):
        await broker.db.read("SELECT 1")
    assert not Path(f"/proc/{pid}").exists()


async def test_what_fails_on_the_way_out_keeps_nothing_else_open(place: Place) -> None:
    broker = place.broker()
    await broker.start()

    async def fails() -> None:
        raise OSError("a part that cannot be closed")

    broker._open.push_async_callback(fails)
    with pytest.raises(OSError, match="cannot be closed"):
        await broker.stop()
    with pytest.raises(CortexError):
        await broker.db.read("SELECT 1")
