"""A real gateway process whose log, memory, clock and names are in the test's hands."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from broker.gateway.child import GatewayChild
from tests.integration.gateway.support import KEY, Rig, rig

_STRANGE = """
import json, pathlib, runpy, socket, sys, time
world = pathlib.Path(sys.argv.pop(1))
ask, clock = socket.getaddrinfo, time.time
def told():
    return json.loads(world.read_text())
def getaddrinfo(host, port, *rest, **more):
    found = told()["names"].get(host, host)
    if found.endswith(".test"):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return ask(found, port, *rest, **more)
socket.getaddrinfo = getaddrinfo
time.time = lambda: clock() + told()["off"]
from broker.gateway import resolve
resolve.TTL_S = resolve.RENEW_S = 0.0
from broker.gateway.__main__ import main
sys.exit(main())
"""
"""The gateway with names and a wall clock as a file says; what it has looked up it looks up again."""


class ObservedChild(GatewayChild):
    """Its log goes to ``log``; ``world`` is the file of the strange gateway, None for a usual one."""

    log: Path
    world: Path | None = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = self._command()
        if self.world is not None:
            at = command.index("broker.gateway")
            command = [sys.executable, "-P", "-c", _STRANGE, str(self.world), *command[at + 1 :]]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env=self._env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


class ObservedRig(Rig):
    """A rig that is told what its gateway logged."""

    world: Path | None = None

    def _fresh(self) -> None:
        super()._fresh()
        self.child = ObservedChild(self.link, self.tasks, log_level="debug", log_format="json")
        self.child.log = self.directory / "log"
        self.child.world = self.world

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def pid(self) -> int:
        assert self.link.peer_pid is not None
        return self.link.peer_pid

    @property
    def peak_kib(self) -> int:
        """The most memory the process ever had resident (since ``forget_peak``), in KiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def tell_world(self, *, off: float = 0.0, **names: str) -> None:
        """``names``: address by name, ``_`` for a dot; ``off``: seconds that the wall clock is wrong."""
        assert self.world is not None
        fresh = self.world.with_suffix(".new")
        fresh.write_text(json.dumps({"off": off, "names": {n.replace("_", "."): a for n, a in names.items()}}))
        fresh.replace(self.world)

    def sound(self, pid: int) -> None:
        """It is the same process, and nothing in its log is a fault of its own or a secret."""
        assert (self.pid, self.child.restarts) == (pid, 0)
        log = self.log
        assert "Traceback" not in log, log[log.index("Traceback") - 200 :][:4000]
        assert '"level": "error"' not in log, [line for line in log.splitlines() if '"level": "error"' in line][:5]
        assert KEY not in log

    async def used(self, count: int, **facts: Any) -> list[dict[str, Any]]:
        """The records of calls told so far, once there are ``count`` with these ``facts``."""
        async with asyncio.timeout(20):
            while True:
                found = [each for report in self.reports for each in report.get("records", ())]
                found = [each for each in found if facts.items() <= each.items()]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.02)


@asynccontextmanager
async def observed(*, strange: bool = False, **settings: Any) -> AsyncIterator[ObservedRig]:
    """As ``rig``. ``strange``: names and clock are told by ``tell_world``."""

    class Made(ObservedRig):
        def _fresh(self) -> None:
            if strange:
                self.world = self.directory / "world"
                self.tell_world()
            super()._fresh()

    async with rig(Made, **settings) as made:
        assert isinstance(made, ObservedRig)
        yield made
