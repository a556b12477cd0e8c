"""ACP in the middle: an ACP server to clients and an ACP client to the agent. START HERE.

A client's message goes ``clients`` → here → ``requests`` (→ ``turns`` for prompts) → ``agent_side``; what
the agent says goes here → ``outbox`` (number, ``journal``, emit), its requests through ``asks``.
Everything runs on the loop and is synchronous, but for opening, rolling and syncing the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import FAILED_HINT, AgentSide
from sandbox_agent.ahead import Ahead, Kind
from sandbox_agent.asks import Asks
from sandbox_agent.calls import ClientCalls
from sandbox_agent.clients import MAX_STRIKES, Client, adopt
from sandbox_agent.conversations import Conversation, Conversations
from sandbox_agent.hearing import Hearing
from sandbox_agent.journal import GrantFn, Journal, JournalFailed
from sandbox_agent.jsonrpc import Message
from sandbox_agent.opening import Opening
from sandbox_agent.outbox import Outbox
from sandbox_agent.port import AgentChannel
from sandbox_agent.requests import Requests
from sandbox_agent.restorer import Restorer
from sandbox_agent.servers import McpServers, Multiplexer
from sandbox_agent.settings import AgentSettings
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.turns import INTERRUPTED, Turns
from sandbox_agent.wire.messages import AgentSpec, Attach, Welcome

HOLD_S = 120.0
"""Longest time that a client is held because journal or agent are not there."""
CONGESTED_S = 0.02
"""Pause before an agent that took nothing is looked at again."""
AHEAD_PAUSE_S = 0.25
"""With clients there, how long nothing is opened ahead of them: what they come for goes first."""
GOODBYE_S = 0.5
"""How long ``close`` waits until clients have their close frames."""
MESSAGES_A_TURN = 64
"""Messages of one client before others have a turn."""


def status_message(state: str, code: str = "", what: str = "", hint: str = "", session_id: str = "") -> Message:
    """A ``_cortex/status`` notification; what is empty is left out."""
    params = {"state": state, "code": code, "what": what[:2000], "hint": hint, "sessionId": session_id}
    return {"jsonrpc": "2.0", "method": "_cortex/status", "params": {k: v for k, v in params.items() if v}}


MakeHubMux = Callable[[Callable[[], str], Callable[[], None]], Multiplexer]
"""Arguments: the directory that MCP servers run in, on_change."""


class AcpHub:
    """Satisfies ``port.AgentHub``. ``grant`` asks for journal files; ``on_change`` hears when
    ``agent_info``, ``open_turns`` or ``clients`` have changed. Needs a running loop.

    Clients may be served and the agent may speak before the journal is there; both wait for it.
    ``garbage``: lines from the agent that were no messages or that nobody asked for.
    """

    def __init__(
        self,
        *,
        welcome: Welcome,
        grant: GrantFn,
        on_change: Callable[[], None],
        mux: MakeHubMux | None,
        spec: Callable[[], AgentSpec | None],
    ) -> None:
        self.agent_info = ""
        self.open_turns = 0
        self.turns = 0
        self.clients = 0
        self.ahead = ""
        self._welcome = welcome
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._empty = asyncio.Event()
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
        self._servers = McpServers(
            agent=self._agent,
            make_mux=(lambda on_change: mux(lambda: self._settings.workspace.path, on_change)) if mux else None,
            spec=spec,
            tasks=self._tasks,
            on_settled=self._tools_known,
        )
        self._listen_to_agent()
        self._serve_requests()
        self._congested: asyncio.TimerHandle | None = None
        self._space: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._tick = self._loop.call_later(self._tick_s, self._look_at_clients)
        if welcome.session:
            self.claim(moved=False, keep_ahead=True)

    def _listen_to_agent(self) -> None:
        self._asks = Asks(agent=self._agent, outbox=self._outbox, conversations=self._conversations)
        self._hearing = Hearing(
            agent=self._agent,
            asks=self._asks,
            outbox=self._outbox,
            conversations=self._conversations,
            making=lambda: self._making,
            limit=self._welcome.max_message_bytes,
        )
        self._ahead = self._hearing.ahead = Ahead(
            agent=self._agent,
            wanted=self._wanted_ahead,
            prepare=self._settings.workspace.make,
            on_change=self._changed,
            on_made=self._hearing.session_named,
            say=self._hearing.lines,
        )
        self._restorer = Restorer(
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            settings=self._settings,
            servers=self._servers,
            on_lost=self._context_lost,
            on_made=self._hearing.session_named,
        )
        self._turns = Turns(
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            restorer=self._restorer,
            servers=self._servers,
            queue_length=self._welcome.prompt_queue,
            on_change=self._changed,
        )

    def _serve_requests(self) -> None:
        calls = ClientCalls(agent=self._agent, outbox=self._outbox)
        self._opening = Opening(
            agent=self._agent,
            calls=calls,
            outbox=self._outbox,
            conversations=self._conversations,
            restorer=self._restorer,
            asks=self._asks,
            settings=self._settings,
            servers=self._servers,
            ahead=self._ahead,
            on_made=self._hearing.session_named,
        )
        self._requests = Requests(
            agent=self._agent,
            calls=calls,
            opening=self._opening,
            outbox=self._outbox,
            conversations=self._conversations,
            restorer=self._restorer,
            turns=self._turns,
            asks=self._asks,
            settings=self._settings,
        )

    @property
    def garbage(self) -> int:
        """Lines from the agent that were no messages or that nobody asked for."""
        return self._hearing.garbage

    @property
    def _opened(self) -> bool:
        """The journal is there."""
        return self._hearing.opened

    # -- the journal -----------------------------------------------------------------------------

    def claim(self, *, moved: bool, keep_ahead: bool) -> None:
        """Opens the journal, beside."""
        if moved:
            self._servers.home_moved()
        if not keep_ahead:
            self._ahead.forget()
        self._look_ahead_soon()
        self._tasks.start(self._open_journal(), "open_journal", on_error=self._not_opened)

    async def _open_journal(self) -> None:
        state, later = await self._journal.open()
        interrupted = self._conversations.restore(state, later)
        self._journal.begin()
        for seq, number, message_id in interrupted:
            end = {"of": seq, "message_id": message_id, "error": INTERRUPTED}
            self._outbox.note(records.END, end, self._conversations.by_number.get(number))
            self._conversations.interrupted_ended(number, message_id, {"error": INTERRUPTED})
        for client in self._outbox.clients:
            self._introduce(client)
        self._hearing.begin()
        self._outbox.flush()
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
        self._servers.agent_up()

    def agent_lines(self, lines: list[bytes]) -> None:
        """Whole lines of the agent's output."""
        self._hearing.lines(lines)
        self._outbox.flush()
        self._mind_congestion()

    def agent_down(self, what: str, *, final: bool) -> None:
        """The process ended."""
        self.agent_info = ""
        self._hearing.agent_down()
        self._asks.agent_down()
        self._ahead.agent_down()
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
            self._look_ahead_soon()
        self._drain_all()
        self._changed()

    @property
    def _making(self) -> bool:
        return bool(self._opening.making or self._restorer.making or self._ahead.making)

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
        """The configured MCP servers."""
        self._servers.set(servers)
        self._look_ahead_soon()
        found = {self._servers.stale(c.opened) for c in self._conversations.by_number.values() if c.live}
        return next((effect for effect in ("next_session", "next_turn") if effect in found), "now")

    def set_settings(self, settings: dict[str, Any]) -> str:
        """What the user allows, and where conversations run."""
        self._settings.set(settings)
        self._look_ahead_soon()
        return "next_session" if any(c.live for c in self._conversations.by_number.values()) else "now"

    def _tools_known(self) -> None:
        self._turns.kick()
        self._outbox.flush()

    @property
    def pending(self) -> int:
        """See ``port.AgentHub``."""
        return self._agent.open_calls + sum(not client.at_rest for client in self._outbox.clients)

    def _changed(self) -> None:
        self.open_turns, self.turns = self._turns.open, self._turns.accepted
        self.ahead = self._ahead.state
        self._on_change()

    # -- the conversation that is opened ahead ---------------------------------------------------

    def _wanted_ahead(self) -> Kind | None:
        if not self._settings.open_ahead or not self._servers.bound:
            return None
        params = {"cwd": self._settings.workspace.path, "mcpServers": self._servers.entries([])}
        return Kind(params, self._servers.opened)

    def _look_ahead_soon(self) -> None:
        """When all of a bind is applied."""
        if self._looking is None and not self._closed:
            pause = AHEAD_PAUSE_S if self._outbox.clients else 0
            self._looking = self._loop.call_later(pause, self._look_ahead)

    def _look_ahead(self) -> None:
        self._looking = None
        self._ahead.look()

    async def close(self) -> None:
        """Journals what there is, lets clients go, syncs."""
        self._closed = True
        self._tick.cancel()
        for timer in (self._congested, self._space, self._looking):
            if timer is not None:
                timer.cancel()
        self._outbox.flush()
        self._outbox.close()
        self._agent.close()
        self._empty.clear()
        for client in list(self._outbox.clients):
            client.close(1001, "session.stopped: the sandbox stops; connect again to start it")
        await self._servers.close()
        await self._tasks.close()
        if self._outbox.clients:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), GOODBYE_S)
        await self._journal.close()
