"""ACP in the middle: an ACP server to clients and an ACP client to the agent. START HERE.

A client's message goes ``clients`` → here → ``requests`` (→ ``turns`` for prompts) → ``agent_side``; what
the agent says goes here → ``outbox`` (number, ``journal``, emit), its requests through ``asks``.
Everything runs on the loop and is synchronous, but for opening, rolling and syncing the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import FAILED_HINT, AgentSide
from sandbox_agent.asks import Asks
from sandbox_agent.clients import MAX_STRIKES, Client, adopt
from sandbox_agent.conversations import Conversation, Conversations
from sandbox_agent.journal import GrantFn, Journal, JournalFailed
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.port import AgentChannel
from sandbox_agent.requests import Requests
from sandbox_agent.restorer import Restorer
from sandbox_agent.settings import AgentSettings
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.turns import INTERRUPTED, Turns
from sandbox_agent.wire.messages import AgentSpec, Attach, Welcome

HOLD_S = 120.0
"""Longest time that a client is held because journal or agent are not there."""
CONGESTED_S = 0.02
"""Pause before an agent that took nothing is looked at again."""
MAX_EARLY = 1000
"""Lines of the agent that wait for the journal or for the answer that names their session."""
GOODBYE_S = 0.5
"""How long ``close`` waits until clients have their close frames."""
MESSAGES_A_TURN = 64
"""Messages of one client before others have a turn."""


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


def status_message(state: str, code: str = "", what: str = "", hint: str = "", session_id: str = "") -> Message:
    """A ``_cortex/status`` notification; what is empty is left out."""
    params = {"state": state, "code": code, "what": what[:2000], "hint": hint, "sessionId": session_id}
    return {"jsonrpc": "2.0", "method": "_cortex/status", "params": {k: v for k, v in params.items() if v}}


class AcpHub:
    """Satisfies ``port.AgentHub``. ``grant`` asks for journal files; ``on_change`` hears when
    ``agent_info``, ``open_turns`` or ``clients`` have changed. Needs a running loop.

    Clients may be served and the agent may speak before the journal is there; both wait for it.
    ``garbage``: lines from the agent that were no messages or that nobody asked for.
    """

    def __init__(self, *, welcome: Welcome, grant: GrantFn, on_change: Callable[[], None]) -> None:
        self.agent_info = ""
        self.open_turns = 0
        self.turns = 0
        self.clients = 0
        self.ahead = ""
        self.garbage = 0
        self._welcome = welcome
        self._on_change = on_change
        self._opened = False
        self._closed = False
        self._empty = asyncio.Event()
        self._early: deque[bytes] = deque()
        self._orphans: deque[tuple[str, bytes]] = deque()
        self._tasks = TaskOwner("acp")
        self._conversations = Conversations()
        self._journal = Journal(
            grant,
            segment_bytes=welcome.journal_segment_bytes,
            tasks=self._tasks,
            snapshot=self._conversations.snapshot,
            on_synced=lambda: self._outbox.pump_all(),
            on_failed=self._journal_failed,
        )
        self._outbox = Outbox(self._journal, on_full=self._disk_full, limit=welcome.max_message_bytes)
        self._agent = AgentSide(on_ready=self._agent_changed)
        self._settings = AgentSettings(welcome.home)
        self._restorer = Restorer(
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            settings=self._settings,
            on_lost=self._context_lost,
            on_made=self._session_made,
        )
        self._turns = Turns(
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            restorer=self._restorer,
            queue_length=welcome.prompt_queue,
            on_change=self._changed,
        )
        self._asks = Asks(agent=self._agent, outbox=self._outbox, conversations=self._conversations)
        self._requests = Requests(
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            restorer=self._restorer,
            turns=self._turns,
            asks=self._asks,
            settings=self._settings,
            on_made=self._session_made,
        )
        self._loop = asyncio.get_running_loop()
        self._congested: asyncio.TimerHandle | None = None
        self._space: asyncio.TimerHandle | None = None
        self._tick = self._loop.call_later(self._tick_s, self._look_at_clients)
        if welcome.session:
            self.claim(moved=False, keep_ahead=True)

    # -- the journal -----------------------------------------------------------------------------

    def claim(self, *, moved: bool, keep_ahead: bool) -> None:
        """Opens the journal, beside."""
        self._tasks.start(self._open_journal(), "open_journal", on_error=self._not_opened)

    async def _open_journal(self) -> None:
        state, later = await self._journal.open()
        interrupted = self._conversations.restore(state, later)
        self._journal.begin()
        for seq, number, message_id in interrupted:
            end = {"of": seq, "message_id": message_id, "error": INTERRUPTED}
            self._outbox.note(records.END, end, self._conversations.by_number.get(number))
            self._conversations.interrupted_ended(number, message_id, {"error": INTERRUPTED})
        self._opened = True
        for client in self._outbox.clients:
            self._introduce(client)
        early, self._early = self._early, deque()
        self.agent_lines(list(early))
        self._drain_all()

    def _not_opened(self, error: BaseException) -> None:
        if not isinstance(error, JournalFailed):
            log.error("the journal could not be opened", exc_info=error)
        self._journal.failed = str(error) or "the journal could not be opened"
        self._journal_failed(self._journal.failed)

    def _journal_failed(self, what: str) -> None:
        """Nothing can be acknowledged any more: clients are told, and so are those that come."""
        for client in list(self._outbox.clients):
            client.close(1011, f"store.error: {what}")

    def _disk_full(self, full: bool) -> None:
        """The agent is held back while there is no space; who waits is told when that lasts."""
        channel = self._agent.channel
        if channel is not None:
            channel.hold(full)
        if self._space is not None:
            self._space.cancel()
            self._space = None
        if full:
            self._space = self._loop.call_later(self._welcome.stall_timeout_s, self._turns.out_of_space)
            self._tell("working", "store.disk_full", "the journal has no space", "free disk space on the host")
        else:
            self._loop.call_soon(self._drain_all)

    # -- the agent (port) ------------------------------------------------------------------------

    def agent_up(self, channel: AgentChannel, spec: AgentSpec) -> None:
        """The process runs."""
        self.agent_info = ""
        self._agent.up(channel, spec)

    def agent_lines(self, lines: list[bytes]) -> None:
        """Whole lines of the agent's output."""
        for line in lines:
            self._agent_line(line)
        self._outbox.flush()
        self._mind_congestion()

    def agent_down(self, what: str, *, final: bool) -> None:
        """The process ended."""
        self.agent_info = ""
        self._orphans.clear()
        self._asks.agent_down()
        self._agent.down(what or "it ended", final=final)
        for conversation in list(self._conversations.by_number.values()):
            self._restorer.agent_down(conversation)
        self._turns.agent_down(what, final=final)
        self._outbox.flush()
        self._tell("failed" if final else "restarting", "agent.failed", what, FAILED_HINT)
        self._changed()

    def _agent_changed(self) -> None:
        """It is ready, or will not be."""
        if self._agent.ready:
            self.agent_info = jsonrpc.dumps(self._agent.info).decode()
            self._tell("ready")
            self._turns.kick()
        self._drain_all()
        self._changed()

    def _agent_line(self, line: bytes) -> None:
        if len(line) > self._welcome.max_message_bytes - jsonrpc.STAMP_BYTES:
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
        elif not self._opened:
            if len(self._early) < MAX_EARLY:
                self._early.append(line)
        elif kind == "request":
            self._asks.ask(message)
        else:
            self._agent_notified(line, message)

    def _agent_notified(self, line: bytes, message: Message) -> None:
        method, params = message["method"], message.get("params")
        if method.startswith(("_cortex/", "$/")):
            if method == "$/cancel_request" and isinstance(params, dict):
                self._asks.withdrawn(params.get("requestId"))
            return
        if not isinstance(params, dict) or "sessionId" not in params:
            if method.startswith("session/"):
                self.garbage += 1
            else:
                self._outbox.update(message, None, raw=line)
            return
        session_id = params["sessionId"]
        if not isinstance(session_id, str) or not isinstance(params.get("update", {}), dict):
            self.garbage += 1
            return
        conversation = self._conversations.by_agent_id.get(session_id)
        if conversation is None:
            self._orphan(session_id, line)
        elif not conversation.quiet:
            if conversation.id != session_id:
                message, line = {**message, "params": {**params, "sessionId": conversation.id}}, b""
            self._outbox.update(message, conversation, raw=line)
            if conversation.track(params.get("update")):
                self._outbox.note(records.CONVERSATION, conversation.saved(), conversation)

    def _orphan(self, session_id: str, line: bytes) -> None:
        """Said of a session whose ``session/new`` is not answered yet: kept until it is."""
        if self._making and len(self._orphans) < MAX_EARLY:
            self._orphans.append((session_id, line))
        else:
            self.garbage += 1

    def _session_made(self) -> None:
        orphans, self._orphans = self._orphans, deque()
        for session_id, line in orphans:
            if session_id in self._conversations.by_agent_id:
                self._agent_line(line)
            elif self._making:
                self._orphans.append((session_id, line))

    @property
    def _making(self) -> int:
        return self._requests.making + self._restorer.making

    # -- clients ---------------------------------------------------------------------------------

    def serve(self, sock: socket.socket, attach: Attach) -> None:
        """A client's stream."""
        if self._closed:
            sock.close()
            return

        def make() -> Client:
            return Client(
                attach,
                self,
                max_message=self._welcome.max_message_bytes,
                buffer_bytes=self._welcome.client_buffer_bytes,
            )

        self._tasks.start(adopt(sock, make), "adopt", on_error=lambda error: log.warning("no client: %s", error))

    def client_connected(self, client: Client) -> None:
        """Its stream is tied to the loop."""
        self._outbox.clients.add(client)
        self.clients = len(self._outbox.clients)
        if self._journal.failed:
            client.close(1011, f"store.error: {self._journal.failed}")
        elif self._opened:
            self._introduce(client)
        self._changed()

    def _introduce(self, client: Client) -> None:
        client.number = self._conversations.next_client
        self._conversations.next_client += 1
        client.subscriptions[0] = self._journal.seq
        if client.attach.cortex and not self._agent.ready:
            broken = self._agent.broken
            status = status_message("failed" if broken else "starting", "agent.failed" if broken else "", broken)
            self._outbox.tell(client, status)

    def client_spoke(self, client: Client) -> None:
        """Takes its messages, if journal and agent are there."""
        done = 0
        while client.inbox and self._serving and done < MESSAGES_A_TURN:
            done += 1
            self._client_message(client, client.next_message())
        if client.inbox and self._serving:
            self._loop.call_soon(self.client_spoke, client)
        self._outbox.flush()
        client.push()
        client.regulate_reading()
        self._mind_congestion()

    def _mind_congestion(self) -> None:
        if self._congested is None and self._agent.congested and not self._closed:
            self._congested = self._loop.call_later(CONGESTED_S, self._uncongest)

    @property
    def _serving(self) -> bool:
        return self._opened and (self._agent.ready or bool(self._agent.broken)) and not self._agent.congested

    def client_writable(self, client: Client) -> None:
        """It takes bytes again."""
        self._outbox.pump(client)

    def client_gone(self, client: Client) -> None:
        """Its stream has ended; its turns go on."""
        self._outbox.leave(client)
        self._asks.left(client)
        for number in client.subscriptions:
            conversation = self._conversations.by_number.get(number)
            if conversation is not None:
                conversation.subscribers.discard(client)
        self.clients = len(self._outbox.clients)
        if not self.clients:
            self._empty.set()
        self._changed()

    def _client_message(self, client: Client, text: str) -> None:
        try:
            message = jsonrpc.parse(text)
        except ValueError as error:
            self._strike(client, jsonrpc.PARSE_ERROR, f"not JSON: {error}")
            return
        try:
            kind = jsonrpc.kind(message)
        except ValueError as error:
            self._strike(client, jsonrpc.INVALID_REQUEST, str(error))
            return
        client.strikes = max(0, client.strikes - 1)
        if kind == "request":
            self._requests.handle(client, message)
        elif kind == "notification":
            self._requests.notified(client, message)
        else:
            self._asks.answered(client, message)

    def _strike(self, client: Client, code: int, what: str) -> None:
        client.strikes += 1
        if client.strikes >= MAX_STRIKES:
            client.close(4400, "request.invalid: too many malformed messages; send one JSON-RPC object per text frame")
            return
        hint = "send one JSON-RPC 2.0 object per text frame"
        error = jsonrpc.error(code, what[:200], slug="request.invalid", hint=hint)
        self._outbox.answer(client, None, {"error": error})

    def _drain_all(self) -> None:
        if not self._opened:
            return
        for client in list(self._outbox.clients):
            if client.inbox:
                self.client_spoke(client)
        self._outbox.flush()

    def _uncongest(self) -> None:
        self._congested = None
        if not self._agent.congested:
            self._turns.kick()
            self._drain_all()
        self._mind_congestion()

    @property
    def _tick_s(self) -> float:
        return max(0.05, min(5.0, self._welcome.stall_timeout_s / 4))

    def _look_at_clients(self) -> None:
        """Closes who takes no byte, and who has been held for too long."""
        self._tick = self._loop.call_later(self._tick_s, self._look_at_clients)
        now = self._loop.time()
        ready = self._opened and (self._agent.ready or self._agent.broken)
        for client in list(self._outbox.clients):
            if client.stalled(now, self._welcome.stall_timeout_s):
                client.close(4408, "client.slow_consumer: it took no byte for too long; connect and load again")
            elif ready or not client.inbox:
                client.since = now
            elif now - client.since > HOLD_S:
                client.close(1013, "session.bringup_timeout: the agent is not ready; try again later")

    def _tell(self, state: str, code: str = "", what: str = "", hint: str = "", session_id: str = "") -> None:
        """``_cortex/status`` for the clients that understand it."""
        if not self._opened:
            return
        message = status_message(state, code, what, hint, session_id)
        for client in list(self._outbox.clients):
            if client.attach.cortex:
                self._outbox.tell(client, message)
                client.push()

    def _context_lost(self, conversation: Conversation) -> None:
        what = "the agent could not reopen this conversation; it does not remember what was said before"
        self._tell("ready", "agent.context_lost", what, "repeat what it has to know", conversation.id)

    # -- the rest of the port --------------------------------------------------------------------

    def set_mcp(self, servers: list[dict[str, Any]]) -> str:
        """The MCP servers of conversations to come."""
        self._settings.set_servers(servers)
        return self._effect()

    def set_settings(self, settings: dict[str, Any]) -> str:
        """What the user allows, and where conversations run."""
        self._settings.set(settings)
        return self._effect()

    def _effect(self) -> str:
        return "next_session" if any(c.live for c in self._conversations.by_number.values()) else "now"

    @property
    def pending(self) -> int:
        """See ``port.AgentHub``."""
        return self._agent.open_calls + sum(not client.at_rest for client in self._outbox.clients)

    def _changed(self) -> None:
        self.open_turns, self.turns = self._turns.open, self._turns.accepted
        self._on_change()

    async def close(self) -> None:
        """Journals what there is, lets clients go, syncs."""
        self._closed = True
        self._tick.cancel()
        for timer in (self._congested, self._space):
            if timer is not None:
                timer.cancel()
        self._outbox.flush()
        self._outbox.close()
        self._agent.close()
        self._empty.clear()
        for client in list(self._outbox.clients):
            client.close(1001, "session.stopped: the sandbox stops; connect again to start it")
        await self._tasks.close()
        if self._outbox.clients:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), GOODBYE_S)
        await self._journal.close()
