"""`cortex bench claim`: how long until somebody who comes has a ready sandbox, by every way there is.

Docker: a user's own warm sandbox (unpaused, paused), a generic one (for a new user, for one whose home is moved
in), a cold start, ``docker exec`` doing the same work, ``docker run``, in turns. Then the real CLIs from the hook
to the first token, a hundred users at once, load, and what idling costs. ``--long`` adds the longer loads.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.bringup import docker_run, milliseconds
from bench.claim_agents import bench_agents, mcp_servers
from bench.claim_crowd import bench_crowd
from bench.claim_load import bench_idle, bench_load
from bench.claim_paths import Api, Exec, credential, first_frame, ready_by, request, settled, until, waiting
from bench.lib import Report, median, percentile, target
from tests.e2e.conftest import docker_missing
from tests.e2e.harness import BrokerProcess, running

ROUNDS, LONG_ROUNDS = 20, 60
CONFIG = """
[pool]
refill_per_s = 50
refill_burst = 50
[pool.agents.demo]
target = 3
maximum = 6
hot = 3
[pool.idle]
pause_after_s = 3600
fallback_keep_s = 3600
[gateway.providers.none]
kind = "anthropic"
base_url = "http://127.0.0.1:9"
[agents.demo]
command = ["{python}", "-I", "-S", "{sandbox_agent}/demo.py"]
prewarm = "agent"
open_ahead = "any"
provider = "none"
credential_path = ".demo/credentials.json"
"""
SOON = "[pool.idle]\npause_after_s = 3600", "[pool.idle]\npause_after_s = 0.2"
"""What makes sessions pause almost at once."""


class Ways:
    """One broker on the docker driver; ``seen``: seconds by way, ``frames``: prompt → first frame after it."""

    def __init__(self, api: Api, prefix: str) -> None:
        self.api = api
        self.prefix = prefix
        self.seen: dict[str, list[float]] = {}
        self.frames: dict[str, list[float]] = {}

    def user(self, way: str, number: int) -> str:
        return f"{self.prefix}{way}{number}"

    def timed(self, way: str, user: str, path: str) -> None:
        """A request that has to come by ``path``, a prompt, and the session's end."""
        took, made = request(self.api, user, "demo", path)
        self.seen.setdefault(way, []).append(took)
        self.seen.setdefault(f"{way}, in the broker", []).append(ready_by(self.api, user))
        self.frames.setdefault(way, []).append(first_frame(made))
        self.api("DELETE", f"/v1/sessions/{user}/main")

    def own(self, number: int, state: str) -> None:
        """A user's own sandbox, brought up because the user was expected."""
        user = self.user("own", number)
        self.api("POST", f"/v1/sessions/{user}/main/prewarm")
        until(lambda: settled(self.api, user, state))
        self.timed("own" if state == "ready" else "own, paused", user, "user_warm")

    def generic_new(self, number: int) -> None:
        """A generic sandbox for who was never here."""
        until(lambda: waiting(self.api, "demo", 3))
        self.timed("generic, new user", self.user("new", number), "generic_warm")

    def generic_returning(self, number: int) -> None:
        """A generic sandbox for who has a home, MCP servers and a credential file."""
        user = self.user("back", number)
        self.api("PUT", f"/v1/users/{user}/config/mcp", mcp_servers())
        credential(self.api, user, "none")
        request(self.api, user, "demo", "generic_warm")
        self.api("POST", f"/v1/sessions/{user}/main/stop")
        until(lambda: waiting(self.api, "demo", 3))
        self.timed("generic, home and MCP and credentials", user, "generic_warm")

    def cold(self, number: int) -> None:
        """Nothing was there: other limits than warm sandboxes have."""
        user = self.user("cold", number)
        self.api("PUT", f"/v1/users/{user}/config/limits", {"pids": 300})
        self.timed("cold", user, "cold")


def go_ways(broker: BrokerProcess, rounds: int) -> Ways:
    """All ways but the paused one, in turns. Blocks."""
    ways, loop = Ways(Api(broker), "w"), asyncio.new_event_loop()
    peer = Exec()
    loop.run_until_complete(peer.open())
    try:
        for number in range(rounds):
            ways.own(number, "ready")
            ways.generic_new(number)
            ways.generic_returning(number)
            ways.cold(number)
            loop.run_until_complete(peer.prepare())
            ways.seen.setdefault("docker exec", []).append(loop.run_until_complete(peer.work()))
            loop.run_until_complete(peer.clear())
            ways.seen.setdefault("docker run IMAGE true", []).append(docker_run())
    finally:
        loop.run_until_complete(peer.close())
        loop.close()
        ways.api.close()
    return ways


def go_paused(broker: BrokerProcess, rounds: int) -> Ways:
    """A user's own sandbox that is paused. Blocks."""
    ways = Ways(Api(broker), "p")
    try:
        for number in range(rounds):
            ways.own(number, "paused")
    finally:
        ways.api.close()
    return ways


async def bench_ways(report: Report, rounds: int) -> None:
    place = Path(tempfile.mkdtemp(prefix="cx-"))
    try:
        async with running(place, "docker", CONFIG) as broker:
            ways = await asyncio.to_thread(go_ways, broker, rounds)
            skipped = await writes(broker)
            broker.write_config(CONFIG.replace(*SOON))
            paused = await asyncio.to_thread(go_paused, broker, rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    seen, frames = ways.seen | paused.seen, ways.frames | paused.frames
    rows = [["way to a ready session", "ms: median (min to max)", "p99 ms", "then prompt → first frame, ms"]]
    for way, values in seen.items():
        frame = milliseconds(frames[way]) if way in frames else ""
        rows.append([way, milliseconds(values), f"{percentile(values, 0.99) * 1000:.1f}", frame])
    report.tables[f"Request → ready, over HTTP, driver docker, demo agent, {rounds} rounds"] = rows
    report.figures["ways"] = {way: median(values) * 1000 for way, values in seen.items()}
    report.targets += path_targets(seen)
    report.targets.append(target("writes of unchanged state that were not skipped", "%", 100 - skipped, 0))


def path_targets(seen: dict[str, list[float]]) -> list[Any]:
    """What the ways are held against."""

    def p(way: str, share: float) -> float:
        return percentile(seen[way], share) * 1000

    generic = "generic, home and MCP and credentials"
    return [
        target("own, unpaused: p50", "ms", p("own", 0.5), 2),
        target("own, unpaused: p99", "ms", p("own", 0.99), 10),
        target("own, paused: p50", "ms", p("own, paused", 0.5), 25),
        target("generic, all in place: p50", "ms", p(generic, 0.5), 5),
        target("generic, all in place: p99", "ms", p(generic, 0.99), 25),
        target("generic, new user: p50", "ms", p("generic, new user", 0.5), 5),
        target("generic, new user: p99", "ms", p("generic, new user", 0.99), 25),
        target("generic against docker exec", "times", p(generic, 0.5) / p("docker exec", 0.5), 0.1),
        target("cold against docker run", "times", p("cold", 0.5) / p("docker run IMAGE true", 0.5), 1.2),
    ]


async def writes(broker: BrokerProcess) -> float:
    """Share of state, in %, that was not sent again to a session that has it; over a hundred requests."""
    await broker.session("same")
    kinds = ("mcp", "credentials", "settings")

    async def written() -> float:
        names = [f'cortex_state_writes_total{{kind="{kind}",result="written"}}' for kind in kinds]
        return float(sum([await broker.metric(name) for name in names]))

    before = await written()
    for _ in range(100):
        await broker.session("same")
        await broker.api("PUT", "/v1/users/same/config/env", {})
    return 100 - (await written() - before)


def main(argv: list[str]) -> int:
    """Runs the benchmark; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="cortex bench claim", description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", help="write the result as JSON; - for stdout")
    parser.add_argument("--long", action="store_true", help="more rounds and longer loads")
    parser.add_argument("--only", default="", help="ways, agents, crowd, load or idle")
    arguments = parser.parse_args(argv)
    report, long = Report("claim"), arguments.long
    why = docker_missing()
    if why:
        report.notes.append(f"docker left out: {why}")
    parts: dict[str, Any] = {
        "ways": lambda: bench_ways(report, LONG_ROUNDS if long else ROUNDS),
        "agents": lambda: bench_agents(report, 9 if long else 5),
        "crowd": lambda: bench_crowd(report, docker=not why),
        "load": lambda: bench_load(report, docker=not why, long=long),
        "idle": lambda: bench_idle(report, docker=not why),
    }
    for name, part in parts.items():
        if arguments.only in ("", name) and not (why and name in ("ways", "agents")):
            asyncio.run(part())
    return report.finish(arguments.json)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
