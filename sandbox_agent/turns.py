"""Prompts: accepted once, queued, given to the agent, answered, each step in the journal first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import AgentSide, failed
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversation, Conversations, Turn, title_of
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.restorer import Restorer
from sandbox_agent.servers import McpServers

TOOLS_S = 5.0
"""How long the first prompt of a conversation, or after a change of MCP servers, waits for their tools."""
MAX_WAITERS = 128
"""Requests that may wait for one turn's answer."""
DISK_FULL = jsonrpc.error(
    jsonrpc.SERVER_ERROR,
    "the session's journal has no space",
    slug="store.disk_full",
    hint="nothing that was answered is lost; free disk space on the host, then send it again",
)
INTERRUPTED = jsonrpc.error(
    jsonrpc.SERVER_ERROR,
    "the sandbox ended while the agent worked on this prompt",
    slug="agent.failed",
    hint="look at what was done so far, then send a new prompt with a new messageId",
)


class Turns:
    """``open``: how many turns run or wait; ``accepted``: how many prompts there were. ``on_change`` is called
    when these change."""

    def __init__(
        self,
        *,
        agent: AgentSide,
        outbox: Outbox,
        conversations: Conversations,
        restorer: Restorer,
        servers: McpServers,
        queue_length: int,
        on_change: Callable[[], None],
    ) -> None:
        self.open = 0
        self.accepted = 0
        self._agent = agent
        self._outbox = outbox
        self._conversations = conversations
        self._restorer = restorer
        self._servers = servers
        self._queue_length = queue_length
        self._on_change = on_change

    # -- accepting -------------------------------------------------------------------------------

    def prompt(self, client: Client, request_id: Any, conversation: Conversation, params: Message) -> None:
        """A client's ``session/prompt``; ``params`` as the client sent them."""
        message_id = jsonrpc.cortex_meta(params).get("messageId", "")
        if not isinstance(message_id, str) or len(message_id) > jsonrpc.MAX_ID:
            what = "_meta.cortex.messageId is no string of at most 1024 characters"
            self._outbox.answer(client, request_id, {"error": jsonrpc.invalid(what)})
            return
        known = self._conversations.prompt_known(conversation, message_id)
        if isinstance(known, Turn):
            self._join(known, client, request_id)
        elif known is not None:
            self._outbox.answer(client, request_id, known)
        elif not _is_content(params.get("prompt")):
            error = jsonrpc.invalid("prompt is not an array of content blocks")
            self._outbox.answer(client, request_id, {"error": error})
        elif conversation.turn is not None and len(conversation.queue) >= self._queue_length:
            error = jsonrpc.error(
                jsonrpc.SERVER_ERROR,
                f"{self._queue_length} prompts already wait in this conversation",
                slug="session.overloaded",
                hint="wait for the running turn, or cancel it with session/cancel",
            )
            self._outbox.answer(client, request_id, {"error": error})
        else:
            self._accept(client, request_id, conversation, params, message_id)

    def _join(self, turn: Turn, client: Client, request_id: Any) -> None:
        waiter = (self._outbox.number(client), request_id)
        if waiter in turn.waiters:
            return
        if len(turn.waiters) >= MAX_WAITERS:
            what = "too many requests wait for this turn"
            error = jsonrpc.error(jsonrpc.SERVER_ERROR, what, slug="session.overloaded", hint="wait for its answer")
            self._outbox.answer(client, request_id, {"error": error})
            return
        turn.waiters.append(waiter)

    def _accept(
        self, client: Client, request_id: Any, conversation: Conversation, params: Message, message_id: str
    ) -> None:
        if self._outbox.full:
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
            return
        number = self._outbox.number(client)
        start, at, title = self._outbox.position, time.time(), conversation.title
        body = {"message_id": message_id, "client": number, "id": request_id, "at": at}
        seq = self._outbox.note(records.PROMPT, body, conversation)
        if not conversation.title:
            conversation.title = title_of(params["prompt"])
            self._outbox.note(records.CONVERSATION, {**conversation.saved(), "at": at}, conversation)
        for block in filter(is_block, params["prompt"]):
            self._outbox.update(_said_by_user(conversation.id, block), conversation, without=client)
        if not self._outbox.commit(start):
            conversation.title = title
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
            return
        self._outbox.sync_soon()
        conversation.at = at
        turn = Turn(conversation, seq, message_id, params, [(number, request_id)])
        self._conversations.prompt_opened(turn)
        self.open += 1
        self.accepted += 1
        if conversation.turn is None:
            conversation.turn = turn
            self._start(turn)
        else:
            conversation.queue.append(turn)
        self._on_change()

    # -- running ---------------------------------------------------------------------------------

    def _start(self, turn: Turn) -> None:
        if not self._agent.ready or self._agent.congested:
            return  # ``kick`` comes when that has changed
        self._restorer.refresh(turn.conversation, for_turn=True)
        self._restorer.ensure(turn.conversation, lambda error: self._live(turn, error))

    def _live(self, turn: Turn, error: Message | None) -> None:
        if turn.conversation.turn is not turn or turn.call:
            return
        if error is not None:
            if self._agent.ready or self._agent.broken:
                self._finish(turn, error)
            return
        if self._waits_for_tools(turn):
            return
        if not self._note_start(turn):
            self._abandon(turn)
            return
        self._conversations.prompt_started(turn)
        turn.conversation.quiet = turn.conversation.blank = False
        turn.conversation.tools = self._servers.version
        params = {**jsonrpc.without_cortex(turn.params), "sessionId": turn.conversation.agent_id}
        turn.params = {}
        call = self._agent.call("session/prompt", params, lambda reply: self._finish(turn, reply), deadline=False)
        turn.call = call or -1

    def _waits_for_tools(self, turn: Turn) -> bool:
        """So that the user's tools are in the agent's next request; ``kick`` comes when they are there."""
        if turn.conversation.tools == self._servers.version or self._servers.settled or turn.impatient:
            return False
        if not turn.waits:
            turn.waits = True
            asyncio.get_running_loop().call_later(TOOLS_S, self._waited, turn)
        return True

    def _waited(self, turn: Turn) -> None:
        turn.impatient = True
        if turn.conversation.turn is turn and not turn.call:
            self._start(turn)
            self._outbox.flush()

    def _note_start(self, turn: Turn) -> bool:
        """Before the agent gets it: a prompt that it may have seen is never given to it again."""
        if self._outbox.full:
            return False
        start = self._outbox.position
        self._outbox.note(records.STARTED, {"of": turn.seq}, turn.conversation)
        return self._outbox.commit(start)

    def kick(self) -> None:
        """Starts what could not be started when it was due."""
        for conversation in list(self._conversations.by_number.values()):
            turn = conversation.turn
            if turn is not None and not turn.call and (turn.waits or not conversation.restoring):
                self._start(turn)

    # -- ending ----------------------------------------------------------------------------------

    def _finish(self, turn: Turn, outcome: Message) -> None:
        """Journals how it ended and answers everybody who waits; then the next one's turn.

        A prompt that failed before the agent had it may be sent again under its message id.
        """
        if turn.conversation.turn is not turn and turn not in turn.conversation.queue:
            return
        final = turn.call != 0 or "result" in outcome
        body = {"of": turn.seq, "message_id": turn.message_id if final else "", **outcome}
        self._outbox.note(records.END, body, turn.conversation)
        for number, request_id in turn.waiters:
            self._outbox.result(number, request_id, outcome, turn.conversation)
        self._conversations.prompt_ended(turn, outcome if final else None)
        self._outbox.flush()
        self._over(turn)

    def _abandon(self, turn: Turn) -> None:
        """There is no space to note that it starts, so it does not; it may be sent again."""
        for client, request_id in self._waiting(turn):
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
        self._conversations.prompt_ended(turn, None)
        self._over(turn)

    def _over(self, turn: Turn) -> None:
        conversation = turn.conversation
        self.open -= 1
        if conversation.turn is turn:
            conversation.turn = conversation.queue.popleft() if conversation.queue else None
            if conversation.turn is not None:
                self._start(conversation.turn)
        else:
            conversation.queue.remove(turn)
        self._on_change()

    def _waiting(self, turn: Turn) -> list[tuple[Client, Any]]:
        clients = {client.number: client for client in self._outbox.clients}
        return [(clients[number], request_id) for number, request_id in turn.waiters if number in clients]

    def cancel(self, conversation: Conversation, client: Client) -> None:
        """``session/cancel``: what this client has waiting ends at once, the agent is told to end what runs."""
        for turn in [turn for turn in conversation.queue if any(n == client.number for n, _ in turn.waiters)]:
            self._finish(turn, {"result": {"stopReason": "cancelled"}})
        self._cancel_running(conversation)

    def _cancel_running(self, conversation: Conversation) -> None:
        turn = conversation.turn
        if turn is None:
            return
        if turn.call:
            turn.cancelled = True
            self._agent.notify("session/cancel", {"sessionId": conversation.agent_id})
        else:
            self._finish(turn, {"result": {"stopReason": "cancelled"}})

    def cancel_all(self, conversation: Conversation) -> None:
        """Ends everything in the conversation."""
        for turn in list(conversation.queue):
            self._finish(turn, {"result": {"stopReason": "cancelled"}})
        self._cancel_running(conversation)

    def cancel_request(self, client: Client, request_id: Any) -> bool:
        """``$/cancel_request`` for a prompt; False if no prompt of that client has this id."""
        for conversation in self._conversations.by_number.values():
            for turn in [conversation.turn, *conversation.queue]:
                if turn is not None and (client.number, request_id) in turn.waiters:
                    self._cancel_turn(turn)
                    return True
        return False

    def _cancel_turn(self, turn: Turn) -> None:
        if turn.call:
            self._agent.notify("$/cancel_request", {"requestId": turn.call})
        else:
            self._finish(turn, {"error": jsonrpc.error(jsonrpc.CANCELLED, "cancelled")})

    def agent_down(self, what: str, *, final: bool) -> None:
        """Turns that the agent had have been answered by its side; without an agent the rest end too."""
        if not final:
            return
        for conversation in list(self._conversations.by_number.values()):
            while conversation.turn is not None:
                self._finish(conversation.turn, failed(f"the agent could not be started: {what}"))

    def out_of_space(self) -> None:
        """The disk stayed full: whoever waits is told, and the agent is asked to stop."""
        for conversation in list(self._conversations.by_number.values()):
            for waiting in list(conversation.queue):
                self._abandon(waiting)
            turn = conversation.turn
            if turn is None:
                continue
            if not turn.call:
                self._abandon(turn)
                continue
            for client, request_id in self._waiting(turn):
                self._outbox.answer(client, request_id, {"error": DISK_FULL})
            turn.waiters.clear()
            self._agent.notify("session/cancel", {"sessionId": conversation.agent_id})


def _is_content(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(block, dict) for block in prompt)


_BLOCKS: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "image": {"data": str, "mimeType": str},
    "audio": {"data": str, "mimeType": str},
    "resource_link": {"name": str, "uri": str},
    "resource": {"resource": dict},
}


def is_block(block: Message) -> bool:
    """A content block as ACP has them: others are the agent's to judge, and no other client is shown them."""
    kind = block.get("type")
    fields = _BLOCKS.get(kind) if isinstance(kind, str) else None
    if fields is None or not all(isinstance(block.get(name), what) for name, what in fields.items()):
        return False
    held = block.get("resource", {})
    return kind != "resource" or (
        isinstance(held.get("uri"), str) and (isinstance(held.get("text"), str) or isinstance(held.get("blob"), str))
    )


def _said_by_user(session_id: str, block: Any) -> Message:
    """What other clients, and history, see of a prompt."""
    update = {"sessionUpdate": "user_message_chunk", "content": block}
    return {"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": session_id, "update": update}}
