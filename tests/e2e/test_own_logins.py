"""Users who have signed in with their own CLI: its credential file in the sandbox, its token at the provider."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.harness import BrokerProcess, Client, connected, turn
from tests.e2e.providers import KEYS, StandIn, broker_and_stand_in, need_agents

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]
DAY = 86_400


def jwt() -> str:
    """A token as a provider issues them; nobody here checks who signed it."""
    facts = {"chatgpt_account_id": "acc-1", "chatgpt_plan_type": "plus"}
    claims = {"https://api.openai.com/auth": facts, "email": "ann@example.com", "exp": int(time.time()) + DAY}
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in ({"alg": "none"}, claims))
    return ".".join((*(part.rstrip("=") for part in parts), "c2ln"))


def claude() -> dict[str, Any]:
    login = {"accessToken": "own-access", "refreshToken": "own-refresh", "expiresAt": int((time.time() + DAY) * 1000)}
    return {"claudeAiOauth": login | {"scopes": ["user:inference"], "subscriptionType": "max"}}


def codex() -> dict[str, Any]:
    tokens = {"id_token": jwt(), "access_token": jwt(), "refresh_token": "own-refresh", "account_id": "acc-1"}
    return {
        "OPENAI_API_KEY": None,
        "tokens": tokens,
        "last_refresh": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[tuple[BrokerProcess, StandIn]]:
    need_agents("claude-agent-acp", "codex-acp")
    async with broker_and_stand_in() as both:
        yield both


async def prompt(broker: BrokerProcess, user: str, agent: str) -> None:
    made = await broker.session(user, agent)
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as connection:
        session = await connection.new_session(cwd="/", mcp_servers=[])
        assert (await turn(connection, session.session_id, "hello")).stop_reason == "end_turn"
    assert "hello" in client.text


@pytest.mark.parametrize(
    ("agent", "provider", "path"), [("claude", "anthropic", "/v1/messages"), ("codex", "openai", "/v1/responses")]
)
async def test_a_users_own_login_is_what_the_provider_sees(
    world: tuple[BrokerProcess, StandIn], agent: str, provider: str, path: str
) -> None:
    broker, providers = world
    login = claude() if agent == "claude" else codex()
    token = "own-access" if agent == "claude" else login["tokens"]["access_token"]
    stored = await broker.api(
        "PUT", f"/v1/users/{agent}-own/credentials/{provider}", {"kind": "file", "value": json.dumps(login)}
    )
    assert (stored["kind"], stored["mode"]) == ("file", "file")
    await providers.forget()
    await prompt(broker, f"{agent}-own", agent)
    asked = [one["headers"] for one in await providers.requests(provider) if one["path"].startswith(path)]
    assert asked
    assert {headers["authorization"] for headers in asked} == {f"Bearer {token}"}
    assert all("x-api-key" not in headers for headers in asked)
    if agent == "claude":
        assert all("oauth-2025-04-20" in headers["anthropic-beta"] for headers in asked)
    else:
        assert {headers["chatgpt-account-id"] for headers in asked} == {"acc-1"}
    # Nobody else's: without a login of their own they have the operator's key.
    await broker.api("POST", f"/v1/sessions/{agent}-own/main/stop")
    await providers.forget()
    await prompt(broker, f"{agent}-other", agent)
    seen = json.dumps([one["headers"] for one in await providers.requests(provider)])
    assert KEYS[provider] in seen
    assert token not in seen
