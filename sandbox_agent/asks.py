"""What the agent asks of clients (permissions above all): delivered to all, answered by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import AgentSide
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversation, Conversations
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox

MAX_OPEN = 256
PERMISSION = "session/request_permission"
CANCELLED: Message = {"result": {"outcome": {"outcome": "cancelled"}}}


@dataclass(eq=False)
class Ask:
    """A request of the agent's that is open. ``seq`` is its id towards clients."""

    seq: int
    agent_id: Any
    method: str
    conversation: Conversation | None
    data: bytes
    delivered: set[Client] = field(default_factory=set)
    declined: set[Client] = field(default_factory=set)


class Asks:
    """The agent's open requests."""

    def __init__(self, *, agent: AgentSide, outbox: Outbox, conversations: Conversations) -> None:
        self._agent = agent
        self._outbox = outbox
        self._conversations = conversations
        self._open: dict[int, Ask] = {}

    def refused(self, message: Message) -> bool:
        """Whether a request from the agent is one that nobody is asked; it has its answer then."""
        refusal = self._refusal(message["method"])
        if refusal is not None:
            self._agent.respond(message["id"], {"error": refusal})
        return refusal is not None

    def ask(self, message: Message) -> None:
        """A request from the agent, already known to be one, and not ``refused``."""
        params = message.get("params")
        session_id = params.get("sessionId") if isinstance(params, dict) else None
        conversation = self._conversations.by_agent_id.get(session_id) if isinstance(session_id, str) else None
        if conversation is None and session_id is not None:
            error = jsonrpc.error(jsonrpc.INVALID_PARAMS, "no such session")
            self._agent.respond(message["id"], {"error": error})
            return
        turn = conversation.turn if conversation is not None else None
        if turn is not None and turn.cancelled and message["method"] == PERMISSION:
            self._agent.respond(message["id"], CANCELLED)  # it crossed the cancel
            return
        if conversation is not None and isinstance(params, dict):
            message = {**message, "params": {**params, "sessionId": conversation.id}}
        seq, data = self._outbox.request(message, conversation)
        if not data:
            self._agent.respond(message["id"], {"error": jsonrpc.error(jsonrpc.SERVER_ERROR, "too large a request")})
            return
        ask = self._open[seq] = Ask(seq, message["id"], message["method"], conversation, data)
        ask.delivered |= self._audience(ask)

    def _refusal(self, method: str) -> dict[str, Any] | None:
        if method.startswith(("fs/", "terminal/", "_cortex/")):
            return jsonrpc.error(
                jsonrpc.METHOD_NOT_FOUND,
                f"{method[:100]} is not offered",
                slug="access.forbidden",
                hint="files and commands are the sandbox's own; it never acts on a client's machine",
            )
        if len(self._open) >= MAX_OPEN:
            return jsonrpc.error(jsonrpc.SERVER_ERROR, "too many open requests", slug="session.overloaded")
        return None

    def answered(self, client: Client, message: Message) -> None:
        """A client's response. One that cannot (an error) counts only when no other client is left to ask."""
        seq = message["id"]
        ask = self._open.get(seq) if isinstance(seq, int) else None
        if ask is None or client not in self._audience(ask):
            return
        outcome: Message = {"error": jsonrpc.safe_error(message["error"])} if "error" in message else {}
        if outcome:
            ask.declined.add(client)
            if self._audience(ask) - ask.declined:
                return
        else:
            outcome = {"result": message["result"]}
            if ask.method == PERMISSION and not isinstance(message["result"], dict):
                outcome = CANCELLED
        self._agent.respond(ask.agent_id, outcome)
        self._close(ask, answered_by=client)

    def _audience(self, ask: Ask) -> set[Client]:
        return ask.conversation.subscribers if ask.conversation is not None else self._outbox.clients

    def _close(self, ask: Ask, *, answered_by: Client | None) -> None:
        """The others are told that it needs no answer any more."""
        del self._open[ask.seq]
        notice = {"jsonrpc": "2.0", "method": "$/cancel_request", "params": {"requestId": ask.seq}}
        self._outbox.update(notice, ask.conversation, kind=records.NOTICE, without=answered_by)

    def deliver(self, client: Client, conversation: Conversation | None) -> None:
        """What is open there and was not yet asked on this connection, to a client that has come (back)."""
        for ask in self._open.values():
            if ask.conversation is conversation and client not in ask.delivered and not client.gone:
                ask.delivered.add(client)
                self._outbox.repeat(client, ask.data)

    def left(self, client: Client, conversation: Conversation | None = None) -> None:
        """The client has closed the conversation, or, with none named, its connection."""
        for ask in self._open.values():
            if conversation is None or ask.conversation is conversation:
                ask.delivered.discard(client)
                ask.declined.discard(client)

    def cancel(self, conversation: Conversation) -> None:
        """The turn is cancelled: permissions that are asked for in it are answered so, as ACP wants."""
        for ask in [ask for ask in self._open.values() if ask.conversation is conversation]:
            if ask.method == PERMISSION:
                self._agent.respond(ask.agent_id, CANCELLED)
                self._close(ask, answered_by=None)

    def deleted(self, conversation: Conversation) -> None:
        """Nobody can be asked any more."""
        self.cancel(conversation)
        for ask in [ask for ask in self._open.values() if ask.conversation is conversation]:
            self._withdraw(ask)

    def withdrawn(self, request_id: Any) -> None:
        """The agent's own ``$/cancel_request``."""
        for ask in [ask for ask in self._open.values() if ask.agent_id == request_id]:
            self._withdraw(ask)

    def _withdraw(self, ask: Ask) -> None:
        self._agent.respond(ask.agent_id, {"error": jsonrpc.error(jsonrpc.CANCELLED, "cancelled")})
        self._close(ask, answered_by=None)

    def agent_down(self) -> None:
        """Nobody waits for the answers any more."""
        for ask in list(self._open.values()):
            self._close(ask, answered_by=None)
