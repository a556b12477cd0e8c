"""The conversation that is opened before anybody asks: the first client that wants its like has it at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sandbox_agent.agent_side import AgentSide, OnReply, failed, is_session_id
from sandbox_agent.jsonrpc import Message
from sandbox_agent.servers import Opened
from sandbox_agent.tasks import log

MAX_SAID = 64
MAX_SAID_BYTES = 2**20
"""What the agent says of it meanwhile is kept up to these; then the oldest goes."""


class Kind(NamedTuple):
    """What it is, or would be, opened with: the params of ``session/new`` and the versions of the MCP servers."""

    params: Message
    opened: Opened


class Taker(NamedTuple):
    """Somebody who waits for it; one of the two is called, once."""

    given: OnReply
    not_given: Callable[[], None]


class Ahead:
    """``state``: empty (none), opening, open or failed; ``agent_id``: the agent's id for it, empty unless it is open.

    ``wanted`` says what should be opened now, None for nothing. ``prepare`` makes the directory, may raise
    ``OSError``. ``on_change`` hears of a new state, ``on_made`` that the agent has named a session, ``say`` gets
    what the agent said of one that was given away. Opened once a bring-up: not again after it was given away,
    nor when a client has made do without it.
    """

    def __init__(
        self,
        *,
        agent: AgentSide,
        wanted: Callable[[], Kind | None],
        prepare: Callable[[str], None],
        on_change: Callable[[], None],
        on_made: Callable[[], None],
        say: Callable[[list[bytes]], None],
    ) -> None:
        self.state = ""
        self.agent_id = ""
        self._agent = agent
        self._wanted = wanted
        self._prepare = prepare
        self._on_change = on_change
        self._on_made = on_made
        self._say = say
        self._kind: Kind | None = None
        self._reply: Message = {}
        self._said: deque[bytes] = deque()
        self._said_bytes = 0
        self._taker: Taker | None = None
        self._spent = False
        self._round = 0

    @property
    def making(self) -> bool:
        """A call is under way that will name a session."""
        return self.state == "opening"

    # -- opening ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Opens it when it is due; discards it when it is not what is wanted any more."""
        wanted = self._wanted()
        if self._kind is not None and self._kind != wanted and self._taker is None:
            self.forget()
        if wanted is not None and self._kind is None and not self._spent and self._agent.ready:
            self._open(wanted)

    def _open(self, kind: Kind) -> None:
        self._kind = kind
        self._round += 1
        number = self._round
        try:
            self._prepare(kind.params["cwd"])
        except OSError as error:
            self._failed(f"the workspace cannot be made: {error}")
            return
        self._set("opening")
        self._agent.call("session/new", kind.params, lambda reply: self._opened(number, reply))

    def _opened(self, number: int, reply: Message) -> None:
        result = reply.get("result")
        agent_id = result.get("sessionId") if isinstance(result, dict) else None
        if number != self._round:  # nobody wants it any more
            if is_session_id(agent_id):
                self._agent.close_session(agent_id)
            return
        if is_session_id(agent_id):
            self.agent_id, self._reply = agent_id, reply
            self._set("open")
            if self._taker is not None:
                self._give(self._taker.given)
        else:
            self._failed(str(reply.get("error", "the agent made no session")))
        self._on_made()

    def _failed(self, why: str) -> None:
        log.warning("no conversation could be opened ahead: %s", why[:300])
        taker, self._taker = self._taker, None
        self._set("failed")
        if taker is not None:
            self._spent = True
            taker.not_given()

    def heard(self, line: bytes) -> None:
        """Something that the agent said of it."""
        self._said.append(line)
        self._said_bytes += len(line)
        while len(self._said) > MAX_SAID or self._said_bytes > MAX_SAID_BYTES:
            self._said_bytes -= len(self._said.popleft())

    # -- giving away -----------------------------------------------------------------------------

    def fits(self, params: Message) -> bool:
        """Whether a ``session/new`` with these params, as the agent would get them, can be answered with it."""
        if self._kind is None or self.state == "failed" or self._taker is not None:
            return False
        plain = {name: value for name, value in params.items() if value or name not in OPTIONAL}
        return plain == self._kind.params and self._kind == self._wanted()

    def take(self, given: OnReply, not_given: Callable[[], None]) -> None:
        """Gives it away, now or when it is open; call it when it ``fits``."""
        if self.state == "open":
            self._give(given)
        else:
            self._taker = Taker(given, not_given)

    def _give(self, given: OnReply) -> None:
        reply, said = self._reply, list(self._said)
        self._spent = True
        self._reset()
        given(reply)
        self._say(said)

    # -- ends ------------------------------------------------------------------------------------

    def passed(self) -> None:
        """A client has made a conversation of its own."""
        self._spent = True

    def release(self) -> None:
        """A client goes on with another conversation. An agent that cannot close it keeps it for a later client."""
        self._spent = True
        if self._taker is None and self._agent.can("close"):
            self.forget()

    def forget(self) -> None:
        """Discards it; the agent closes it, if it can."""
        self._agent.close_session(self.agent_id)
        self._reset()

    def agent_down(self) -> None:
        """The process is gone, and it with it."""
        taker = self._taker
        self._reset()
        if taker is not None:
            taker.given(failed("the agent ended before it had made the conversation"))

    def _reset(self) -> None:
        self._round += 1
        self._kind = self._taker = None
        self.agent_id, self._reply = "", {}
        self._said.clear()
        self._said_bytes = 0
        self._set("")

    def _set(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._on_change()


OPTIONAL = ("_meta", "additionalDirectories")
"""Params that mean nothing when they are empty."""
