"""npm installs a package in a real builder sandbox, from a registry that answers on its egress socket."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from broker.config import Config, ProcessConfig, SandboxSettings
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.packages import PackageShelf
from broker.sandbox.process import ProcessDriver
from broker.sandbox.slots import Slots
from broker.store.db import Database
from broker.store.packages import PackageStore

pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]

HOST = "registry.test"


def tarball(files: dict[str, bytes]) -> bytes:
    """A package as npm packs it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


PACKAGE = tarball(
    {
        "package.json": json.dumps(
            {
                "name": "@tiny/server",
                "version": "1.2.3",
                "bin": {"tiny-server": "server.js"},
                "scripts": {"postinstall": "touch scripts-ran"},
            }
        ).encode(),
        "server.js": b"#!/usr/bin/env node\nconsole.log('served', process.argv[2])\n",
    }
)


def packument() -> bytes:
    """What a registry says of the package."""
    digest = base64.b64encode(hashlib.sha512(PACKAGE).digest()).decode()
    version = {
        "name": "@tiny/server",
        "version": "1.2.3",
        "bin": {"tiny-server": "server.js"},
        "hasInstallScript": True,
        "dist": {"tarball": f"http://{HOST}/tiny.tgz", "integrity": f"sha512-{digest}"},
    }
    return json.dumps(
        {"name": "@tiny/server", "dist-tags": {"latest": "1.2.3"}, "versions": {"1.2.3": version}}
    ).encode()


class Registry:
    """A ``BuilderNetwork`` whose way out leads to one registry and nowhere else."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._servers: dict[str, asyncio.Server] = {}

    async def put_builder(self, slot: str, incarnation: int, fds: tuple[int, int]) -> None:
        listener = socket.socket(fileno=os.dup(fds[1]))
        self._servers[slot] = await asyncio.start_unix_server(self._serve, sock=listener)

    async def drop_slot(self, slot: str) -> None:
        server = self._servers.pop(slot, None)
        if server is not None:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            url = urlsplit(unquote(head.split()[1].decode()))
            self.asked.append(f"{url.hostname}{url.path}")
            found = {"/@tiny/server": packument(), "/tiny.tgz": PACKAGE}.get(url.path)
            status = "200 OK" if found is not None and url.hostname == HOST else "404 Not Found"
            body = found or b"{}"
            answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(answer.encode() + body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


class Rig:
    def __init__(self, shelf: PackageShelf, slots: Slots, registry: Registry, driver: ProcessDriver) -> None:
        self.shelf, self.slots, self.registry, self.driver = shelf, slots, registry, driver
        self.ended: asyncio.Queue[tuple[str, CortexError | None]] = asyncio.Queue()

    async def install(self, spec: str) -> CortexError | None:
        server = {"name": "s", "command": "npx", "args": ["-y", spec, "now"], "env": []}
        resolved = await self.shelf.resolve([server], on_done=lambda *end: self.ended.put_nowait(end))
        assert resolved.pending == [f"npm:{spec}"]
        async with asyncio.timeout(50):
            return (await self.ended.get())[1]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    state = tmp_path / "s"
    slots = Slots(state, uid=64321 if os.geteuid() == 0 else os.geteuid())
    slots.check()
    tasks = TaskOwner("test")
    driver = ProcessDriver(ProcessConfig(), installation="test", state_dir=state, tasks=tasks)
    await driver.open()
    store = await Database.open(state)
    registry = Registry()
    config = Config(sandbox=SandboxSettings(driver="process", npm_registry=f"http://{HOST}/"))
    shelf = PackageShelf(
        driver=driver,
        slots=slots,
        index=PackageStore(store),
        network=registry,
        config=lambda: config,
        installation_key=b"k" * 32,
    )
    yield Rig(shelf, slots, registry, driver)
    await shelf.close()
    await store.close()
    await driver.close()
    await tasks.close()


async def test_a_package_is_installed_published_and_runs_from_its_path(rig: Rig) -> None:
    assert await rig.install("@tiny/server") is None
    assert set(rig.registry.asked) >= {f"{HOST}/@tiny/server", f"{HOST}/tiny.tgz"}
    resolved = await rig.shelf.resolve([{"name": "s", "command": "npx", "args": ["@tiny/server", "now"], "env": []}])
    (server,) = resolved.servers
    assert server["command"].startswith("/opt/cortex/packages/")
    assert server["args"] == ["now"]
    on_host = server["command"].replace("/opt/cortex/packages", str(rig.slots.packages_dir))
    ran = subprocess.run([on_host, *server["args"]], capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout == "served now\n"
    assert list(rig.slots.packages_dir.rglob("scripts-ran")) == []
    assert rig.slots.ids() == []
    assert await rig.driver.list() == []


async def test_a_package_that_is_not_there_is_a_clear_failure(rig: Rig) -> None:
    error = await rig.install("no-such-package")
    assert error is not None
    assert error.code is Code.PACKAGE_FAILED
    assert "404" in str(error)
    assert error.hint
    assert rig.slots.ids() == []
    assert await rig.driver.list() == []
