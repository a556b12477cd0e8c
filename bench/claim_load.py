"""Load on claims, and what warm sandboxes cost while nobody comes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path

from bench.bringup import milliseconds
from bench.lib import Report, percentile, pss_bytes, target
from broker.session.pool import Pool
from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import BrokerProcess, running
from tests.integration.session.rig import rig

PER_S, DURATION_S, LONG_S = 2.0, 60.0, 300.0
BURST = 50
FAKE_PER_S = 45.0
WARM = {"process": 100, "docker": 30}
IDLE_S = 20.0
TICKS = os.sysconf("SC_CLK_TCK")


def pool_config(target_: int, hot: int) -> str:
    return f"""
[pool]
refill_per_s = 20
refill_burst = 50
memory_bytes = {16 * 2**30}
[pool.agents.demo]
target = {target_}
maximum = {target_}
hot = {hot}
[pool.idle]
pause_after_s = 3600
fallback_keep_s = 3600
"""


async def hot(broker: BrokerProcess, count: int, state: str = "hot") -> None:
    """Returns when so many wait."""
    name = f'cortex_pool_size{{agent="demo",kind="generic",state="{state}"}}'
    async with asyncio.timeout(180):
        while await broker.metric(name) < count:
            await asyncio.sleep(0.1)


async def claim(broker: BrokerProcess, user: str, seen: list[tuple[float, str]]) -> None:
    """A session, ready, and gone again."""
    begin = time.perf_counter()
    await broker.session(user)
    took = time.perf_counter() - begin
    bringups = (await broker.api("GET", f"/v1/sessions/{user}/main/timeline"))["bringups"]
    seen.append((took, bringups[0]["path"]))
    await broker.api("DELETE", f"/v1/sessions/{user}/main")


async def steady(broker: BrokerProcess, per_s: float, duration_s: float) -> list[tuple[float, str]]:
    """Poisson arrivals."""
    seen: list[tuple[float, str]] = []
    chance, begin, at, number = random.Random(1), time.monotonic(), 0.0, 0
    async with asyncio.TaskGroup() as group:
        while (at := at + chance.expovariate(per_s)) < duration_s:
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            group.create_task(claim(broker, f"s{number}", seen))
            number += 1
    return seen


async def burst(broker: BrokerProcess, count: int) -> list[tuple[float, str]]:
    """All at once."""
    seen: list[tuple[float, str]] = []
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(claim(broker, f"b{number}", seen))
    return seen


async def fake_engine(per_s: float, duration_s: float) -> list[tuple[float, str]]:
    """The same in this process, sandboxes and engine being fake: what the broker's own code bears."""
    seen: list[tuple[float, str]] = []
    pools = {"agents": {"demo": {"target": 100, "maximum": 100, "hot": 100}}, "refill_per_s": 200, "refill_burst": 200}
    async with rig(pool={**pools, "refill_concurrency": 16}) as world:
        pool = Pool(world.runtime, world.warmer)
        world.registry._pool = pool
        pool.start()

        async def one(user: str) -> None:
            begin = time.perf_counter()
            session = await world.ready(user)
            took = time.perf_counter() - begin
            seen.append((took, str(session.timeline()[0]["path"])))
            await world.registry.delete(user, "main")

        async with asyncio.timeout(60):
            while len(world.engine.sandboxes) < 100:
                await asyncio.sleep(0.05)
        chance, begin, at, number = random.Random(2), time.monotonic(), 0.0, 0
        async with asyncio.TaskGroup() as group:
            while (at := at + chance.expovariate(per_s)) < duration_s:
                await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
                group.create_task(one(f"f{number}"))
                number += 1
        await pool.close()
    return seen


def row(name: str, asked: str, seen: list[tuple[float, str]]) -> list[str]:
    took = [each for each, _ in seen]
    paths = [path for _, path in seen]
    mix = ", ".join(f"{path} {paths.count(path)}" for path in sorted(set(paths)))
    return [name, asked, str(len(seen)), mix, milliseconds(took), f"{percentile(took, 0.99) * 1000:.1f}"]


async def bench_load(report: Report, *, docker: bool, long: bool) -> None:
    """Nobody may be lost: every request that was made was answered, or this raises."""
    rows = [["engine", "load", "claims", "ways", "request → ready, ms: median (min to max)", "p99 ms"]]
    duration = LONG_S if long else DURATION_S
    if docker:
        with short_directory() as directory:
            async with running(directory, "docker", pool_config(10, 10)) as broker:
                await hot(broker, 10)
                seen = await steady(broker, PER_S, duration)
                rows.append(row("docker", f"{PER_S:g} a second for {duration:.0f} s", seen))
                await hot(broker, 10)
                rows.append(row("docker", f"{BURST} at once, 10 warm", await burst(broker, BURST)))
    seen = await fake_engine(FAKE_PER_S, duration)
    rows.append(row("fake", f"{FAKE_PER_S:g} a second (Poisson) for {duration:.0f} s", seen))
    report.tables["Load"] = rows
    report.figures["load"] = rows[1:]


async def bench_idle(report: Report, *, docker: bool) -> None:
    """All warm, none asked for."""
    rows = [
        ["driver", "warm sandboxes", "CPU of all of it, % of one core", "PSS of each, MB", "of it the agent server"]
    ]
    for driver in ("process", "docker") if docker else ("process",):
        count = WARM[driver]
        with short_directory() as directory:
            async with running(directory, driver, pool_config(count, count) + process_config()) as broker:
                await hot(broker, count)
                await asyncio.sleep(5)  # what starting them left to do
                inside, around = processes(broker)
                before = busy([*inside, *around])
                await asyncio.sleep(IDLE_S)
                share = (busy([*inside, *around]) - before) / IDLE_S * 100
                each = sum(pss(pid) for pid in inside) / count / 1e6
                servers = [pid for pid in inside if "--socket-dir" in command(pid) and "__main__" in command(pid)]
                server = sum(pss(pid) for pid in servers) / count / 1e6
        rows.append([driver, str(count), f"{share:.2f}", f"{each:.1f}", f"{server:.1f}"])
        report.targets.append(target(f"{count} warm sandboxes, {driver}: idle CPU", "% of a core", share, 2))
        report.figures[f"idle_{driver}"] = {"cpu_percent": share, "pss_mb": each, "agent_server_mb": server}
    report.tables["What warm sandboxes cost while nobody comes"] = rows


def processes(broker: BrokerProcess) -> tuple[list[int], list[int]]:
    """Processes in sandboxes, and those around them: broker, gateway, bubblewrap, the engine's."""
    assert broker.process is not None
    inside, around = [], [broker.process.pid]
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        words = command(int(name))
        if "sandbox_agent" in words and "bwrap" not in words:
            inside.append(int(name))
        elif any(word in words for word in ("bwrap", "broker.gateway", "containerd", "dockerd", "docker-init", "tini")):
            around.append(int(name))
    return inside, around


def command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def busy(pids: list[int]) -> float:
    """CPU seconds so far."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def pss(pid: int) -> int:
    with suppress(OSError, StopIteration):
        return pss_bytes(pid)
    return 0
