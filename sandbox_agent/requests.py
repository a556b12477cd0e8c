"""What clients ask for: each ACP method, answered here, from the journal, or by the agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import AgentSide, failed, is_session_id
from sandbox_agent.asks import Asks
from sandbox_agent.clients import Client
from sandbox_agent.conversations import Conversation, Conversations
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.restorer import Restorer
from sandbox_agent.settings import AgentSettings
from sandbox_agent.turns import DISK_FULL, Turns

MAX_CLIENT_CALLS = 256
"""Requests of one client that may be open at the agent."""
MAX_CALLS = 1024
"""Requests open at the agent over which clients' are refused; prompts have their own bound."""
MAX_NEW = 8
"""Conversations of one client that may be in the making."""
PAGE = 100
"""Conversations in one answer to ``session/list``."""
REFUSED = ("authenticate", "logout", "providers/", "auth/")
NO_NOTIFICATIONS = ("$/", "_cortex/", "session/", "initialize", *REFUSED)
HURRIED = ("session/", "initialize")
"""Methods that an agent has to answer within its deadline; others may be long by design."""
LONG_S = 3600.0

Handler = Callable[[Client, Any, Message], None]


class Requests:
    """Requests from clients, once the agent server is ready for them."""

    def __init__(
        self,
        *,
        agent: AgentSide,
        outbox: Outbox,
        conversations: Conversations,
        restorer: Restorer,
        turns: Turns,
        asks: Asks,
        settings: AgentSettings,
        on_made: Callable[[], None],
    ) -> None:
        self.making = 0
        """Calls under way that will name a session."""
        self._on_made = on_made
        self._agent = agent
        self._outbox = outbox
        self._conversations = conversations
        self._restorer = restorer
        self._turns = turns
        self._asks = asks
        self._settings = settings
        self._handlers: dict[str, Handler] = {
            "initialize": self._initialize,
            "session/new": partial(self._new, "session/new"),
            "session/fork": partial(self._new, "session/fork"),
            "session/load": partial(self._load, "session/load"),
            "session/resume": partial(self._load, "session/resume"),
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
                self._refuse(client, request_id, jsonrpc.INVALID_PARAMS, "params is not an object")
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
            self._refuse(client, request_id, jsonrpc.METHOD_NOT_FOUND, f"unknown method {method[:100]}")
        else:
            self._other(client, request_id, method, params)

    def _refuse(self, client: Client, request_id: Any, code: int, what: str, slug: str = "", hint: str = "") -> None:
        error = jsonrpc.error(code, what, slug=slug, hint=hint) if slug else jsonrpc.invalid(what, code)
        self._outbox.answer(client, request_id, {"error": error})

    def _not_found(self, client: Client, request_id: Any) -> None:
        self._refuse(client, request_id, jsonrpc.NOT_FOUND, "no such session", "session.not_found", "see session/list")

    # -- initialize ------------------------------------------------------------------------------

    def _initialize(self, client: Client, request_id: Any, params: Message) -> None:
        version = params.get("protocolVersion")
        if isinstance(version, bool) or not isinstance(version, int):
            self._refuse(client, request_id, jsonrpc.INVALID_PARAMS, "protocolVersion is not an integer")
        elif not self._agent.info:
            self._outbox.answer(client, request_id, failed(self._agent.broken))
        else:
            self._outbox.answer(client, request_id, {"result": offered(self._agent.info)})
            self._asks.deliver(client, None)

    # -- conversations ---------------------------------------------------------------------------

    def _new(self, method: str, client: Client, request_id: Any, params: Message) -> None:
        if self._making_of(client) >= MAX_NEW:
            what = f"{MAX_NEW} conversations of this client are in the making"
            self._refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", "wait for their answers")
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
            self._refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "config.invalid_section", hint)
            return
        servers = self._settings.client_servers(params.get("mcpServers"))
        wanted = {**jsonrpc.without_cortex(params), "cwd": cwd, "mcpServers": self._settings.servers(servers)}
        if "additionalDirectories" in params:
            wanted["additionalDirectories"] = self._settings.workspace.directories(params["additionalDirectories"])
        source = self._conversation(params)
        if source is not None:
            wanted["sessionId"] = source.agent_id

        def made(reply: Message) -> None:
            self.making -= 1
            self._made(client, request_id, cwd, servers, reply)
            self._on_made()

        if self._forward(client, request_id, method, wanted, None, made):
            self.making += 1

    def _no_room(self, client: Client, request_id: Any) -> None:
        what, hint = "as many conversations are open as may be", "session/close or session/delete some first"
        self._refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", hint)

    def _making_of(self, client: Client) -> int:
        return sum(1 for method, _, _ in client.calls.values() if method in ("session/new", "session/fork"))

    def _made(self, client: Client, request_id: Any, cwd: str, servers: list[Message], reply: Message) -> None:
        result = reply.get("result")
        agent_id = result.get("sessionId") if isinstance(result, dict) else None
        if not isinstance(result, dict) or not isinstance(agent_id, str) or not is_session_id(agent_id):
            if "error" not in reply:
                reply = failed("the agent made no session, or one whose id is too long")
            self._give(client, request_id, reply, None)
            return
        start = self._outbox.position
        found = self._conversations.add(agent_id, cwd, first=start, at=time.time())
        found.take_extras(result)
        found.live, found.servers, found.version = True, servers, self._settings.version
        self._outbox.note(records.CONVERSATION, found.saved(), found)
        if not client.gone:
            self._outbox.subscribe(client, found)
        self._outbox.result(client.number, request_id, {"result": {**result, "sessionId": found.id}}, found)
        if not self._outbox.commit(start):
            self._conversations.remove(found)
            self._outbox.answer(client, request_id, {"error": DISK_FULL})

    def _load(self, method: str, client: Client, request_id: Any, params: Message) -> None:
        history = method == "session/load"
        found = self._conversation(params)
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
        known = session_id in self._conversations.by_agent_id if isinstance(session_id, str) else True
        if not isinstance(session_id, str) or not is_session_id(session_id) or known or not self._agent.can(capability):
            self._not_found(client, request_id)
            return
        if self._conversations.full:
            self._no_room(client, request_id)
            return
        cwd = self._settings.workspace.cwd(params.get("cwd"))
        wanted = {"sessionId": session_id, "cwd": cwd, "mcpServers": self._settings.servers([])}
        start = self._outbox.position
        found = self._conversations.add(session_id, cwd, first=start, at=time.time())

        def loaded(reply: Message) -> None:
            if "error" in reply:
                self._conversations.remove(found)
                self._outbox.note(records.CONVERSATION, {"deleted": True}, found)
            else:
                found.live, found.version = True, self._settings.version
                found.take_extras(reply.get("result"))
            self._give(client, request_id, reply, found)
            self._restorer.adopted(found, reply if "error" in reply else None)

        if not self._forward(client, request_id, method, wanted, found, loaded):
            self._conversations.remove(found)
            return
        found.restoring = True
        self._outbox.note(records.CONVERSATION, found.saved(), found)
        self._outbox.subscribe(client, found)

    def _list(self, client: Client, request_id: Any, params: Message) -> None:
        cursor = params.get("cursor") or "0"
        if not isinstance(cursor, str) or not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9:
            self._refuse(client, request_id, jsonrpc.INVALID_PARAMS, "cursor is not one that was given out")
            return
        found, following = self._conversations.page(int(cursor), PAGE)
        result: Message = {"sessions": [conversation.info() for conversation in found]}
        if following:
            result["nextCursor"] = str(following)
        self._outbox.answer(client, request_id, {"result": result})

    def _close(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversation(params)
        if found is None:
            self._not_found(client, request_id)
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
        self._forward(client, request_id, "session/close", wanted, found)

    def _delete(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversation(params)
        if found is None:
            self._not_found(client, request_id)
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
            self._forward(client, request_id, "session/delete", wanted, None)
        else:
            self._outbox.answer(client, request_id, {"result": {}})

    def _prompt(self, client: Client, request_id: Any, params: Message) -> None:
        found = self._conversation(params)
        if found is None:
            self._not_found(client, request_id)
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
            self._forward(client, request_id, method, params, None)
            return
        wanted = jsonrpc.without_cortex(params)
        if "cwd" in wanted:
            wanted = {**wanted, "cwd": self._settings.workspace.cwd(wanted["cwd"])}
        found = self._conversation(params)
        if found is None:
            if method.startswith("session/"):
                self._not_found(client, request_id)
            else:
                self._forward(client, request_id, method, wanted, None)
            return

        def live(error: Message | None) -> None:
            if error is not None:
                self._outbox.answer(client, request_id, error)
                return

            def replied(reply: Message) -> None:
                self._follow(found, method, wanted, reply)
                self._give(client, request_id, reply, found)

            self._forward(client, request_id, method, {**wanted, "sessionId": found.agent_id}, found, replied)

        self._restorer.ensure(found, live)

    def _follow(self, found: Conversation, method: str, params: Message, reply: Message) -> None:
        result = reply.get("result")
        changed = False
        if method == "session/set_mode" and "error" not in reply:
            changed = found.set_mode(params.get("modeId"))
        elif method == "session/set_model" and "error" not in reply:
            changed = found.set_model(params.get("modelId"))
        elif method == "session/set_config_option" and isinstance(result, dict) and "configOptions" in result:
            found.set_options(result["configOptions"])
            changed = True
        if changed:
            self._outbox.note(records.CONVERSATION, found.saved(), found)

    def _forward(
        self,
        client: Client,
        request_id: Any,
        method: str,
        params: Any,
        found: Conversation | None,
        replied: Callable[[Message], None] | None = None,
    ) -> bool:
        """Asks the agent for the client; False when that was refused and answered."""
        if self._outbox.full:
            self._outbox.answer(client, request_id, {"error": DISK_FULL})
            return False
        if self._agent.broken:
            self._outbox.answer(client, request_id, failed(self._agent.broken))
            return False
        if len(client.calls) >= MAX_CLIENT_CALLS or self._agent.open_calls >= MAX_CALLS:
            what = "too many open requests"
            self._refuse(client, request_id, jsonrpc.SERVER_ERROR, what, "session.overloaded", "wait for answers first")
            return False
        self._outbox.number(client)
        token = object()

        def done(reply: Message) -> None:
            client.calls.pop(token, None)
            if replied is not None:
                replied(reply)
            else:
                self._give(client, request_id, reply, found)

        within_s = 0.0 if method.startswith(HURRIED) else LONG_S
        call = self._agent.call(method, params, done, within_s=within_s)
        client.calls[token] = (method, request_id, call)
        return True

    def _give(self, client: Client, request_id: Any, outcome: Message, found: Conversation | None) -> None:
        """The agent's answer to the client, by way of the journal; straight when that has no space."""
        start = self._outbox.position
        self._outbox.result(client.number, request_id, outcome, found)
        if not self._outbox.commit(start):
            self._outbox.answer(client, request_id, outcome)

    def _conversation(self, params: Message) -> Conversation | None:
        session_id = params.get("sessionId")
        return self._conversations.by_id.get(session_id) if isinstance(session_id, str) else None

    # -- notifications ---------------------------------------------------------------------------

    def notified(self, client: Client, message: Message) -> None:
        """A notification from a client. What has to be a request, or is refused as one, goes nowhere."""
        method, params = message["method"], message.get("params")
        if method == "$/cancel_request":
            self._cancel_request(client, params)
            return
        found = self._conversation(params) if isinstance(params, dict) else None
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
        for _, theirs, call in client.calls.values():
            if theirs == request_id and call:
                self._agent.notify("$/cancel_request", {"requestId": call})


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
