"""How clients come to a conversation: made anew, forked, loaded, resumed, or taken over from the agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import AgentSide, failed, is_session_id
from sandbox_agent.ahead import Ahead
from sandbox_agent.asks import Asks
from sandbox_agent.calls import ClientCalls
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversation, Conversations
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.restorer import Restorer
from sandbox_agent.servers import McpServers, Opened
from sandbox_agent.settings import AgentSettings
from sandbox_agent.turns import DISK_FULL

MAX_NEW = 8
"""Conversations of one client that may be in the making."""


class Opening:
    """``making``: calls under way that will name a session."""

    def __init__(
        self,
        *,
        agent: AgentSide,
        calls: ClientCalls,
        outbox: Outbox,
        conversations: Conversations,
        restorer: Restorer,
        asks: Asks,
        settings: AgentSettings,
        servers: McpServers,
        ahead: Ahead,
        on_made: Callable[[], None],
    ) -> None:
        self.making = 0
        self._agent = agent
        self._calls = calls
        self._outbox = outbox
        self._conversations = conversations
        self._restorer = restorer
        self._asks = asks
        self._settings = settings
        self._servers = servers
        self._ahead = ahead
        self._on_made = on_made

    # -- new -------------------------------------------------------------------------------------

    def new(self, method: str, client: Client, request_id: Any, params: Message) -> None:
        """``session/new`` or ``session/fork``."""
        if self._making_of(client) >= MAX_NEW:
            what, hint = f"{MAX_NEW} conversations of this client are in the making", "wait for their answers"
            self._calls.refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", hint)
            return
        if self._conversations.full:
            self._no_room(client, request_id)
            return
        cwd = self._settings.workspace.cwd(params.get("cwd"))
        try:
            self._settings.workspace.make(cwd)
        except OSError as error:
            what = f"the workspace cannot be made: {error.strerror}"
            hint = "look at the workspace setting and at the disk"
            self._calls.refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "config.invalid_section", hint)
            return
        servers = self._settings.client_servers(params.get("mcpServers"))
        wanted = {**jsonrpc.without_cortex(params), "cwd": cwd, "mcpServers": self._servers.entries(servers)}
        if "additionalDirectories" in params:
            wanted["additionalDirectories"] = self._settings.workspace.directories(params["additionalDirectories"])
        source = self._conversations.named(params)
        if source is not None:
            wanted["sessionId"] = source.agent_id
        opened = self._servers.opened

        def made(reply: Message) -> None:
            self._made(client, request_id, cwd, servers, opened, reply, blank=method == "session/new")

        if method == "session/new" and self._from_ahead(client, request_id, wanted, made):
            return
        self._ahead.passed()
        self._ask(method, client, request_id, wanted, made)

    def _from_ahead(self, client: Client, request_id: Any, wanted: Message, made: Callable[[Message], None]) -> bool:
        """Gives the client the conversation that was opened ahead, as soon as it is there, if that is what it wants."""
        if self._outbox.full or not self._ahead.fits(wanted):
            return False
        over = self._calls.waits(client, request_id, "session/new")

        def given(reply: Message) -> None:
            over()
            made(reply)

        def not_given() -> None:
            over()
            self._ask("session/new", client, request_id, wanted, made)

        self._ahead.take(given, not_given)
        return True

    def _ask(
        self, method: str, client: Client, request_id: Any, wanted: Message, made: Callable[[Message], None]
    ) -> None:
        def replied(reply: Message) -> None:
            self.making -= 1
            made(reply)
            self._on_made()

        if self._calls.forward(client, request_id, method, wanted, None, replied):
            self.making += 1

    def _no_room(self, client: Client, request_id: Any) -> None:
        what, hint = "as many conversations are open as may be", "session/close or session/delete some first"
        self._calls.refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", hint)

    def _making_of(self, client: Client) -> int:
        return sum(1 for method, _, _ in client.calls.values() if method in ("session/new", "session/fork"))

    def _made(
        self,
        client: Client,
        request_id: Any,
        cwd: str,
        servers: list[Message],
        opened: Opened,
        reply: Message,
        *,
        blank: bool,
    ) -> None:
        result = reply.get("result")
        agent_id = result.get("sessionId") if isinstance(result, dict) else None
        if not isinstance(result, dict) or not isinstance(agent_id, str) or not is_session_id(agent_id):
            if "error" not in reply:
                reply = failed("the agent made no session, or one whose id is too long")
            self._calls.give(client, request_id, reply, None)
            return
        start = self._outbox.position
        found = self._conversations.add(agent_id, cwd, first=start, at=time.time())
        found.take_extras(result)
        found.servers, found.blank = servers, blank
        found.went_live(opened)
        self._outbox.note(records.CONVERSATION, found.saved(), found)
        if not client.gone:
            self._outbox.subscribe(client, found)
        self._outbox.result(client.number, request_id, {"result": {**result, "sessionId": found.id}}, found)
        if not self._outbox.commit(start):
            self._conversations.remove(found)
            self._agent.close_session(agent_id)
            self._outbox.answer(client, request_id, {"error": DISK_FULL})

    # -- known -----------------------------------------------------------------------------------

    def load(self, method: str, client: Client, request_id: Any, params: Message) -> None:
        """``session/load`` or ``session/resume``."""
        self._ahead.release()
        history = method == "session/load"
        found = self._conversations.named(params)
        if found is None:
            self._adopt(method, client, request_id, params)
            return
        self._outbox.flush()
        if history:
            self._outbox.replay(client, found)
        self._outbox.subscribe(client, found)
        self._asks.deliver(client, found)
        if "mcpServers" in params:
            found.servers = self._settings.client_servers(params["mcpServers"])
        if self._agent.broken:
            self._outbox.answer(client, request_id, {"result": dict(found.extras)})
            return
        self._restorer.refresh(found)
        self._restorer.ensure(found, lambda error: self._loaded(client, request_id, found, error))

    def _loaded(self, client: Client, request_id: Any, found: Conversation, error: Message | None) -> None:
        if not client.gone:
            self._outbox.answer(client, request_id, error or {"result": dict(found.extras)})

    def _adopt(self, method: str, client: Client, request_id: Any, params: Message) -> None:
        """A conversation that only the agent may know: its own replay becomes the history."""
        session_id = params.get("sessionId")
        capability = "loadSession" if method == "session/load" else "resume"
        if not isinstance(session_id, str) or not is_session_id(session_id) or not self._agent.can(capability):
            self._calls.not_found(client, request_id)
            return
        if session_id in self._conversations.by_agent_id or session_id == self._ahead.agent_id:
            self._calls.not_found(client, request_id)
            return
        if self._conversations.full:
            self._no_room(client, request_id)
            return
        cwd = self._settings.workspace.cwd(params.get("cwd"))
        wanted = {"sessionId": session_id, "cwd": cwd, "mcpServers": self._servers.entries([])}
        opened = self._servers.opened
        start = self._outbox.position
        found = self._conversations.add(session_id, cwd, first=start, at=time.time())

        def loaded(reply: Message) -> None:
            if "error" in reply:
                self._conversations.remove(found)
                self._outbox.note(records.CONVERSATION, {"deleted": True}, found)
            else:
                found.went_live(opened)
                found.take_extras(reply.get("result"))
            self._calls.give(client, request_id, reply, found)
            self._restorer.adopted(found, reply if "error" in reply else None)

        if not self._calls.forward(client, request_id, method, wanted, found, loaded):
            self._conversations.remove(found)
            return
        found.restoring = True
        self._outbox.note(records.CONVERSATION, found.saved(), found)
        self._outbox.subscribe(client, found)
