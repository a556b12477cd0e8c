"""A look from the inside: no network, no real credential, nothing of the host; and nothing secret in the logs."""

from __future__ import annotations

import base64
import json
import secrets
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, free_port, running, turn
from tests.e2e.wire import raw, request

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

KEY = f"sk-ant-{secrets.token_hex(24)}"
"""The real credential of the stand-in provider."""
PROBE = base64.b64encode((Path(__file__).parent / "probe.py").read_bytes()).decode()


class Provider:
    """Notes what reaches it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.asked: list[dict[str, str]] = []

    async def answer(self, asked: web.Request) -> web.Response:
        self.asked.append({name.lower(): value for name, value in asked.headers.items()})
        return web.json_response({"path": asked.path}, headers={"X-Request-Id": "r1"})


@dataclass
class World:
    broker: BrokerProcess
    provider: Provider
    credential: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(driver: str) -> AsyncIterator[World]:
    """A broker that holds a credential and logs all it can."""
    provider = Provider()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", provider.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", provider.port).start()
    with short_directory() as directory:
        credential = directory / "anthropic.key"
        credential.write_text(KEY + "\n")
        credential.chmod(0o600)
        config = f"""
{process_config() if driver == "process" else ""}
[gateway.providers.anthropic]
kind = "anthropic"
base_url = "http://127.0.0.1:{provider.port}"
credential_file = "{credential}"
[agents.caller]
command = ["{{python}}", "-I", "-S", "{{sandbox_agent}}/demo.py"]
provider = "anthropic"
env = {{ANTHROPIC_BASE_URL = "{{gateway}}/anthropic", ANTHROPIC_API_KEY = "placeholder"}}
"""
        async with running(directory, driver, config, env={"CORTEX_BROKER__LOG_LEVEL": "debug"}) as broker:
            yield World(broker, provider, credential)
    await runner.cleanup()


async def shell(broker: BrokerProcess, user: str, command: str) -> str:
    """What a command prints in the sandbox."""
    made = await broker.session(user, "caller")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, f"!{command}")
    done = [update for update in client.updates if update.session_update == "tool_call_update"][-1]
    texts = [block.content.text for block in done.content or []]
    return "".join(texts)


def python(source: str, *arguments: Any) -> str:
    """A shell command that runs base64 ``source`` with the agent's own Python."""
    words = " ".join(shlex.quote(json.dumps(argument)) for argument in arguments)
    return f'echo {source} | base64 -d > /tmp/probe.py && "$(readlink /proc/$PPID/exe)" -I -S /tmp/probe.py {words}'


async def look(world: World, user: str, *words: str) -> dict[str, Any]:
    """The probe's report."""
    broker = world.broker
    places = [
        *("1.1.1.1:80", "169.254.169.254:80", "172.17.0.1:22", "[::1]:22"),
        *(f"127.0.0.1:{port}" for port in (broker.front_port, broker.control_port, world.provider.port)),
    ]
    paths = [str(broker.state_dir), str(world.credential), str(broker.config_path), str(broker.directory / "run")]
    said = await shell(broker, user, python(PROBE, [word[::-1] for word in words], places, paths))
    start = said.index("{")
    report: dict[str, Any] = json.loads(said[start : said.rindex("}") + 1])
    return report


isolated = pytest.mark.skipif(bool(process_config()), reason="bubblewrap cannot run here")


@isolated
async def test_the_sandbox_has_no_network(world: World) -> None:
    report = await look(world, "net")
    assert report["interfaces"] == ["lo"]
    assert set(report["routes"]) <= {"lo"}
    assert set(report["routes6"]) <= {"lo"}
    assert "connected" not in report["connects"].values(), report["connects"]
    assert not report["udp"]
    assert not report["raw"]
    assert not report["packet"]
    slot = (await world.broker.api("GET", "/v1/sessions/net/main"))["sandbox"]["slot"]
    ours = (f"{world.broker.state_dir}/slots/{slot}/sock/", "/run/cortex/")
    assert all(path.startswith(ours) for path in report["sockets"]), report["sockets"]


@isolated
async def test_the_sandbox_has_no_real_credential_though_its_calls_carry_one(world: World) -> None:
    ask = 'import os, urllib.request as u\nprint(u.urlopen(u.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"'
    ask += ', b"{}", {"x-api-key": os.environ["ANTHROPIC_API_KEY"]})).headers)'
    script = base64.b64encode(ask.encode()).decode()
    said = await shell(world.broker, "cred", python(script).replace("-I -S", "-I"))
    assert world.provider.asked[-1]["x-api-key"] == KEY
    assert "r1" in said
    assert KEY not in said
    keys = [KEY, world.broker.admin_token, (world.broker.state_dir / "hook.secrets").read_text().strip()]
    report = await look(world, "cred", *keys)
    assert report["found"] == []


@isolated
async def test_the_sandbox_shows_nothing_of_the_host(world: World) -> None:
    report = await look(world, "host")
    assert report["present"] == []
    assert report["own"] == (["/vol"] if report["uid"] == 0 else [])
    for process in report["processes"]:
        assert "broker" not in process["command"], process
        assert not any(str(world.broker.directory) in fd for fd in process["fds"]), process
    agent_server = [
        process
        for process in report["processes"]
        if "python" in process["command"].split(" ")[0] and "__main__.py" in process["command"]
    ]
    assert agent_server
    assert not any(process["memory"] or process["fds"] for process in agent_server), "its secret can be read"
    allowed = ("/vol", "/tmp", "/dev", "/proc", "/run", "/var/tmp")
    assert all(place.startswith(allowed) for place in report["writable"]), report["writable"]
    foreign = {name for name in report["variables"] if name.startswith(("CORTEX_", "DOCKER_", "SSH_", "AWS_"))}
    assert foreign <= {"CORTEX_SANDBOX"}


@isolated
async def test_one_sandbox_sees_nothing_of_another(world: World) -> None:
    word = secrets.token_hex(16)
    await shell(world.broker, "owner", f"echo {word} > ~/private.txt; echo {word} > /tmp/private.txt")
    await world.broker.api("PUT", "/v1/users/owner/config/env", {"PRIVATE": word})
    assert word in await shell(world.broker, "owner", "cat ~/private.txt; echo $PRIVATE")
    report = await look(world, "nosy", word)
    assert report["found"] == []


@isolated
async def test_a_user_cannot_have_a_file_of_the_host_shown_by_naming_it(world: World) -> None:
    note = world.broker.directory / "note"
    note.write_text("the host's")
    settings = {"agent": {"caller": {"args": [str(note)]}}}
    await world.broker.api("PUT", "/v1/users/greedy/config/settings", settings)
    assert "hidden" in await shell(world.broker, "greedy", f"test -e {note} && echo seen || echo hidden")


async def test_no_secret_is_in_a_log_a_view_or_an_argument(world: World) -> None:
    """Everything secret or private that passes through, also on the ways where something fails."""
    broker = world.broker
    word = secrets.token_hex(16)
    made = await broker.session("log", "caller")
    hook_secret = (broker.state_dir / "hook.secrets").read_text().split()[-1].removeprefix("whsec_")
    forged = made["token"][:-8] + "AAAAAAAA"
    canaries = [KEY, word, made["token"], made["token"].rpartition(".")[2], forged, broker.admin_token, hook_secret]

    await broker.api("PUT", "/v1/users/log/config/env", {"SECRET": f"env-{word}"})
    server = {"command": "/bin/cat", "args": [], "env": {"API_KEY": f"mcp-{word}"}}
    await broker.api("PUT", "/v1/users/log/config/mcp", {"mcpServers": {"private": server}})
    await broker.refused("PUT", "/v1/users/log/config/env", {"BAD": [f"bad-{word}"]})
    await broker.refused("POST", "/v1/sessions", {"user": f"..{word}"})
    await broker.refused("POST", "/v1/sessions", f'{{"user": "{word}'.encode())
    async with raw(broker.front_url, request(forged)) as client:
        await client.refusal()
    async with raw(broker.front_url, request(path=f"/acp?ticket={forged}")) as client:
        assert (await client.head())[0] == 101
        assert (await client.closed())[0] == 4401
    ticket = (await broker.api("POST", "/v1/sessions/log/main/tokens", {"kind": "ticket"}))["token"]
    canaries.append(ticket)
    async with raw(broker.front_url, request(path=f"/acp?ticket={ticket}")) as client:
        assert (await client.head())[0] == 101
    _, answer = await broker.hook({"user": "log", "agent": "caller"}, hook_id="log-1")
    canaries.append(answer["token"])
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {word}"}) as http:
        await http.get(f"{broker.control_url}/v1/sessions?{word}")
    said = await shell(broker, "log", f"echo prompt-{word}; echo $SECRET; echo err-{word} >&2; exit 3")
    assert f"env-{word}" in said

    assert broker.process is not None
    places = {
        "log": broker.log_path.read_text(),
        "metrics": str(await broker.api("GET", "/metrics")),
        "view": json.dumps(await broker.api("GET", "/v1/sessions/log/main")),
        "list": json.dumps(await broker.api("GET", "/v1/sessions?limit=100")),
        "timeline": json.dumps(await broker.api("GET", "/v1/sessions/log/main/timeline")),
    }
    assert places["log"].count("\n") > 20
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            places[f"arguments of {entry.name}"] = _text(f"{entry}/cmdline")
    for pid in family(broker.process.pid):
        places[f"environment of {pid}"] = _text(f"/proc/{pid}/environ")
    places["database"] = "".join(_text(str(path)) for path in broker.state_dir.glob("cortex.db*"))
    found = [(name, canary) for name, text in places.items() for canary in canaries if canary in text]
    mine = ("database", word)  # the user's own section is stored there
    assert [pair for pair in found if pair != mine] == []


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def family(pid: int) -> list[int]:
    """The process and its children."""
    children = _text(f"/proc/{pid}/task/{pid}/children").split()
    return [pid, *map(int, children)]
