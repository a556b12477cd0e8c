"""The whole path: a real broker, its agent servers in sandboxes, and an agent that only streams.

Beside it the same agent driven over stdio, so that what is reported is what the path adds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bench import lib
from bench.peers import acp
from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, running

SESSIONS = 20
TOKENS_PER_S = 1_000
PACED_S, LONG_PACED_S = 5, 30
ROUNDS = 3
FLOOD = 20_000
CLIENTS = (1, 4)
CPU_LIMIT_US, LAG_LIMIT_MS, LOOP_LAG_LIMIT_MS = 25.0, 2.0, 5.0


def config() -> str:
    """The broker's settings: one agent, the one that streams."""
    agent = f'[agents.bench]\ncommand = ["{{python}}", "-I", "-S", "{acp.AGENT}"]\n'
    return process_config() + agent


async def whole_path(report: lib.Report, *, long: bool) -> None:
    """Adds the path's figures and targets to ``report``."""
    with tempfile.TemporaryDirectory(prefix="cortex-bench-", ignore_cleanup_errors=True) as directory:
        # Sandboxes run under a uid of their own and have to pass through.
        os.chmod(directory, 0o755)
        async with running(Path(directory), "process", config()) as broker:
            users = [f"u{number}" for number in range(SESSIONS)]
            answers = [await broker.session(user, agent="bench") for user in users]
            tokens = [str(answer["token"]) for answer in answers]
            brought_up = await _loop_lags(broker)
            serving = await _lag(report, broker, tokens, LONG_PACED_S if long else PACED_S)
            before = await _loop_lags(broker)
            await _cpu(report, broker, tokens[0])
            flooded = lib.difference(await _loop_lags(broker), before)
    rows = [["while", "p99 up to, ms"]]
    phases = {f"{SESSIONS} sessions come up": brought_up, f"{TOKENS_PER_S} tokens/s": serving}
    for name, lags in (phases | {"agents stream at full speed, all CPUs busy": flooded}).items():
        rows.append([name, f"{lib.quantile(lags, 0.99) * 1e3:g}"])
    report.tables["Loop lag of the broker"] = rows
    limit = LOOP_LAG_LIMIT_MS
    report.targets.append(lib.target("path.loop_lag_p99", "ms", lib.quantile(serving, 0.99) * 1e3, limit))


async def _lag(report: lib.Report, broker: BrokerProcess, tokens: Sequence[str], seconds: int) -> dict[float, float]:
    """Returns the broker's loop lags meanwhile."""
    loop_lags: dict[float, float] = {}
    direct: list[tuple[float, float]] = []
    path: list[tuple[float, float]] = []
    paced_cpu: list[float] = []
    for _ in range(ROUNDS):
        agents = [await acp.over_stdio() for _ in tokens]
        direct.append(await _paced(agents, seconds))
        for agent in agents:
            await agent.close()
        clients = [await acp.over_websocket(broker.front_port, token) for token in tokens]
        servers = agent_servers(broker.state_dir)
        lags_before = await _loop_lags(broker)
        before = lib.cpu_of(servers)
        path.append(await _paced(clients, seconds))
        used = lib.cpu_of(servers)
        now = lib.difference(await _loop_lags(broker), lags_before)
        loop_lags = {bound: count + loop_lags.get(bound, 0.0) for bound, count in now.items()}
        paced_cpu.append((used - before) / (seconds * TOKENS_PER_S) * 1e6)
        for client in clients:
            client.transport.abort()
    rows = [["way", "lag p50 ms", "p99 ms"]]
    for name, figures in (("agent's stdio", direct), ("through Cortex", path)):
        rows.append([name, *[f"{lib.median([figure[index] for figure in figures]):.3f}" for index in (0, 1)]])
    report.tables[f"Lag per token, {TOKENS_PER_S} tokens/s over {len(tokens)} sessions"] = rows
    added = lib.median([ours[1] - theirs[1] for ours, theirs in zip(path, direct, strict=True)])
    report.figures["lag_ms"] = {"direct": direct, "path": path}
    report.figures["paced_cpu_us"] = paced_cpu
    each = lib.median(paced_cpu)
    report.notes.append(
        f"Tokens that come one by one cost the agent server {each:.1f} µs of CPU each (a wake-up each)."
    )
    report.targets.append(lib.target("path.lag_added_p99", "ms", added, LAG_LIMIT_MS))
    return loop_lags


async def _paced(callers: Sequence[acp.Caller], seconds: int) -> tuple[float, float]:
    """Lag p50 and p99 in milliseconds."""
    sessions = [await caller.open() for caller in callers]
    pause_us = len(callers) * 1_000_000 // TOKENS_PER_S
    count = seconds * TOKENS_PER_S // len(callers)
    turns = [caller.tokens(session, count, pause_us) for caller, session in zip(callers, sessions, strict=True)]
    await asyncio.gather(*turns)
    lags = [lag * 1e3 for caller in callers for lag in caller.lags]
    if len(lags) != count * len(callers):
        raise RuntimeError(f"{len(lags)} tokens arrived of {count * len(callers)}")
    return lib.percentile(lags, 0.5), lib.percentile(lags, 0.99)


async def _cpu(report: lib.Report, broker: BrokerProcess, token: str) -> None:
    assert broker.process is not None
    rows = [["clients", "agent server: CPU µs per update and client", "broker: CPU µs per update and client"]]
    for count in CLIENTS:
        server, relay = [], []
        for _ in range(ROUNDS):
            clients = [await acp.over_websocket(broker.front_port, token) for _ in range(count)]
            session = await clients[0].open()
            for other in clients[1:]:
                await other.call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
                await other.call("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
            pid = _busiest(broker.state_dir, await _flood_pids(clients[0], session, broker.state_dir))
            before = lib.cpu_seconds(pid), lib.cpu_seconds(broker.process.pid)
            await clients[0].tokens(session, FLOOD, 0)
            after = lib.cpu_seconds(pid), lib.cpu_seconds(broker.process.pid)
            server.append((after[0] - before[0]) / FLOOD / count * 1e6)
            relay.append((after[1] - before[1]) / FLOOD / count * 1e6)
            for client in clients:
                client.transport.abort()
        rows.append([str(count), f"{lib.median(server):.2f}", f"{lib.median(relay):.2f}"])
        report.figures[f"update_cpu_us_{count}"] = {"agent_server": server, "broker": relay}
        name = f"path.agent_server_cpu_{count}_clients"
        report.targets.append(lib.target(name, "µs", lib.median(server), CPU_LIMIT_US))
    report.tables["Updates of a streaming agent"] = rows


async def _flood_pids(client: acp.Caller, session: str, state_dir: Path) -> dict[int, float]:
    """CPU that a small flood of this session cost, by agent server."""
    before = {pid: lib.cpu_seconds(pid) for pid in agent_servers(state_dir)}
    await client.tokens(session, 2_000, 0)
    return {pid: lib.cpu_seconds(pid) - used for pid, used in before.items()}


def _busiest(state_dir: Path, used: dict[int, float]) -> int:
    if not used:
        raise RuntimeError(f"no agent server found for {state_dir}")
    return max(used, key=lambda pid: used[pid])


async def _loop_lags(broker: BrokerProcess) -> dict[float, float]:
    return lib.histogram(str(await broker.api("GET", "/metrics")), "cortex_loop_lag_seconds")


def agent_servers(state_dir: Path) -> list[int]:
    """Agent servers whose slot lies under ``state_dir``, isolated or not."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            argv = (entry / "cmdline").read_text().split("\0")
            if "python" not in Path(argv[0]).name or not any(a.endswith("sandbox_agent/__main__.py") for a in argv):
                continue
            if str(state_dir) in "\0".join(argv) or str(state_dir) in (entry / "mountinfo").read_text():
                found.append(int(entry.name))
    return found
