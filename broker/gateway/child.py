"""The gateway process as a child of the broker: started, watched, restarted with backoff, stopped."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import structlog

import broker
from broker.errors import CortexError
from broker.gateway import lock
from broker.gateway.link import GatewayLink
from broker.host.tasks import TaskOwner

ADOPT_S = 5.0
"""How long a gateway that outlived the last broker may take to dial before it is replaced."""
ALONE_S = 120.0
"""A gateway without a broker for so long ends by itself."""
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
STEADY_S = 30.0
_ENV = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_COLOR")
log = structlog.get_logger(__name__)


class GatewayChild:
    """Keeps one gateway running behind ``link`` (``gateway.mode = "child"``).

    A gateway that outlived the last broker is taken over instead of starting a second one: it holds
    the lock beside the link, and its model calls go on.
    """

    def __init__(
        self, link: GatewayLink, tasks: TaskOwner, *, log_level: str = "info", log_format: str = "auto"
    ) -> None:
        self.link = link
        self.restarts = 0
        self._tasks = tasks
        self._logs = (log_level, log_format)
        self._lock = link.path.with_name(link.path.name + ".lock")
        self._stopping = asyncio.Event()
        self._pid = -1
        self._pidfd = -1
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts it; ``link.start()`` comes before. Returns at once; see ``link.wait_connected``."""
        self.link.on_hung = self._hung
        self._task = self._tasks.start(self._keep(), "gateway_child")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM (it drains), after ``grace_s`` seconds SIGKILL; returns when it is dead."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._task is None:
            return
        try:
            await asyncio.wait_for(asyncio.shield(self._task), grace_s)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._task

    def _hung(self, pid: int) -> None:
        log.error("gateway_hung", pid=pid)
        if pid == self._pid:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                log.debug("gateway_already_dead")

    # -- the life of one gateway after another

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        delay = BACKOFF_MIN_S
        await self._take_over()
        while not self._stopping.is_set():
            started = loop.time()
            try:
                process = await loop.run_in_executor(None, self._spawn)
            except OSError as error:
                log.error("gateway_not_started", error=str(error))
            else:
                await self._until_dead(process.pid, os.pidfd_open(process.pid))
                self._tell_end(process.pid, process.wait())
                if process.returncode == os.EX_TEMPFAIL:
                    await self._take_over()
            self.restarts += 1
            delay = BACKOFF_MIN_S if loop.time() - started > STEADY_S else min(BACKOFF_MAX_S, delay * 2)
            await self._pause(delay * random.uniform(0.5, 1.0))

    def _tell_end(self, pid: int, code: int | None) -> None:
        tell = log.info if self._stopping.is_set() else log.error
        tell("gateway_ended", pid=pid, code=code)
        if code != os.EX_TEMPFAIL:
            self.link.nobody_serves()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command(), env=self._env(), stdin=subprocess.DEVNULL, start_new_session=True)

    @staticmethod
    def _env() -> dict[str, str]:
        env = {name: os.environ[name] for name in _ENV if name in os.environ}
        return {**env, "PYTHONPATH": str(Path(broker.__file__).parents[1])}

    def _command(self) -> list[str]:
        level, style = self._logs
        command = [sys.executable, "-P", "-m", "broker.gateway", "--link", str(self.link.path)]
        command += ["--lock", str(self._lock), "--alone", f"{ALONE_S:g}", "--log-level", level, "--log-format", style]
        return command

    async def _until_dead(self, pid: int, pidfd: int) -> None:
        """Waits for the end of a process, ours or not, and closes ``pidfd``; ``stop`` meanwhile signals it."""
        loop = asyncio.get_running_loop()
        dead = asyncio.Event()
        self._pid, self._pidfd = pid, pidfd
        loop.add_reader(pidfd, dead.set)
        try:
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
            await dead.wait()
        finally:
            loop.remove_reader(pidfd)
            self._pid = self._pidfd = -1
            os.close(pidfd)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _take_over(self) -> None:
        """Lives with the gateway that holds the lock until it ends; one that does not dial is killed."""
        found = lock.holder_pidfd(self._lock)
        if found is None:
            return
        pid, pidfd = found
        log.info("gateway_found", pid=pid)
        impatience = self._tasks.start(self._expect_dial(pid), "gateway_take_over")
        await self._until_dead(pid, pidfd)
        impatience.cancel()
        self._tell_end(pid, None)

    async def _expect_dial(self, pid: int) -> None:
        try:
            await self.link.wait_connected(ADOPT_S)
        except CortexError:
            log.error("gateway_does_not_dial", pid=pid)
            self._signal(signal.SIGKILL)
