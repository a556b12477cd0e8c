"""What tests of pools share: settings, what a broker shows of its pool, and somebody at work in a sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from broker.sandbox.slots import home_key
from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, Client, connected, turn

WAIT_S = 60.0


def pooled(target: int, hot: int = 1, *, agent: str = "demo", before: str = "", more: str = "", after: str = "") -> str:
    """Settings with a pool. ``before``: of [sandbox]; ``more``: of [pool]; ``after``: any."""
    pool = f"[pool]\n{more}\n[pool.agents.{agent}]\ntarget = {target}\nhot = {hot}\nmaximum = 200\n"
    return f"{before}\n{process_config()}{pool}{after}\n"


async def seen(broker: BrokerProcess, agent: str = "demo") -> dict[str, Any]:
    """The agent's part of the pool's view; empty when there is none."""
    view = await broker.api("GET", "/v1/pool")
    return next((one for one in view["agents"] if one["agent"] == agent), {})


async def until(broker: BrokerProcess, what: Callable[[], Awaitable[bool]], limit_s: float = WAIT_S) -> None:
    """Asks again and again; the deadline fails the test with what the broker said last."""
    try:
        async with asyncio.timeout(limit_s):
            while not await what():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{await broker.api('GET', '/v1/pool')}\n{broker.log_tail()}") from None


async def filled(broker: BrokerProcess, count: int, agent: str = "demo") -> None:
    """Returns when so many warm sandboxes are there and none is on its way."""

    async def full() -> bool:
        it = await seen(broker, agent)
        return bool(it) and (it["hot"] + it["paused"], it["making"], it["ending"]) == (count, 0, 0)

    await until(broker, full)


async def claims(broker: BrokerProcess) -> dict[str, float]:
    """Claims so far, by kind and result; those that there were."""
    text = str(await broker.api("GET", "/metrics"))
    found = {}
    for line in text.splitlines():
        if line.startswith("cortex_pool_claims_total{"):
            labels, _, value = line.partition("{")[2].rpartition("} ")
            kind, result = (part.partition("=")[2].strip('"') for part in labels.split(","))
            found[f"{kind} {result}"] = float(value)
    return {name: value for name, value in found.items() if value}


async def newest(broker: BrokerProcess, user: str) -> dict[str, Any]:
    """The newest entry of the user's timeline."""
    told = await broker.api("GET", f"/v1/sessions/{user}/main/timeline")
    entry: dict[str, Any] = told["bringups"][0]
    return entry


class Shell:
    """A conversation with the demo agent, which runs commands."""

    def __init__(self, made: dict[str, Any], agent: Any, session: str, client: Client) -> None:
        self.made, self.agent, self.session, self.client = made, agent, session, client

    async def run(self, command: str) -> str:
        """What it prints."""
        return await self.say(f"!{command}")

    async def say(self, text: str) -> str:
        """What the agent answers."""
        self.client.updates.clear()
        await turn(self.agent, self.session, text)
        return self.client.text.strip()


@asynccontextmanager
async def shell(broker: BrokerProcess, user: str, agent: str = "demo") -> AsyncIterator[Shell]:
    """``user`` in their session, which is brought up if need be."""
    made = await broker.session(user, agent)
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as connection:
        opened = await connection.new_session(cwd="/", mcp_servers=[])
        yield Shell(made, connection, opened.session_id, client)


async def run(broker: BrokerProcess, user: str, command: str) -> str:
    """One command of ``user``'s."""
    async with shell(broker, user) as place:
        return await place.run(command)


async def stop(broker: BrokerProcess, user: str) -> None:
    await broker.api("POST", f"/v1/sessions/{user}/main/stop")


# On the host


def slots(broker: BrokerProcess) -> set[str]:
    return set(os.listdir(broker.state_dir / "slots"))


def homes(broker: BrokerProcess, user: str, mark: str) -> list[Path]:
    """Every place where a home of the user's is that has the file ``mark``, in use, at rest or set aside."""
    # One that is moved while we look may be seen at neither place; it is at one of them by the next look.
    return next(filter(None, (_homes(broker, user, mark) for _ in range(3))), [])


def _homes(broker: BrokerProcess, user: str, mark: str) -> list[Path]:
    key = home_key(user, "main")
    held = [
        slot / "vol" / "home" for slot in (broker.state_dir / "slots").iterdir() if (slot / f"owner.{key}").exists()
    ]
    aside = (broker.state_dir / "quarantine").glob("*")
    places = (broker.state_dir / "homes" / key / "home", *held, *aside)
    return [home for home in places if (home / mark).exists()]


def docker(*arguments: str, host: str = "") -> str:
    """What the docker command prints."""
    command = ["docker", *(("-H", host) if host else ()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def inits(broker: BrokerProcess, host: str = "") -> dict[str, int]:
    """Slot → first process of each sandbox of this broker that runs or is paused, as the host numbers it."""
    if broker.driver == "docker":
        pids = {slot: _container(slot, host) for slot in slots(broker)}
    else:
        pids = dict(map(_recorded, (broker.state_dir / "process").glob("*.json")))
    return {slot: pid for slot, pid in pids.items() if pid and alive(pid)}


def _container(slot: str, host: str) -> int:
    """0 when it is gone, or was never started."""
    for ref in docker("ps", "-q", "--filter", f"label=io.cortex.slot={slot}", host=host).split():
        with suppress(AssertionError):
            return int(docker("inspect", "-f", "{{.State.Pid}}", ref, host=host))
    return 0


def _recorded(path: Path) -> tuple[str, int]:
    with suppress(FileNotFoundError):
        record = json.loads(path.read_text())
        return record["slot"], record["init"]["pid"] if record["init"] else 0
    return "", 0


def alive(pid: int) -> bool:
    """It is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


async def killed(pid: int) -> None:
    """Kills it; returns when it is dead."""
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while alive(pid):
            await asyncio.sleep(0.005)
