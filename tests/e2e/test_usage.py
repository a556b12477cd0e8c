"""What real CLIs in containers used, as the broker tells it: exactly what the provider said, each call once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from broker.gateway.caller import Endpoint, endpoint_of
from tests.e2e.agents import CLAUDE, CODEX, GEMINI
from tests.e2e.harness import BrokerProcess, Client, connected, turn
from tests.e2e.providers import StandIn, broker_and_stand_in, need_agents

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]
PROMPT = "[[usage=120,40,80]] hello"
INPUT, OUTPUT, CACHED = 120, 40, 80
OTHER = 10, 5
"""Input and output of calls that a CLI makes besides."""
PRICES = '[gateway.prices."*"]\ninput = 1.0\noutput = 10.0\ncache_read = 0.5\n'
WAIT_S = 20.0
MODELS = ["claude-sonnet-4-1", "claude-sonnet-4-2"]
FASTEST = f"""
[agents.quick]
command = ["/opt/agents/bin/claude-agent-acp"]
provider = "anthropic"
model = "fastest"
models = {json.dumps(MODELS)}
model_env = {{ ANTHROPIC_MODEL = "{{model}}" }}
[agents.quick.env]
ANTHROPIC_BASE_URL = "{{gateway}}/anthropic"
ANTHROPIC_AUTH_TOKEN = "placeholder"
CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC = "1"
IS_SANDBOX = "1"
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[tuple[BrokerProcess, StandIn]]:
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini")
    async with broker_and_stand_in(PRICES + FASTEST) as both:
        yield both


async def used(broker: BrokerProcess, query: str, least: int) -> dict[str, Any]:
    """Rows by name, once so many calls are there; the gateway tells them a moment after they end."""
    async with asyncio.timeout(WAIT_S):
        while True:
            told = await broker.api("GET", f"/v1/usage?{query}", expect=200)
            if told["total"]["calls"] >= least:
                return {row["key"]: row for row in told["rows"]}


async def test_usage_is_what_the_providers_said_and_survives_a_killed_broker(
    world: tuple[BrokerProcess, StandIn],
) -> None:
    broker, providers = world
    for cli in (CLAUDE, CODEX, GEMINI):
        user = f"use-{cli.name}"
        await broker.api("PUT", f"/v1/users/{user}/config/settings", {"team": "red"}, expect=200)
        made = await broker.session(user, cli.name)
        async with connected(made["acp_url"], made["token"], Client()) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, PROMPT)
    for cli in (CLAUDE, CODEX, GEMINI):
        row = (await used(broker, f"by=user&user=use-{cli.name}&team=red", 1))[f"use-{cli.name}"]
        asked = row["cache_read"] // CACHED
        other = (row["input"] - asked * INPUT) // OTHER[0]
        assert asked >= 1
        assert (row["input"], row["output"]) == (asked * INPUT + other * OTHER[0], asked * OUTPUT + other * OTHER[1])
        fresh = row["input"] - row["cache_read"]
        assert row["cost_usd"] == pytest.approx((fresh + row["cache_read"] / 2 + row["output"] * 10) / 1e6)
        assert row["mean_ttft_s"] is not None
        await broker.api("POST", f"/v1/sessions/use-{cli.name}/main/stop", expect=200)
    asked_for = [
        request
        for cli in (CLAUDE, CODEX, GEMINI)
        for request in await providers.requests(cli.provider)
        if request["method"] == "POST" and endpoint_of(b"POST", request["path"].encode()) is Endpoint.GENERATE
    ]
    rows = await used(broker, "by=provider", len(asked_for))
    assert sum(row["calls"] for row in rows.values()) == len(asked_for)
    before = await broker.api("GET", "/v1/usage?by=user", expect=200)
    await broker.kill()
    await broker.start()
    assert await broker.api("GET", "/v1/usage?by=user", expect=200) == before
    async with aiohttp.ClientSession() as http, http.get(f"{broker.control_url}/metrics") as response:
        metrics = await response.text()
    for name in (
        "gen_ai_client_token_usage",
        "gen_ai_client_operation_duration_seconds",
        "cortex_gateway_queue_seconds",
    ):
        assert f"# TYPE {name} histogram" in metrics
    assert "use-" not in "".join(line for line in metrics.splitlines() if line.startswith("gen_ai"))


async def test_each_model_gets_its_turn(world: tuple[BrokerProcess, StandIn]) -> None:
    broker, _ = world
    chosen: list[str] = []
    for number in range(3):
        user = f"quick-{number}"
        made = await broker.session(user, "quick")
        async with connected(made["acp_url"], made["token"], Client()) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, "hello")
        async with asyncio.timeout(WAIT_S):
            while not (found := set(await used(broker, f"by=model&user={user}", 1)) & set(MODELS)):
                pass
        chosen += found
    assert chosen[:2] == MODELS
    assert chosen[2] in MODELS
