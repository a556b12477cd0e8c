"""The whole way with real agent CLIs in containers, as the image installs them and config.toml starts them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import websockets

from tests.e2e.agents import CLAUDE, CODEX, GEMINI, OPENCODE, Cli
from tests.e2e.harness import BrokerProcess, Client, connected, turn
from tests.e2e.providers import StandIn, broker_and_stand_in, need_agents

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]


CODEX_WEBSOCKET = replace(CODEX, name="codex-websocket")
"""One WebSocket for the whole conversation. Its built-in provider would have it too, but then each turn waits for
chatgpt.com, which no list has."""
WEBSOCKET = """
[agents.codex-websocket]
command = ["/opt/agents/bin/codex-acp"]
provider = "openai"
[agents.codex-websocket.env]
OPENAI_API_KEY = "placeholder"
INITIAL_AGENT_MODE = "permission-profile:sandboxed"
CODEX_CONFIG = '''
{"model_provider": "cortex", "model_providers": {"cortex": {"name": "Cortex", "base_url": "{gateway}/openai/v1",
 "env_key": "OPENAI_API_KEY", "wire_api": "responses", "supports_websockets": true}}}
'''
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[tuple[BrokerProcess, StandIn]]:
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini", "opencode")
    async with broker_and_stand_in(WEBSOCKET) as both:
        yield both


@pytest_asyncio.fixture(loop_scope="module")
async def alone() -> AsyncIterator[BrokerProcess]:
    """A broker to be killed."""
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini")
    async with broker_and_stand_in() as (broker, _):
        yield broker


@pytest.fixture(params=[CLAUDE, CODEX, GEMINI], ids=lambda cli: cli.name)
def cli(request: pytest.FixtureRequest) -> Cli:
    found: Cli = request.param
    return found


def shown(client: Client) -> str:
    """All that the agent showed, its words and its tools' output."""
    return client.text + "".join(str(update) for update in client.updates)


@pytest.mark.parametrize("cli", [CLAUDE, CODEX, GEMINI, OPENCODE], ids=lambda cli: cli.name)
async def test_an_answer_is_streamed_and_the_provider_gets_the_real_key(
    cli: Cli, world: tuple[BrokerProcess, StandIn]
) -> None:
    broker, providers = world
    status, made = await broker.hook({"user": f"ann-{cli.name}", "agent": cli.name}, hook_id=f"msg_{cli.name}")
    assert status in (200, 201), made
    await providers.forget()
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/Users/ann/src/shop", mcp_servers=[])
        result = await turn(agent, session.session_id, "[[chunks=30 delay=20]]")
    assert result.stop_reason == "end_turn"
    chunks = [update for update in client.updates if update.session_update == "agent_message_chunk"]
    assert len(chunks) > 5, "the reply is streamed"
    assert "w0 w1 w2" in client.text
    assert "w28 w29" in client.text
    requests = await providers.requests(cli.provider)
    assert requests
    for request in requests:
        assert request["headers"][cli.credential] == cli.secret()
        assert "placeholder" not in str(request["headers"])


@pytest.mark.parametrize("cli", [CLAUDE, CODEX, GEMINI, OPENCODE], ids=lambda cli: cli.name)
async def test_a_tool_runs_in_the_workspace_after_the_client_allowed_it(
    cli: Cli, world: tuple[BrokerProcess, StandIn]
) -> None:
    broker, _ = world
    made = await broker.session(f"ann-{cli.name}", cli.name)
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="C:\\Users\\bob", mcp_servers=[])
        await turn(agent, session.session_id, cli.run("pwd > here; cat here; expr 1111 '*' 1111"))
    assert "/vol/home/workspace" in shown(client)
    assert "1234321" in shown(client)
    assert len(client.permissions) == 1


@pytest.mark.parametrize("cli", [CLAUDE, CODEX, CODEX_WEBSOCKET, GEMINI], ids=lambda cli: cli.name)
async def test_a_whole_conversation_with_tools(cli: Cli, world: tuple[BrokerProcess, StandIn]) -> None:
    broker, providers = world
    made = await broker.session(f"eve-{cli.name}", cli.name)
    await providers.forget()
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, cli.run("expr 1111 '*' 1111 > product"))
        await turn(agent, session.session_id, "[[chunks=30 delay=5]]")
        await turn(agent, session.session_id, cli.run("cat product"))
        result = await turn(agent, session.session_id, "and aubergine")
    assert result.stop_reason == "end_turn"
    assert "w28 w29" in client.text
    assert "1234321" in shown(client)
    assert "heard: and aubergine" in client.text
    asked = await providers.requests(cli.provider)
    assert {one["headers"][cli.credential] for one in asked} == {cli.secret()}
    if cli.provider == "openai":
        ways = {one["method"] for one in asked if one["path"] == "/v1/responses"}
        assert ways == ({"GET", "WEBSOCKET"} if cli is CODEX_WEBSOCKET else {"POST"})


async def test_a_tool_does_not_run_when_the_client_refuses(cli: Cli, world: tuple[BrokerProcess, StandIn]) -> None:
    broker, _ = world
    made = await broker.session(f"bob-{cli.name}", cli.name)
    client = Client(permission="reject_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, cli.run("touch made; expr 1111 '*' 1111"))
    assert len(client.permissions) == 1
    assert "1234321" not in shown(client)


async def test_cancel_ends_the_turn_and_the_conversation_goes_on(
    cli: Cli, world: tuple[BrokerProcess, StandIn]
) -> None:
    broker, _ = world
    made = await broker.session(f"bob-{cli.name}", cli.name)
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running = asyncio.ensure_future(turn(agent, session.session_id, "[[chunks=2000 delay=20]]"))
        await client.until(lambda: "w5 " in client.text)
        await agent.cancel(session_id=session.session_id)
        result = await running
        assert result.stop_reason == "cancelled"
        assert "w1999" not in client.text
        result = await turn(agent, session.session_id, "still there?")
    assert result.stop_reason == "end_turn"
    assert "still there?" in client.text


async def test_a_second_client_loads_the_conversation_and_a_killed_broker_takes_the_agent_over(
    cli: Cli, alone: BrokerProcess
) -> None:
    broker = alone
    made = await broker.session(f"bob-{cli.name}", cli.name)
    first = Client()
    async with connected(made["acp_url"], made["token"], first) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "remember the word aubergine")
        running = asyncio.ensure_future(turn(agent, session.session_id, "[[chunks=200 delay=20]]"))
        await first.until(lambda: "w3 " in first.text)
        before = await broker.api("GET", f"/v1/sessions/bob-{cli.name}/main")
        await broker.kill()
    running.cancel()
    await broker.start()
    second = Client()
    async with connected(made["acp_url"], made["token"], second) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        assert "aubergine" in second.text, "the history is replayed"
        await second.until(lambda: "w198 w199" in second.text, 30)
        result = await turn(agent, session.session_id, "and the word celeriac")
    assert result.stop_reason == "end_turn"
    assert "celeriac" in second.text
    after = await broker.api("GET", f"/v1/sessions/bob-{cli.name}/main")
    assert after["sandbox"]["agent_pid"] == before["sandbox"]["agent_pid"], "the same agent process"


async def test_inside_there_is_no_network_and_no_real_key(world: tuple[BrokerProcess, StandIn]) -> None:
    broker, providers = world
    made = await broker.session("bob-claude", "claude")
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, CLAUDE.run(LOOK.replace("URL", providers.url)))
    assert "interfaces: lo;" in client.text
    assert "provider: refused;" in client.text
    assert "keys in processes: 0;" in client.text
    assert "keys in files: 0;" in client.text


LOOK = """\
echo "interfaces: $(ls /sys/class/net | tr '\\n' ' ' | sed 's/ $//');"
echo "provider: $(node -e 'fetch("URL/_requests").then(() => "reached", () => "refused").then(console.log)');"
echo "keys in processes: $(cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | grep -ac 'real-ke[y]');"
echo "keys in files: $(grep -rIl 'real-ke[y]' /vol /etc /opt/cortex /run /tmp 2>/dev/null | wc -l);"
"""


async def test_the_agents_own_websocket_is_served_raw(world: tuple[BrokerProcess, StandIn]) -> None:
    broker, providers = world
    made = await broker.session("cleo", "codex-raw")
    await providers.forget()
    headers = {"Authorization": f"Bearer {made['token']}"}
    async with (
        asyncio.timeout(60),
        websockets.connect(
            f"{broker.front_url}/raw", additional_headers=headers, compression=None, max_size=2**25
        ) as socket,
    ):
        codex = Rpc(socket)
        about = {"clientInfo": {"name": "probe", "version": "1"}, "capabilities": {"experimentalApi": True}}
        await codex.call("initialize", about)
        await codex.notify("initialized")
        thread = (await codex.call("thread/start", {"cwd": "/vol/home/workspace"}))["thread"]["id"]
        said = [{"type": "text", "text": "[[chunks=20 delay=10]]"}]
        await codex.call("turn/start", {"threadId": thread, "input": said})
        await codex.until("turn/completed")
    deltas = [message["params"]["delta"] for message in codex.seen if message["method"] == "item/agentMessage/delta"]
    assert len(deltas) > 5
    assert "w18 w19" in "".join(deltas)
    requests = await providers.requests("openai")
    assert {request["headers"]["authorization"] for request in requests} == {CODEX.secret()}


class Rpc:
    """JSON-RPC as ``codex app-server`` speaks it: one message a frame."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.seen: list[dict[str, Any]] = []
        self._number = 0

    async def notify(self, method: str) -> None:
        await self.socket.send(json.dumps({"method": method}))

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The result; notifications before it are kept in ``seen``."""
        self._number += 1
        await self.socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(await self.socket.recv())
            if message.get("id") == self._number and "method" not in message:
                assert "result" in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.seen.append(message)

    async def until(self, method: str) -> None:
        while not self.seen or self.seen[-1].get("method") != method:
            self.seen.append(json.loads(await self.socket.recv()))
