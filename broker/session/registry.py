"""The registry: the one place that answers whose a session is.

Sessions are loaded when they are first needed and leave memory when they have been stopped for a
while; a start of the broker loads none but those whose sandboxes still run.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from broker.config import USER_ID
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.reconcile import Adopted
from broker.sandbox.slots import home_key
from broker.session.claim import NO_POOL, Takes
from broker.session.directory import Directory
from broker.session.port import Applied, SessionPort
from broker.session.sandbox import Owner, Runtime, Sandbox, place
from broker.session.session import Session
from broker.store.sessions import SessionRow

log = structlog.get_logger(__name__)

TICK = 15.0
"""Seconds between looks at which sessions to refresh or unload."""

AT_ONCE = 200
"""Sessions looked at without a break for others."""

Key = tuple[str, str]


def check_name(kind: str, name: str) -> None:
    """Raises ``BAD_USER_ID`` unless ``name`` may name a user or workspace."""
    if not USER_ID.fullmatch(name):
        raise CortexError(
            Code.BAD_USER_ID,
            f"{name[:40]!r} is not a {kind}",
            hint=f"a {kind} begins with a letter or digit; then letters, digits and ._@+:|- follow, 128 in all",
        )


class Registry:
    """``clock`` gives seconds since the epoch, ``steady`` seconds that never jump; ``pool`` has warm sandboxes for
    whoever comes."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        clock: Callable[[], float] = time.time,
        pool: Takes = NO_POOL,
        *,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._pool = pool
        self._directory = directory
        self._clock = clock
        self._steady = steady
        self._sessions: dict[Key, Session] = {}
        self._turns: dict[Key, asyncio.Future[None]] = {}
        self._tasks = TaskOwner("registry")
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Begins the regular looks."""
        self._tasks.start(self._look_after(), "look_after")

    def held(self, user: str, workspace: str) -> Session | None:
        """The session if it is in memory; no I/O."""
        return self._sessions.get((user, workspace))

    async def create(self, user: str, workspace: str, agent: str | None) -> tuple[SessionPort, bool]:
        """Creates or loads, and starts its bring-up; the flag says created."""
        return await self._found(user, workspace, agent, Session.wake)

    async def prewarm(
        self, user: str, workspace: str, agent: str | None = None, *, create: bool = False, announced: bool = False
    ) -> SessionPort:
        """Somebody will come, at any moment where that was ``announced``: has their session ready ahead. Raises
        ``NO_SESSION`` for one that there is not yet, unless it may ``create`` it."""

        def begin(session: Session) -> None:
            session.prewarm(announced=announced)

        if create:
            return (await self._found(user, workspace, agent, begin))[0]
        session = await self._loaded(user, workspace)
        begin(session)
        return session

    async def _found(
        self, user: str, workspace: str, agent: str | None, begin: Callable[[Session], None]
    ) -> tuple[Session, bool]:
        check_name("user id", user)
        check_name("workspace name", workspace)
        config = self._runtime.config()
        if agent is not None and agent not in config.agents:
            raise CortexError(
                Code.UNKNOWN_AGENT,
                f"there is no agent {agent[:40]!r}",
                hint=f"one of {', '.join(sorted(config.agents))}",
                details={"agents": sorted(config.agents)},
            )
        if self._closing.is_set():
            raise CortexError(Code.SESSION_STOPPED, "the broker is stopping", hint="try again")
        held = self.held(user, workspace)
        if held is not None and held.stored and agent in (None, held.agent) and (user, workspace) not in self._turns:
            begin(held)
            return held, False
        # Whoever is cancelled stops nothing: what was begun has a row in the end, or is put away.
        finding = self._tasks.start(self._find(user, workspace, agent, begin), "find", on_error=_told_by_result)
        return await asyncio.shield(finding)

    async def _find(
        self, user: str, workspace: str, agent: str | None, begin: Callable[[Session], None]
    ) -> tuple[Session, bool]:
        async with _Turn(self._turns, (user, workspace)):
            session = await self._load(user, workspace)
            if session is None:
                default = self._runtime.config().session.default_agent
                return await self._new(user, workspace, agent or default, begin), True
            if agent is not None and agent != session.agent:
                raise CortexError(
                    Code.SESSION_CONFLICT,
                    f"the session exists with agent {session.agent!r}",
                    hint="use another workspace name, or delete the session first",
                )
            # One whose create was refused may still be here, for what could not be put away.
            created = not session.stored
            await session.keep()
            begin(session)
            return session, created

    async def load(self, user: str, workspace: str) -> SessionPort:
        """The stored session. Raises ``NO_SESSION``."""
        return await self._loaded(user, workspace)

    async def _loaded(self, user: str, workspace: str) -> Session:
        session = self.held(user, workspace)
        if session is None or not session.stored:
            async with _Turn(self._turns, (user, workspace)):
                session = await self._load(user, workspace)
                if session is not None:
                    await session.keep()
        if session is None:
            raise _no_session(user, workspace)
        return session

    async def _load(self, user: str, workspace: str) -> Session | None:
        session = self.held(user, workspace)
        if session is not None:
            return session
        await self._claim(user)
        row = await self._runtime.store.get(user, workspace)
        return self._hold(row) if row is not None else None

    async def _claim(self, user: str) -> None:
        if not self._directory.held(user) and not await self._directory.claim(user):
            raise CortexError(
                Code.SESSION_CONFLICT, "another node owns this user", hint="connect to any node; it relays to the owner"
            )

    async def _new(self, user: str, workspace: str, agent: str, begin: Callable[[Session], None]) -> Session:
        """Durable when it returns. Its bring-up does not wait for that: what it writes comes after the row."""
        now = self._clock()
        row = SessionRow(
            user=user,
            workspace=workspace,
            id=f"s_{secrets.token_hex(8)}",
            agent=agent,
            state="stopped",
            reason="",
            slot="",
            incarnation=0,
            generation=0,
            config=None,
            config_at=0.0,
            created_at=now,
            updated_at=now,
        )
        session = self._hold(row, new=True)
        begin(session)
        try:
            await session.keep()
        except CortexError:
            await self._forsake(session)
            raise
        return session

    async def _forsake(self, session: Session) -> None:
        """It could not be stored, so there is none. It stays in memory, without a row, while its sandbox cannot be
        put away."""
        try:
            await session.retire()
            await self._drop(session)
            await self._runtime.store.delete(session.user, session.workspace)
        except CortexError as error:
            log.warning("session_not_forsaken", session=session.id, error=str(error), hint=error.hint)

    def _hold(self, row: SessionRow, *, new: bool = False) -> Session:
        if row.agent not in self._runtime.config().agents:
            raise CortexError(
                Code.UNKNOWN_AGENT,
                f"the session's agent {row.agent!r} is no longer configured",
                hint=f"put [agents.{row.agent}] back into config.toml, or delete the session",
            )
        session = Session(self._runtime, row, self._clock, self._pool, steady=self._steady, new=new)
        self._sessions[row.user, row.workspace] = session
        return session

    async def list(self, *, after: str = "", limit: int = 100) -> tuple[list[dict[str, Any]], str]:
        """A page of views; ``after`` is the cursor USER/WORKSPACE of the page before."""
        user, _, workspace = after.partition("/")
        rows = await self._runtime.store.page((user, workspace), limit)
        views = []
        for row in rows:
            session = self.held(row.user, row.workspace)
            views.append(session.view() if session else _stored_view(row))
        cursor = f"{rows[-1].user}/{rows[-1].workspace}" if len(rows) == limit else ""
        return views, cursor

    async def delete(self, user: str, workspace: str) -> None:
        """Stops it and erases its row, home and journal."""
        async with _Turn(self._turns, (user, workspace)):
            session = self.held(user, workspace)
            if session is not None:
                await session.retire()
            elif await self._runtime.store.get(user, workspace) is None:
                raise _no_session(user, workspace)
            try:
                await self._runtime.slots.erase_home(home_key(user, workspace))
                await self._runtime.store.delete(user, workspace)
            finally:
                if session is not None:
                    await self._drop(session)

    async def erase_user(self, user: str) -> int:
        """Erases all sessions of a user. One that cannot be erased keeps none of the others."""
        rows = await self._runtime.store.of_user(user)
        failed: list[CortexError] = []
        for row in rows:
            try:
                await self.delete(user, row.workspace)
            except CortexError as error:
                if error.code is not Code.NO_SESSION:
                    failed.append(error)
        if failed:
            raise failed[0]
        return len(rows)

    async def config_changed(self, user: str, section: str) -> Sequence[Applied]:
        """Has every held session of the user apply its configuration, all at once."""
        sessions = [session for (owner, _), session in self._sessions.items() if owner == user]
        return await asyncio.gather(*(session.config_changed(section) for session in sessions))

    def awake(self, user: str) -> bool:
        """Whether a session of the user runs, or is about to."""
        states = (session.state for (owner, _), session in self._sessions.items() if owner == user)
        return any(state in ("starting", "ready", "paused") for state in states)

    def settings_reloaded(self) -> None:
        """config.toml changed: what runs assembles anew, soon."""
        for session in self._sessions.values():
            session.settings_changed()

    async def adopt_all(self, found: Sequence[Adopted]) -> Sequence[asyncio.Task[None]]:
        """``adopt`` for each; of one that cannot be taken over the log tells why."""
        settling = []
        for adopted in found:
            try:
                settling.append(await self.adopt(adopted))
            except CortexError as error:
                log.error("not_adopted", slot=adopted.slot.id, error=str(error), hint=error.hint)
        return settling

    async def adopt(self, adopted: Adopted) -> asyncio.Task[None]:
        """Takes over a sandbox that outlived the last broker; the task ends when it is ready, or has failed.

        Raises ``CortexError``; it is put away then.
        """
        record = adopted.record
        box: Sandbox | None = None
        try:
            async with _Turn(self._turns, (record.user, record.workspace)):
                session = await self._load(record.user, record.workspace)
            if session is None:
                raise _no_session(record.user, record.workspace)
            if session.cut_short:
                # Its agent server may have been told to end, and will never call again.
                raise CortexError(Code.SESSION_STOPPED, "the session was being stopped", hint="it is stopped now")
            box = self._place(adopted, session)
            return await session.adopt(box)
        except CortexError:
            if box is not None:
                await box.put_away(grace_s=self._runtime.config().sandbox.stop_timeout_s)
            else:
                await self._put_away(adopted)
            raise

    def _place(self, adopted: Adopted, session: Session) -> Sandbox:
        record = adopted.record
        box: Sandbox | None = None
        box = place(
            self._runtime,
            Owner(record.user, record.workspace, session.id, home_key(record.user, record.workspace)),
            adopted.slot,
            record.incarnation,
            agent=session.agent,
            welcomed=True,
            on_status=session.on_status,
            on_lost=lambda reason: session.on_lost(box, reason) if box else None,
        )
        box.ref = adopted.found.ref
        box.paused = adopted.found.liveness == "paused"
        return box

    async def _put_away(self, adopted: Adopted) -> None:
        """Ends a sandbox that no session can have; its home goes to rest."""
        runtime, slot = self._runtime, adopted.slot.id
        await runtime.driver.remove(adopted.found.ref)
        try:
            await runtime.gateway.drop_slot(slot)
        except CortexError as error:
            log.warning("gateway_drop_failed", slot=slot, error=str(error))
        runtime.slots.release_home(slot, home_key(adopted.record.user, adopted.record.workspace))
        await runtime.slots.remove(slot)
        await runtime.store.sandbox_delete(slot)

    async def _look_after(self) -> None:
        while True:
            try:
                async with asyncio.timeout(TICK):
                    await self._closing.wait()
                return
            except TimeoutError:
                await self._look()

    async def _look(self) -> None:
        limit = self._runtime.config().session.unload_after_s
        for number, session in enumerate(list(self._sessions.values()), 1):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            session.tick()
            if session.idle and self._clock() - session.idle_since > limit:
                await self._drop(session)

    async def _drop(self, session: Session) -> None:
        self._sessions.pop((session.user, session.workspace), None)
        await session.close()

    async def close(self) -> None:
        """Lets go of all sessions; their sandboxes go on."""
        self._closing.set()
        await self._tasks.close()
        await asyncio.gather(*(self._drop(session) for session in list(self._sessions.values())))

    def warm(self) -> Sequence[tuple[str, str]]:
        """Agent and state (hot or paused) of each session that is up though nobody asks for it."""
        held = self._sessions.values()
        return [(one.agent, "paused" if one.state == "paused" else "hot") for one in held if one.warm]

    def states(self) -> dict[str, int]:
        """How many held sessions are in each state."""
        counts: dict[str, int] = {}
        for session in self._sessions.values():
            counts[session.state] = counts.get(session.state, 0) + 1
        return counts


class _Turn:
    """One at a time for each key; loading, creating and deleting a session never overlap."""

    def __init__(self, turns: dict[Key, asyncio.Future[None]], key: Key) -> None:
        self._turns = turns
        self._key = key

    async def __aenter__(self) -> None:
        while (running := self._turns.get(self._key)) is not None:
            await asyncio.shield(running)
        self._turns[self._key] = asyncio.get_running_loop().create_future()

    async def __aexit__(self, *exc: object) -> None:
        self._turns.pop(self._key).set_result(None)


def _told_by_result(error: BaseException) -> None:
    """Its awaiter raises it."""


def _no_session(user: str, workspace: str) -> CortexError:
    return CortexError(
        Code.NO_SESSION,
        f"there is no session {user}/{workspace}",
        hint="create it with POST /v1/sessions or `cortex session create`",
    )


def _stored_view(row: SessionRow) -> dict[str, Any]:
    return {
        "session": row.id,
        "user": row.user,
        "workspace": row.workspace,
        "agent": row.agent,
        # What is not in memory does not run, whatever it did when the last broker died.
        "state": row.state if row.state == "failed" else "stopped",
        "reason": row.reason,
        "clients": 0,
        "generation": row.generation,
        "sandbox": None,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }
