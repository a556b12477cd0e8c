"""Towards the agent: requests with ids of our own, their deadlines, and ``initialize``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from sandbox_agent import jsonrpc
from sandbox_agent.jsonrpc import Message
from sandbox_agent.port import AgentChannel
from sandbox_agent.tasks import log
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import AgentSpec

PROTOCOL_VERSION = 1
FAILED_HINT = "the agent is started again by itself; send the message again, or look at the session's state"

OnReply = Callable[[Message], None]
"""Gets ``{"result": …}`` or ``{"error": …}``."""


@dataclass
class Call:
    """A request that the agent has not answered."""

    method: str
    on_reply: OnReply
    deadline: asyncio.TimerHandle | None


def failed(what: str) -> Message:
    """What a request is answered with when the agent cannot."""
    error = jsonrpc.error(jsonrpc.SERVER_ERROR, what, slug="agent.failed", hint=FAILED_HINT)
    return {"error": error}


def is_session_id(value: Any) -> TypeGuard[str]:
    """May name an ACP session."""
    return isinstance(value, str) and 0 < len(value) <= jsonrpc.MAX_ID


class AgentSide:
    """``ready``: it has answered ``initialize``. ``broken``: why there is no agent to be had, else empty.

    ``info`` is the last good ``initialize`` result, kept over restarts. ``on_ready`` is called
    whenever ``ready`` or ``broken`` has changed.
    """

    def __init__(self, *, on_ready: Callable[[], None]) -> None:
        self.ready = False
        self.broken = ""
        self.info: Message = {}
        self.timeout_s = 60.0
        self.live_mcp = False
        self._on_ready = on_ready
        self._channel: AgentChannel | None = None
        self._calls: dict[int, Call] = {}
        self._next = 0

    @property
    def congested(self) -> bool:
        """The agent does not take what it is sent."""
        return self._channel is not None and self._channel.congested

    @property
    def open_calls(self) -> int:
        """Requests that it has not answered."""
        return len(self._calls)

    @property
    def channel(self) -> AgentChannel | None:
        """The running process's input."""
        return self._channel

    def can(self, name: str) -> bool:
        """Whether it advertised ``loadSession`` or a member of ``sessionCapabilities``."""
        capabilities = _object(self.info.get("agentCapabilities"))
        if name == "loadSession":
            return capabilities.get("loadSession") is True
        return isinstance(_object(capabilities.get("sessionCapabilities")).get(name), dict)

    @property
    def reopens(self) -> bool:
        """It can open a conversation again that it has or had."""
        return self.can("resume") or self.can("loadSession")

    # -- life ------------------------------------------------------------------------------------

    def up(self, channel: AgentChannel, spec: AgentSpec, unclaimed: Callable[[], Message] | None = None) -> None:
        """A process runs; says ``initialize`` to it. The process's owner has the deadline.

        ``unclaimed``: the sandbox is nobody's yet; the params of the ``session/new`` to come. An agent that can
        prepare for it is told them in ``_meta``.
        """
        self._channel, self.ready, self.broken = channel, False, ""
        self.timeout_s, self.live_mcp = spec.init_timeout_s, spec.live_mcp
        params: Message = {
            "protocolVersion": PROTOCOL_VERSION,
            "clientCapabilities": {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False},
            "clientInfo": {"name": "cortex", "title": "Cortex", "version": str(codec.VERSION)},
        }
        if unclaimed is not None:
            params["_meta"] = {"cortex": {"unclaimed": unclaimed()}}
        self.call("initialize", params, self._initialized, deadline=False)

    def _initialized(self, reply: Message) -> None:
        result = reply.get("result")
        if isinstance(result, dict) and result.get("protocolVersion") == PROTOCOL_VERSION:
            self.info, self.ready, self.broken = result, True, ""
        elif self._channel is not None:
            said = result.get("protocolVersion") if isinstance(result, dict) else reply.get("error")
            self.broken = f"the agent does not speak ACP version {PROTOCOL_VERSION}: it answered {str(said)[:200]}"
            log.warning("%s", self.broken)
        self._on_ready()

    def down(self, what: str, *, final: bool) -> None:
        """The process is gone: every open request fails."""
        self._channel, self.ready = None, False
        self.broken = what if final else ""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            _cancel(call)
            if call.method != "initialize":
                call.on_reply(failed(f"the agent ended before it answered {call.method}: {what}"))
        self._on_ready()

    # -- messages --------------------------------------------------------------------------------

    def call(self, method: str, params: Any, on_reply: OnReply, *, deadline: bool = True, within_s: float = 0.0) -> int:
        """Sends a request; ``on_reply`` is called once, never from within.

        Returns its id at the agent, 0 when that does not run.

        With a deadline it is answered with an error after ``within_s``, 0 being the agent's own.
        """
        loop = asyncio.get_running_loop()
        if self._channel is None:
            loop.call_soon(on_reply, failed("the agent does not run"))
            return 0
        self._next += 1
        within_s = within_s or self.timeout_s
        timer = loop.call_later(within_s, self._overdue, self._next, within_s) if deadline else None
        self._calls[self._next] = Call(method, on_reply, timer)
        message: Message = {"jsonrpc": "2.0", "id": self._next, "method": method}
        if params is not None:
            message["params"] = params
        self.send(message)
        return self._next

    def notify(self, method: str, params: Any) -> None:
        """Sends a notification, if the agent runs."""
        message: Message = {"jsonrpc": "2.0", "method": method}
        if params is not None:
            message["params"] = params
        self.send(message)

    def close_session(self, agent_id: Any) -> None:
        """Has it forget a session that nobody will use, if it can and if that is one."""
        if is_session_id(agent_id) and self.ready and self.can("close"):
            self.call("session/close", {"sessionId": agent_id}, lambda reply: None)

    def respond(self, request_id: Any, outcome: Message) -> None:
        """Answers a request of the agent's."""
        key = "error" if "error" in outcome else "result"
        self.send({"jsonrpc": "2.0", "id": request_id, key: outcome.get(key)})

    def send(self, message: Message) -> None:
        """One line to the agent; lost when none runs."""
        if self._channel is not None:
            self._channel.write(jsonrpc.dumps(message) + b"\n")

    def answered(self, message: Message) -> bool:
        """Takes the agent's response; False when nothing of that id is open."""
        request_id = message.get("id")
        call = self._calls.pop(request_id, None) if isinstance(request_id, int) else None
        if call is None:
            return False
        _cancel(call)
        if "error" in message:
            call.on_reply({"error": jsonrpc.safe_error(message["error"])})
        else:
            call.on_reply({"result": message.get("result")})
        return True

    def _overdue(self, request_id: int, within_s: float) -> None:
        call = self._calls.pop(request_id, None)
        if call is not None:
            call.on_reply(failed(f"the agent did not answer {call.method} within {within_s:g} s"))

    def close(self) -> None:
        """Forgets what is open."""
        for call in self._calls.values():
            _cancel(call)
        self._calls = {}
        self._channel = None


def _cancel(call: Call) -> None:
    if call.deadline is not None:
        call.deadline.cancel()


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
