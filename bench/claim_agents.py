"""The real CLIs: from the hook to the first token, beside the same CLI that is initialised and driven over stdio."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import tomllib
import uuid
from typing import Any

from bench.bringup import MCP_SERVER, Rpc, milliseconds
from bench.claim_paths import Api, first_token, settled, until, waiting
from bench.lib import Report, median, target
from tests.e2e.conftest import short_directory
from tests.e2e.harness import IMAGE, ROOT, BrokerProcess, running
from tests.e2e.providers import agents_config, stand_in

AGENTS = ("claude", "codex", "gemini")
SERVERS = 2
"""MCP servers of each user."""
EARLY_S = 3.0
"""A user who is expected comes so long after their sandbox is up."""
SETTLE = 3
"""Turns before the one that counts as open."""


def mcp_servers() -> dict[str, Any]:
    """Section ``mcp`` of a user."""
    server = {"command": "/usr/bin/python3", "args": ["-c", MCP_SERVER]}
    return {"mcpServers": {f"bench{number}": server for number in range(SERVERS)}}


def acp_servers() -> list[dict[str, Any]]:
    """The same as ACP says it."""
    return [{"name": name, **server, "env": []} for name, server in mcp_servers()["mcpServers"].items()]


class Direct(Rpc):
    """A shipped agent in a container of its own, driven over stdio, its provider the stand-in at ``url``."""

    def __init__(self, agent: str, url: str) -> None:
        super().__init__()
        shipped = tomllib.loads((ROOT / "config.toml").read_text())["agents"][agent]
        self._name = f"cortex-bench-{uuid.uuid4().hex[:12]}"
        command = ["docker", "run", "--rm", "-i", "--init", "--name", self._name, "--network", "host"]
        command += ["--user", "64321:64321", "--read-only"]
        command += [
            "--tmpfs",
            "/vol:uid=64321,gid=64321,exec",
            "--tmpfs",
            "/tmp:exec",
            "-e",
            "HOME=/vol/home",
            "-w",
            "/vol",
        ]
        for name, value in shipped.get("env", {}).items():
            command += ["-e", f"{name}={value.replace('{gateway}', url).strip()}"]
        words = [word.replace("{gateway}", url) for word in shipped["command"]]
        inside = f"mkdir -p /vol/home/workspace; exec {' '.join(words)}"
        self._process = subprocess.Popen(
            [*command, IMAGE, "sh", "-c", inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.initialize()

    def send(self, text: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(text + b"\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the agent ended")
        return json.loads(line)

    def open(self) -> str:
        """A conversation with the MCP servers."""
        params = {"cwd": "/vol/home/workspace", "mcpServers": acp_servers()}
        return str(self.call("session/new", params)[0]["sessionId"])

    def close(self) -> None:
        subprocess.run(["docker", "rm", "-f", self._name], capture_output=True, timeout=30)
        self._process.communicate()


def direct(agent: str, url: str) -> tuple[float, float]:
    """Seconds from prompt to first words: of a conversation whose MCP servers are long there, and later in it."""
    driven = Direct(agent, url)
    try:
        session = driven.open()
        # Its servers have started when another conversation, opened later, has been through a turn.
        driven.prompt(driven.open(), "warm up")
        first = driven.prompt(session, "hello")
        return first, min(driven.prompt(session, f"more {number}") for number in range(SETTLE))
    finally:
        driven.close()


def pool_config() -> str:
    """One warm sandbox of each, nothing paused."""
    pools = [f"[pool.agents.{agent}]\ntarget = 1\nmaximum = 2\nhot = 1\n" for agent in AGENTS]
    return "".join(pools) + "[pool.idle]\npause_after_s = 3600\nfallback_keep_s = 3600\n"


def came(api: Api, user: str, agent: str, path: str) -> float:
    """``first_token`` by ``path``; the session is stopped after it."""
    took, found = first_token(api, user, agent, "hello")
    if found != path:
        raise RuntimeError(f"{user} came by {found}, not {path}")
    api("POST", f"/v1/sessions/{user}/main/stop")
    return took


def go_agent(broker: BrokerProcess, agent: str, url: str, rounds: int) -> dict[str, list[float]]:
    """Every way in turns, beside the CLI driven directly; seconds by way. Blocks."""
    api = Api(broker)
    seen: dict[str, list[float]] = {}

    def see(way: str, took: float) -> None:
        seen.setdefault(way, []).append(took)

    try:
        for number in range(rounds):
            first, later = direct(agent, url)
            see("direct", first)
            see("direct, later turn", later)
            user = f"{agent}-{number}"
            api("PUT", f"/v1/users/{user}/config/mcp", mcp_servers())
            until(lambda: waiting(api, agent, 1))
            see("generic, new user", came(api, user, agent, "generic_warm"))
            until(lambda: waiting(api, agent, 1))
            see("generic, returning user", came(api, user, agent, "generic_warm"))
            api("POST", f"/v1/sessions/{user}/main/prewarm")
            until(lambda name=user: settled(api, name))  # type: ignore[misc]
            time.sleep(EARLY_S)
            see("own", came(api, user, agent, "user_warm"))
            api("DELETE", f"/v1/sessions/{user}/main")
            api("PUT", f"/v1/users/{user}-cold/config/limits", {"pids": 300})
            api("PUT", f"/v1/users/{user}-cold/config/mcp", mcp_servers())
            see("cold", came(api, f"{user}-cold", agent, "cold"))
            api("DELETE", f"/v1/sessions/{user}-cold/main")
    finally:
        api.close()
    return seen


async def bench_agents(report: Report, rounds: int) -> None:
    """The shipped CLIs in containers, a stand-in for their providers that answers at once, two MCP servers a user."""
    rows: list[list[str]] = []
    with short_directory() as directory:
        async with (
            stand_in() as providers,
            running(directory, "docker", agents_config(directory, providers.url) + pool_config()) as broker,
        ):
            for agent in AGENTS:
                seen = await asyncio.to_thread(go_agent, broker, agent, providers.url, rounds)
                if not rows:
                    rows.append(["agent", *seen])
                rows.append([agent, *(milliseconds(values) for values in seen.values())])
                report.figures[agent] = {way: median(values) * 1000 for way, values in seen.items()}
                report.targets += agent_targets(agent, seen)
    report.tables[f"Hook → first token, driver docker, {SERVERS} MCP servers, ms, {rounds} rounds"] = rows


def agent_targets(agent: str, seen: dict[str, list[float]]) -> list[Any]:
    """What is added to the CLI's own first turn."""
    first = median(seen["direct"])
    limits = {"own": 20, "generic, new user": 150, "generic, returning user": 150}
    return [
        target(f"{agent}: {way}: added to the CLI's own first turn", "ms", (median(seen[way]) - first) * 1000, limit)
        for way, limit in limits.items()
    ]
