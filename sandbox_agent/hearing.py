"""What the agent says: told apart, kept while it has no place yet, handed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from sandbox_agent import choices, jsonrpc, records
from sandbox_agent.agent_side import AgentSide
from sandbox_agent.ahead import Ahead
from sandbox_agent.asks import Asks
from sandbox_agent.conversations import Conversations
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox

MAX_EARLY = 1000
"""Lines that wait for the journal, or for the answer that names their session."""
UPDATE = "notification"


def is_update(message: Any) -> bool:
    """The commonest message by far, told at a glance; ``jsonrpc.kind`` would say the same."""
    return (
        type(message) is dict
        and message.get("method") == "session/update"
        and "id" not in message
        and message.get("jsonrpc") == "2.0"
        and type(message.get("params")) is dict
    )


class Hearing:
    """``opened``: the journal is there. ``making`` tells whether a call is under way that will name a session.

    ``garbage``: lines that were no messages or that nobody asked for.
    """

    def __init__(
        self,
        *,
        agent: AgentSide,
        asks: Asks,
        outbox: Outbox,
        conversations: Conversations,
        making: Callable[[], bool],
        limit: int,
    ) -> None:
        self.garbage = 0
        self.opened = False
        self.ahead: Ahead
        self._agent = agent
        self._asks = asks
        self._outbox = outbox
        self._conversations = conversations
        self._making = making
        self._limit = limit
        self._early: deque[bytes] = deque()
        self._orphans: deque[tuple[str, bytes]] = deque()

    def lines(self, lines: list[bytes]) -> None:
        """Whole lines of the agent's output."""
        for line in lines:
            self._line(line)

    def begin(self) -> None:
        """The journal is there: what waited for it goes on."""
        self.opened = True
        early, self._early = self._early, deque()
        self.lines(list(early))

    def session_named(self) -> None:
        """The agent has answered with a session's id: what it said of it before has a place now."""
        orphans, self._orphans = self._orphans, deque()
        for session_id, line in orphans:
            if session_id == self.ahead.agent_id or session_id in self._conversations.by_agent_id:
                self._line(line)
            elif self._making():
                self._orphans.append((session_id, line))

    def agent_down(self) -> None:
        """What waits is of no use any more."""
        self._early.clear()
        self._orphans.clear()

    def _line(self, line: bytes) -> None:
        if len(line) > self._limit - jsonrpc.STAMP_BYTES:
            self.garbage += 1
            return
        try:
            message = jsonrpc.parse(line)
            kind = UPDATE if is_update(message) else jsonrpc.kind(message)
        except ValueError:
            self.garbage += 1
            return
        if kind == "response":
            if not self._agent.answered(message):
                self.garbage += 1
        elif kind == "request":
            if not self._asks.refused(message):
                self._request(line, message)
        else:
            self._notified(line, message)

    def _request(self, line: bytes, message: Message) -> None:
        if self.opened:
            self._asks.ask(message)
        else:
            self._keep_early(line)

    def _keep_early(self, line: bytes) -> None:
        if len(self._early) < MAX_EARLY:
            self._early.append(line)

    def _notified(self, line: bytes, message: Message) -> None:
        method, params = message["method"], message.get("params")
        if method.startswith(("_cortex/", "$/")):
            if method == "$/cancel_request" and isinstance(params, dict):
                self._asks.withdrawn(params.get("requestId"))
        elif isinstance(params, dict) and "sessionId" in params:
            session_id = params["sessionId"]
            if isinstance(session_id, str) and isinstance(params.get("update", {}), dict):
                self._said_of(session_id, line, message)
            else:
                self.garbage += 1
        elif method.startswith("session/"):
            self.garbage += 1
        elif self.opened:
            self._outbox.update(message, None, raw=line)
        else:
            self._keep_early(line)

    def _said_of(self, session_id: str, line: bytes, message: Message) -> None:
        if session_id == self.ahead.agent_id:
            self.ahead.heard(line)
            return
        conversation = self._conversations.by_agent_id.get(session_id)
        if conversation is None:
            self._orphan(session_id, line)
        elif not conversation.quiet:
            params = message["params"]
            if conversation.id != session_id:
                message, line = {**message, "params": {**params, "sessionId": conversation.id}}, b""
            self._outbox.update(message, conversation, raw=line)
            if conversation.track(params.get("update")):
                if not conversation.restoring:  # what an agent begins with was not chosen
                    choices.said_by_agent(conversation)
                self._outbox.note(records.CONVERSATION, conversation.saved(), conversation)

    def _orphan(self, session_id: str, line: bytes) -> None:
        """Said of a session whose ``session/new`` is not answered yet: kept until it is."""
        if self._making() and len(self._orphans) < MAX_EARLY:
            self._orphans.append((session_id, line))
        else:
            self.garbage += 1
