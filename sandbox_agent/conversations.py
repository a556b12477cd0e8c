"""ACP sessions ("conversations" here, since a Cortex session holds several) and what was asked in them.

State only, no I/O: it is taken from the journal when the agent server starts and put at the head
of each new journal file.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.jsonrpc import Message
from sandbox_agent.records import Record
from sandbox_agent.servers import Opened

if TYPE_CHECKING:
    from sandbox_agent.clients import Client

MAX_CONVERSATIONS = 1024
MAX_STATE_BYTES = 65_536
"""Modes and options of one conversation that are kept. Every journal file begins with all that is kept."""
MAX_CHOICES = 64
MAX_CHOICE_BYTES = 1024
"""What clients have chosen in one conversation, that is kept."""
MAX_OUTCOME_BYTES = 4096
MAX_OUTCOMES = 512
"""Finished prompts with a message id that are remembered."""
MAX_EXTRAS = 32
"""Conversations whose modes and options go into the head of a new journal file."""
TITLE_LENGTH = 80

WhenLive = Callable[[Message | None], None]
"""Called with None when the agent has the conversation, else with the error."""


@dataclass(eq=False)
class Turn:
    """A prompt that was accepted and is not over. ``waiters``: client numbers and the ids of their requests."""

    conversation: Conversation
    seq: int
    message_id: str
    params: Message
    waiters: list[tuple[int, Any]]
    call: int = 0
    """Id of the request at the agent, 0 until it is given to it."""
    cancelled: bool = False
    """The agent was told to end it."""
    waits: bool = False
    """For MCP servers; ``impatient``: it has waited long enough."""
    impatient: bool = False


@dataclass(eq=False)
class Conversation:
    """One ACP session. ``id`` is the clients' name for it, ``agent_id`` the agent's; they differ only
    after the agent has lost it. ``extras``: the rest of the agent's answer to ``session/new``."""

    number: int
    id: str
    agent_id: str
    cwd: str
    title: str = ""
    at: float = 0.0
    first: int = 0
    """Journal position before its first record."""
    extras: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    """What clients have chosen, see ``choices``."""
    live: bool = False
    """The agent process that runs now has it."""
    servers: list[dict[str, Any]] = field(default_factory=list)
    """MCP servers that a client was allowed to add."""
    opened: Opened = field(default_factory=Opened)
    """Versions of the configured MCP servers that the agent opened it with."""
    tools: int = -1
    """Version of the configured tools that its last prompt has waited for; -1: there was none since it was opened."""
    blank: bool = False
    """It was made here and nothing was said in it yet."""
    restoring: bool = False
    refreshing: bool = False
    """It is opened again for other MCP servers; if that fails it goes on as it was."""
    quiet: bool = False
    """What the agent says of it is its own replay and goes to nobody."""
    turn: Turn | None = None
    queue: deque[Turn] = field(default_factory=deque)
    subscribers: set[Client] = field(default_factory=set)
    when_live: list[WhenLive] = field(default_factory=list)

    def went_live(self, opened: Opened) -> None:
        """The agent has opened it."""
        self.live, self.tools = True, -1
        self.opened = opened

    def saved(self) -> dict[str, Any]:
        """What the journal keeps."""
        return {
            "number": self.number,
            "id": self.id,
            "agent_id": self.agent_id,
            "cwd": self.cwd,
            "title": self.title,
            "at": self.at,
            "first": self.first,
            "extras": self.extras,
            "chosen": self.chosen,
        }

    def info(self) -> dict[str, Any]:
        """ACP ``SessionInfo``."""
        info: dict[str, Any] = {"sessionId": self.id, "cwd": self.cwd}
        if self.title:
            info["title"] = self.title
        if self.at:
            info["updatedAt"] = datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return info

    def take_extras(self, result: Any) -> None:
        """Keeps what the agent answered to ``session/new``, ``load`` or ``resume`` besides the id."""
        if isinstance(result, dict):
            self._keep({k: v for k, v in result.items() if k not in ("sessionId", "_meta") and v is not None})

    def _keep(self, extras: dict[str, Any]) -> None:
        extras = {**self.extras, **extras}
        if len(jsonrpc.dumps(extras)) <= MAX_STATE_BYTES:
            self.extras = extras

    def track(self, update: Any) -> bool:
        """Follows an update that changes what ``session/list`` or ``load`` say; True when it did."""
        if not isinstance(update, dict):
            return False
        what = update.get("sessionUpdate")
        if what == "current_mode_update":
            return self.set_mode(update.get("currentModeId"))
        if what == "config_option_update" and isinstance(update.get("configOptions"), list):
            self.set_options(update["configOptions"])
            return True
        if what == "session_info_update" and isinstance(update.get("title"), str):
            self.title = update["title"][:TITLE_LENGTH]
            return True
        return False

    def set_mode(self, mode: Any) -> bool:
        """Notes the mode that is on; True when modes are known and it is a name."""
        modes = self.extras.get("modes")
        if not isinstance(modes, dict) or not isinstance(mode, str):
            return False
        self._keep({"modes": {**modes, "currentModeId": mode}})
        return True

    def set_model(self, model: Any) -> bool:
        """Notes the model that is chosen; True when models are known and it is a name."""
        models = self.extras.get("models")
        if not isinstance(models, dict) or not isinstance(model, str):
            return False
        self._keep({"models": {**models, "currentModelId": model}})
        return True

    def set_options(self, options: Any) -> None:
        """Notes the configuration options as they are now."""
        self._keep({"configOptions": options})


class Conversations:
    """All of them, by the clients' id, by the agent's and by number; and the prompts by message id."""

    def __init__(self) -> None:
        self.by_id: dict[str, Conversation] = {}
        self.by_agent_id: dict[str, Conversation] = {}
        self.by_number: dict[int, Conversation] = {}
        self.next_client = 1
        self._next_number = 1
        self._prompts: OrderedDict[tuple[int, str], Turn | Message] = OrderedDict()
        self._open: dict[int, tuple[int, str, bool]] = {}

    def add(self, session_id: str, cwd: str, *, first: int, at: float) -> Conversation:
        """A new conversation; the clients' id for it is the agent's, unless that is taken.

        The oldest idle one may be forgotten for it.
        """
        public = session_id
        if session_id in self.by_id:  # an agent that starts numbering anew
            public = f"{session_id}.{self._next_number}"
        found = Conversation(self._next_number, public, session_id, cwd, at=at, first=first)
        self._next_number += 1
        self._put(found)
        if len(self.by_id) > MAX_CONVERSATIONS:
            idle = self._idle()
            idle.remove(found)
            if idle:
                self.remove(min(idle, key=lambda c: c.at))
        return found

    def named(self, params: Message) -> Conversation | None:
        """The one that ``sessionId`` in a client's params names."""
        session_id = params.get("sessionId")
        return self.by_id.get(session_id) if isinstance(session_id, str) else None

    @property
    def full(self) -> bool:
        """There is room for no more: as many as may be, and all of them in use."""
        return len(self.by_id) >= MAX_CONVERSATIONS and not self._idle()

    def _idle(self) -> list[Conversation]:
        return [c for c in self.by_id.values() if not c.subscribers and c.turn is None and not c.restoring]

    def _put(self, conversation: Conversation) -> None:
        for old in (self.by_id.get(conversation.id), self.by_number.get(conversation.number)):
            if old is not None:
                self.remove(old)
        self.by_id[conversation.id] = conversation
        self._name(conversation, conversation.agent_id)
        self.by_number[conversation.number] = conversation
        self._next_number = max(self._next_number, conversation.number + 1)

    def _name(self, conversation: Conversation, agent_id: str) -> None:
        """An agent id means the conversation that got it last: an agent may number anew."""
        older = self.by_agent_id.get(agent_id)
        if older is not None and older is not conversation:
            older.agent_id, older.live = "", False
        conversation.agent_id = agent_id
        if agent_id:
            self.by_agent_id[agent_id] = conversation

    def remove(self, conversation: Conversation) -> None:
        """Forgets it."""
        self.by_id.pop(conversation.id, None)
        self.by_number.pop(conversation.number, None)
        if self.by_agent_id.get(conversation.agent_id) is conversation:
            del self.by_agent_id[conversation.agent_id]

    def rename(self, conversation: Conversation, agent_id: str) -> None:
        """The agent knows it by another id from now on."""
        if self.by_agent_id.get(conversation.agent_id) is conversation:
            del self.by_agent_id[conversation.agent_id]
        self._name(conversation, agent_id)

    def page(self, cursor: int, size: int) -> tuple[list[Conversation], int]:
        """The newest first, from ``cursor`` on, and the next cursor (0 at the end)."""
        ordered = sorted(self.by_id.values(), key=lambda c: (c.at, c.number), reverse=True)
        following = cursor + size if cursor + size < len(ordered) else 0
        return ordered[cursor : cursor + size], following

    # -- prompts that run once -------------------------------------------------------------------

    def prompt_known(self, conversation: Conversation, message_id: str) -> Turn | Message | None:
        """The turn that runs for this message id, or how it ended (``result`` or ``error``)."""
        return self._prompts.get((conversation.number, message_id)) if message_id else None

    def prompt_opened(self, turn: Turn) -> None:
        """Accepted."""
        number = turn.conversation.number
        self._open[turn.seq] = (number, turn.message_id, False)
        if turn.message_id:
            self._prompts[number, turn.message_id] = turn

    def prompt_started(self, turn: Turn) -> None:
        """Given to the agent."""
        if turn.seq in self._open:
            self._open[turn.seq] = (*self._open[turn.seq][:2], True)

    def prompt_ended(self, turn: Turn, outcome: Message | None) -> None:
        """Over; ``outcome`` None: it never ran and may be sent again."""
        self._open.pop(turn.seq, None)
        self._ended(turn.conversation.number, turn.message_id, outcome)

    def _ended(self, number: int, message_id: str, outcome: Message | None) -> None:
        if not message_id:
            return
        self._prompts.pop((number, message_id), None)
        if outcome is None:
            return
        if len(jsonrpc.dumps(outcome)) > MAX_OUTCOME_BYTES:
            outcome = _shortened(outcome)
        self._prompts[number, message_id] = outcome
        if len(self._prompts) > MAX_OUTCOMES:
            done = next((key for key, value in self._prompts.items() if not isinstance(value, Turn)), None)
            if done is not None:
                del self._prompts[done]

    # -- to and from the journal -----------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All that a new journal file has to begin with."""
        recent = {c.number for c in self.page(0, MAX_EXTRAS)[0]}
        return {
            "next_client": self.next_client,
            "next_number": self._next_number,
            "conversations": [
                c.saved() if c.number in recent else {**c.saved(), "extras": {}} for c in self.by_id.values()
            ],
            "prompts": [[*key, value] for key, value in self._prompts.items() if not isinstance(value, Turn)],
            "open": [[seq, *rest] for seq, rest in self._open.items()],
        }

    def restore(self, state: dict[str, Any], later: list[Record]) -> list[tuple[int, int, str]]:
        """Takes over a snapshot and the records after it.

        Returns the prompts that an agent was given and that never ended, as (seq, conversation number,
        message id); the ones that no agent was given are forgotten.
        """
        self.next_client = max(1, state.get("next_client", 1))
        self._next_number = max(1, state.get("next_number", 1))
        for saved in state.get("conversations", []):
            self._put(Conversation(**saved))
        for number, message_id, outcome in state.get("prompts", []):
            self._prompts[number, message_id] = outcome
        for seq, number, message_id, started in state.get("open", []):
            self._open[seq] = (number, message_id, started)
        for record in later:
            self._replay(record, json.loads(record.body))
        interrupted = [(seq, number, mid) for seq, (number, mid, started) in self._open.items() if started]
        self._open = {}
        return interrupted

    def _replay(self, record: Record, body: dict[str, Any]) -> None:
        number = record.conversation
        if record.kind == records.PROMPT:
            self._open[record.seq] = (number, body.get("message_id", ""), False)
            if number in self.by_number:
                self.by_number[number].at = body.get("at", 0.0)
        elif record.kind == records.STARTED:
            known = self._open.get(body["of"])
            if known is not None:
                self._open[body["of"]] = (known[0], known[1], True)
        elif record.kind == records.END:
            self._open.pop(body["of"], None)
            outcome: Message = {key: body[key] for key in ("result", "error") if key in body}
            self._ended(number, body.get("message_id", ""), outcome or None)
        elif record.kind == records.CLIENT:
            self.next_client = max(self.next_client, body["number"] + 1)
        elif body.get("deleted"):
            if number in self.by_number:
                self.remove(self.by_number[number])
        else:
            self._put(Conversation(**body))

    def interrupted_ended(self, number: int, message_id: str, outcome: Message) -> None:
        """A prompt of an earlier agent server ended without an answer."""
        self._ended(number, message_id, outcome)


def _shortened(outcome: Message) -> Message:
    """What an outsized answer to a prompt came to."""
    if "error" in outcome:
        error = jsonrpc.safe_error(outcome["error"])
        return {"error": {"code": error["code"], "message": error["message"][:1000]}}
    result = outcome.get("result")
    reason = result.get("stopReason") if isinstance(result, dict) else None
    return {"result": {"stopReason": reason if isinstance(reason, str) and len(reason) < 100 else "end_turn"}}


def title_of(prompt: Any) -> str:
    """A title from a prompt's first text: its first line, shortened."""
    for block in prompt if isinstance(prompt, list) else []:
        if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str):
            line: str = block["text"].strip().split("\n", 1)[0].strip()
            return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1] + "…"
    return ""
