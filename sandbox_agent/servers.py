"""The MCP servers that conversations get.

The configured ones on stdio run once each behind the multiplexer, which is one entry towards the
agent; those on HTTP and a client's own are entries of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from sandbox_agent.agent_side import AgentSide
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.messages import AgentSpec


class Multiplexer(Protocol):
    """One MCP server on stdio that stands for many; see ``mux``."""

    @property
    def settled(self) -> bool:
        """Every server has listed its tools, or will not."""

    @property
    def followed(self) -> bool:
        """Agents that follow changes know these tools."""

    def set(self, servers: list[dict[str, Any]]) -> bool:
        """Runs these and no others; equal ones go on. True when something differs."""

    def entry(self) -> dict[str, Any]:
        """What conversations are given: always the same."""

    def renew(self) -> None:
        """Starts all of them anew."""

    async def start(self) -> None:
        """Listens for agents. Raises ``OSError``."""

    async def close(self) -> None:
        """Ends all servers."""


MakeMux = Callable[[Callable[[], None]], Multiplexer]
"""Argument: ``on_change``, which hears of a new ``settled``."""


class Opened(NamedTuple):
    """What a conversation was opened with: versions of the entries of their own and of what is behind the
    multiplexer."""

    direct: int = 0
    muxed: int = 0


class McpServers:
    """``spec`` tells the agent that runs or will next; ``on_settled`` is called when ``settled`` has become true.

    ``bound``: they were configured.
    """

    def __init__(
        self,
        *,
        agent: AgentSide,
        make_mux: MakeMux,
        spec: Callable[[], AgentSpec | None],
        tasks: TaskOwner,
        on_settled: Callable[[], None],
    ) -> None:
        self.bound = False
        self._versions = Opened()
        self._agent = agent
        self._make_mux = make_mux
        self._spec = spec
        self._tasks = tasks
        self._on_settled = on_settled
        self._stdio: list[dict[str, Any]] = []
        self._direct: list[dict[str, Any]] = []
        self._mux: Multiplexer | None = None
        self._env: dict[str, str] | None = None
        self._moved = False
        self._due = False
        self._closed = False

    def set(self, servers: list[dict[str, Any]]) -> None:
        """The configured ones (ACP ``McpServer`` objects)."""
        self.bound = True
        stdio = [dict(server) for server in servers if "command" in server]
        direct = [dict(server) for server in servers if "command" not in server]
        if direct != self._direct:
            self._direct = direct
            self._versions = self._versions._replace(direct=self._versions.direct + 1)
        if stdio != self._stdio:
            self._stdio = stdio
            self._versions = self._versions._replace(muxed=self._versions.muxed + 1)
            self._apply_soon()

    def entries(self, clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For ``session/new``: the configured ones, then a client's with other names."""
        ours = [*([self._multiplexer().entry()] if self._muxes else []), *self._direct]
        taken = {server.get("name") for server in (*ours, *self._stdio)}
        return [*ours, *(server for server in clients if server["name"] not in taken)]

    @property
    def opened(self) -> Opened:
        """What a conversation that is opened now is opened with. What is behind the multiplexer does not matter to
        agents that follow its changes."""
        return self._versions._replace(muxed=0) if self._agent.live_mcp else self._versions

    @property
    def version(self) -> int:
        """Goes up when what is behind the multiplexer is other servers."""
        return self._versions.muxed

    def stale(self, opened: Opened) -> str:
        """When a conversation that was opened so gets what is configured now: empty (it has it), next_turn or
        next_session."""
        if opened.muxed != self.opened.muxed:
            return "next_turn" if self._agent.reopens else "next_session"
        return "" if opened == self.opened else "next_session"

    @property
    def settled(self) -> bool:
        """The tools of all that are multiplexed are known, to conversations too, as far as they ever will be."""
        if self._due or self._mux is None:
            return not self._due
        return self._mux.settled and (self._mux.followed or not self._agent.live_mcp)

    @property
    def starting(self) -> bool:
        """Some have neither listed their tools yet nor failed to."""
        return self._due or (self._mux is not None and not self._mux.settled)

    @property
    def _muxes(self) -> bool:
        """An agent that takes tools in an open conversation has the multiplexer from the start: they may come later."""
        return bool(self._stdio) or self._agent.live_mcp

    # -- the multiplexer -------------------------------------------------------------------------

    def agent_up(self) -> None:
        """An agent runs: its environment is the servers', and one that speaks no ACP needs none."""
        self._apply_soon()

    def home_moved(self) -> None:
        """What runs has the old home in hand: it is started anew."""
        self._moved = True
        self._apply_soon()

    def _multiplexer(self) -> Multiplexer:
        if self._mux is None:
            self._mux = mux = self._make_mux(self._changed)
            self._tasks.start(mux.start(), "mux", on_error=lambda error: log.error("no MCP servers: %s", error))
        return self._mux

    def _apply_soon(self) -> None:
        """Once all of a bind is applied."""
        if not self._due and not self._closed:
            self._due = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._due = False
        spec = self._spec()
        if self._closed or spec is None or spec.protocol != "acp":
            return
        if self._stdio or self._mux is not None:
            mux = self._multiplexer()
            mux.set(self._stdio)
            if self._moved or self._env not in (None, spec.env):
                mux.renew()
            self._env, self._moved = dict(spec.env), False
        self._changed()

    def _changed(self) -> None:
        if self.settled and not self._closed:
            self._on_settled()

    async def close(self) -> None:
        """Ends them."""
        self._closed = True
        if self._mux is not None:
            await self._mux.close()
