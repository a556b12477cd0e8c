"""MCP packages: installed once by a sandbox without a tenant, then called by real agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.harness import BrokerProcess, Client, connected, turn
from tests.e2e.providers import broker_and_stand_in, need_agents

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]
INSTALL_S = 200.0
EVERYTHING = {
    "mcpServers": {"everything": {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-everything"]}}
}
MISSING = {
    "mcpServers": {"ghost": {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-that-does-not-exist"]}}
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[BrokerProcess]:
    need_agents("claude-agent-acp", "codex-acp", "gemini", "npm")
    async with broker_and_stand_in() as (process, _):
        yield process


async def logged(broker: BrokerProcess, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Waits for a line in the broker's log."""
    async with asyncio.timeout(INSTALL_S):
        while True:
            for event in broker.log_events():
                if what(event):
                    return event
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
async def test_a_tool_of_a_server_from_npm_is_called(name: str, broker: BrokerProcess) -> None:
    user = f"ann-{name}"
    made = await broker.session(user, name)
    await broker.api("PUT", f"/v1/users/{user}/config/mcp", EVERYTHING)
    await logged(broker, lambda event: event["event"] in ("package_installed", "package_failed"))
    # Written again, it is answered when the running sandbox has the server.
    await broker.api("PUT", f"/v1/users/{user}/config/mcp", EVERYTHING)
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await called(agent, session.session_id, client)
    assert "Echo: aubergine" in client.text, client.updates
    assert await broker.metric('cortex_packages_total{result="installed"}') == 1, "installed once for all users"


async def called(agent: Any, session_id: str, client: Client) -> None:
    """Agents start servers in the background: the tool may be there only at a later turn."""
    async with asyncio.timeout(60):
        while "Echo: " not in client.text:
            await turn(agent, session_id, '[[tool=echo {"message": "aubergine"}]]')


async def test_a_package_that_does_not_exist_is_said_and_the_session_works(broker: BrokerProcess) -> None:
    await broker.api("PUT", "/v1/users/bob/config/mcp", MISSING)
    made = await broker.session("bob", "demo")
    await logged(broker, lambda event: event["event"] == "package_failed" and "does-not-exist" in event["spec"])
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        result = await turn(agent, session.session_id, "hello")
    assert result.stop_reason == "end_turn"
    async with asyncio.timeout(20):
        while not (warnings := (await broker.api("GET", "/v1/sessions/bob/main"))["warnings"]):
            await asyncio.sleep(0.05)
    assert "ghost" in warnings[0]
    assert "could not be installed" in warnings[0]
