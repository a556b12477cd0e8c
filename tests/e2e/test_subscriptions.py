"""Subscriptions as config.toml has them, turned on: real CLIs without a token, renewed tokens at the provider."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.agents import CLAUDE, CODEX, GEMINI, Cli
from tests.e2e.harness import ROOT, BrokerProcess, Client, connected, turn
from tests.e2e.probing import token_endpoint
from tests.e2e.providers import StandIn, broker_and_stand_in, need_agents, stand_in
from tests.e2e.test_own_logins import codex as codex_login

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]
PROVIDERS = {
    "https://api.anthropic.com": "anthropic",
    "https://chatgpt.com": "chatgpt",
    "https://cloudcode-pa.googleapis.com": "codeassist",
}
RENEWED = {"access_token": "renewed", "refresh_token": "rt-1", "expires_in": 3600}
Asked = list[dict[str, Any]]


def turned_on(url: str, token_url: str) -> str:
    """The part of config.toml that is commented out, with the stand-in's addresses in it."""
    shipped = (ROOT / "config.toml").read_text()
    start, end = shipped.index("# Subscriptions, as"), shipped.index("# Warm sandboxes: made ahead")
    part = re.sub(r"^#(?! \S)", "", shipped[start:end], flags=re.MULTILINE)
    for address, name in PROVIDERS.items():
        assert f'base_url = "{address}"' in part
        part = part.replace(f'base_url = "{address}"', f'base_url = "{url}/{name}"')
    part, count = re.subn(r'token_url = "https://[^"]+"', f'token_url = "{token_url}"', part)
    assert count == len(PROVIDERS)
    return part.replace('client_id = ""', 'client_id = "a-client"')


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[tuple[BrokerProcess, StandIn, Asked]]:
    need_agents("claude-agent-acp", "codex-acp", "gemini")
    async with (
        token_endpoint(RENEWED) as (token_url, asked),
        stand_in() as providers,
        broker_and_stand_in(turned_on(providers.url, token_url)) as (broker, _),
    ):
        yield broker, providers, asked


async def work(broker: BrokerProcess, user: str, agent: str, cli: Cli) -> None:
    """A conversation of two turns, one of them with a tool."""
    made = await broker.session(user, agent)
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as connection:
        session = await connection.new_session(cwd="/", mcp_servers=[])
        await turn(connection, session.session_id, cli.run("expr 1111 '*' 1111"))
        assert "1234321" in client.text
        assert (await turn(connection, session.session_id, "and aubergine")).stop_reason == "end_turn"
        assert "heard: and aubergine" in client.text


@pytest.mark.parametrize(
    ("name", "agent", "provider", "path", "cli"),
    [
        ("claude", "claude", "anthropic", "/v1/messages", CLAUDE),
        ("chatgpt", "codex-chatgpt", "chatgpt", "/backend-api/codex/responses", CODEX),
        ("code-assist", "gemini-code-assist", "codeassist", "/v1internal:streamGenerateContent", GEMINI),
    ],
    ids=["claude", "chatgpt", "code-assist"],
)
async def test_an_expired_token_set_is_renewed_and_a_conversation_runs_on_it(
    world: tuple[BrokerProcess, StandIn, Asked], name: str, agent: str, provider: str, path: str, cli: Cli
) -> None:
    broker, providers, renewals = world
    renewals.clear()
    user = f"sub-{name}"
    if name == "claude":
        await broker.api("PUT", f"/v1/users/{user}/config/providers", {"anthropic": {"use": "claude"}})
    tokens = {"access_token": "old", "refresh_token": "rt-0", "expires_at": time.time() - 5, "account_id": "acc-1"}
    await broker.api("PUT", f"/v1/users/{user}/credentials/{name}", {"kind": "oauth", "value": tokens})
    await providers.forget()
    await work(broker, user, agent, cli)
    wanted = {"grant_type": "refresh_token", "refresh_token": "rt-0", "client_id": "a-client"}
    assert [{key: each[key] for key in wanted} for each in renewals] == [wanted]
    asked = await providers.requests(provider)
    assert [one for one in asked if one["path"].startswith(path)]
    for headers in (one["headers"] for one in asked):
        assert headers["authorization"] == "Bearer renewed"
        assert "placeholder" not in str(headers)
        assert "x-api-key" not in headers
        assert "x-goog-api-key" not in headers
        if name == "claude":
            assert "oauth-2025-04-20" in headers["anthropic-beta"].split(",")
        if name == "chatgpt":
            assert headers["chatgpt-account-id"] == "acc-1"


async def test_codex_that_its_user_has_signed_in_uses_its_own_token(
    world: tuple[BrokerProcess, StandIn, Asked],
) -> None:
    broker, providers, _ = world
    login = codex_login()
    await broker.api("PUT", "/v1/users/own/credentials/chatgpt", {"kind": "file", "value": login})
    await providers.forget()
    await work(broker, "own", "codex-chatgpt", CODEX)
    asked = await providers.requests("chatgpt")
    assert {one["headers"]["authorization"] for one in asked} == {f"Bearer {login['tokens']['access_token']}"}
    assert "/backend-api/codex/responses" in {one["path"] for one in asked}
