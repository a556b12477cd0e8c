"""Slots and drivers for the conformance suite."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.host.tasks import TaskOwner
from broker.sandbox.driver import SandboxDriver, SandboxSpec

DIALLER = Path(__file__).with_name("dialler.py")
UID = 64321 if os.getuid() == 0 else os.getuid()
_numbers = itertools.count(1)


class Peer:
    """The host's end of a dialler's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.pid = 0

    async def hello(self) -> None:
        self.pid = json.loads(await asyncio.wait_for(self._reader.readline(), 10))["pid"]

    async def run(self, code: str) -> Any:
        """What ``result`` is after ``code``; an exception inside is an AssertionError here."""
        self._writer.write(json.dumps({"code": code}).encode() + b"\n")
        answer = json.loads(await asyncio.wait_for(self._reader.readline(), 20))
        assert "error" not in answer, answer["error"]
        return answer["result"]

    async def fails(self, code: str) -> str:
        """The exception that ``code`` raises."""
        self._writer.write(json.dumps({"code": code}).encode() + b"\n")
        answer = json.loads(await asyncio.wait_for(self._reader.readline(), 20))
        return str(answer.get("error", ""))

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await asyncio.wait_for(self._writer.wait_closed(), 5)


@dataclass
class Slot:
    """A slot's directories and its listening agent socket."""

    root: Path
    spec: SandboxSpec
    server: asyncio.Server | None = None
    peers: asyncio.Queue[Peer] = field(default_factory=lambda: asyncio.Queue(16))
    connected: list[Peer] = field(default_factory=list)

    async def listen(self) -> None:
        path = self.spec.sock_dir / "agent"
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        os.chown(path, -1, self.spec.group)
        os.chmod(path, 0o660)
        self.server = await asyncio.start_unix_server(self._connected, sock=sock)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.connected.append(peer)
        with suppress(asyncio.IncompleteReadError, ValueError, OSError):
            await peer.hello()
            await self.peers.put(peer)

    async def peer(self) -> Peer:
        return await asyncio.wait_for(self.peers.get(), 15)

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for peer in self.connected:
            await peer.close()


@dataclass
class Rig:
    """One driver and its world. ``make`` builds a driver object, each with tasks of its own."""

    kind: str
    base: Path
    make: Callable[[TaskOwner, str], SandboxDriver]
    driver: SandboxDriver
    tasks: TaskOwner
    owners: list[TaskOwner]
    drivers: list[SandboxDriver] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)

    async def slot(self, **changes: Any) -> Slot:
        number = next(_numbers)
        root = self.base / f"s{number}"
        for name in ("sock", "vol", "vol/home"):
            (root / name).mkdir(parents=True, mode=0o755)
        packages = self.base / "packages"
        packages.mkdir(exist_ok=True)
        (packages / "tool").write_text("shared")
        if os.getuid() == 0:
            os.chown(root / "vol/home", UID, UID)
        spec = SandboxSpec(f"slot{os.getpid()}x{number}", 1, root / "sock", root / "vol", packages, UID, **changes)
        slot = Slot(root, spec)
        await slot.listen()
        self.slots.append(slot)
        return slot

    async def create(self, slot: Slot) -> str:
        ref = await self.driver.create(slot.spec)
        self.refs.append(ref)
        return ref

    async def up(self, **changes: Any) -> tuple[str, Slot, Peer]:
        slot = await self.slot(**changes)
        ref = await self.create(slot)
        await self.driver.start(ref)
        return ref, slot, await slot.peer()

    def another(self, installation: str = "test") -> SandboxDriver:
        """A driver object of a broker that was started anew (or, with another name, of a neighbour)."""
        owner = TaskOwner("another")
        self.owners.append(owner)
        self.drivers.append(self.make(owner, installation))
        return self.drivers[-1]


@asynccontextmanager
async def rig(
    kind: str, make: Callable[[TaskOwner, str, Path], SandboxDriver], base: Path | None = None
) -> AsyncIterator[Rig]:
    """``base``: an empty directory, erased in the end; default one of its own."""
    base = base or Path(tempfile.mkdtemp(prefix="cortex-rig-"))
    tasks = TaskOwner("rig")
    installation = f"test{os.getpid()}"

    def build(owner: TaskOwner, name: str) -> SandboxDriver:
        return make(owner, installation if name == "test" else name, base / "state")

    driver = build(tasks, "test")
    made = Rig(kind, base, build, driver, tasks, [tasks], [driver])
    try:
        await driver.open()
        yield made
    finally:
        for ref in made.refs:
            await made.driver.remove(ref)
        for each in made.drivers:
            await each.close()
        for slot in made.slots:
            await slot.close()
        for owner in made.owners:
            await owner.close()
        shutil.rmtree(base, ignore_errors=True)
