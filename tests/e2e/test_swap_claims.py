"""Real CLIs from the pool, through the broker: a generic sandbox becomes a returning user's, and a new one's."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from broker.sandbox.slots import home_key
from tests.e2e.conftest import short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, turn
from tests.e2e.providers import StandIn, broker_and_stand_in, need_agents
from tests.e2e.swap import copy_home, holding
from tests.e2e.swap_clis import CLAUDE, CODEX, EARLIER, GEMINI, HELLO, LATER, MEMORIES, OPENCODE, Cli, first_life

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]
CLIS = pytest.mark.parametrize("cli", [CLAUDE, CODEX, GEMINI, OPENCODE], ids=lambda cli: cli.name, scope="module")
MORE = "once more, with persimmons"
"""Words that no CLI has of its own, as in what it adds to suggest a next prompt."""
POOL = """
[pool]
debounce_s = 0.02
[pool.agents.{name}]
target = 1
hot = {hot}
"""


@dataclass
class World:
    cli: Cli
    broker: BrokerProcess
    providers: StandIn

    @property
    def provider(self) -> str:
        return self.cli.shipped.provider

    async def warm(self) -> None:
        """Returns when a generic sandbox is there."""
        async with asyncio.timeout(120):
            while True:
                view = await self.broker.api("GET", "/v1/pool")
                if any(agent["agent"] == self.cli.name and agent["hot"] + agent["paused"] for agent in view["agents"]):
                    return
                await asyncio.sleep(0.05)

    async def way(self, user: str) -> str:
        """By which way the user's session became ready."""
        shown = await self.broker.api("GET", f"/v1/sessions/{user}/main/timeline")
        return str(shown["bringups"][0]["path"])

    def at_rest(self, user: str) -> Path:
        return self.broker.state_dir / "homes" / home_key(user, "main") / "home"

    def containers(self) -> list[str]:
        slots = [path.name for path in (self.broker.state_dir / "slots").iterdir()]
        filters = [["--filter", f"label=io.cortex.slot={slot}"] for slot in slots]
        found = [subprocess.check_output(["docker", "ps", "-q", *one], text=True, timeout=20) for one in filters]
        return " ".join(found).split()

    def pids(self, program: str) -> set[str]:
        """Processes of that program in all sandboxes."""
        command = [["docker", "top", ref, "-eo", "pid,comm"] for ref in self.containers()]
        lines = [subprocess.check_output(one, text=True, timeout=20).splitlines()[1:] for one in command]
        return {line.split()[0] for found in lines for line in found if line.split()[1] == program}

    async def said(self, user: str, token: str, *texts: str, load: str = "") -> str:
        """What the agent says to each, in one conversation."""
        client = Client()
        url = f"{self.broker.front_url}/acp"
        async with connected(url, token, client) as agent:
            if load:
                await agent.load_session(cwd="/", session_id=load, mcp_servers=[])
            session = load or (await agent.new_session(cwd="/", mcp_servers=[])).session_id
            for text in texts:
                await turn(agent, session, text)
        return client.text

    async def asked(self, text: str) -> dict[str, object]:
        """The model's largest request in which ``text`` is."""
        found = [it for it in await self.providers.requests(self.provider) if text in json.dumps(it["body"])]
        return max(found, key=lambda request: len(json.dumps(request["body"])))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(cli: Cli) -> AsyncIterator[World]:
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini", "opencode")
    # Claude's stands still while it waits, the others' do not.
    async with broker_and_stand_in(POOL.format(name=cli.name, hot=0 if cli is CLAUDE else 1)) as (broker, providers):
        yield World(cli, broker, providers)


@CLIS
async def test_a_returning_user_is_at_home_in_a_generic_sandbox(cli: Cli, world: World) -> None:
    with short_directory() as root:
        first = await first_life(cli, root)
        world.at_rest("ann").parent.mkdir(mode=0o700)
        copy_home(first.home, world.at_rest("ann"))
    await world.warm()
    parked = world.pids("claude")
    assert bool(parked) == (cli is CLAUDE)
    made = await world.broker.session("ann", cli.name)
    assert await world.way("ann") == "generic_warm"
    await world.providers.forget()
    words = await world.said("ann", made["token"], HELLO, f"remember {LATER}", cli.run)
    assert "w0 w1" in words
    request = await world.asked("hello there")
    assert cli.taken(request)
    for memory in MEMORIES:
        assert memory in json.dumps(request["body"])
    assert not parked or parked & world.pids("claude"), "what was parked is what serves"
    await world.providers.forget()
    await world.said("ann", made["token"], MORE, load=first.session)
    assert EARLIER in json.dumps((await world.asked(MORE))["body"]), "the earlier conversation"
    await world.broker.api("POST", "/v1/sessions/ann/main/stop")
    assert holding(world.at_rest("ann"), LATER), "it has gone home with its user"
    assert (world.at_rest("ann") / "workspace" / "here").read_text() == "/vol/home/workspace\n"


@CLIS
async def test_a_new_user_stays_in_the_blank_home(cli: Cli, world: World) -> None:
    await world.warm()
    made = await world.broker.session("bob", cli.name)
    assert await world.way("bob") == "generic_warm"
    await world.said("bob", made["token"], f"remember {LATER}", cli.run)
    await world.broker.api("POST", "/v1/sessions/bob/main/stop")
    assert holding(world.at_rest("bob"), LATER)
    assert (world.at_rest("bob") / "workspace" / "here").read_text() == "/vol/home/workspace\n"
