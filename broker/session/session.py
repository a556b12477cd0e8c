"""The session: one actor per user and workspace.

Everything that changes a session goes through its mailbox and is done by its one task, in order, so
there are no locks. The warm path (``attach``, ``open_stream`` on a ready session) changes nothing
but counters and touches neither mailbox, store nor engine.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import CONFIG_ASSEMBLY
from broker.session.applying import Applying
from broker.session.attempts import Attempts
from broker.session.bringup import BringUp, Prepared, Subject
from broker.session.claim import NO_POOL, Takes
from broker.session.claims import Claims
from broker.session.clients import Clients
from broker.session.configuration import Configuration
from broker.session.custody import Custody
from broker.session.ends import Ends
from broker.session.idling import Idling
from broker.session.life import Life
from broker.session.mailbox import Mailbox, crashed
from broker.session.port import Applied, AttachedClient, State
from broker.session.resting import Resting
from broker.session.sandbox import Runtime, Sandbox
from broker.session.state import Event, wants_bringup
from broker.session.timeline import ADOPTED, Timeline
from broker.store.sessions import SessionRow
from sandbox_agent.wire.messages import Attach, Status

log = structlog.get_logger(__name__)

SLACK_S = 5.0
"""What whoever waits for a bring-up gives it beyond its own deadline, so that its own error is told."""


class Session:
    """See the module. ``row`` is what the store holds, or will where it is ``new``; ``clock`` gives seconds since the
    epoch, ``steady`` seconds that never jump."""

    def __init__(
        self,
        runtime: Runtime,
        row: SessionRow,
        clock: Callable[[], float] = time.time,
        pool: Takes = NO_POOL,
        *,
        steady: Callable[[], float] = time.monotonic,
        new: bool = False,
    ) -> None:
        self.id = row.id
        self.user = row.user
        self.workspace = row.workspace
        self.agent = row.agent
        self._protocol = runtime.config().agents[row.agent].protocol
        self._runtime = runtime
        self._clock = clock
        self._waking = False
        self._retired = False
        self._opening = 0
        self._left_at = clock()
        names = (self.user, self.workspace, self.id, self.agent)
        self._subject = Subject(*names, self.on_status, self.on_lost, self._on_placed, self._on_package)
        self._configuration = Configuration(runtime, self._subject, row, clock)
        self._clients = Clients(lambda: runtime.config().front.max_clients_per_session)
        self._custody = Custody(row.id, lambda: runtime.config().sandbox.stop_timeout_s)
        self._life = Life(runtime.store, row, clock, lambda: self._configuration.generation, new=new)
        self._tasks = TaskOwner(f"session.{row.id}")
        self._mailbox = Mailbox(row.id, lambda error: self._ends.fail(crashed(error)))
        self._applying = Applying(
            runtime, self._subject, self._life, self._clients, self._custody, self._configuration, self._mailbox
        )
        self._attempts = Attempts(
            row.id,
            lambda timeline: BringUp(runtime, self._subject, timeline, pool),
            self._tasks,
            self._mailbox,
            length=runtime.config().session.timeline_length,
        )
        self._ends = Ends(self._life, self._clients, self._custody, self._attempts, self._mailbox, self._tasks)
        self._claims = Claims(runtime.driver.name, self._attempts)
        self._idling = Idling(
            self.user,
            self._life,
            self._clients,
            config=lambda: runtime.config().pool,
            activity=runtime.activity,
            at_work=self._at_work,
            act=lambda: self._resting.soon(),
            clock=clock,
            steady=steady,
        )
        self._resting = Resting(
            self._life,
            self._clients,
            self._custody,
            self._ends,
            self._idling,
            self._claims,
            mailbox=self._mailbox,
            tasks=self._tasks,
            lane=runtime.resting,
            rouse=self._spoken,
        )
        self._tasks.start(self._mailbox.run(), "actor")

    @property
    def protocol(self) -> Literal["acp", "websocket"]:
        """What its agent speaks."""
        return self._protocol

    @property
    def state(self) -> State:
        """Where it is in its life; see ``state``. One whose bring-up is about to begin is starting."""
        return "starting" if self._waking else self._life.state

    @property
    def idle_since(self) -> float:
        """When its state last changed, or its last client left; seconds since the epoch."""
        return max(self._life.since, self._left_at)

    @property
    def warm(self) -> bool:
        """It is up though nobody asks for it: made ready ahead, or kept after its last client left (or since it was
        paused, when no client ever came). Whoever asks first claims it."""
        return self._life.state in ("ready", "paused") and not self._claims.asked and not self._clients

    @property
    def _serving(self) -> bool:
        return self._life.state == "ready" and not self._resting.going

    @property
    def stored(self) -> bool:
        """It has a row: it was acknowledged, or may be."""
        return bool(self._life.stored)

    async def keep(self) -> None:
        """It has a row when it returns. Raises ``CortexError``."""
        await self._life.keep()

    @property
    def cut_short(self) -> bool:
        """The last broker ended while it stopped the session."""
        return self._life.stored == "stopping"

    @property
    def idle(self) -> bool:
        """Nothing runs or is left to put away, nobody is attached, nothing waits: it may leave memory."""
        at_rest = self._life.state in ("stopped", "failed") and self._custody.left is None
        return at_rest and not self._clients and self._mailbox.idle

    # -- the warm path -------------------------------------------------------------------------

    def attach(self, client: AttachedClient) -> None:
        """Counts the client in; wakes the session when it sleeps. Raises ``SESSION_BUSY``."""
        self._ask()
        self._clients.add(client)
        self._idling.account()
        if not self._serving:
            self._rouse()
        elif self._configuration.old:
            self._applying.soon()
        else:
            CONFIG_ASSEMBLY.labels("hit").inc()

    def detach(self, client: AttachedClient) -> None:
        """Counts it out; the agent goes on."""
        self._clients.discard(client)
        self._left_at = self._clock()
        if not self._clients:
            self._claims.asked = False
            self._runtime.activity.note(self.user, self._left_at, "end")
        self._idling.left()

    async def open_stream(self, attach: Attach) -> socket.socket:
        """A stream of the agent server. On a ready session nothing is waited for."""
        expected = "acp" if self._protocol == "acp" else "raw"
        if attach.protocol != expected:
            raise CortexError(
                Code.WRONG_PROTOCOL,
                f"agent {self.agent!r} does not speak {attach.protocol}",
                hint=f"connect to /{expected}",
            )
        self._opening += 1
        try:
            if not self._serving:
                await self.wait_ready()
            return await self._take_stream(attach)
        finally:
            self._opening -= 1
            self._idling.watch()

    async def _take_stream(self, attach: Attach) -> socket.socket:
        box = self._custody.box
        if box is None:
            raise self._not_running()
        try:
            sock = await box.link.take_stream(attach)
        except CortexError as error:
            if error.code is Code.BRINGUP_TIMEOUT:
                self._without_streams(box)
            raise
        self._clients.serve(attach.connection)
        return sock

    async def wait_ready(self) -> None:
        """Wakes the session and waits for what comes of it: as long as a bring-up may take, at most."""
        config = self._runtime.config()
        limit = config.session.bringup_timeout_s + config.sandbox.stop_timeout_s + SLACK_S
        self._idling.used()
        try:
            async with asyncio.timeout(limit):
                self._rouse()
                await self._life.until(lambda: self._life.state != "stopping" and not self._resting.going)
                self._rouse()
                await self._life.until(lambda: self._life.state != "starting" and not self._waking)
        except TimeoutError as error:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the session was not ready in {limit:g} s",
                hint="try again; look at the session's timeline",
            ) from error
        if self._life.state != "ready" or self._life.closed:
            raise self._ends.error or self._not_running()

    def _not_running(self) -> CortexError:
        return CortexError(Code.SESSION_STOPPED, f"the session is {self._life.state}", hint="connect again to start it")

    def close_clients(self, code: int, reason: str) -> int:
        """Closes every attached client."""
        return self._clients.close(code, reason)

    # -- commands ------------------------------------------------------------------------------

    def wake(self) -> None:
        """Somebody asks for it: sees to it that it becomes ready; waits for nothing."""
        self._ask()
        self._rouse()

    def prewarm(self, *, announced: bool = True) -> None:
        """Somebody will come, at any moment where it was ``announced``: has it ready for them. This is no use of it:
        when nobody comes, it is stopped like any that nobody uses."""
        self._idling.expected()
        if announced:
            self._runtime.activity.note(self.user, self._clock(), "intent")
        if wants_bringup(self._life.state):
            self._claims.intent = "announced" if announced else "forecast"
            self._claims.asked = self._waking or bool(self._clients)
            self._rouse()
        elif announced:
            self._rouse()
        if self._serving and (self._configuration.dirty or self._configuration.old):
            self._applying.soon()
        self._idling.look()

    async def let_go(self) -> None:
        """Nobody is expected any more: what was made ready for them is stopped, unless it is of use."""
        self._idling.unexpected()
        await self._mailbox.ask(self._resting.settle)

    def _ask(self) -> None:
        """A request: a create, a hook, a client, a prompt over HTTP. The first that finds the session up claims it."""
        self._claims.ask(warm=self.warm, serving=self._serving)
        if self._protocol == "acp":
            self._idling.used()
        else:
            self._idling.request()
        self._runtime.activity.note(self.user, self._clock(), "start")

    def _spoken(self) -> None:
        """A client that is held has something to say."""
        self._idling.used()
        self._rouse()

    def _rouse(self) -> None:
        """Has the actor see to it that the session is ready, unless it is."""
        asleep = wants_bringup(self._life.state) or self._life.state == "paused" or self._resting.going
        if asleep and not (self._waking or self._retired or self._life.closed):
            self._waking = True
            self._mailbox.post(self._up)

    def settings_changed(self) -> None:
        """config.toml is another one now."""
        self._configuration.changed()
        self._applying.soon()
        self._idling.settings_changed()

    async def stop(self) -> None:
        """Stops the sandbox; home, journal and row stay. Raises when the sandbox cannot be put away."""
        stopped = CortexError(Code.SESSION_STOPPED, "the session was stopped", hint="connect again to start it")
        await self._mailbox.ask(lambda: self._ends.stop(stopped))

    async def retire(self) -> None:
        """Stops it for good: nothing starts it again in this object. Raises as ``stop``; nothing is changed then."""
        gone = CortexError(Code.NO_SESSION, "the session was deleted", hint="create it again")
        self._retired = True
        try:
            await self._mailbox.ask(lambda: self._ends.stop(gone))
        except BaseException:
            self._retired = False
            raise
        self._ends.error = gone

    async def config_changed(self, section: str) -> Applied:
        """Assembles anew and binds what differs; returns when the sandbox has acknowledged."""
        return await self._applying.changed()

    # -- bring-up ------------------------------------------------------------------------------

    async def _up(self) -> None:
        """Wakes it from a pause, or starts a bring-up, whichever it needs."""
        try:
            if self._life.state == "paused":
                await self._wake()
            self._claims.settle(up=self._life.state == "ready")
            if not wants_bringup(self._life.state) or self._retired:
                return
            self._ends.error = None
            incarnation = self._life.row.incarnation + 1
            self._life.step(Event.WANTED, "")
        finally:
            self._waking = False
            self._life.told()
        timeline = Timeline(self._runtime.driver.name, intent=self._claims.begun())
        # What runs is told by the sandbox's own row; this one is written when it is ready, or has failed.
        self._life.note(incarnation=incarnation)
        if self.cut_short:
            # If this broker ends too, the next would take the new one for the one that was being stopped.
            await self._life.save(state="starting", reason="")
        self._attempt(timeline, lambda bringup: self._start(bringup, incarnation))

    async def _wake(self) -> None:
        refresh = self._applying.refresh if self._configuration.dirty else None
        hold_s = self._runtime.config().session.bind_hold_s
        if await self._resting.wake(self._claims.timeline(), refresh, hold_s) and self._configuration.old:
            self._applying.soon()

    def _attempt(self, timeline: Timeline, work: Callable[[BringUp], Awaitable[Prepared]]) -> asyncio.Task[None]:
        generation = self._configuration.generation
        return self._attempts.begin(
            timeline,
            work,
            on_up=lambda bringup, prepared: self._brought_up(bringup, prepared, generation),
            on_failed=self._ends.fail,
        )

    async def _start(self, bringup: BringUp, incarnation: int) -> Prepared:
        if self._custody.left is not None:
            with bringup.timeline.stage("put_away"):
                await self._custody.tidy()
        configuration = self._configuration
        return await bringup.run(incarnation, configuration.generation, configuration.assembled)

    def _on_placed(self, box: Sandbox) -> None:
        self._custody.box = box

    async def _brought_up(self, bringup: BringUp, prepared: Prepared, generation: int) -> None:
        box = bringup.sandbox
        if self._life.state != "starting" or box is None:
            return
        if box.failed is not None:
            bringup.timeline.finish(box.failed.code.slug)
            await self._ends.fail(box.failed)
            return
        configuration = self._configuration
        configuration.keep(prepared, generation)
        self._life.step(Event.READY, "")
        bringup.timeline.finish("ready")
        self._ends.watch(box)
        self._idling.came_up(adopted=bringup.timeline.path == ADOPTED)
        if configuration.dirty:
            self._applying.soon()
        await self._life.save(
            state="ready",
            reason="",
            config=prepared.assembled.dump(),
            config_at=configuration.assembled_at,
            slot=box.slot.id,
        )
        log.info("session_ready", session=self.id, agent=self.agent, ms=round(bringup.timeline.total * 1000, 1))

    async def adopt(self, box: Sandbox) -> asyncio.Task[None]:
        """Takes over a sandbox that outlived the last broker; the task ends when it is ready, or has failed."""
        return cast("asyncio.Task[None]", await self._mailbox.ask(lambda: self._adopt(box)))

    async def _adopt(self, box: Sandbox) -> asyncio.Task[None]:
        if self._custody.left is not None or self._custody.box is not None or not self._life.may(Event.ADOPTED):
            raise CortexError(
                Code.SESSION_CONFLICT, "the session has another sandbox", hint="stop the session to have a new one"
            )
        self._custody.box = box
        await self._life.move(Event.ADOPTED, "adopted after a restart of the broker", incarnation=box.incarnation)
        configuration = self._configuration
        return self._attempt(
            Timeline(self._runtime.driver.name, path=ADOPTED),
            lambda bringup: bringup.readopt(box, configuration.generation, configuration.assembled),
        )

    def tick(self) -> None:
        """Called now and then by the registry: mends what is left over and keeps a session in use fresh."""
        self._idling.tick()
        configuration = self._configuration
        if self._life.state == "ready" and (configuration.dirty or (self._clients and configuration.old)):
            self._applying.soon()
        elif self._custody.left is not None and wants_bringup(self._life.state):
            self._mailbox.post_once("tidy", self._ends.tidy)

    # -- ends ----------------------------------------------------------------------------------

    def on_status(self, status: Status) -> None:
        """The agent server of its sandbox says how it is."""
        self._idling.heard(status)
        if status.agent == "failed" and self._life.state == "ready" and self._custody.box is not None:
            self._ends.lose_soon(self._custody.box, status.what or "the agent failed", Code.AGENT_FAILED)

    def on_lost(self, box: Sandbox, reason: str) -> None:
        """The link to its sandbox is gone for good."""
        self._ends.lose_soon(box, reason)

    def _without_streams(self, box: Sandbox) -> None:
        """A client got no stream: a sandbox that serves nobody is not ready, unless it is only busy with a turn."""
        if box.status is None or box.status.open_turns == 0:
            self._ends.lose_soon(box, "its agent server offers no stream to clients")

    def _on_package(self, spec: str, error: CortexError | None) -> None:
        told = str(error) if error is not None else ""
        log.info("package_failed" if told else "package_ready", session=self.id, spec=spec, error=told)
        self._configuration.landed(spec)
        self._applying.soon()
        self._idling.look()

    # -- rest ----------------------------------------------------------------------------------

    def _at_work(self) -> bool:
        """A turn, a client that gets its stream, a package install. Of turns at an agent's own WebSocket nothing is
        known: there whoever is attached is at work."""
        box = self._custody.box
        if box is not None and box.status is not None and box.status.open_turns:
            return True
        return (
            self._opening > 0 or bool(self._configuration.pending) or (self._protocol != "acp" and bool(self._clients))
        )

    def view(self) -> dict[str, Any]:
        """For operators."""
        assembled = self._configuration.assembled
        return {
            "session": self.id,
            "user": self.user,
            "workspace": self.workspace,
            "agent": self.agent,
            "protocol": self._protocol,
            "state": self.state,
            "reason": "" if self._waking else self._life.reason,
            "clients": len(self._clients),
            "warm": self.warm,
            "intent": self._claims.intent,
            "idle": self._idling.view(),
            "generation": self._configuration.generation,
            "permission_policy": assembled.config.settings.permission_policy if assembled else "ask",
            "warnings": self._configuration.told(),
            "origins": dict(assembled.origins) if assembled else {},
            "sandbox": self._custody.box.facts() if self._custody.box else None,
            "created_at": self._life.row.created_at,
            "updated_at": self._life.row.updated_at,
        }

    def timeline(self) -> list[dict[str, Any]]:
        """The last bring-ups, newest first."""
        return self._attempts.view()

    async def close(self) -> None:
        """Lets go of the session; its sandbox goes on and is adopted by the next broker. Idempotent."""
        if self._life.closed:
            return
        self._life.closed = True
        self._idling.close()
        await self._tasks.close()
        self._mailbox.close()
        await self._custody.let_go()
        self._life.close()
