"""Requests of clients on their way to the agent, and its answers on their way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc
from sandbox_agent.agent_side import AgentSide, failed
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversation
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.turns import DISK_FULL

MAX_CLIENT_CALLS = 256
"""Requests of one client that may be open at the agent."""
MAX_CALLS = 1024
"""Requests open at the agent over which clients' are refused; prompts have their own bound."""
HURRIED = ("session/", "initialize")
"""Methods that an agent has to answer within its deadline; others may be long by design."""
LONG_S = 3600.0


class ClientCalls:
    """What is open for a client stands in its ``calls``."""

    def __init__(self, *, agent: AgentSide, outbox: Outbox) -> None:
        self._agent = agent
        self._outbox = outbox

    def forward(
        self,
        client: Client,
        request_id: Any,
        method: str,
        params: Any,
        found: Conversation | None,
        replied: Callable[[Message], None] | None = None,
    ) -> bool:
        """Asks the agent for the client; False when that was refused and answered."""
        if not self._possible(client, request_id):
            return False
        if len(client.calls) >= MAX_CLIENT_CALLS or self._agent.open_calls >= MAX_CALLS:
            what = "too many open requests"
            self.refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", "wait for answers first")
            return False
        self._outbox.number(client)
        token = object()

        def done(reply: Message) -> None:
            client.calls.pop(token, None)
            if replied is not None:
                replied(reply)
            else:
                self.give(client, request_id, reply, found)

        within_s = 0.0 if method.startswith(HURRIED) else LONG_S
        call = self._agent.call(method, params, done, within_s=within_s)
        client.calls[token] = (method, request_id, call)
        return True

    def _possible(self, client: Client, request_id: Any) -> bool:
        if self._outbox.full:
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
        elif self._agent.broken:
            self._outbox.answer(client, request_id, failed(self._agent.broken))
        else:
            return True
        return False

    def waits(self, client: Client, request_id: Any, method: str) -> Callable[[], None]:
        """Counts a request that waits for what was asked before it; call the result when it does not any more."""
        self._outbox.number(client)
        token = object()
        client.calls[token] = (method, request_id, 0)

        def over() -> None:
            client.calls.pop(token, None)

        return over

    def give(self, client: Client, request_id: Any, outcome: Message, found: Conversation | None) -> None:
        """The agent's answer to the client, by way of the journal; straight when that has no space."""
        start = self._outbox.position
        self._outbox.result(client.number, request_id, outcome, found)
        if not self._outbox.commit(start):
            self._outbox.answer(client, request_id, outcome)

    def refuse(self, client: Client, request_id: Any, code: int, what: str, slug: str = "", hint: str = "") -> None:
        """Answers with an error of our own; without a slug the request itself is at fault."""
        error = jsonrpc.error(code, what, slug=slug, hint=hint) if slug else jsonrpc.invalid(what, code)
        self._outbox.answer(client, request_id, {"error": error})

    def not_found(self, client: Client, request_id: Any) -> None:
        """There is no such conversation."""
        self.refuse(client, request_id, jsonrpc.NOT_FOUND, "no such session", "session.not_found", "see session/list")

    def cancel(self, client: Client, request_id: Any) -> None:
        """``$/cancel_request`` for what is open at the agent."""
        for _, theirs, call in client.calls.values():
            if theirs == request_id and call:
                self._agent.notify("$/cancel_request", {"requestId": call})
