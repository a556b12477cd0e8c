"""What a generic warm sandbox may hold of each real CLI before its user's home is moved in: what config.toml says.

Without the broker (``swap``): here it is the CLIs that are tested, and each test fails when one does not bear any
more what [agents.*] decides. docs/warm-agents.md has the reasons and the times.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.conftest import short_directory
from tests.e2e.providers import need_agents
from tests.e2e.swap import Box, boxed, give
from tests.e2e.swap_clis import (
    CLAUDE,
    CODEX,
    EARLIER,
    GEMINI,
    LATER,
    MEMORIES,
    OPENCODE,
    SHIPPED,
    Cli,
    Life,
    alike,
    claimed_life,
    first_life,
    next_life,
)

pytestmark = [
    pytest.mark.docker,
    pytest.mark.cli,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]
CLIS = pytest.mark.parametrize("cli", [CLAUDE, CODEX, GEMINI, OPENCODE], ids=lambda cli: cli.name, scope="module")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    need_agents("claude-agent-acp", "codex-acp", "codex", "gemini", "opencode")
    with short_directory() as directory:
        yield directory


@dataclass
class Returned:
    """A user's first life, the one in a generic sandbox, and what the next one knows of it."""

    first: Life
    life: Life
    later: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def returned(cli: Cli, root: Path) -> AsyncIterator[Returned]:
    first = await first_life(cli, root)
    life = await claimed_life(cli, root, first.home, earlier=first.session)
    yield Returned(first, life, await next_life(cli, root, life))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def newcomer(cli: Cli, root: Path) -> AsyncIterator[Returned]:
    """The same for one whose home is the blank one; compared with a cold start in a blank home."""
    life = await claimed_life(cli, root, None)
    yield Returned(await first_life(cli, root, {}), life, await next_life(cli, root, life))


async def test_these_are_the_decisions() -> None:
    decided = {name: (agent.prewarm, agent.open_ahead, agent.live_mcp) for name, agent in SHIPPED.items()}
    assert decided == {
        "demo": ("agent", "any", False),
        "claude": ("agent", "own", True),
        "codex": ("agent", "new", False),
        "codex-raw": ("server", "own", False),
        "gemini": ("agent", "own", True),
        "opencode": ("server", "new", True),
    }


# -- a user who has a home -----------------------------------------------------------------------------


@CLIS
async def test_the_model_is_asked_as_after_a_cold_start_in_that_home(cli: Cli, returned: Returned) -> None:
    assert cli.taken(returned.first.request), "the settings do what they are there for"
    assert cli.taken(returned.life.request)
    for memory in MEMORIES:
        assert memory in json.dumps(returned.life.request["body"])
    assert alike(returned.life.request["body"]) == alike(returned.first.request["body"])
    assert alike(returned.life.made) == alike(returned.first.made), "and the client sees the same"


@CLIS
async def test_an_earlier_conversation_is_there(cli: Cli, returned: Returned) -> None:
    assert returned.life.loaded.count(EARLIER) >= 2


@CLIS
async def test_what_is_said_and_done_is_in_the_users_home_and_nowhere_else(cli: Cli, returned: Returned) -> None:
    assert returned.life.where == ["vol/home/workspace/here"]
    assert returned.life.blank == []
    assert returned.later.count(LATER) >= 2, "the next life goes on with it"


@CLIS
async def test_nothing_is_asked_of_the_provider_before_there_is_a_user(cli: Cli, returned: Returned) -> None:
    assert returned.life.unclaimed == []


# -- a new user ----------------------------------------------------------------------------------------


@CLIS
async def test_a_new_user_goes_on_in_the_blank_home(cli: Cli, newcomer: Returned) -> None:
    assert alike(newcomer.life.request["body"]) == alike(newcomer.first.request["body"])
    assert newcomer.life.where == ["vol/home/workspace/here"]
    assert newcomer.later.count(LATER) >= 2
    assert not [asked for asked in newcomer.life.unclaimed if not asked.startswith("egress:")]


# -- Claude Code ---------------------------------------------------------------------------------------


USED, NOT_USED = "the parked process is claimed", "the parked process is not used"
HEADER = json.dumps({"env": {"ANTHROPIC_CUSTOM_HEADERS": "X-Probe: own"}})


async def test_claude_claims_its_parked_process(root: Path) -> None:
    first = await first_life(CLAUDE, root)
    life = await claimed_life(CLAUDE, root, first.home)
    assert USED in life.words
    assert len(list(life.home.glob(f".claude/projects/*/{life.session}.jsonl"))) == 1, "under the session's own id"


@pytest.mark.parametrize(
    "files",
    [{".claude/settings.json": HEADER}, {"workspace/.claude/settings.json": HEADER}],
    ids=["users", "projects"],
)
async def test_claude_starts_anew_for_settings_that_a_parked_process_cannot_take(
    files: dict[str, str], root: Path
) -> None:
    first = await first_life(CLAUDE, root, files)
    life = await claimed_life(CLAUDE, root, first.home)
    assert NOT_USED in life.words
    assert life.request["headers"]["x-probe"] == first.request["headers"]["x-probe"] == "own"
    assert alike(life.request["body"]) == alike(first.request["body"])
    assert LATER in await next_life(CLAUDE, root, life)


# -- Codex ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cli", [CODEX], ids=lambda cli: cli.name, scope="module")
async def test_codex_keeps_its_index_in_the_users_home(cli: Cli, returned: Returned) -> None:
    """It opens its databases when it starts: without a new app-server they would be the blank home's."""
    with closing(sqlite3.connect(returned.life.home / ".codex/state_5.sqlite")) as database:
        found = {thread for (thread,) in database.execute("select id from threads")}
    assert found == {returned.first.session, returned.life.session}


# -- opencode ------------------------------------------------------------------------------------------


async def test_opencode_does_not_bear_a_home_that_is_moved_in(root: Path) -> None:
    """When this fails, it may be started before its user: prewarm = "agent"."""
    first = await first_life(OPENCODE, root)
    life = await claimed_life(OPENCODE, root, first.home, warm=True)
    assert life.blank, "its database stays in the blank home"


# -- MCP servers ---------------------------------------------------------------------------------------


class Server:
    """``swap_mcp`` in a sandbox."""

    def __init__(self, box: Box) -> None:
        self.place = box.directory / "vol" / "mcp"
        self.place.mkdir()
        (self.place / "server.py").write_text((Path(__file__).parent / "swap_mcp.py").read_text())
        give(self.place)
        argv = ["-I", "-S", "/vol/mcp/server.py", "/vol/mcp"]
        box.servers = [{"name": "probe", "command": "/usr/bin/python3", "args": argv, "env": []}]

    def change(self) -> None:
        """It has another tool from now on, and says so."""
        (self.place / "more").touch()

    async def told(self) -> None:
        """Returns when it has said so."""
        async with asyncio.timeout(20):
            while "changed" not in (self.place / "log").read_text():
                await asyncio.sleep(0.02)


async def omega(box: Box, session: str) -> bool:
    """Whether the new tool can be called."""
    return "called omega" in (await box.prompt(session, '[[tool=omega {"x": "y"}]]')).text


@CLIS
async def test_new_tools_reach_an_open_conversation_where_live_mcp_says_so(cli: Cli, root: Path) -> None:
    async with boxed(root) as box:
        server = Server(box)
        box.stay()
        await cli.start(box)
        session = await box.new()
        answer = await box.prompt(session, '[[tool=alpha {"x": "y"}]]')
        assert "called alpha" in answer.text
        server.change()
        await server.told()
        if not cli.shipped.live_mcp:
            await box.prompt(session, "a turn later")
            assert not await omega(box, session)
            return
        async with asyncio.timeout(20):
            while not await omega(box, session):
                pass


async def test_codex_takes_new_tools_when_its_conversation_is_closed_and_resumed(root: Path) -> None:
    async with boxed(root) as box:
        server = Server(box)
        box.stay()
        await CODEX.start(box)
        session = await box.new()
        await box.prompt(session, '[[tool=alpha {"x": "y"}]]')
        server.change()
        await server.told()
        await box.load(session, "session/resume")
        assert not await omega(box, session), "resumed only, it goes on with what it has"
        await box.rpc.call("session/close", {"sessionId": session})
        await box.load(session, "session/resume")
        assert await omega(box, session)
