"""ACP in the middle: an ACP server to clients and an ACP client to the agent. START HERE.

A client's message goes ``clients`` → ``audience`` → ``requests`` (→ ``opening``, ``turns`` for prompts) →
``agent_side``; what the agent says goes ``hearing`` → ``outbox`` (number, ``journal``, emit), its requests
through ``asks``. Here these parts are put together, and tied to the agent's process and the broker's binds.
Everything runs on the loop and is synchronous, but for opening, rolling and syncing the journal.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, records
from sandbox_agent.agent_side import FAILED_HINT, AgentSide
from sandbox_agent.ahead import Ahead, Kind
from sandbox_agent.asks import Asks
from sandbox_agent.audience import Audience
from sandbox_agent.calls import ClientCalls
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

AHEAD_PAUSE_S = 0.25
"""With clients there, how long nothing is opened ahead of them: what they come for goes first."""

MakeHubMux = Callable[[Callable[[], str], Callable[[], bool], Callable[[], None]], Multiplexer]
"""Arguments: the directory that MCP servers run in, whether the home is a user's, on_change."""


class AcpHub:
    """Satisfies ``port.AgentHub``. ``grant`` asks for journal files; ``on_change`` hears when
    ``agent_info``, ``open_turns`` or ``clients`` have changed. Needs a running loop.

    Clients may be served and the agent may speak before the journal is there; both wait for it. Without a
    session in the welcome it is asked for with the ``claim``.
    """

    def __init__(
        self,
        *,
        welcome: Welcome,
        grant: GrantFn,
        on_change: Callable[[], None],
        mux: MakeHubMux,
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
        self._claimed = False
        self._closed = False
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
            make_mux=lambda on_change: mux(self._workspace, lambda: self._claimed, on_change),
            spec=spec,
            tasks=self._tasks,
            on_settled=self._tools_known,
        )
        self._listen_to_agent()
        self._serve_requests()
        self._space: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
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
        self._audience = Audience(
            welcome=self._welcome,
            journal=self._journal,
            agent=self._agent,
            outbox=self._outbox,
            conversations=self._conversations,
            asks=self._asks,
            turns=self._turns,
            requests=self._requests,
            tasks=self._tasks,
            on_change=self._changed,
        )

    @property
    def garbage(self) -> int:
        """Lines from the agent that were no messages or that nobody asked for."""
        return self._hearing.garbage

    # -- the journal -----------------------------------------------------------------------------

    def claim(self, *, moved: bool, keep_ahead: bool) -> None:
        """Opens the journal, beside."""
        self._claimed = True
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
        self._audience.begin()
        self._hearing.begin()
        self._outbox.flush()
        self._audience.drain()

    def _not_opened(self, error: BaseException) -> None:
        if not isinstance(error, JournalFailed):
            log.error("the journal could not be opened", exc_info=error)
        self._journal.failed = str(error) or "the journal could not be opened"
        self._journal_failed(self._journal.failed)

    def _journal_failed(self, what: str) -> None:
        """Nothing can be acknowledged any more: clients are told, and so are those that come."""
        self._audience.dismiss(1011, f"store.error: {what}")

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
            self._audience.tell("working", "store.disk_full", "the journal has no space", "free disk space on the host")
        else:
            self._loop.call_soon(self._audience.drain)

    # -- the agent (port) ------------------------------------------------------------------------

    def agent_up(self, channel: AgentChannel, spec: AgentSpec) -> None:
        """The process runs."""
        self.agent_info = ""
        self._agent.up(channel, spec, None if self._claimed else self._plain_session)
        self._servers.agent_up()

    def agent_lines(self, lines: list[bytes]) -> None:
        """Whole lines of the agent's output."""
        self._hearing.lines(lines)
        self._outbox.flush()
        self._audience.mind_congestion()

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
        self._audience.tell("failed" if final else "restarting", "agent.failed", what, FAILED_HINT)
        self._changed()

    def _agent_changed(self) -> None:
        """It is ready, or will not be."""
        if self._agent.ready:
            self.agent_info = jsonrpc.dumps(self._agent.info).decode()
            self._audience.tell("ready")
            self._turns.kick()
            self._look_ahead_soon()
        self._audience.drain()
        self._changed()

    def _context_lost(self, conversation: Conversation) -> None:
        what = "the agent could not reopen this conversation; it does not remember what was said before"
        self._audience.tell("ready", "agent.context_lost", what, "repeat what it has to know", conversation.id)

    @property
    def _making(self) -> bool:
        return bool(self._opening.making or self._restorer.making or self._ahead.making)

    # -- the rest of the port --------------------------------------------------------------------

    def serve(self, sock: socket.socket, attach: Attach) -> None:
        """A client's stream."""
        self._audience.serve(sock, attach)

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

    def _workspace(self) -> str:
        """Made when it is not there."""
        workspace = self._settings.workspace
        try:
            workspace.make(workspace.path)
        except OSError as error:
            log.warning("the workspace cannot be made: %s", error)
        return workspace.path

    def _tools_known(self) -> None:
        self._turns.kick()
        self._outbox.flush()

    @property
    def pending(self) -> int:
        """See ``port.AgentHub``."""
        clients = sum(not client.at_rest for client in self._outbox.clients)
        return self._agent.open_calls + clients + self._servers.starting

    def _changed(self) -> None:
        self.open_turns, self.turns = self._turns.open, self._turns.accepted
        self.clients = len(self._outbox.clients)
        self.ahead = self._ahead.state
        self._on_change()

    # -- the conversation that is opened ahead ---------------------------------------------------

    def _wanted_ahead(self) -> Kind | None:
        if not self._settings.open_ahead or not self._servers.bound:
            return None
        return Kind(self._plain_session(), self._servers.opened)

    def _plain_session(self) -> Message:
        """Params of a ``session/new`` in which a client asks for nothing of its own."""
        return {"cwd": self._settings.workspace.path, "mcpServers": self._servers.entries([])}

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
        for timer in (self._space, self._looking):
            if timer is not None:
                timer.cancel()
        self._outbox.flush()
        self._outbox.close()
        self._agent.close()
        self._audience.stop()
        await self._tasks.close()
        await self._audience.gone()
        await self._journal.close()
        await self._servers.close()
