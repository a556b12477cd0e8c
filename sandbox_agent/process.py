"""Keeps one agent process: starts it, watches it, restarts it, ends it.

One task (``run``) does all of it, woken by one event: the process has ended, a new specification
is wanted, the hub has changed, or a deadline has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Protocol

from sandbox_agent import spawn
from sandbox_agent.port import AgentHub
from sandbox_agent.stdio import AgentStdio
from sandbox_agent.tasks import log
from sandbox_agent.wire.messages import AgentSpec

BACKOFF_S = (0.2, 10.0)
"""First and longest pause before a restart."""
STABLE_S = 60.0
"""An agent that was up for so long has no restarts in a row behind it."""
RESTART_GRACE_S = 2.0
NOT_FOUND_EXIT = 127
"""What ``sh`` and ``env`` exit with when the program they were to run is not there."""


class RestartPolicy:
    """How long to wait before the next start. Pure."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.in_a_row = 0

    def proved(self) -> None:
        """The process finished a turn or was up long enough."""
        self.in_a_row = 0

    def died(self, up_s: float) -> float | None:
        """Seconds until the next start after ``up_s`` seconds of life; None: no more of them."""
        if up_s >= STABLE_S:
            self.in_a_row = 0
        if self.in_a_row >= self.max_restarts:
            return None
        self.in_a_row += 1
        first, longest = BACKOFF_S
        return min(longest, first * 2.0 ** (self.in_a_row - 1))


class PortReady(Protocol):
    """Waits until a websocket agent's port accepts; False: ``given_up()`` or not within ``timeout_s``."""

    def __call__(self, port: int, timeout_s: float, given_up: Callable[[], bool]) -> Coroutine[Any, Any, bool]: ...


class AgentProcess:
    """The agent. ``state`` is stopped, starting, ready, restarting or failed; ``code``, ``what``, ``hint`` say why."""

    def __init__(
        self,
        *,
        hub: AgentHub,
        surroundings: spawn.Surroundings,
        max_line: int,
        on_change: Callable[[], None],
        port_ready: PortReady,
        raw_clients: Callable[[], int],
    ) -> None:
        self.state = "stopped"
        self.code = self.what = self.hint = ""
        self.pid = 0
        self.port = 0
        self.spec: AgentSpec | None = None
        self._hub = hub
        self._surroundings = surroundings
        self._max_line = max_line
        self._on_change = on_change
        self._port_ready = port_ready
        self._raw_clients = raw_clients
        self._next: AgentSpec | None = None
        self._child: spawn.Child | None = None
        self._wake = asyncio.Event()
        self._exit: int | None = None
        self._hung = False
        self._up = False
        self._renew = False
        """The agent had failed for good; what is wanted now has all its restarts before it."""
        self._at_once = False
        """What runs was killed for what is wanted now; nobody waits for its death."""
        self._stopping = False
        self._turns = 0
        self._policy = RestartPolicy(0)

    @property
    def idle(self) -> bool:
        """No turn is open; for a websocket agent: no client is there."""
        if self.websocket:
            return self._raw_clients() == 0
        return self._hub.open_turns == 0

    @property
    def websocket(self) -> bool:
        """The agent speaks WebSocket itself; the hub has no part in it."""
        return self.spec is not None and self.spec.protocol == "websocket"

    def adopt(self, child: spawn.Child | None, failure: spawn.SpawnError | None, spec: AgentSpec) -> None:
        """Takes over what boot started or failed to start. Before ``run``."""
        self.spec = spec
        self._child = child
        if child is not None:
            ExitWatch.awaited.add(child.pid)  # it may end before ``run`` watches it
        if child is None and failure is not None:
            self._fail(failure)
            self._down(failure.what, final=True)
        elif child is None:
            self._next = spec

    def want(self, spec: AgentSpec) -> str:
        """Runs ``spec`` instead; returns the effect: now or next_turn. Raises ``SpawnError`` if it cannot be."""
        if spec == self.spec and self._child is not None and self._next is None:
            return "now"
        spawn.check(spec.command, spec.env, self._surroundings)
        self._next = spec
        self._wake.set()
        if self._child is not None and not self.idle:
            return "next_turn"
        # Known from now on: whoever asks next must not be told that the old one is ready.
        self._renew = self._renew or self.state == "failed"
        self._set("restarting")
        return "now"

    def restart(self) -> None:
        """Kills what runs, at once, and starts what is wanted anew; for an agent that nobody has used."""
        wanted = self._next or self.spec
        if wanted is None:
            return
        self._next = wanted
        self._at_once = self._child is not None
        self._signal(signal.SIGKILL)
        self._wake.set()
        self._renew = self._renew or self.state == "failed"
        self._set("restarting")

    @property
    def upcoming(self) -> AgentSpec | None:
        """What runs, or will in its place."""
        return self._next or self.spec

    def noticed(self) -> None:
        """The hub has changed."""
        turns = self._hub.open_turns
        if turns < self._turns and self._child is not None and self._exit is None:
            self._policy.proved()
        self._turns = turns
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled or ``stop``."""
        while not self._stopping:
            if self._child is None:
                if self._next is None:
                    await self._woken(None)
                    continue
                if not self._start():
                    continue
            await self._live()
        self._set("stopped")

    async def stop(self, grace_s: float) -> None:
        """Ends the agent; returns when it is gone or could not be killed in time."""
        self._stopping = True
        self._wake.set()
        if self._child is None:
            return
        self._signal(signal.SIGTERM)
        if not await self._gone_within(grace_s):
            self._signal(signal.SIGKILL)
            await self._gone_within(1.0)

    # -- one life -------------------------------------------------------------------------------

    def _start(self) -> bool:
        if self._next is not None:
            if self._next != self.spec or self._renew:
                self._policy = RestartPolicy(self._next.max_restarts)
            self.spec, self._next, self._renew = self._next, None, False
        spec = self.spec
        if spec is None:
            return False
        try:
            self._child = spawn.launch(spec.command, dict(spec.env), dict(spec.files), spec.cwd, self._surroundings)
        except spawn.SpawnError as error:
            self._fail(error)
            self._down(error.what, final=True)
            return False
        return True

    async def _live(self) -> None:
        """From a running process to its end, and what follows from that."""
        child, spec = self._child, self.spec
        if child is None or spec is None:
            return
        loop = asyncio.get_running_loop()
        self._exit, self._hung, self._at_once, begun = None, False, False, loop.time()
        self.pid, self.port = child.pid, child.port
        self._policy.max_restarts = spec.max_restarts
        self._set("starting")
        talks = not self.websocket
        stdio = AgentStdio(child, max_line=self._max_line, on_lines=self._lines, on_hung=self._stuck, must_talk=talks)
        watch = ExitWatch(child, lambda status: self._ended(stdio, status))
        try:
            reason = await self._until_end(child, spec, stdio)
        finally:
            if self._at_once and self._exit is None:
                watch.let_go(lambda _: None)
            else:
                watch.close()
            stdio.finish()
            self._child, self.pid, self.port = None, 0, 0
        await self._after(spec, reason or self._exit_reason(stdio), loop.time() - begun, replaced=reason == "")

    async def _until_end(self, child: spawn.Child, spec: AgentSpec, stdio: AgentStdio) -> str | None:
        """Returns why we ended it ("": for another specification), None when it ended by itself."""
        deadline = asyncio.get_running_loop().time() + spec.init_timeout_s
        if not self.websocket:
            self._up = True
            self._hub.agent_up(stdio, spec)
        elif await self._port_ready(child.port, spec.init_timeout_s, self._interrupted):
            self._set("ready")
        while self._exit is None:
            if self.state == "starting" and not self.websocket and self._hub.agent_info:
                self._set("ready")
            if self._next is not None and (self.idle or self._at_once) and not self._stopping:
                self._down("its configuration changed", final=False)  # first, so that no turn begins in the old one
                if not self._at_once:
                    await self._end(RESTART_GRACE_S)
                return ""
            if self._hung:
                await self._end(0)
                return "it stopped reading its input, or closed its input or output"
            left = None if self.state == "ready" else deadline - asyncio.get_running_loop().time()
            if left is not None and left <= 0:
                await self._end(RESTART_GRACE_S)
                return self._late(spec, stdio)
            await self._woken(left)
        return None

    async def _after(self, spec: AgentSpec, reason: str, up_s: float, *, replaced: bool) -> None:
        if self._stopping:
            self._down("the sandbox stops", final=True)
            return
        if replaced or self._next is not None:
            if not replaced:
                self._down(reason, final=False)
            self._set("restarting")
            return
        if self._exit == NOT_FOUND_EXIT and up_s < spec.init_timeout_s and self.state != "ready":
            pause = None
            self.code, self.hint = "agent.not_in_image", "a program that the agent's command runs is not in the sandbox"
        else:
            pause = self._policy.died(up_s)
            self.code, self.hint = (
                "agent.failed",
                "its last words are in the message; look at the agent's configuration",
            )
        self.what = f"agent {spec.name}: {reason}"
        log.warning("%s", self.what)
        self._down(self.what, final=pause is None)
        if pause is None:
            self._set("failed", keep=True)
            return
        self._set("restarting", keep=True)
        self._next = self._next or spec
        await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        """The backoff; a stop ends it early, and so does a new specification."""
        loop = asyncio.get_running_loop()
        end, waiting_for = loop.time() + seconds, self._next
        while not self._stopping and self._next is waiting_for and loop.time() < end:
            await self._woken(end - loop.time())

    # -- parts ----------------------------------------------------------------------------------

    def _lines(self, lines: list[bytes]) -> None:
        if self._up:
            self._hub.agent_lines(lines)

    def _down(self, what: str, *, final: bool) -> None:
        self._up = False
        if not self.websocket:
            self._hub.agent_down(what, final=final)

    def _interrupted(self) -> bool:
        return self._exit is not None or self._stopping or self._next is not None

    def _stuck(self) -> None:
        self._hung = True
        self._wake.set()

    def _ended(self, stdio: AgentStdio, status: int) -> None:
        stdio.finish()
        self._exit = status
        self._wake.set()

    def _late(self, spec: AgentSpec, stdio: AgentStdio) -> str:
        missing = "did not listen on its port" if self.websocket else "did not answer initialize"
        said = f": {stdio.last_words}" if stdio.last_words else ""
        return f"it {missing} within {spec.init_timeout_s:g} s{said}"

    def _exit_reason(self, stdio: AgentStdio) -> str:
        status = self._exit if self._exit is not None else 0
        how = f"killed by signal {-status}" if status < 0 else f"exited with code {status}"
        return f"{how}: {stdio.last_words}" if stdio.last_words else how

    def _fail(self, error: spawn.SpawnError) -> None:
        self.code, self.what, self.hint = error.code, error.what, error.hint
        self._next = None
        self._set("failed", keep=True)

    def _set(self, state: str, *, keep: bool = False) -> None:
        self.state = state
        if not keep:
            self.code = self.what = self.hint = ""
        self._on_change()

    def _signal(self, number: int) -> None:
        """To the whole process group. The leader is not reaped while ``_child`` is set, so the id is its own."""
        if self._child is not None and self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    async def _end(self, grace_s: float) -> None:
        self._signal(signal.SIGTERM if grace_s else signal.SIGKILL)
        if not await self._gone_within(grace_s or 1.0):
            self._signal(signal.SIGKILL)
            await self._gone_within(5.0)

    async def _gone_within(self, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._child is not None and self._exit is None and loop.time() < end:
            await self._woken(end - loop.time())
        return self._child is None or self._exit is not None

    async def _woken(self, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()


class ExitWatch:
    """Calls ``on_exit(status)`` once when the process has ended: its exit code, or minus the signal.

    What is left of its process group is killed first, while its id cannot be anybody else's.
    """

    awaited: ClassVar[set[int]] = set()
    """Processes whose status somebody wants."""

    def __init__(self, child: spawn.Child, on_exit: Callable[[int], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self.awaited.add(child.pid)
        self._on_exit: Callable[[int], None] | None = on_exit
        if child.pidfd >= 0:
            self._loop.add_reader(child.pidfd, self._reap)
        else:  # a kernel without pidfd_open
            threading.Thread(target=self._wait, name="exit-watch", daemon=True).start()

    def close(self) -> None:
        """Stops watching. Idempotent."""
        self.awaited.discard(self._child.pid)
        self._on_exit = None
        if self._child.pidfd >= 0:
            self._loop.remove_reader(self._child.pidfd)
            os.close(self._child.pidfd)
            self._child.pidfd = -1

    def let_go(self, on_exit: Callable[[int], None]) -> None:
        """Tells somebody else."""
        if self._on_exit is not None:
            self._on_exit = on_exit

    def _wait(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # gone already, or the loop is closed
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        if self._on_exit is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(self._child.pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(self._child.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = 255
        on_exit = self._on_exit
        self.close()
        on_exit(code)


def reap_orphans() -> bool:
    """As process 1: takes in the children that have ended and that nobody waits for. False: one that is waited for
    stands before the others; ask again soon."""
    try:
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if info.si_pid in ExitWatch.awaited:
                return False
            os.waitpid(info.si_pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return True
