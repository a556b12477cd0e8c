"""`cortex bench bringup`: how long until a session is ready, and what a message and a change cost then.

A broker in a process of its own, both drivers where Docker answers, interleaved with what each is
compared to: ``docker run --rm IMAGE true``, and the same agent driven directly over stdio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from bench.host import facts
from bench.lib import Report, median, percentile, pss_bytes, target
from bench.variance import Run, default_path, groups, host_table, read, record, stage_table
from sandbox_agent.wire import codec
from tests.e2e.conftest import docker_missing, process_config
from tests.e2e.harness import IMAGE, BrokerProcess, running
from tests.e2e.providers import broker_and_stand_in

ROOT = Path(__file__).parents[1]
AGENTS = ("claude", "codex", "gemini", "opencode")
SESSIONS = 100
"""Ready sessions for the memory figure."""


def speaks(message: dict[str, Any]) -> bool:
    """A frame of the agent's reply; lists of commands and the like come by themselves."""
    update = message.get("params", {}).get("update", {}) if message.get("method") == "session/update" else {}
    return update.get("sessionUpdate") in ("agent_message_chunk", "agent_thought_chunk", "tool_call")


class Rpc(ABC):
    """A bare JSON-RPC client that blocks: whatever carries the messages, the client costs the same."""

    def __init__(self) -> None:
        self._ids = 0

    @abstractmethod
    def send(self, text: bytes) -> None:
        """One message out."""

    @abstractmethod
    def receive(self) -> Any:
        """The next message in."""

    def call(self, method: str, params: dict[str, Any]) -> tuple[Any, float]:
        """The result, and the seconds until the agent's first words (or the result, when it has none)."""
        self._ids += 1
        text = json.dumps({"jsonrpc": "2.0", "id": self._ids, "method": method, "params": params}).encode()
        begin = time.perf_counter()
        self.send(text)
        first = 0.0
        while True:
            message = self.receive()
            if speaks(message):
                first = first or time.perf_counter() - begin
            if message.get("id") == self._ids and "method" not in message:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"], first or time.perf_counter() - begin

    def new(self) -> str:
        """A new conversation, after ``initialize``."""
        return str(self.call("session/new", {"cwd": "/", "mcpServers": []})[0]["sessionId"])

    def initialize(self) -> None:
        self.call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})

    def prompt(self, session: str, text: str) -> float:
        """Seconds from the prompt to the first message."""
        content = [{"type": "text", "text": text}]
        return self.call("session/prompt", {"sessionId": session, "prompt": content})[1]


class Front(Rpc):
    """A client of the front door: websockets' Sans-I/O protocol on a blocking socket."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__()
        uri = parse_uri(url)
        self._socket = socket.create_connection((uri.host, uri.port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._protocol = ClientProtocol(uri, max_size=2**25)
        self._messages: list[Any] = []
        request = self._protocol.connect()
        request.headers["Authorization"] = f"Bearer {token}"
        self._protocol.send_request(request)
        self._flush()
        while self._protocol.state is State.CONNECTING:
            self._protocol.receive_data(self._socket.recv(65_536))
        if self._protocol.handshake_exc:
            raise self._protocol.handshake_exc
        self.initialize()

    def send(self, text: bytes) -> None:
        self._protocol.send_text(text)
        self._flush()

    def receive(self) -> Any:
        while not self._messages:
            self._protocol.receive_data(self._socket.recv(65_536))
            for event in self._protocol.events_received():
                if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    self._messages.append(json.loads(bytes(event.data)))
            self._flush()
        return self._messages.pop(0)

    def _flush(self) -> None:
        self._socket.sendall(b"".join(self._protocol.data_to_send()))

    def close(self) -> None:
        self._socket.close()


class Stdio(Rpc):
    """The demo agent driven directly."""

    def __init__(self) -> None:
        super().__init__()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(ROOT / "sandbox_agent/demo.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        self.initialize()

    def send(self, text: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(text + b"\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def exec_to_hello(rounds: int) -> list[float]:
    """Seconds from the exec of the agent server, outside any sandbox, until its whole hello is here."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="cx-") as place, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{place}/agent")
            listener.listen()
            begin = time.perf_counter()
            entry = [sys.executable, "-I", "-S", str(ROOT / "sandbox_agent/__main__.py")]
            process = subprocess.Popen([*entry, "--socket-dir", place, "--vol", place], stderr=subprocess.DEVNULL)
            connection, _ = listener.accept()
            decoder, seen = codec.Decoder(), 0
            while seen < 2:
                seen += len(decoder.feed(connection.recv(65_536)))
            times.append(time.perf_counter() - begin)
            connection.close()
            process.kill()
            process.wait()
    return times


def docker_run() -> float:
    """Seconds of one ``docker run --rm IMAGE true``."""
    begin = time.perf_counter()
    subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--entrypoint", "true", IMAGE],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return time.perf_counter() - begin


async def cold(broker: BrokerProcess, user: str) -> dict[str, float]:
    """One session from nothing: seconds to hello and to ready, and the stages."""
    begin = time.perf_counter()
    await broker.session(user)
    total = time.perf_counter() - begin
    bringup = (await broker.api("GET", f"/v1/sessions/{user}/main/timeline"))["bringups"][0]
    stages = {stage["stage"]: stage for stage in bringup["stages"]}
    figures = {stage: values["ms"] / 1000 for stage, values in stages.items()}
    figures["create → hello"] = (stages["hello"]["start_ms"] + stages["hello"]["ms"]) / 1000
    figures["create → ready"] = bringup["total_ms"] / 1000
    figures["create → ready, over HTTP"] = total
    facts = (await broker.api("GET", f"/v1/sessions/{user}/main"))["sandbox"]
    figures["welcome → agent started"] = facts["agent_started_ms"] / 1000
    figures["agent server PSS"] = facts["pss_bytes"] / 1e6
    return figures


def talk(url: str, token: str, rounds: int) -> dict[str, list[float]]:
    """Prompt → first frame, directly and through the whole way, in turns. Blocks."""
    seen: dict[str, list[float]] = {"direct": [], "through": [], "new conversation": []}
    direct, through = Stdio(), Front(url, token)
    try:
        beside, session = direct.new(), through.new()
        for number in range(rounds):
            seen["direct"].append(direct.prompt(beside, f"m{number}"))
            seen["through"].append(through.prompt(session, f"m{number}"))
        for number in range(max(3, rounds // 10)):
            begin = time.perf_counter()
            fresh = through.new()
            opened = time.perf_counter() - begin
            seen["new conversation"].append(opened + through.prompt(fresh, f"n{number}"))
    finally:
        direct.close()
        through.close()
    return seen


async def messages(broker: BrokerProcess, rounds: int) -> dict[str, list[float]]:
    """What ``talk`` sees on a ready session."""
    made = await broker.session("talker")
    return await asyncio.to_thread(talk, made["acp_url"], made["token"], rounds)


async def changes(broker: BrokerProcess, rounds: int) -> list[float]:
    """PUT of one section that differs → answered, which is when the sandbox has acknowledged; seconds."""
    await broker.session("changer")
    times = []
    headers = {"Authorization": f"Bearer {broker.admin_token}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        url = f"{broker.control_url}/v1/users/changer/config/mcp"
        for number in range(rounds):
            body = {"mcpServers": {"s": {"command": "/bin/cat", "args": [str(number)]}}}
            begin = time.perf_counter()
            async with http.put(url, json=body) as response:
                assert response.status == 200, await response.text()
            times.append(time.perf_counter() - begin)
    return times


async def memory(broker: BrokerProcess) -> tuple[float, float]:
    """The broker's PSS in MB with ``SESSIONS`` ready ones, and kB for each of them."""
    assert broker.process is not None
    pid = broker.process.pid
    await broker.session("m0")
    before = pss_bytes(pid)
    for number in range(1, SESSIONS):
        await broker.session(f"m{number}")
    after = pss_bytes(pid)
    return after / 1e6, (after - before) / (SESSIONS - 1) / 1000


async def lag_p99(broker: BrokerProcess) -> float:
    """The bucket bound of ``cortex_loop_lag_seconds`` that holds 99 % of what was observed; milliseconds."""
    text = str(await broker.api("GET", "/metrics"))
    buckets = []
    for line in text.splitlines():
        if line.startswith("cortex_loop_lag_seconds_bucket"):
            bound = line.split('le="')[1].split('"')[0]
            buckets.append((float(bound), float(line.rpartition(" ")[2])))
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= 0.99 * total) * 1000


def milliseconds(values: list[float]) -> str:
    return f"{median(values) * 1000:.1f} ({min(values) * 1000:.1f} to {max(values) * 1000:.1f})"


def collect(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Figure → values over the rounds."""
    return {name: [each[name] for each in rounds if name in each] for name in rounds[0]}


async def bench_driver(report: Report, driver: str, rounds: int) -> None:
    """Cold starts, then unchanged-warm ones; for docker beside ``docker run``."""
    place = Path(tempfile.mkdtemp(prefix="cx-"))
    try:
        async with running(place, driver, process_config()) as broker:
            seen, runs, warm = [], [], []
            for number in range(rounds):
                if driver == "docker":
                    runs.append(await asyncio.to_thread(docker_run))
                seen.append(await cold(broker, f"c{number}"))
                begin = time.perf_counter()
                await broker.session(f"c{number}")
                warm.append(time.perf_counter() - begin)
            figures = collect(seen)
            figures["unchanged and warm, over HTTP"] = warm
            if runs:
                figures["docker run --rm IMAGE true"] = runs
            add_driver(report, driver, figures)
            if driver == "process":
                await bench_ready(report, broker, rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def add_driver(report: Report, driver: str, figures: dict[str, list[float]]) -> None:
    """Table and targets of one driver."""
    rows = [["stage", "ms: median (min to max)"]]
    rows += [[name, milliseconds(values)] for name, values in figures.items() if name != "agent server PSS"]
    report.tables[f"Cold start, driver {driver}, demo agent, {len(figures['hello'])} rounds"] = rows
    report.figures[driver] = {name: median(values) for name, values in figures.items()}
    if driver == "docker":
        ratio = median(figures["create → hello"]) / median(figures["docker run --rm IMAGE true"])
        report.targets.append(target("docker: create → hello against docker run", "times", ratio, 1.2))
    else:
        report.targets.append(target("process: create → ready", "ms", median(figures["create → ready"]) * 1000, 400))
    started = median(figures["welcome → agent started"]) * 1000
    report.targets.append(target(f"{driver}: welcome → agent started", "ms", started, 10))
    report.targets.append(target(f"{driver}: agent server PSS", "MB", median(figures["agent server PSS"]), 30))


async def bench_ready(report: Report, broker: BrokerProcess, rounds: int) -> None:
    """What things cost on a ready session, and the broker's memory."""
    said = await messages(broker, rounds * 20)
    added = (median(said["through"]) - median(said["direct"])) * 1000
    changed = await changes(broker, rounds * 5)
    total, each = await memory(broker)
    lag = await lag_p99(broker)
    report.tables["A ready session, demo agent"] = [
        ["what", "ms: median (min to max)"],
        ["prompt → first frame, agent driven over stdio", milliseconds(said["direct"])],
        ["prompt → first frame, through Cortex", milliseconds(said["through"])],
        ["session/new and prompt → first frame, through Cortex", milliseconds(said["new conversation"])],
        ["PUT of one changed section → acknowledged", milliseconds(changed)],
    ]
    report.figures["ready"] = {
        "through_p99_ms": percentile(said["through"], 0.99) * 1000,
        "broker_mb": total,
        "session_kb": each,
    }
    report.targets += [
        target("message on a ready session: added to the first frame", "ms", added, 1.0),
        target("one setting changed → acknowledged", "ms", median(changed) * 1000, 5),
        target(f"broker with {SESSIONS} ready sessions", "MB", total, 110),
        target("broker, each ready session", "kB", each, 150),
        target("loop lag p99 over all of it", "ms", lag, 5),
    ]


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    answers = {
        "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                       "serverInfo": {"name": "bench", "version": "1"}},
        "tools/list": {"tools": [{"name": "nothing", "inputSchema": {"type": "object"}}]},
    }
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answers.get(asked["method"], {})}), flush=True)
"""


def converse(url: str, token: str, rounds: int) -> tuple[dict[str, list[float]], str]:
    """With a real CLI: opening a conversation, its first and its later turns; seconds, and the conversation. Blocks."""
    client = Front(url, token)
    try:
        seen: dict[str, list[float]] = {"session/new": [], "new": [], "open": []}
        session = ""
        for number in range(rounds):
            begin = time.perf_counter()
            session = client.new()
            opened = time.perf_counter() - begin
            seen["session/new"].append(opened)
            seen["new"].append(opened + client.prompt(session, f"first {number}"))
            seen["open"] += [client.prompt(session, f"more {number} {turn}") for turn in range(3)]
    finally:
        client.close()
    return seen, session


def reload(url: str, token: str, session: str) -> float:
    """Seconds of ``session/load`` of an open conversation."""
    client = Front(url, token)
    try:
        begin = time.perf_counter()
        client.call("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
        return time.perf_counter() - begin
    finally:
        client.close()


async def bench_agents(report: Report, rounds: int) -> None:
    """The real CLIs in containers against the stand-in for their providers, which answers at once."""
    rows = [["agent", "create → ready", "session/new", "new: to first frame", "open: to first frame"]]
    rows[0] += ["MCP change → acknowledged", "→ an open conversation has it"]
    async with broker_and_stand_in() as (broker, _):
        for agent in AGENTS:
            made = await broker.session(agent, agent=agent)
            bringup = (await broker.api("GET", f"/v1/sessions/{agent}/main/timeline"))["bringups"][0]
            url, token = made["acp_url"], made["token"]
            seen, session = await asyncio.to_thread(converse, url, token, rounds)
            server = {"command": "/usr/bin/python3", "args": ["-c", MCP_SERVER]}
            begin = time.perf_counter()
            body = {"mcpServers": {"bench": server}}
            answer = await broker.api("PUT", f"/v1/users/{agent}/config/mcp", body)
            told = time.perf_counter() - begin
            loaded = told + await asyncio.to_thread(reload, url, token, session)
            rows.append(
                [
                    agent,
                    f"{bringup['total_ms']:.0f}",
                    milliseconds(seen["session/new"]),
                    milliseconds(seen["new"]),
                    milliseconds(seen["open"]),
                    f"{told * 1000:.1f} ({answer['effect']})",
                    f"{loaded * 1000:.0f} (session/load)",
                ]
            )
            report.figures[agent] = {name: median(values) * 1000 for name, values in seen.items()}
    report.tables[f"Real agent CLIs, driver docker, prompt → first frame in ms, {rounds} conversations each"] = rows


async def vary(rounds: int, data: Path) -> Report:
    """Cold starts of each driver in turns, recorded; and what the whole data set says."""
    drivers = ["process"] + ([] if docker_missing() else ["docker"])
    host, runs = facts(), []
    place = Path(tempfile.mkdtemp(prefix="cx-"))
    try:
        async with AsyncExitStack() as stack:
            brokers = {}
            for driver in drivers:
                (place / driver).mkdir()
                brokers[driver] = await stack.enter_async_context(running(place / driver, driver, process_config()))
            for number in range(rounds):
                for driver, broker in brokers.items():
                    seen = await cold(broker, f"v{number}")
                    stages = {name: round(value * 1000, 3) for name, value in seen.items() if "PSS" not in name}
                    runs.append(Run(time.time(), driver, host, stages))
                    await broker.api("DELETE", f"/v1/sessions/v{number}/main")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    record(data, runs)
    known, report = read(data), Report("bringup-variance")
    report.tables[f"Hosts, {len(known)} runs in {data.name}"] = host_table(known)
    for (driver, where), of_host in groups(known).items():
        report.tables[f"{driver} on {where}"] = stage_table(of_host)
    report.figures["runs"] = [asdict(run) for run in runs]
    return report


def main(argv: list[str]) -> int:
    """Runs the benchmark; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="cortex bench bringup", description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", help="write the result as JSON; - for stdout")
    parser.add_argument("--long", action="store_true", help="three times the rounds")
    parser.add_argument("--runs", type=int, default=0, help="only so many cold starts, added to the data set")
    parser.add_argument("--data", type=Path, default=default_path(), help="the data set, JSON lines")
    arguments = parser.parse_args(argv)
    if arguments.runs:
        return asyncio.run(vary(arguments.runs, arguments.data)).finish(arguments.json)
    rounds = 21 if arguments.long else 7
    report = Report("bringup")
    hello = exec_to_hello(rounds)
    report.targets.append(target("agent server: exec → hello", "ms", median(hello) * 1000, 100))
    report.figures["exec_to_hello_ms"] = [round(value * 1000, 2) for value in hello]
    asyncio.run(bench_driver(report, "process", rounds))
    why = docker_missing()
    if why:
        report.notes.append(f"docker left out: {why}")
    else:
        asyncio.run(bench_driver(report, "docker", rounds))
        asyncio.run(bench_agents(report, 3))
    return report.finish(arguments.json)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
