"""Pools in a running broker, on both drivers: filled, claimed, drained, killed, taken over, short of their image."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.sandbox.procfs import tree
from tests.e2e.conftest import need_docker, process_config, short_directory
from tests.e2e.harness import IMAGE, ROOT, BrokerProcess, Client, connected, running, turn
from tests.integration.sandbox.way import Way

pytestmark = pytest.mark.timeout(180)

POOL = """
{more}
[pool]
debounce_s = 0.02
breaker_s = 1.5
[pool.agents.demo]
target = {target}
hot = {hot}
"""


def pool(target: int, hot: int = 1, more: str = "") -> str:
    return process_config() + POOL.format(target=target, hot=hot, more=more)


async def seen(broker: BrokerProcess) -> dict[str, Any]:
    """The demo agent's part of the view."""
    view = await broker.api("GET", "/v1/pool")
    return next((agent for agent in view["agents"] if agent["agent"] == "demo"), {})


async def becomes(broker: BrokerProcess, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The view, once it is as wished."""
    agent: dict[str, Any] = {}
    try:
        async with asyncio.timeout(60):
            while not (agent := await seen(broker)) or not what(agent):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{agent}\n{broker.log_tail()}") from None
    return agent


async def rests(broker: BrokerProcess, hot: int, paused: int) -> dict[str, Any]:
    """So many are there, and none is on its way."""
    wanted = (hot, paused, 0, 0)
    return await becomes(broker, lambda it: (it["hot"], it["paused"], it["making"], it["ending"]) == wanted)


async def way(broker: BrokerProcess, user: str) -> str:
    """By which way the user's session became ready."""
    await broker.session(user)
    return str((await broker.api("GET", f"/v1/sessions/{user}/main/timeline"))["bringups"][0]["path"])


def containers(broker: BrokerProcess) -> list[str]:
    """Ids of this broker's containers."""
    return [found for slot in os.listdir(broker.state_dir / "slots") for found in _ps(slot)]


def _ps(slot: str) -> list[str]:
    command = ["docker", "ps", "-aq", "--no-trunc", "--filter", f"label=io.cortex.slot={slot}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def pids(broker: BrokerProcess) -> set[int]:
    """Of what runs in the sandboxes, as records or containers tell."""
    if broker.driver == "docker":
        command = ["docker", "inspect", "-f", "{{.State.Pid}}", *containers(broker)]
        # One may be gone meanwhile; the others are told all the same.
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return {int(pid) for pid in shown.stdout.split()} - {0}
    records = [json.loads(path.read_text()) for path in (broker.state_dir / "process").glob("*.json")]
    return {int(record["init"]["pid"]) for record in records if record.get("init")}


async def test_the_life_of_a_pool(place: Path, driver: str) -> None:
    async with running(place, driver, pool(3)) as broker:
        await rests(broker, 1, 2)
        assert [await way(broker, user) for user in ("ann", "bob")] == ["generic_warm"] * 2
        full = await rests(broker, 1, 2)
        assert full["claims"]["hit"] == 2
        assert full["hit_rate"] == 1.0
        full = await becomes(broker, lambda it: bool(it["measured"]))
        assert 2**20 < full["bytes_each"] < 2**30
        made = await broker.session("ann")
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, "say marrow")
        assert "marrow" in client.text
        assert await broker.metric('cortex_pool_size{agent="demo",kind="generic",state="paused"}') == 2
        shown = subprocess.run(
            [sys.executable, "-m", "broker", "pool", "--config", str(broker.config_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=30,
            env=os.environ | {"NO_COLOR": "1"},
        )
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.splitlines()[1].split()[:5] == ["demo", "3", "0", "1", "2"]


async def test_new_settings_apply_at_once(place: Path, driver: str) -> None:
    async with running(place, driver, pool(1)) as broker:
        await rests(broker, 1, 0)
        before = pids(broker)
        broker.write_config(pool(3, 2))
        await rests(broker, 2, 1)
        assert before < pids(broker)
        broker.write_config(pool(2, 0, '[defaults.env]\nA = "b"'))
        await becomes(broker, lambda it: it["target"] == 2)
        await rests(broker, 0, 2)
        assert not before & pids(broker)
        assert await way(broker, "ann") == "generic_warm"


async def test_one_that_is_killed_or_stuck_is_replaced(place: Path, driver: str) -> None:
    """One ends by a signal, one stands still though nobody paused it."""
    more = "probe_interval_s = 0.2" if driver == "docker" else "probe_interval_s = 0.2\n"
    async with running(place, driver, more + pool(2, 2)) as broker:
        await rests(broker, 2, 0)
        first, second = sorted(pids(broker))
        os.kill(first, signal.SIGKILL)
        await becomes(broker, lambda it: it["hot"] + it["paused"] < 2)
        await rests(broker, 2, 0)
        assert second in pids(broker)
        for pid in tree(second):
            os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(40):
            while second in pids(broker):
                await asyncio.sleep(0.05)
        await rests(broker, 2, 0)
        reasons = {event.get("reason", "") for event in broker.log_events() if event["event"] == "warm_sandbox_ends"}
        assert any("unanswered" in reason for reason in reasons), reasons


async def test_a_broker_that_is_killed_leaves_them_to_the_next(place: Path, driver: str) -> None:
    async with running(place, driver, pool(3)) as broker:
        await rests(broker, 1, 2)
        before = pids(broker)
        await broker.kill()
        await broker.start()
        await rests(broker, 1, 2)
        assert pids(broker) == before, broker.log_tail()
        assert await way(broker, "ann") == "generic_warm"
        await broker.api("DELETE", "/v1/sessions/ann/main")
        await broker.stop()
        broker.write_config(pool(2, 1, "[defaults.limits]\npids = 300"))
        await broker.start()
        await rests(broker, 1, 1)
        assert len(before & pids(broker)) == 0
        assert await way(broker, "bob") == "generic_warm"


async def test_a_broker_that_stops_while_it_makes_some_leaves_nothing_half_made(place: Path, driver: str) -> None:
    async with running(place, driver, pool(4, more="")) as broker:
        for pause in (0.0, 0.1, 0.3):
            await becomes(broker, lambda it: it["making"] > 0)
            await asyncio.sleep(pause)
            assert await broker.stop() == 0
            await broker.start()
        await rests(broker, 1, 3)
        assert len(os.listdir(broker.state_dir / "slots")) == len(pids(broker)) == 4
        assert await way(broker, "ann") == "generic_warm"


async def test_an_agent_that_cannot_be_made_opens_the_breaker_and_leaves_nothing(place: Path, driver: str) -> None:
    broken = '[agents.broken]\ncommand = ["/no/such/agent"]\n[pool.agents.broken]\ntarget = 2\n'
    async with running(place, driver, pool(1) + broken) as broker:
        await rests(broker, 1, 0)
        async with asyncio.timeout(60):
            while (told := await _agent(broker, "broken"))["short"] != "breaker":
                await asyncio.sleep(0.05)
        assert "/no/such/agent" in told["error"]
        assert await broker.metric('cortex_pool_breaker_open{agent="broken"}') == 1
        assert await way(broker, "ann") == "generic_warm"
        await rests(broker, 1, 0)
        broker.write_config(pool(1))
        async with asyncio.timeout(30):
            while len(os.listdir(broker.state_dir / "slots")) != 2:
                await asyncio.sleep(0.05)


async def _agent(broker: BrokerProcess, name: str) -> dict[str, Any]:
    view = await broker.api("GET", "/v1/pool")
    return next((agent for agent in view["agents"] if agent["agent"] == name), {"short": ""})


@pytest.mark.docker
async def test_an_engine_that_restarts_and_takes_all_with_it(place: Path) -> None:
    """Users are told while it is away; when it is back the pool fills by itself, and nothing is left of before."""
    need_docker()
    way_there = Way(place / "engine.sock")
    await way_there.open()
    engine = f'[sandbox.docker]\nhost = "unix://{way_there.path}"\ncall_timeout_s = 5\n'
    async with running(place, "docker", pool(2, more=engine)) as broker:
        await rests(broker, 1, 1)
        assert await way(broker, "ann") == "generic_warm"
        await rests(broker, 1, 1)
        before = containers(broker)
        assert len(before) == 3
        way_there.cut()
        docker("kill", *before)
        told = await broker.refused("POST", "/v1/sessions", {"user": "bob", "agent": "demo", "wait": "ready"})
        assert told["code"] in ("sandbox.engine_down", "sandbox.died")
        await becomes(broker, lambda it: it["hot"] + it["paused"] == 0)
        await way_there.open()
        await rests(broker, 1, 1)
        assert await way(broker, "bob") == "generic_warm"
        assert await way(broker, "ann") in ("generic_warm", "cold")
        await rests(broker, 1, 1)
        assert not set(before) & set(docker("ps", "-aq", "--no-trunc").split())
        assert len(os.listdir(broker.state_dir / "slots")) == 4
    way_there.cut()


@asynccontextmanager
async def own_image() -> AsyncIterator[str]:
    """Another name for the image, so that it can be taken away."""
    need_docker()
    name = f"cortex-pool-{os.getpid()}:test"
    docker("tag", IMAGE, name)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rmi", name], capture_output=True, timeout=60)


@pytest.mark.docker
async def test_an_image_that_is_removed_under_the_pool() -> None:
    """Told once by the pool; users fall through to a cold start, whose own error is clear; mended without a restart."""
    async with own_image() as name:
        with short_directory() as directory:
            env = {"CORTEX_SANDBOX__DOCKER__IMAGE": name}
            async with running(directory, "docker", pool(1), env=env) as broker:
                await rests(broker, 1, 0)
                docker("rmi", name)
                assert await way(broker, "ann") == "generic_warm"
                await becomes(broker, lambda it: it["breaker"] == "open")
                told = await broker.refused("POST", "/v1/sessions", {"user": "bob", "agent": "demo", "wait": "ready"})
                assert told["code"] == "sandbox.image_missing"
                assert "make image" in told["hint"]
                said = [event["event"] for event in broker.log_events() if event.get("level") == "error"]
                assert said.count("pool_image_missing") == 1
                docker("tag", IMAGE, name)
                await rests(broker, 1, 0)
                assert await way(broker, "bob") == "generic_warm"


@pytest.mark.docker
async def test_an_image_that_is_built_anew_under_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made from the old one is replaced, though its name is the same."""
    async with own_image() as name:
        with short_directory() as directory:
            env = {"CORTEX_SANDBOX__DOCKER__IMAGE": name}
            async with running(directory, "docker", pool(1), env=env) as broker:
                await rests(broker, 1, 0)
                (before,) = containers(broker)
                file = f"FROM {IMAGE}\nLABEL io.cortex.test={os.getpid()}\n"
                subprocess.run(["docker", "build", "-t", name, "-"], input=file.encode(), check=True, timeout=120)
                async with asyncio.timeout(60):
                    while before in containers(broker):
                        await asyncio.sleep(0.1)
                await rests(broker, 1, 0)
                (after,) = containers(broker)
                image = docker("image", "inspect", "-f", "{{.Id}}", name)
                assert docker("inspect", "-f", "{{.Image}}", after) == image
