"""Bring-up: from nothing to a ready session, its stages run as parallel as their inputs allow.

    assemble ──┬─────────────► packages ─► gateway ─┐
               ▼                                    ├─► bind ─► agent ready
    place ──► create ─► start ─► hello ─────────────┘

Assembly stands before ``create`` only when no configuration is cached; else it runs beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from broker.errors import Code, CortexError
from broker.host.tasks import first_of, together
from broker.sandbox.slots import home_key
from broker.session.assembly import Assembled
from broker.session.parts import Wanted, servers, wanted
from broker.session.sandbox import Runtime, Sandbox, place
from broker.session.timeline import Timeline
from sandbox_agent.wire.messages import Status

LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Subject:
    """Whose sandbox it is, and who hears of it."""

    user: str
    workspace: str
    session_id: str
    agent: str
    on_status: Callable[[Status], None]
    on_lost: Callable[[Sandbox, str], None]
    on_package: Callable[[str, CortexError | None], None]


@dataclass
class Prepared:
    """A configuration and what it means for the sandbox. ``warnings`` are for people."""

    assembled: Assembled
    wanted: Wanted
    warnings: tuple[str, ...] = ()


async def prepare(runtime: Runtime, subject: Subject, assembled: Assembled, home: str) -> Prepared:
    """Resolves MCP packages and computes parts and hashes; never waits for an install."""
    resolved = await runtime.shelf.resolve(servers(assembled.config), on_done=subject.on_package)
    warnings = [*assembled.warnings]
    warnings += [f"MCP server {name} is left out: {error}" for name, error in resolved.failed.items()]
    parts = wanted(
        runtime.installation_key,
        runtime.config(),
        subject.agent,
        assembled.config,
        home=home,
        image=runtime.image(),
        mcp=resolved.servers,
    )
    return Prepared(assembled, parts, tuple(warnings))


class BringUp:
    """One bring-up. ``sandbox`` is set as soon as there is something to put away."""

    def __init__(self, runtime: Runtime, subject: Subject, timeline: Timeline) -> None:
        self.runtime = runtime
        self.subject = subject
        self.timeline = timeline
        self.sandbox: Sandbox | None = None

    async def run(self, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        """Cold start. Raises ``CortexError``; then the caller puts ``sandbox`` away."""
        timeout = self.runtime.config().session.bringup_timeout_s
        try:
            async with asyncio.timeout(timeout):
                return await self._run(incarnation, generation, cached)
        except TimeoutError as error:
            last = max(self.timeline.stages, key=lambda s: s[1], default=("nothing", 0, 0))[0]
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the session was not ready in {timeout:g} s; the last stage that ended was {last!r}",
                hint="look at the session's timeline; raise session.bringup_timeout_s if the host is slow",
            ) from error
        except CortexError as error:
            if error.code is Code.SANDBOX_DIED:
                error.cause = await self._last_words() or error.cause
            raise

    async def _last_words(self) -> str:
        """What a sandbox that has just died wrote last; "" when it is not dead or said nothing."""
        if self.sandbox is None or not self.sandbox.ref:
            return ""
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                return (await self.runtime.driver.wait(self.sandbox.ref)).tail.strip()[-400:]
        except (TimeoutError, CortexError):
            return ""

    async def _run(self, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        first = cached or await self._assemble(None)
        with self.timeline.stage("place"):
            box = await self._place(incarnation)
        home = self.runtime.home_of(box.slot)
        # The agent server is welcomed with the command that the first configuration gives; a newer
        # one that comes meanwhile is bound like any change.
        with self.timeline.stage("packages"):
            early = await prepare(self.runtime, self.subject, first, home)
        _, fresh, _ = await together(self._launch(box, early), self._refresh(cached), self._gateway(box, early))
        latest = early
        if fresh is not None:
            latest = await prepare(self.runtime, self.subject, fresh, home)
            await box.tell_gateway(fresh, latest.wanted)
        with self.timeline.stage("bind"):
            await box.bind(latest.wanted, generation)
        with self.timeline.stage("agent"):
            await box.agent_ready()
        return latest

    async def _place(self, incarnation: int) -> Sandbox:
        key = home_key(self.subject.user, self.subject.workspace)
        slots = self.runtime.slots
        slot = slots.create(slots.new_id())
        try:
            slots.adopt_home(slot.id, key)
        except CortexError:
            await slots.remove(slot.id)
            raise
        self.sandbox = place(
            self.runtime,
            self.subject.user,
            self.subject.workspace,
            self.subject.session_id,
            key,
            slot,
            incarnation,
            welcomed=False,
            on_status=self.subject.on_status,
            on_lost=self._lost,
        )
        return self.sandbox

    def _lost(self, reason: str) -> None:
        if self.sandbox is not None:
            self.subject.on_lost(self.sandbox, reason)

    async def _assemble(self, last: Assembled | None) -> Assembled:
        with self.timeline.stage("assemble"):
            return await self.runtime.assembler.assemble(self.subject.user, last)

    async def _refresh(self, cached: Assembled | None) -> Assembled | None:
        return await self._assemble(cached) if cached is not None else None

    async def _gateway(self, box: Sandbox, prepared: Prepared) -> None:
        with self.timeline.stage("gateway"):
            await box.tell_gateway(prepared.assembled, prepared.wanted)

    async def _launch(self, box: Sandbox, prepared: Prepared) -> None:
        with self.timeline.stage("start"):
            await box.launch(prepared.assembled, prepared.wanted)
        with self.timeline.stage("hello"):
            await self._hello_or_exit(box)

    async def _hello_or_exit(self, box: Sandbox) -> None:
        """Waits for hello, and for the sandbox's end, which tells more than a deadline would."""
        exited, hello = await first_of(
            self.runtime.driver.wait(box.ref),
            box.link.wait_hello(self.runtime.config().sandbox.hello_timeout_s),
        )
        if hello is None and exited is not None:
            raise CortexError(
                Code.SANDBOX_DIED,
                f"the sandbox ended with code {exited.code} before its agent server said hello",
                cause=exited.tail.strip()[-400:] or None,
                hint="build the image anew with `make image`; `cortex doctor` checks the rest",
            )
