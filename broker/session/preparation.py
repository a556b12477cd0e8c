"""What is done for users who are expected, with the parts of the broker that can do it.

``session.forewarner`` says for whom and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from broker.config import PoolAgentConfig
from broker.errors import Code, CortexError
from broker.sandbox.slots import home_key
from broker.session.assembly import Assembled
from broker.session.parts import servers
from broker.session.port import SessionPort
from broker.session.sandbox import Runtime
from broker.session.shelf import GUESS_BYTES
from broker.store.sessions import SessionRow

IS_UP = ("starting", "ready", "paused")


class Sessions(Protocol):
    """``session.registry.Registry``."""

    def held(self, user: str, workspace: str) -> SessionPort | None: ...
    async def prewarm(self, user: str, workspace: str) -> Any: ...


class Pools(Protocol):
    """``session.pool.Pool``: what warm sandboxes take, and how many there may be."""

    def view(self) -> dict[str, Any]:
        """For operators; ``pool_view.view``."""

    def expect(self, agent: str, count: int | None) -> None:
        """So many generic ones are wanted, between minimum and maximum; None: as many as configured."""


class Preparation:
    """A ``Preparer``. A user's session is the one that was used last."""

    def __init__(
        self, runtime: Runtime, sessions: Sessions, pools: Pools, agents: Callable[[], Mapping[str, PoolAgentConfig]]
    ) -> None:
        self._runtime = runtime
        self._sessions = sessions
        self._pools = pools
        self._agents = agents
        self._room = 0
        self._sizes: dict[str, int] = {}
        self._whose: dict[str, tuple[str, str]] = {}
        """Workspace and agent by user."""

    async def up(self, users: Sequence[str]) -> Collection[str]:
        """Those who have a sandbox that is up, or comes up; also sees how much room there is. Raises
        ``CortexError``."""
        self._look_at_pools()
        self._whose = {user: known for user, known in self._whose.items() if user in users}
        for user in users:
            if user not in self._whose:
                await self._find(user)
        held = ((user, self._held(user)) for user in users)
        return [user for user, session in held if session is not None and session.state in IS_UP]

    def _held(self, user: str) -> SessionPort | None:
        known = self._whose.get(user)
        return self._sessions.held(user, known[0]) if known else None

    async def _find(self, user: str) -> SessionRow | None:
        rows = await self._runtime.store.of_user(user)
        last = max(rows, key=lambda row: row.updated_at, default=None)
        if last is not None:
            self._whose[user] = (last.workspace, last.agent)
        return last

    def room(self) -> int:
        """Bytes that warm sandboxes may take beyond those there are, below 0 when they take too much; as of the last
        ``up``."""
        return self._room

    def _look_at_pools(self) -> None:
        view = self._pools.view()
        memory, agents = view["memory"], view["agents"]
        left = memory["budget_bytes"] - memory["warm_bytes"]
        self._room = min(left, memory["host_available_bytes"] - memory["reserve_bytes"])
        self._sizes = {one["agent"]: one["bytes_each"] for one in agents}

    def size(self, user: str) -> int:
        """Bytes of the user's sandbox, about."""
        known = self._whose.get(user)
        return self._sizes.get(known[1], GUESS_BYTES) if known else GUESS_BYTES

    async def prewarm(self, user: str) -> bool:
        """Begins to bring the user's sandbox up, or keeps it a while longer; False: they have no session."""
        last = await self._find(user)
        if last is not None:
            await self._sessions.prewarm(user, last.workspace)
        return last is not None

    async def let_go(self, user: str) -> None:
        """Stops what was brought up for the user, unless somebody uses it."""
        session = self._held(user)
        if session is not None:
            await session.let_go()

    async def prepare(self, user: str) -> Mapping[str, str]:
        """Home, packages and credentials of the user's next bring-up; by name "" or what is wrong."""
        last = await self._find(user)
        if last is None:
            raise CortexError(Code.NO_SESSION, f"{user} has no session", hint="it is made when they come")
        row = await self._runtime.store.get(user, last.workspace) or last
        return {
            "home": self._home(row),
            "packages": await self._packages(row),
            "credentials": await self._credentials(row),
        }

    def _home(self, row: SessionRow) -> str:
        """A session that never came up has none yet."""
        key, slots = home_key(row.user, row.workspace), self._runtime.slots
        there = slots.has_home(key) or key in slots.owners().values()
        return "" if there or row.config is None else "it is not there"

    async def _packages(self, row: SessionRow) -> str:
        """Installs what is missing; what is being installed when this returns is ready the next time."""
        resolved = await self._runtime.shelf.resolve(servers((await self._assembled(row)).config))
        return "; ".join(f"{name}: {error}" for name, error in sorted(resolved.failed.items()))

    async def _assembled(self, row: SessionRow) -> Assembled:
        """The latest configuration, which the sources remember, so that the bring-up's read is a short one."""
        assembler = self._runtime.assembler
        cached = assembler.restore(row.config) if row.config is not None else None
        return await assembler.assemble(row.user, cached)

    async def _credentials(self, row: SessionRow) -> str:
        """Whether they can be read; renews what is about to expire."""
        config, credentials = self._runtime.config(), self._runtime.credentials
        agent = config.agents.get(row.agent)
        if agent is None:
            return f"agent {row.agent} is no longer configured"
        try:
            if agent.provider:
                await credentials.get(row.user, agent.provider, config.gateway.providers[agent.provider])
            await credentials.files(row.user, row.agent, agent)
        except CortexError as error:
            return str(error)
        return "; ".join(await credentials.warnings(row.user))

    def load(self, share: float | None) -> None:
        """Scales the targets of the pools by the hour of the week."""
        for agent, pool in self._agents().items():
            self._pools.expect(agent, None if share is None else math.ceil(pool.target * share))
