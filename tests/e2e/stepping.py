"""A broker that dies, or stands still, at a step of what it does; see ``tests.e2e.crashing``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.e2e.harness import ROOT, BrokerProcess


class Crashing(BrokerProcess):
    """Dies at the step that was asked for."""

    by = "KILL"

    @property
    def crash_at(self) -> Path:
        return self.directory / "crash"

    def arm(self, step: int | str) -> None:
        """``step``: its number from now on, or its name."""
        draft = self.directory / "crash.new"
        draft.write_text(str(step))
        draft.rename(self.crash_at)

    def disarm(self) -> list[str]:
        """The steps that were reached."""
        steps = Path(f"{self.crash_at}.steps")
        self.crash_at.unlink(missing_ok=True)
        reached = steps.read_text().split("\n")[:-1] if steps.exists() else []
        steps.unlink(missing_ok=True)
        return reached

    async def spawn(self) -> asyncio.subprocess.Process:
        with self.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.e2e.crashing", "serve", "--config", str(self.config_path)),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")}
                | self.env
                | {"CRASH_AT": str(self.crash_at), "CRASH_BY": self.by},
            )

    async def died(self) -> bool:
        """Whether it is dead, or dies within the moment that an answer to a killed call takes."""
        assert self.process is not None
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            return False
        return True


class Halting(Crashing):
    """Stands still at that step, until it is told to go on."""

    by = "STOP"

    async def halted(self) -> None:
        """Returns when it stands still."""
        try:
            async with asyncio.timeout(30):
                while self._state() != "T":
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(
                f"never at {self.crash_at.read_text()!r}: {self.disarm()}\n{self.log_tail()}"
            ) from None

    def go_on(self) -> None:
        self.disarm()
        self.process_signal(signal.SIGCONT)

    def process_signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _state(self) -> str:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
