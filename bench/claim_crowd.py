"""Document 000's case: a hundred users, 60 % with a sandbox of their own, 30 % with a generic one, 10 % with none."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.bringup import milliseconds
from bench.claim_paths import Api, first_token, settled, until, waiting
from bench.lib import Report, percentile, target
from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import ROOT, BrokerProcess, running

THINK_S = 0.2
OVER_S = 20.0
"""The users come one after the other, evenly, over so many seconds."""
CROWD = {"process": 100, "docker": 20}
"""What two cores hold."""
SHARES = {"user_warm": 0.6, "generic_warm": 0.3, "cold": 0.1}


def crowd_config(url: str, generic: int) -> str:
    return f"""
[pool]
refill_per_s = 50
refill_burst = 100
memory_bytes = {16 * 2**30}
[pool.agents.demo]
target = {generic}
maximum = {generic}
hot = {generic}
[pool.idle]
pause_after_s = 3600
fallback_keep_s = 3600
[gateway.providers.thinking]
kind = "anthropic"
base_url = "{url}"
[agents.demo]
command = ["{{python}}", "-I", "-S", "{{sandbox_agent}}/demo.py"]
prewarm = "agent"
open_ahead = "any"
[agents.demo.env]
DEMO_MODEL_URL = "{{gateway}}/thinking"
"""


@contextmanager
def thinking() -> Iterator[str]:
    """The provider, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.thinking", str(THINK_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.stdin.close()


def cast(count: int) -> list[tuple[str, str]]:
    """(user, path it is to come by), mixed evenly."""
    wanted = {path: round(count * share) for path, share in SHARES.items()}
    given = dict.fromkeys(SHARES, 0)
    people = []
    for number in range(count):
        path = max(SHARES, key=lambda each: wanted[each] * (number + 1) / count - given[each])
        given[path] += 1
        people.append((f"{path[:1]}{number}", path))
    return people


def prepare(api: Api, people: list[tuple[str, str]], generic: int) -> None:
    """Sandboxes of their own for those who are to have one; other limits for those who are to come cold."""
    for user, path in people:
        if path == "user_warm":
            api("POST", f"/v1/sessions/{user}/main/prewarm")
            until(lambda name=user: settled(api, name))  # type: ignore[misc]
        elif path == "cold":
            api("PUT", f"/v1/users/{user}/config/limits", {"pids": 300})
    until(lambda: waiting(api, "demo", generic))


def come(broker: BrokerProcess, people: list[tuple[str, str]]) -> dict[str, list[float]]:
    """Everybody comes when it is their turn; seconds from the hook to the first token, by path. Blocks."""
    seen: dict[str, list[float]] = {}
    failed: list[str] = []
    lock = threading.Lock()
    begin = time.perf_counter() + 0.5

    def one(number: int, user: str) -> None:
        api = Api(broker)
        time.sleep(max(0.0, begin + number * OVER_S / len(people) - time.perf_counter()))
        try:
            took, path = first_token(api, user, "demo", "/model what do you think?")
        except (OSError, RuntimeError) as error:
            with lock:
                failed.append(f"{user}: {error}")
            return
        finally:
            api.close()
        with lock:
            seen.setdefault(path, []).append(took)

    threads = [threading.Thread(target=one, args=(number, user)) for number, (user, _) in enumerate(people)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{len(failed)} did not get an answer: {failed[0]}")
    return seen


async def bench_crowd(report: Report, *, docker: bool) -> None:
    """Both drivers."""
    rows: list[list[str]] = [["driver", "users", "own", "generic", "cold", "warm: mean", "all: mean", "all: p95"]]
    for driver in ("process", "docker") if docker else ("process",):
        people = cast(CROWD[driver])
        generic = sum(path == "generic_warm" for _, path in people)
        with thinking() as url, short_directory() as directory:
            async with running(directory, driver, crowd_config(url, generic) + process_config()) as broker:
                api = Api(broker)
                await asyncio.to_thread(prepare, api, people, generic)
                seen = await asyncio.to_thread(come, broker, people)
                api.close()
        add(report, rows, driver, len(people), seen)
    title = f"{THINK_S * 1000:.0f} ms of thinking: hook → first token through the gateway, demo agent, ms"
    report.tables[title] = rows


def add(report: Report, rows: list[list[str]], driver: str, count: int, seen: dict[str, list[float]]) -> None:
    warm = [*seen.get("user_warm", []), *seen.get("generic_warm", [])]
    everybody = [took for values in seen.values() for took in values]
    figures: dict[str, Any] = {
        "warm_mean": statistics.mean(warm) * 1000,
        "all_mean": statistics.mean(everybody) * 1000,
        "all_p95": percentile(everybody, 0.95) * 1000,
    }
    ways = [f"{len(seen.get(path, []))}: {milliseconds(seen[path])}" if path in seen else "0" for path in SHARES]
    rows.append([driver, str(count), *ways, *(f"{value:.0f}" for value in figures.values())])
    report.figures[f"crowd_{driver}"] = figures
    report.targets.append(target(f"crowd, {driver}: warm paths, mean", "ms", figures["warm_mean"], 300))
    report.targets.append(target(f"crowd, {driver}: all, mean", "ms", figures["all_mean"], 500))
