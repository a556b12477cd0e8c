"""The session: one actor per user and workspace.

Everything that changes a session goes through its mailbox and is done by its one task, in order, so
there are no locks. The warm path (``attach``, ``open_stream`` on a ready session) changes nothing
but counters and touches neither mailbox, store nor engine.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Literal

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import CONFIG_ASSEMBLY, SESSIONS
from broker.session.assembly import Assembled
from broker.session.bringup import BringUp, Prepared, Subject, prepare
from broker.session.clients import Clients
from broker.session.port import Applied, AttachedClient, State
from broker.session.sandbox import Runtime, Sandbox
from broker.session.state import Event, advance, allowed, wants_bringup
from broker.session.timeline import Timeline
from broker.store.sessions import SessionRow
from sandbox_agent.wire.messages import Attach, Status

log = structlog.get_logger(__name__)

MAILBOX = 256
RESERVED = 64
"""Places in the mailbox that only the session's own events may take."""
Command = Callable[[], Awaitable[None]]


class Session:
    """See the module. ``row`` is what the store holds; ``clock`` gives seconds since the epoch."""

    def __init__(self, runtime: Runtime, row: SessionRow, clock: Callable[[], float] = time.time) -> None:
        self.id = row.id
        self.user = row.user
        self.workspace = row.workspace
        self.agent = row.agent
        self._runtime = runtime
        self._clock = clock
        self._row = row
        self._state: State = "stopped"
        self._reason = row.reason
        self._error: CortexError | None = None
        self._clients = Clients(lambda: runtime.config().front.max_clients_per_session)
        self._mailbox: asyncio.Queue[Command] = asyncio.Queue(MAILBOX)
        self._tasks = TaskOwner(f"session.{row.id}")
        self._changed = asyncio.Event()
        self._box: Sandbox | None = None
        self._work: asyncio.Task[None] | None = None
        self._assembled: Assembled | None = None
        self._warnings: tuple[str, ...] = ()
        self._generation = row.generation
        self._assembled_generation = -1
        self._assembled_at = 0.0
        self._refreshing = False
        self._waking = False
        self._timelines: deque[Timeline] = deque(maxlen=runtime.config().session.timeline_length)
        self.idle_since = clock()
        if row.config is not None:
            self._assembled = runtime.assembler.restore(row.config)
            self._assembled_at = row.config_at
        self._subject = Subject(
            self.user, self.workspace, self.id, self.agent, self.on_status, self.on_lost, self._on_package
        )
        SESSIONS.labels(self._state).inc()
        self._tasks.start(self._run(), "actor")

    @property
    def protocol(self) -> Literal["acp", "websocket"]:
        """What its agent speaks."""
        return self._runtime.config().agents[self.agent].protocol

    @property
    def state(self) -> State:
        """Where it is in its life; see ``state``."""
        return self._state

    @property
    def idle(self) -> bool:
        """Nothing runs, nobody is attached, nothing waits: it may leave memory."""
        return self._state in ("stopped", "failed") and not self._clients and self._mailbox.empty()

    # -- the warm path -------------------------------------------------------------------------

    def attach(self, client: AttachedClient) -> None:
        """Counts the client in; wakes the session when it sleeps. Raises ``SESSION_BUSY``."""
        self._clients.add(client)
        if self._state == "ready":
            self._check_age()
        else:
            self.wake()

    def detach(self, client: AttachedClient) -> None:
        """Counts it out; the agent goes on."""
        self._clients.discard(client)
        self.idle_since = self._clock()

    async def open_stream(self, attach: Attach) -> socket.socket:
        """A stream of the agent server. On a ready session nothing is waited for."""
        expected = "acp" if self.protocol == "acp" else "raw"
        if attach.protocol != expected:
            raise CortexError(
                Code.WRONG_PROTOCOL,
                f"agent {self.agent!r} does not speak {attach.protocol}",
                hint=f"connect to /{expected}",
            )
        if self._state != "ready":
            await self.wait_ready()
        box = self._box
        if box is None:
            raise self._not_running()
        return await box.link.take_stream(attach)

    async def wait_ready(self) -> None:
        """Wakes the session and waits, ``bringup_timeout_s`` at most."""
        limit = self._runtime.config().session.bringup_timeout_s
        try:
            async with asyncio.timeout(limit):
                await self._leave("stopping")
                if wants_bringup(self._state):
                    await self._ask(self._begin)
                await self._leave("starting")
        except TimeoutError as error:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the session was not ready in {limit:g} s",
                hint="try again; look at the session's timeline",
            ) from error
        if self._state != "ready":
            raise self._error or self._not_running()

    async def _leave(self, state: State) -> None:
        """Returns when the session is in another state; the caller has a deadline."""
        while self._state == state:
            self._changed.clear()
            await self._changed.wait()

    def _not_running(self) -> CortexError:
        return CortexError(Code.SESSION_STOPPED, f"the session is {self._state}", hint="connect again to start it")

    def close_clients(self, code: int, reason: str) -> int:
        """Closes every attached client."""
        return self._clients.close(code, reason)

    # -- commands ------------------------------------------------------------------------------

    def _post(self, command: Command) -> None:
        """An event of the session's own. Those that come often are coalesced, so the bound holds."""
        self._mailbox.put_nowait(command)

    async def _ask(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Has the actor do ``work`` and returns what it gives. Raises ``MAILBOX_FULL``."""
        if self._mailbox.qsize() >= MAILBOX - RESERVED:
            raise CortexError(Code.MAILBOX_FULL, "the session has too much to do", hint="try again in a few seconds")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def command() -> None:
            try:
                result = await work()
            except CortexError as error:
                if not answer.done():
                    answer.set_exception(error)
            else:
                if not answer.done():
                    answer.set_result(result)

        self._post(command)
        return await answer

    def wake(self) -> None:
        """Starts a bring-up when nothing runs; waits for nothing."""
        if wants_bringup(self._state) and not self._waking:
            self._waking = True
            self._post(self._begin)

    def settings_changed(self) -> None:
        """config.toml is another one now."""
        self._generation += 1
        self._apply_soon()

    async def stop(self) -> None:
        """Stops the sandbox; home, journal and row stay."""
        stopped = CortexError(Code.SESSION_STOPPED, "the session was stopped", hint="connect again to start it")
        await self._ask(lambda: self._stop(stopped))

    async def config_changed(self, section: str) -> Applied:
        """Assembles anew and binds what differs; returns when the sandbox has acknowledged."""
        self._generation += 1
        async with asyncio.timeout(self._runtime.config().session.bringup_timeout_s):
            await self._leave("starting")
        result: Applied = await self._ask(self._apply)
        return result

    async def _run(self) -> None:
        while True:
            command = await self._mailbox.get()
            try:
                await command()
            except CortexError as error:
                log.warning("session_command_failed", session=self.id, error=str(error), hint=error.hint)
            except Exception as error:
                log.exception("session_command_crashed", session=self.id)
                await self._fail(
                    CortexError(Code.INTERNAL, "the broker made a mistake", cause=error, hint="see the broker's log")
                )

    # -- bring-up ------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Starts a bring-up unless one runs."""
        self._waking = False
        if not wants_bringup(self._state):
            return
        self._error = None
        incarnation = self._row.incarnation + 1
        await self._move(Event.WANTED, "", incarnation=incarnation)
        timeline = Timeline(self._runtime.driver.name)
        self._timelines.appendleft(timeline)
        bringup = BringUp(self._runtime, self._subject, timeline)
        self._work = self._tasks.start(self._bring_up(bringup, incarnation), "bringup")

    async def _bring_up(self, bringup: BringUp, incarnation: int) -> None:
        generation = self._generation
        try:
            prepared = await bringup.run(incarnation, generation, self._assembled)
        except CortexError as error:
            failed = error
        except OSError as error:
            failed = CortexError(
                Code.STORE_ERROR, "the host refused a step of the bring-up", cause=error, hint="run `cortex doctor`"
            )
        else:
            box = bringup.sandbox
            assert box is not None
            self._post(lambda: self._brought_up(box, prepared, generation, bringup.timeline))
            return
        finally:
            self._box = bringup.sandbox
        bringup.timeline.finish(failed.code.slug)
        self._post(lambda: self._fail(failed))

    async def _brought_up(self, box: Sandbox, prepared: Prepared, generation: int, timeline: Timeline) -> None:
        if box is not self._box or self._state != "starting":
            return
        self._keep(prepared, generation)
        await self._move(Event.READY, "", config=prepared.assembled.dump(), config_at=self._assembled_at)
        timeline.finish("ready")
        log.info("session_ready", session=self.id, agent=self.agent, ms=round(timeline.total * 1000, 1))
        self._tasks.start(self._watch(box), "watch")
        if self._generation != generation:
            self._apply_soon()

    def _keep(self, prepared: Prepared, generation: int) -> None:
        self._assembled = prepared.assembled
        self._warnings = prepared.warnings
        self._assembled_generation = generation
        self._assembled_at = self._clock()
        CONFIG_ASSEMBLY.labels("assembled").inc()

    async def _watch(self, box: Sandbox) -> None:
        """The sandbox's end is an event like any other."""
        exit_ = await self._runtime.driver.wait(box.ref)
        why = "ran out of memory" if exit_.oom else f"ended with code {exit_.code}"
        self._post(lambda: self._lose(box, f"the sandbox {why}"))

    async def adopt(self, box: Sandbox) -> None:
        """Takes over a sandbox that outlived the last broker; ready when its agent server has redialled."""
        await self._ask(lambda: self._adopt(box))

    async def _adopt(self, box: Sandbox) -> None:
        timeline = Timeline(self._runtime.driver.name, path="adopted")
        self._timelines.appendleft(timeline)
        self._box = box
        await self._move(Event.ADOPTED, "adopted after a restart of the broker", incarnation=box.incarnation)
        self._work = self._tasks.start(self._readopt(box, timeline), "adopt")

    async def _readopt(self, box: Sandbox, timeline: Timeline) -> None:
        generation = self._generation
        try:
            with timeline.stage("hello"):
                await box.link.wait_hello(self._runtime.config().sandbox.hello_timeout_s)
            with timeline.stage("assemble"):
                assembled = await self._runtime.assembler.assemble(self.user, self._assembled)
            prepared = await prepare(self._runtime, self._subject, assembled, self._runtime.home_of(box.slot))
            await box.tell_gateway(assembled, prepared.wanted)
            with timeline.stage("bind"):
                await box.bind(prepared.wanted, generation)
            with timeline.stage("agent"):
                await box.agent_ready()
        except CortexError as failed:
            error = failed
            timeline.finish(error.code.slug)
            self._post(lambda: self._lose(box, str(error)))
            return
        box.boot_hash = prepared.wanted.hashes["boot"]
        self._post(lambda: self._brought_up(box, prepared, generation, timeline))

    # -- configuration -------------------------------------------------------------------------

    def _apply_soon(self) -> None:
        """Coalesced: however often it is called before the actor comes to it, it is done once."""
        if not self._refreshing:
            self._refreshing = True
            self._post(self._refresh)

    async def _apply(self) -> Applied:
        """Assembles and sends what differs to a running sandbox; one that is starting applies it when it is up."""
        box = self._box
        if self._state != "ready" or box is None:
            return Applied(self.user, self.workspace, "stored", {})
        generation = self._generation
        try:
            assembled = await self._runtime.assembler.assemble(self.user, self._assembled)
            prepared = await prepare(self._runtime, self._subject, assembled, self._runtime.home_of(box.slot))
            effect = await self._send(box, prepared, generation)
        except CortexError as error:
            self._warnings = (str(error),)
            return Applied(self.user, self.workspace, "failed", {}, error.problem())
        self._keep(prepared, generation)
        await self._save(config=assembled.dump(), config_at=self._assembled_at, generation=self._generation)
        return Applied(self.user, self.workspace, "applied", effect)

    async def _send(self, box: Sandbox, prepared: Prepared, generation: int) -> dict[str, str]:
        """Tells gateway and agent server what differs; client frames wait meanwhile, bounded."""
        effect = {}
        if await box.tell_gateway(prepared.assembled, prepared.wanted):
            effect["gateway"] = "now"
        if prepared.wanted.hashes["boot"] != box.boot_hash:
            effect["boot"] = "next_start"
        if box.differing(prepared.wanted):
            with self._clients.held(self._runtime.config().session.bind_hold_s):
                bound = await box.bind(prepared.wanted, generation)
            if bound is not None:
                effect |= bound.effect
        else:
            await box.bind(prepared.wanted, generation)
        return effect

    def _check_age(self) -> None:
        """A cache that has grown old is refreshed behind everybody's back."""
        if self._clock() - self._assembled_at < self._runtime.config().session.config_max_age_s:
            CONFIG_ASSEMBLY.labels("hit").inc()
        else:
            self._apply_soon()

    async def _refresh(self) -> None:
        self._refreshing = False
        await self._apply()

    def tick(self) -> None:
        """Called now and then by the registry: keeps the configuration of a session in use fresh."""
        if self._state == "ready" and self._clients:
            self._check_age()

    # -- ends ----------------------------------------------------------------------------------

    def on_status(self, status: Status) -> None:
        """The agent server of its sandbox says how it is."""
        self._changed.set()
        if status.agent == "failed" and self._state == "ready" and self._box is not None:
            box = self._box
            self._post(lambda: self._lose(box, status.what or "the agent failed", Code.AGENT_FAILED))

    def on_lost(self, box: Sandbox, reason: str) -> None:
        """The link to its sandbox is gone for good."""
        self._post(lambda: self._lose(box, reason))

    def _on_package(self, spec: str, error: CortexError | None) -> None:
        log.info("package_ready" if error is None else "package_failed", session=self.id, spec=spec, error=str(error))
        self._generation += 1
        self._apply_soon()

    async def _lose(self, box: Sandbox, reason: str, code: Code = Code.SANDBOX_DIED) -> None:
        """Its sandbox is dead or out of reach: put it away; the next client starts a new one."""
        if box is not self._box or self._state not in ("ready", "starting", "paused"):
            return
        log.warning("sandbox_lost", session=self.id, slot=box.slot.id, reason=reason)
        await self._stop(CortexError(code, reason[:400], hint="connect again: the session starts anew"))

    async def _stop(self, why: CortexError) -> None:
        if self._state == "stopped" or not allowed(self._state, Event.STOP):
            return
        await self._cancel_work()
        self._error = why
        await self._move(Event.STOP, str(why))
        self._clients.close(why.code.close_code, why.close_reason())
        await self._put_away()
        await self._move(Event.STOPPED, str(why))

    async def _fail(self, error: CortexError) -> None:
        if not allowed(self._state, Event.FAILED):
            return
        self._error = error
        log.warning("session_failed", session=self.id, error=str(error), hint=error.hint)
        await self._cancel_work()
        await self._put_away()
        await self._move(Event.FAILED, str(error)[:1000])

    async def _cancel_work(self) -> None:
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait((self._work,))
        self._work = None

    async def _put_away(self) -> None:
        box, self._box = self._box, None
        if box is None:
            return
        grace = self._runtime.config().sandbox.stop_timeout_s
        try:
            await box.put_away(grace_s=grace)
        except CortexError as error:
            log.error("put_away_failed", session=self.id, slot=box.slot.id, error=str(error), hint=error.hint)

    # -- state ---------------------------------------------------------------------------------

    async def _move(self, event: Event, reason: str, **fields: Any) -> None:
        """The next state: durable first, then visible."""
        following = advance(self._state, event)
        await self._save(state=following, reason=reason, **fields)
        SESSIONS.labels(self._state).dec()
        self._state = following
        SESSIONS.labels(self._state).inc()
        self._reason = reason
        self._changed.set()

    async def _save(self, **fields: Any) -> None:
        row = replace(self._row, **({"generation": self._generation} | fields), updated_at=self._clock())
        try:
            await self._runtime.store.save(row)
        except CortexError as error:
            # The state in memory is what runs; a store that is full must not stop what works.
            log.error("session_not_saved", session=self.id, error=str(error), hint=error.hint)
        self._row = row

    def view(self) -> dict[str, Any]:
        """For operators."""
        return {
            "session": self.id,
            "user": self.user,
            "workspace": self.workspace,
            "agent": self.agent,
            "protocol": self.protocol,
            "state": self._state,
            "reason": self._reason,
            "clients": len(self._clients),
            "generation": self._generation,
            "permission_policy": self._assembled.config.settings.permission_policy if self._assembled else "ask",
            "warnings": list(self._warnings),
            "origins": dict(self._assembled.origins) if self._assembled else {},
            "sandbox": self._box.facts() if self._box else None,
            "created_at": self._row.created_at,
            "updated_at": self._row.updated_at,
        }

    def timeline(self) -> list[dict[str, Any]]:
        """The last bring-ups, newest first."""
        return [timeline.view() for timeline in self._timelines]

    async def close(self) -> None:
        """Lets go of the session; its sandbox goes on and is adopted by the next broker."""
        await self._tasks.close()
        box = self._box
        if box is not None:
            await box.link.close("the broker is restarting")
            box.sockets.close()
        SESSIONS.labels(self._state).dec()
