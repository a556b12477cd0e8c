"""The agent CLIs of the image, what a user of theirs has at home, and their lives in sandboxes."""

from __future__ import annotations

import json
import re
import tomllib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config import AgentConfig
from tests.e2e.harness import ROOT
from tests.e2e.stdio import RpcError
from tests.e2e.swap import GATEWAY_PORT, HOME, WORKSPACE, Box, boxed, copy_home, holding, make_home

SHIPPED = {
    name: AgentConfig.model_validate(agent)
    for name, agent in tomllib.loads((ROOT / "config.toml").read_text())["agents"].items()
}
HELLO = "hello there [[chunks=5]]"
"""The first prompt of every life."""
EARLIER, LATER = "aubergine", "celeriac"
"""What was said in an earlier life, and in the one that is looked at."""
MEMORIES = ("HOME-MEMORY", "WORKSPACE-MEMORY")


def filled(text: str) -> str:
    return text.replace("{gateway}", f"http://127.0.0.1:{GATEWAY_PORT}").replace("{home}", HOME)


@dataclass(frozen=True)
class Cli:
    """``files``: of a user who has settings of their own; ``taken``: whether a request to the provider shows them.
    ``run``: a prompt for its own tool."""

    name: str
    files: Mapping[str, str]
    taken: Callable[[dict[str, Any]], bool]
    run: str

    @property
    def shipped(self) -> AgentConfig:
        return SHIPPED[self.name]

    async def start(self, box: Box, **env: str) -> None:
        """As config.toml says, and initialized."""
        shipped = {name: filled(value) for name, value in self.shipped.env.items()}
        cwd = "/" if self.shipped.prewarm == "agent" else WORKSPACE
        await box.start([filled(word) for word in self.shipped.command], shipped | env, cwd)
        await box.initialize()


CLAUDE = Cli(
    "claude",
    {
        ".claude/settings.json": json.dumps(
            {
                "model": "haiku",
                "permissions": {"allow": ["Bash(pwd*)"]},
                "outputStyle": "Explanatory",
                "hooks": {"SessionStart": [{"hooks": [{"type": "command", "command": "echo HOME-HOOK"}]}]},
            }
        ),
        ".claude/CLAUDE.md": "HOME-MEMORY",
        ".claude/rules/one.md": "HOME-RULE",
        ".claude/commands/mine.md": "HOME-COMMAND",
        ".claude/agents/mine.md": "---\nname: mine\ndescription: HOME-AGENT\n---\nDo it.\n",
        ".claude/skills/skilled/SKILL.md": "---\nname: skilled\ndescription: HOME-SKILL\n---\nDo it.\n",
        ".claude.json": json.dumps({"numStartups": 77, "hasCompletedOnboarding": True}),
        "workspace/CLAUDE.md": "WORKSPACE-MEMORY @notes.md",
        "workspace/notes.md": "WORKSPACE-NOTES",
        "workspace/.claude/settings.json": json.dumps({"permissions": {"deny": ["Bash(rm *)"]}}),
    },
    lambda request: (
        "haiku" in request["body"]["model"]
        and all(
            word in json.dumps(request["body"])
            for word in ("HOME-HOOK", "HOME-RULE", "HOME-COMMAND", "HOME-AGENT", "HOME-SKILL", "WORKSPACE-NOTES")
        )
    ),
    '[[tool=Bash {"command": "pwd | tee here", "description": "probe"}]]',
)
CODEX = Cli(
    "codex",
    {
        ".codex/config.toml": 'model = "gpt-5.4-mini"\nmodel_reasoning_effort = "low"\n',
        ".codex/AGENTS.md": "HOME-MEMORY",
        ".codex/skills/mine/SKILL.md": "---\nname: mine\ndescription: HOME-SKILL\n---\nDo it.\n",
        "workspace/AGENTS.md": "WORKSPACE-MEMORY",
    },
    lambda request: (
        request["body"]["model"] == "gpt-5.4-mini"
        and request["body"]["reasoning"]["effort"] == "low"
        and "HOME-SKILL" in json.dumps(request["body"])
    ),
    '[[tool=exec_command {"cmd": "pwd | tee here"}]]',
)
GEMINI = Cli(
    "gemini",
    {
        ".gemini/settings.json": json.dumps({"model": {"name": "gemini-2.5-flash-lite"}}),
        ".gemini/GEMINI.md": "HOME-MEMORY",
        "workspace/GEMINI.md": "WORKSPACE-MEMORY",
    },
    lambda request: "gemini-2.5-flash-lite" in request["path"],
    '[[tool=run_shell_command {"command": "pwd | tee here", "description": "probe"}]]',
)
OPENCODE = Cli(
    "opencode",
    {
        ".config/opencode/opencode.json": json.dumps({"model": "openai/gpt-5.4-mini"}),
        ".config/opencode/AGENTS.md": "HOME-MEMORY",
        "workspace/AGENTS.md": "WORKSPACE-MEMORY",
    },
    lambda request: request["body"]["model"] == "gpt-5.4-mini",
    '[[tool=bash {"command": "pwd | tee here", "description": "probe"}]]',
)


@dataclass
class Life:
    """What was seen of one. ``home`` is as its agent left it, ``blank`` what was in its place before."""

    home: Path
    session: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    """The model's, for ``HELLO``."""
    made: dict[str, Any] = field(default_factory=dict)
    """The answer to ``session/new``."""
    unclaimed: list[str] = field(default_factory=list)
    """Calls before there was a user."""
    where: list[str] = field(default_factory=list)
    """Files below the sandbox's directory that the agent's own tool has written."""
    loaded: str = ""
    """What was said in the earlier conversation, as the agent tells it and as it tells the model."""
    blank: list[str] = field(default_factory=list)
    """Files in the blank home that hold what was said."""
    words: str = ""
    """Standard error."""


def request_for(box: Box, text: str) -> dict[str, Any]:
    """The largest to the model in which ``text`` is: others make titles and choose models."""
    found = [request for request in box.gate.requests if text in json.dumps(request["body"])]
    assert found, f"the provider was not asked: {box.gate.asked}\n{box.last_words[-2000:]}"
    return max(found, key=lambda request: len(json.dumps(request["body"])))


async def first_life(cli: Cli, root: Path, files: Mapping[str, str] | None = None) -> Life:
    """A cold start in a home that was there before the agent; ``EARLIER`` is said."""
    home = make_home(root / uuid.uuid4().hex, cli.files if files is None else files)
    async with boxed(root) as box:
        box.move_in(home)
        await cli.start(box)
        life = Life(root / uuid.uuid4().hex, await box.new(), made=box.made)
        await box.prompt(life.session, HELLO)
        life.request = request_for(box, "hello there")
        await box.prompt(life.session, f"remember {EARLIER}")
        await keep(box, life)
    return life


async def claimed_life(
    cli: Cli,
    root: Path,
    home: Path | None,
    *,
    warm: bool | None = None,
    earlier: str = "",
    tweak: Callable[[Box], None] | None = None,
) -> Life:
    """A generic warm sandbox gets a user: ``home`` is moved in, or the blank one is theirs. ``LATER`` is said.
    What was opened ahead is for those whose home is the blank one.

    ``warm``: the agent runs before; default as config.toml says. ``earlier``: a conversation to be opened too.
    ``tweak``: something to be done to the sandbox before its agent starts.
    """
    warm = warm if warm is not None else cli.shipped.prewarm == "agent" or home is None
    async with boxed(root) as box:
        if tweak is not None:
            tweak(box)
        life = Life(root / uuid.uuid4().hex)
        ahead = ""
        if warm:
            await cli.start(box)
            if cli.shipped.open_ahead in ("new", "any"):
                ahead = await box.new()
            await box.frozen()
        life.unclaimed = list(box.gate.asked)
        if home is None:
            box.stay()
            life.session = ahead
        else:
            box.move_in(copy_home(home, root / uuid.uuid4().hex))
            if ahead:
                await box.discard(ahead)
        if not warm:
            await cli.start(box)
        life.session = life.session or await box.new()
        life.made = box.made
        await box.prompt(life.session, HELLO)
        life.request = request_for(box, "hello there")
        await box.prompt(life.session, f"remember {LATER}")
        await box.prompt(life.session, cli.run)
        life.where = [str(path.relative_to(box.directory)) for path in box.directory.rglob("here")]
        if earlier:
            life.loaded = await reopened(box, earlier)
        await keep(box, life)
    return life


async def reopened(box: Box, session: str) -> str:
    """What an earlier conversation holds, as the agent says it and as the model is told."""
    box.gate.forget()
    said = await box.load(session)
    await box.prompt(session, "go on")
    return f"{said} / {json.dumps(request_for(box, 'go on')['body'])}"


async def keep(box: Box, life: Life) -> None:
    """Ends the sandbox; its home may leave then."""
    await box.end()
    life.words = box.last_words
    life.blank = holding(box.blank, LATER) if box.blank.exists() else []
    aged(copy_home(box.home, life.home))


def aged(home: Path) -> None:
    """Gemini CLI names its histories by the minute; one that is loaded within the minute that it began in is lost."""
    for path in home.glob(".gemini/tmp/*/chats/session-*"):
        path.rename(path.with_name(re.sub(r"^session-\d{4}", "session-2025", path.name)))


async def next_life(cli: Cli, root: Path, life: Life) -> str:
    """What a later agent in that home knows of the conversation."""
    async with boxed(root) as box:
        box.move_in(copy_home(life.home, root / uuid.uuid4().hex))
        await cli.start(box)
        try:
            listed = await box.rpc.call("session/list", {})
        except RpcError:
            listed = {}
        known = [session["sessionId"] for session in listed.get("sessions", [])]
        assert life.session in known or not listed, "it is listed"
        return await reopened(box, life.session)


def alike(value: Any) -> str:
    """JSON without what differs from start to start: ids, hashes, times."""
    text = json.dumps(value, indent=1, sort_keys=True)
    text = re.sub(
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{64}|cch=[0-9a-f]+|ses_\w+", "ID", text
    )
    return re.sub(r"\d{4}-\d\d-\d\d[T ][0-9:.]+Z?|\b1[78]\d{11}\b", "TIME", text)
