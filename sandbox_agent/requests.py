"""What clients ask for: each ACP method, answered here, from the journal, or by the agent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sandbox_agent import choices, jsonrpc, records
from sandbox_agent.agent_side import AgentSide, failed
from sandbox_agent.asks import Asks
from sandbox_agent.calls import ClientCalls
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversations
from sandbox_agent.jsonrpc import Message
from sandbox_agent.opening import Opening
from sandbox_agent.outbox import Outbox
from sandbox_agent.restorer import Restorer
from sandbox_agent.settings import AgentSettings
from sandbox_agent.turns import DISK_FULL, Turns

PAGE = 100
"""Conversations in one answer to ``session/list``."""
REFUSED = ("authenticate", "logout", "providers/", "auth/")
NO_NOTIFICATIONS = ("$/", "_cortex/", "session/", "initialize", *REFUSED)
Handler = Callable[[Client, Any, Message], None]


class Requests:
    """Requests from clients, once the agent server is ready for them."""

    def __init__(
        self,
        *,
        agent: AgentSide,
        calls: ClientCalls,
        opening: Opening,
        outbox: Outbox,
        conversations: Conversations,
        restorer: Restorer,
        turns: Turns,
        asks: Asks,
        settings: AgentSettings,
    ) -> None:
        self._agent = agent
        self._calls = calls
        self._outbox = outbox
        self._conversations = conversations
        self._restorer = restorer
        self._turns = turns
        self._asks = asks
        self._settings = settings
        self._handlers: dict[str, Handler] = {
            "initialize": self._initialize,
            "session/new": partial(opening.new, "session/new"),
            "session/fork": partial(opening.new, "session/fork"),
            "session/load": partial(opening.load, "session/load"),
            "session/resume": partial(opening.load, "session/resume"),
            "session/list": self._list,
            "session/close": self._close,
            "session/delete": self._delete,
            "session/prompt": self._prompt,
        }

    def handle(self, client: Client, message: Message) -> None:
        """One request. Everything it leads to is answered, now or later."""
        method, request_id = message["method"], message["id"]
        params = message.get("params")
        handler = self._handlers.get(method)
        if handler is not None:
            if not isinstance(params, dict):
                self._calls.refuse(client, request_id, jsonrpc.INVALID_PARAMS, "params is not an object")
            else:
                handler(client, request_id, params)
        elif method.startswith(REFUSED):
            error = jsonrpc.error(
                jsonrpc.METHOD_NOT_FOUND,
                f"{method[:100]} is not offered here",
                slug="access.forbidden",
                hint="credentials are kept outside the sandbox; nobody has to sign in at the agent",
            )
            self._outbox.answer(client, request_id, {"error": error})
        elif method.startswith("_cortex/"):
            self._calls.refuse(client, request_id, jsonrpc.METHOD_NOT_FOUND, f"unknown method {method[:100]}")
        else:
            self._other(client, request_id, method, params)

    # -- initialize ------------------------------------------------------------------------------

    def _initialize(self, client: Client, request_id: Any, params: Message) -> None:
        version = params.get("protocolVersion")
        if isinstance(version, bool) or not isinstance(version, int):
            self._calls.refuse(client, request_id, jsonrpc.INVALID_PARAMS, "protocolVersion is not an integer")
        elif not self._agent.info:
            self._outbox.answer(client, request_id, failed(self._agent.broken))
        else:
            self._outbox.answer(client, request_id, {"result": offered(self._agent.info)})
            self._asks.deliver(client, None)

    # -- conversations ---------------------------------------------------------------------------

    def _list(self, client: Client, request_id: Any, params: Message) -> None:
        cursor = params.get("cursor") or "0"
        if not isinstance(cursor, str) or not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9:
            self._calls.refuse(client, request_id, jsonrpc.INVALID_PARAMS, "cursor is not one that was given out")
            return
        found, following = self._conversations.page(int(cursor), PAGE)
        result: Message = {"sessions": [conversation.info() for conversation in found]}
        if following:
            result["nextCursor"] = str(following)
        self._outbox.answer(client, request_id, {"result": result})

    def _close(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversations.named(params)
        if found is None:
            self._calls.not_found(client, request_id)
            return
        found.subscribers.discard(client)
        client.subscriptions.pop(found.number, None)
        self._asks.left(client, found)
        if not found.subscribers:
            self._asks.cancel(found)
            self._turns.cancel_all(found)
        if found.subscribers or not found.live or not self._agent.can("close"):
            self._outbox.answer(client, request_id, {"result": {}})
            return
        found.live = False
        wanted = {**jsonrpc.without_cortex(params), "sessionId": found.agent_id}
        self._calls.forward(client, request_id, "session/close", wanted, found)

    def _delete(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversations.named(params)
        if found is None:
            self._calls.not_found(client, request_id)
            return
        self._asks.deleted(found)
        self._turns.cancel_all(found)
        start = self._outbox.position
        self._outbox.note(records.CONVERSATION, {"deleted": True}, found)
        if not self._outbox.commit(start):
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
            return
        self._conversations.remove(found)
        if self._agent.can("delete"):
            wanted = {**jsonrpc.without_cortex(params), "sessionId": found.agent_id}
            self._calls.forward(client, request_id, "session/delete", wanted, None)
        else:
            self._outbox.answer(client, request_id, {"result": {}})

    def _prompt(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversations.named(params)
        if found is None:
            self._calls.not_found(client, request_id)
        elif self._agent.broken:
            self._outbox.answer(client, request_id, failed(self._agent.broken))
        else:
            self._outbox.subscribe(client, found)
            self._asks.deliver(client, found)
            self._turns.prompt(client, request_id, found, params)

    # -- the rest --------------------------------------------------------------------------------

    def _other(self, client: Client, request_id: Any, method: str, params: Any) -> None:
        """Passed on, with the agent's session id, when the agent has that conversation."""
        if not isinstance(params, dict):
            self._calls.forward(client, request_id, method, params, None)
            return
        wanted = jsonrpc.without_cortex(params)
        if "cwd" in wanted:
            wanted = {**wanted, "cwd": self._settings.workspace.cwd(wanted["cwd"])}
        found = self._conversations.named(params)
        if found is None:
            if method.startswith("session/"):
                self._calls.not_found(client, request_id)
            else:
                self._calls.forward(client, request_id, method, wanted, None)
            return

        def live(error: Message | None) -> None:
            if error is not None:
                self._outbox.answer(client, request_id, error)
                return

            def replied(reply: Message) -> None:
                if choices.follow(found, choices.Choice(method, wanted), reply):
                    self._outbox.note(records.CONVERSATION, found.saved(), found)
                self._calls.give(client, request_id, reply, found)

            self._calls.forward(client, request_id, method, {**wanted, "sessionId": found.agent_id}, found, replied)

        self._restorer.ensure(found, live)

    # -- notifications ---------------------------------------------------------------------------

    def notified(self, client: Client, message: Message) -> None:
        """A notification from a client. What has to be a request, or is refused as one, goes nowhere."""
        method, params = message["method"], message.get("params")
        if method == "$/cancel_request":
            self._cancel_request(client, params)
            return
        found = self._conversations.named(params) if isinstance(params, dict) else None
        if method == "session/cancel":
            if found is not None:
                self._asks.cancel(found)
                self._turns.cancel(found, client)
            return
        if method.startswith(NO_NOTIFICATIONS):
            return
        if isinstance(params, dict):
            params = jsonrpc.without_cortex(params)
            if found is not None:
                params = {**params, "sessionId": found.agent_id}
        self._agent.notify(method, params)

    def _cancel_request(self, client: Client, params: Any) -> None:
        request_id = params.get("requestId") if isinstance(params, dict) else None
        if not jsonrpc.is_id(request_id) or self._turns.cancel_request(client, request_id):
            return
        self._calls.cancel(client, request_id)


def offered(info: Message) -> Message:
    """The agent's ``initialize`` result as clients get it: nothing to sign in to; load, list and resume are ours."""
    given = info.get("agentCapabilities")
    capabilities = {k: v for k, v in given.items() if k not in ("auth", "providers")} if isinstance(given, dict) else {}
    sessions = capabilities.get("sessionCapabilities")
    capabilities["loadSession"] = True
    capabilities["sessionCapabilities"] = {
        **(sessions if isinstance(sessions, dict) else {}),
        "list": {},
        "resume": {},
        "delete": {},
        "close": {},
    }
    return {**info, "agentCapabilities": capabilities, "authMethods": []}
