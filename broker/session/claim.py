"""A claim: a warm sandbox that was nobody's becomes a session's.

    row (durable, fenced) ─► home ──┐
    gateway ────────────────────────┼─► bind
    resume ─────────────────────────┘

Whose it is is durable before anything of theirs comes near it, and the gateway serves them before the
sandbox is told. A claim that fails is put away like any sandbox: the home goes back to rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from broker.errors import Code, CortexError
from broker.host.tasks import both, together
from broker.session.assembly import Assembled
from broker.session.parts import Wanted
from broker.session.sandbox import Owner, Sandbox, claim_part, journal_of
from broker.session.timeline import Timeline
from sandbox_agent.wire.messages import Status

T = TypeVar("T")
TAKE_OVER_S = 3.0
"""Longest that a claim's own steps, all at once, may take until the bind; a cold start is the better bet then."""


class Takes(Protocol):
    """What a bring-up asks of the pool (``session.pool``)."""

    def take(self, agent: str, boot: str) -> Sandbox | None:
        """A warm sandbox of ``agent`` made with ``boot``, handed out this once; None when there is none. No I/O."""

    def yielding(self) -> AbstractContextManager[None]:
        """Around a cold start of a user's: the pool makes none meanwhile."""


class _NoPool:
    def take(self, agent: str, boot: str) -> Sandbox | None:
        return None

    def yielding(self) -> AbstractContextManager[None]:
        return nullcontext()


NO_POOL: Takes = _NoPool()


class Claim:
    """One claim of ``box``, which the pool has handed out; ``box.put_away`` undoes it, whatever was reached."""

    def __init__(
        self, box: Sandbox, owner: Owner, *, on_status: Callable[[Status], None], on_lost: Callable[[str], None]
    ) -> None:
        self._box = box
        self._owner = owner
        self._moved = False
        box.owner = replace(owner, home_key="")
        box.on_status, box.on_lost = on_status, on_lost

    async def take_over(self, assembled: Assembled, timeline: Timeline, meanwhile: Coroutine[Any, Any, T]) -> T:
        """Row, home, journal and gateway are the owner's when it returns what ``meanwhile`` did; a cold start would
        wait for that just as long. Raises ``CortexError``."""
        box = self._box
        with timeline.stage("claim"):
            # The row first: what the others compute is computed while it is written.
            rest = both(self._soon(box.resume()), meanwhile)
            _, _, (_, done) = await together(self._soon(self._own()), self._soon(box.tell_gateway(assembled)), rest)
            return done

    async def _soon(self, step: Coroutine[Any, Any, object]) -> None:
        try:
            async with asyncio.timeout(TAKE_OVER_S):
                await step
        except TimeoutError as error:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the warm sandbox in slot {self._box.slot.id} was not taken over in {TAKE_OVER_S:g} s",
                hint="a cold start follows; look at the load of host and engine",
            ) from error

    async def _own(self) -> None:
        box, owner, runtime = self._box, self._owner, self._box.runtime
        if box.failed is not None:
            raise box.failed
        if not await runtime.store.sandbox_claim(box.slot.id, box.incarnation, owner.user, owner.workspace):
            raise CortexError(
                Code.SESSION_CONFLICT, f"slot {box.slot.id} is not to be claimed", hint="a cold start follows"
            )
        box.owner = owner
        self._moved = runtime.slots.adopt_home(box.slot.id, owner.home_key)
        box.link.journal = journal_of(runtime, owner.home_key)

    async def bind(self, wanted: Wanted, generation: int) -> None:
        """Tells the agent server, with the parts that differ. Raises ``CortexError``."""
        box = self._box
        agent = box.runtime.config().agents[box.agent]
        await box.bind(wanted, generation, claim_part(self._owner.session_id, agent, moved=self._moved))
