"""Bring-up: from nothing to a ready session, its stages run as parallel as their inputs allow.

    assemble ──┬─────────────► packages ─► gateway ─┐
               ▼                                    ├─► bind ─► agent ready
    place ──► create ─► start ─► hello ─────────────┘

Assembly stands before ``create`` only when no configuration is cached; else it runs beside it.
Where the pool has a warm sandbox, ``claim`` takes the place of the lower line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import structlog

from broker.config import AgentConfig, Config
from broker.errors import Code, CortexError
from broker.host.tasks import both, first_of, together
from broker.metrics import POOL_CLAIMS
from broker.sandbox.slots import home_key
from broker.session.assembly import Assembled
from broker.session.claim import NO_POOL, Claim, Takes
from broker.session.parts import Wanted, boot_hash, servers, wanted
from broker.session.sandbox import Owner, Runtime, Sandbox, how_ended, place
from broker.session.timeline import Timeline
from sandbox_agent.wire.messages import Status

log = structlog.get_logger(__name__)

T = TypeVar("T")
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
    on_placed: Callable[[Sandbox], None]
    """There is something to put away from now on."""
    on_package: Callable[[str, CortexError | None], None]

    @classmethod
    def nobody(cls, agent: str) -> Subject:
        """Of a warm sandbox."""

        def ignore(*args: object) -> None:
            return

        return cls("", "", "", agent, ignore, ignore, ignore, ignore)

    @property
    def owner(self) -> Owner:
        """Whose sandbox it is."""
        return Owner(self.user, self.workspace, self.session_id, home_key(self.user, self.workspace))


@dataclass
class Prepared:
    """A configuration and what it means for the sandbox. ``warnings`` are for people; ``pending``: packages that are
    being installed for it."""

    assembled: Assembled
    wanted: Wanted
    warnings: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()


async def prepare(runtime: Runtime, subject: Subject, assembled: Assembled, home: str) -> Prepared:
    """Resolves MCP packages and computes parts and hashes; never waits for an install. Raises ``CortexError``."""
    config = runtime.config()
    agent = agent_of(config, subject.agent)
    resolved = await runtime.shelf.resolve(servers(assembled.config), on_done=subject.on_package)
    warnings = [*assembled.warnings]
    warnings += [f"MCP server {name} is left out: {error}" for name, error in resolved.failed.items()]
    files = await runtime.credentials.files(subject.user, subject.agent, agent) if subject.user else []
    warnings += await runtime.credentials.warnings(subject.user) if subject.user else ()
    parts = wanted(
        runtime.installation_key,
        config,
        subject.agent,
        assembled.config,
        home=home,
        image=runtime.image,
        mcp=resolved.servers,
        files=files,
        generic=not subject.user,
    )
    return Prepared(assembled, parts, tuple(warnings), tuple(resolved.pending))


def agent_of(config: Config, name: str) -> AgentConfig:
    """Raises ``UNKNOWN_AGENT``."""
    if name not in config.agents:
        raise CortexError(
            Code.UNKNOWN_AGENT,
            f"the session's agent {name!r} is no longer configured",
            hint=f"put [agents.{name}] back into config.toml, or delete the session",
        )
    return config.agents[name]


async def or_exit(box: Sandbox, work: Coroutine[Any, Any, T], when: str) -> T:
    """Returns what ``work`` does; the sandbox's end meanwhile tells more, and sooner, than a deadline would."""
    exited, done = await first_of(box.runtime.driver.wait(box.ref), work)
    if exited is not None:
        raise CortexError(
            Code.SANDBOX_DIED,
            f"the sandbox {how_ended(exited)} {when}",
            cause=exited.tail.strip()[-400:] or None,
            hint="build the image anew with `make image`; `cortex doctor` checks the rest",
        )
    return cast(T, done)


class BringUp:
    """One bring-up, or the taking over of a sandbox that outlived the last broker."""

    def __init__(self, runtime: Runtime, subject: Subject, timeline: Timeline, pool: Takes = NO_POOL) -> None:
        self.runtime = runtime
        self.pool = pool
        self.subject = subject
        self.timeline = timeline
        self.sandbox: Sandbox | None = None

    async def run(self, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        """From a warm sandbox, else a cold start. Raises ``CortexError``; then the caller puts the sandbox away."""
        return await self._bounded(self._run(incarnation, generation, cached))

    async def readopt(self, box: Sandbox, generation: int, cached: Assembled | None) -> Prepared:
        """Waits until the agent server has redialled and gives it what differs. Raises ``CortexError``."""
        self.sandbox = box
        return await self._bounded(self._readopt(box, generation, cached))

    async def _bounded(self, work: Coroutine[Any, Any, Prepared]) -> Prepared:
        timeout = self.runtime.config().session.bringup_timeout_s
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError as error:
            last = max(self.timeline.stages, key=lambda s: s[1], default=("nothing", 0, 0))[0]
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the session was not ready in {timeout:g} s; the last stage that began was {last!r}",
                cause=self.sandbox.status.what if self.sandbox and self.sandbox.status else None,
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
        latest = await self._bring(first, incarnation, generation, cached)
        if self.sandbox is None or self.sandbox.boot_hash == latest.wanted.hashes["boot"]:
            return latest
        # It was made with what was cached, and the sources say otherwise by now.
        with self.timeline.stage("put_away"):
            await self.sandbox.put_away(grace_s=0)
        self.timeline.path = "cold"
        return await self._bring(latest.assembled, incarnation, generation, None)

    async def _bring(self, first: Assembled, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        if self.timeline.intent == "forecast":
            # What may come to nothing takes nothing from those who are here.
            return await self._start(first, incarnation, generation, cached)
        return await self._warm(first, generation, cached) or await self._cold(first, incarnation, generation, cached)

    async def _warm(self, first: Assembled, generation: int, cached: Assembled | None) -> Prepared | None:
        """From the pool; None when it has none, or when that one was lost on the way and is put away."""
        runtime = self.runtime
        boot = boot_hash(runtime.installation_key, first.config, runtime.image)
        box = self.pool.take(self.subject.agent, boot)
        if box is None:
            return None
        self.sandbox = box
        self.subject.on_placed(box)
        self.timeline.path = "generic_warm"
        try:
            return await self._claim(box, first, generation, cached)
        except CortexError as error:
            log.warning("claim_failed", session=self.subject.session_id, slot=box.slot.id, error=str(error))
            POOL_CLAIMS.labels("generic", "failed").inc()
            with self.timeline.stage("put_away"):
                await box.put_away(grace_s=0)
            self.sandbox = None
            self.timeline.path = "cold"
            return None

    async def _claim(self, box: Sandbox, first: Assembled, generation: int, cached: Assembled | None) -> Prepared:
        claim = Claim(box, self.subject.owner, on_status=self.subject.on_status, on_lost=self._lost)
        home = self.runtime.home_of(box.slot)

        async def make() -> Prepared:
            early = await claim.take_over(first, self.timeline, prepare(self.runtime, self.subject, first, home))
            with self.timeline.stage("bind"):
                await claim.bind(early.wanted, generation)
            with self.timeline.stage("agent"):
                await box.agent_ready()
            return early

        async def work() -> Prepared:
            early, fresh = await both(make(), self._refresh(cached))
            return await self._newer(box, early, fresh, generation)

        return await or_exit(box, work(), "while it was claimed")

    async def _newer(self, box: Sandbox, early: Prepared, fresh: Assembled | None, generation: int) -> Prepared:
        """Gives it what the sources say now, where that is another configuration than the cached one."""
        latest = await self._latest(box, early, fresh)
        if box.differing(latest.wanted):
            await self._settle(box, latest, generation)
        return latest

    async def _latest(self, box: Sandbox, early: Prepared, fresh: Assembled | None) -> Prepared:
        """What the sources say now, prepared and told to the gateway."""
        before = early.assembled
        if fresh is None:
            return early
        if fresh.config == before.config and fresh.warnings == before.warnings:
            return replace(early, assembled=fresh)
        latest = await prepare(self.runtime, self.subject, fresh, self.runtime.home_of(box.slot))
        await box.tell_gateway(fresh)
        return latest

    async def _cold(self, first: Assembled, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        with self.pool.yielding():
            latest = await self._start(first, incarnation, generation, cached)
        if not self.timeline.intent:
            POOL_CLAIMS.labels("cold", "hit").inc()
        return latest

    async def _start(self, first: Assembled, incarnation: int, generation: int, cached: Assembled | None) -> Prepared:
        with self.timeline.stage("place"):
            box = await self._place(incarnation)
        home = self.runtime.home_of(box.slot)
        # The agent server is welcomed with the command that the first configuration gives; a newer
        # one that comes meanwhile is bound like any change.
        with self.timeline.stage("packages"):
            early = await prepare(self.runtime, self.subject, first, home)
        _, fresh, _ = await together(self._launch(box, early), self._refresh(cached), self._gateway(box, first))
        latest = await self._latest(box, early, fresh)
        await or_exit(box, self._settle(box, latest, generation), "before it was ready")
        return latest

    async def _readopt(self, box: Sandbox, generation: int, cached: Assembled | None) -> Prepared:
        if box.paused:
            with self.timeline.stage("resume"):
                await box.resume()
        await self._hello(box)
        assembled = await self._assemble(cached)
        prepared = await prepare(self.runtime, self.subject, assembled, self.runtime.home_of(box.slot))
        await self._gateway(box, assembled)
        # What it was made with is not known any more; what it would be made with now is the best guess.
        box.boot_hash = prepared.wanted.hashes["boot"]
        claim = box.unfinished_claim()
        await or_exit(box, self._settle(box, prepared, generation, claim), "before it was taken over")
        return prepared

    async def _place(self, incarnation: int) -> Sandbox:
        key = home_key(self.subject.user, self.subject.workspace)
        slots = self.runtime.slots
        slot = slots.create(slots.new_id())
        try:
            slots.adopt_home(slot.id, key)
            box = place(
                self.runtime,
                self.subject.owner,
                slot,
                incarnation,
                agent=self.subject.agent,
                welcomed=False,
                on_status=self.subject.on_status,
                on_lost=self._lost,
            )
        except CortexError:
            if slots.owner(slot.id) == key:
                slots.release_home(slot.id, key)
            await slots.remove(slot.id)
            raise
        self.sandbox = box
        self.subject.on_placed(box)
        return box

    def _lost(self, reason: str) -> None:
        if self.sandbox is not None:
            self.subject.on_lost(self.sandbox, reason)

    async def _assemble(self, last: Assembled | None) -> Assembled:
        with self.timeline.stage("assemble"):
            return await self.runtime.assembler.assemble(self.subject.user, last)

    async def _refresh(self, cached: Assembled | None) -> Assembled | None:
        return await self._assemble(cached) if cached is not None else None

    async def _gateway(self, box: Sandbox, assembled: Assembled) -> None:
        with self.timeline.stage("gateway"):
            await box.tell_gateway(assembled)

    async def _launch(self, box: Sandbox, prepared: Prepared) -> None:
        with self.timeline.stage("start"):
            await box.launch(prepared.assembled, prepared.wanted)
        await self._hello(box)

    async def _hello(self, box: Sandbox) -> None:
        timeout = self.runtime.config().sandbox.hello_timeout_s
        with self.timeline.stage("hello"):
            await or_exit(box, box.link.wait_hello(timeout), "before its agent server said hello")

    async def _settle(
        self, box: Sandbox, prepared: Prepared, generation: int, claim: Mapping[str, Any] | None = None
    ) -> None:
        with self.timeline.stage("bind"):
            await box.bind(prepared.wanted, generation, claim)
        with self.timeline.stage("agent"):
            await box.agent_ready()
