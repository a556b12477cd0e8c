"""All clients of an agent server: they come, are heard, held, told how things are, and closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from sandbox_agent import jsonrpc
from sandbox_agent.agent_side import AgentSide
from sandbox_agent.asks import Asks
from sandbox_agent.clients import MAX_STRIKES, Client, adopt
from sandbox_agent.conversations import Conversations
from sandbox_agent.journal import Journal
from sandbox_agent.jsonrpc import Message
from sandbox_agent.outbox import Outbox
from sandbox_agent.requests import Requests
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.turns import Turns
from sandbox_agent.wire.messages import Attach, Welcome

HOLD_S = 120.0
"""Longest time that a client is held because journal or agent are not there."""
CONGESTED_S = 0.02
"""Pause before an agent that took nothing is looked at again."""
GOODBYE_S = 0.5
"""How long ``close`` waits until clients have their close frames."""
MESSAGES_A_TURN = 64
"""Messages of one client before others have a turn."""


def status_message(state: str, code: str = "", what: str = "", hint: str = "", session_id: str = "") -> Message:
    """A ``_cortex/status`` notification; what is empty is left out."""
    params = {"state": state, "code": code, "what": what[:2000], "hint": hint, "sessionId": session_id}
    return {"jsonrpc": "2.0", "method": "_cortex/status", "params": {k: v for k, v in params.items() if v}}


class Audience:
    """Clients may come before the journal is there; they are held until ``begin``. Satisfies
    ``clients.ClientEvents``. ``on_change``: there are more of them or fewer."""

    def __init__(
        self,
        *,
        welcome: Welcome,
        journal: Journal,
        agent: AgentSide,
        outbox: Outbox,
        conversations: Conversations,
        asks: Asks,
        turns: Turns,
        requests: Requests,
        tasks: TaskOwner,
        on_change: Callable[[], None],
    ) -> None:
        self._welcome = welcome
        self._journal = journal
        self._agent = agent
        self._outbox = outbox
        self._conversations = conversations
        self._asks = asks
        self._turns = turns
        self._requests = requests
        self._tasks = tasks
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._opened = False
        self._closed = False
        self._empty = asyncio.Event()
        self._congested: asyncio.TimerHandle | None = None
        self._tick: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The journal is there."""
        self._opened = True
        for client in self._outbox.clients:
            self._introduce(client)

    # -- coming and going ------------------------------------------------------------------------

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
        if self._tick is None:
            self._tick = self._loop.call_later(self._tick_s, self._look)
        if self._journal.failed:
            client.close(1011, f"store.error: {self._journal.failed}")
        elif self._opened:
            self._introduce(client)
        self._on_change()

    def _introduce(self, client: Client) -> None:
        client.number = self._conversations.next_client
        self._conversations.next_client += 1
        client.subscriptions[0] = self._journal.seq
        if client.attach.cortex and not self._agent.ready:
            broken = self._agent.broken
            status = status_message("failed" if broken else "starting", "agent.failed" if broken else "", broken)
            self._outbox.tell(client, status)

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
        if not self._outbox.clients:
            self._empty.set()
        self._on_change()

    @property
    def _tick_s(self) -> float:
        return max(0.05, min(5.0, self._welcome.stall_timeout_s / 4))

    def _look(self) -> None:
        """Closes who takes no byte, and who has been held for too long; while nobody is there it does not look."""
        self._tick = self._loop.call_later(self._tick_s, self._look) if self._outbox.clients else None
        now = self._loop.time()
        ready = self._opened and (self._agent.ready or self._agent.broken)
        for client in list(self._outbox.clients):
            if client.stalled(now, self._welcome.stall_timeout_s):
                client.close(4408, "client.slow_consumer: it took no byte for too long; connect and load again")
            elif ready or not client.inbox:
                client.since = now
            elif now - client.since > HOLD_S:
                client.close(1013, "session.bringup_timeout: the agent is not ready; try again later")

    def dismiss(self, code: int, reason: str) -> None:
        """Closes all that are there."""
        for client in list(self._outbox.clients):
            client.close(code, reason)

    def stop(self) -> None:
        """Serves nobody any more."""
        self._closed = True
        if self._tick is not None:
            self._tick.cancel()
        if self._congested is not None:
            self._congested.cancel()
        self._empty.clear()
        self.dismiss(1001, "session.stopped: the sandbox stops; connect again to start it")

    async def gone(self) -> None:
        """Returns when all are gone, after ``GOODBYE_S`` at most."""
        if self._outbox.clients:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), GOODBYE_S)

    # -- hearing ---------------------------------------------------------------------------------

    @property
    def _serving(self) -> bool:
        return self._opened and (self._agent.ready or bool(self._agent.broken)) and not self._agent.congested

    def client_spoke(self, client: Client) -> None:
        """Takes its messages, if journal and agent are there."""
        done = 0
        while client.inbox and self._serving and done < MESSAGES_A_TURN:
            done += 1
            self._message(client, client.next_message())
        if client.inbox and self._serving:
            self._loop.call_soon(self.client_spoke, client)
        self._outbox.flush()
        client.push()
        client.regulate_reading()
        self.mind_congestion()

    def _message(self, client: Client, text: str) -> None:
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

    def drain(self) -> None:
        """Takes what waits, of everybody, if it can be taken."""
        if not self._opened:
            return
        for client in list(self._outbox.clients):
            if client.inbox:
                self.client_spoke(client)
        self._outbox.flush()

    def mind_congestion(self) -> None:
        """Looks again in a moment when the agent takes nothing."""
        if self._congested is None and self._agent.congested and not self._closed:
            self._congested = self._loop.call_later(CONGESTED_S, self._uncongest)

    def _uncongest(self) -> None:
        self._congested = None
        if not self._agent.congested:
            self._turns.kick()
            self.drain()
        self.mind_congestion()

    # -- telling ---------------------------------------------------------------------------------

    def tell(self, state: str, code: str = "", what: str = "", hint: str = "", session_id: str = "") -> None:
        """``_cortex/status`` for the clients that understand it."""
        if not self._opened:
            return
        message = status_message(state, code, what, hint, session_id)
        for client in list(self._outbox.clients):
            if client.attach.cortex:
                self._outbox.tell(client, message)
                client.push()
