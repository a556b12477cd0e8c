"""Real agent CLIs that stood still for a while: their connections are gone, their users see nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.conftest import short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.providers import agents_config, need_agents, stand_in

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

SOON = "\n[pool.idle]\npause_after_s = 0.3\nattached_pause_after_s = 0.3\nfallback_keep_s = 600\n"
AGENTS = ["claude", "codex", "gemini", "opencode"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[BrokerProcess]:
    """Pauses soon; its gateway closes what nothing moves on, as providers do with connections that are kept."""
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini", "opencode")
    with short_directory() as directory:
        async with (
            stand_in() as providers,
            running(
                directory,
                "docker",
                agents_config(directory, providers.url) + SOON,
                env={"CORTEX_GATEWAY__IDLE_TIMEOUT_S": "1"},
            ) as process,
        ):
            yield process


async def stands_still(broker: BrokerProcess, user: str, seconds: float) -> None:
    """It is paused, and stays so for a while."""
    async with asyncio.timeout(60):
        while (await broker.api("GET", f"/v1/sessions/{user}/main"))["state"] != "paused":
            await asyncio.sleep(0.05)
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("name", AGENTS)
async def test_a_conversation_goes_on_after_a_pause(broker: BrokerProcess, name: str) -> None:
    made = await broker.session(f"ann-{name}", name)
    client, late = Client(), Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "remember aubergine")
        for word in ("celeriac", "fennel"):
            await stands_still(broker, f"ann-{name}", 1.5)
            result = await turn(agent, session.session_id, f"say {word}")
            assert result.stop_reason == "end_turn"
            assert word in client.text
        before = await broker.api("GET", f"/v1/sessions/ann-{name}/main")
    await stands_still(broker, f"ann-{name}", 0.5)
    async with connected(made["acp_url"], made["token"], late) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        assert "fennel" in late.text
        result = await turn(agent, session.session_id, "say radicchio")
        assert "radicchio" in late.text
        after = await broker.api("GET", f"/v1/sessions/ann-{name}/main")
    assert after["sandbox"]["agent_pid"] == before["sandbox"]["agent_pid"], "the same agent process"
