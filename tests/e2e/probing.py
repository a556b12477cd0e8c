"""Sandboxes that call a model as a CLI does, and what the provider saw of the call."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.e2e.conftest import process_config
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.providers import StandIn, stand_in
from tests.host import missing

OPERATORS = "sk-operators-own-key"
_CALL = """
import os, urllib.request
body = b'{"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}'
asked = urllib.request.Request(os.environ["MODEL_URL"] + "/v1/messages", body, HEADERS)
print(urllib.request.urlopen(asked, timeout=20).status)
"""


def config(directory: Path, url: str, *, oauth: str = "") -> str:
    """An agent on a provider at ``url`` with a key of the operator's; ``oauth``: where token sets are renewed."""
    key = directory / "operators.key"
    key.write_text(OPERATORS)
    key.chmod(0o600)
    return f"""
[gateway.providers.anthropic]
kind = "anthropic"
base_url = "{url}/anthropic"
credential_file = "{key}"
[gateway.providers.anthropic.oauth]
token_url = "{oauth}"
headers = {{ anthropic-beta = "oauth-2025-04-20" }}
[session]
default_agent = "probe"
[agents.probe]
command = ["{{python}}", "-I", "-S", "{{sandbox_agent}}/demo.py"]
provider = "anthropic"
credential_path = ".cli/auth.json"
[agents.probe.env]
MODEL_URL = "{{gateway}}/anthropic"
"""


@asynccontextmanager
async def probed(
    directory: Path, driver: str, *, oauth: str = "", env: Mapping[str, str] | None = None, more: str = ""
) -> AsyncIterator[tuple[BrokerProcess, StandIn]]:
    """A broker with a vault, and the provider behind it, at PROVIDER in ``more`` too, which is settings."""
    if driver == "process" and process_config():
        missing("no bubblewrap here: there is no vault without isolation")
    async with (
        stand_in() as provider,
        running(
            directory,
            driver,
            config(directory, provider.url, oauth=oauth) + more.replace("PROVIDER", provider.url),
            env=env,
        ) as broker,
    ):
        yield broker, provider


class Cli:
    """Someone's agent. ``provider`` forgets what it was asked before each call."""

    def __init__(self, agent: Any, session: str, client: Client, provider: StandIn) -> None:
        self._agent, self._session, self._client, self._provider = agent, session, client, provider

    async def call(self, headers: Mapping[str, str] | None = None, at: str = "anthropic") -> dict[str, str]:
        """Calls the model with ``headers``, of provider ``at``; those that the provider got."""
        await self._provider.forget()
        script = _CALL.replace('["MODEL_URL"]', f'["MODEL_URL"].replace("/anthropic", "/{at}")')
        script = script.replace("HEADERS", repr({"content-type": "application/json", **(headers or {})}))
        said = await self.run(f"echo {base64.b64encode(script.encode()).decode()} | base64 -d | python3 -")
        assert "200" in said, said
        (request,) = await self._provider.requests("anthropic")
        found: dict[str, str] = request["headers"]
        return found

    async def run(self, command: str) -> str:
        """What a shell command in the sandbox prints."""
        self._client.updates.clear()
        await turn(self._agent, self._session, f"!{command}")
        return self._client.text.strip()


@asynccontextmanager
async def cli(broker: BrokerProcess, provider: StandIn, user: str) -> AsyncIterator[Cli]:
    """``user`` with an agent that is ready."""
    made = await broker.session(user, "probe")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        yield Cli(agent, session.session_id, client, provider)


@asynccontextmanager
async def token_endpoint(answer: dict[str, Any]) -> AsyncIterator[tuple[str, list[Any]]]:
    """Its address, and what it was asked."""
    asked: list[Any] = []

    async def token(request: web.Request) -> web.Response:
        json = request.content_type == "application/json"
        asked.append(await request.json() if json else dict(await request.post()))
        return web.json_response(answer, status=400 if "error" in answer else 200)

    app = web.Application()
    app.router.add_post("/token", token)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/token", asked
    finally:
        await runner.cleanup()
