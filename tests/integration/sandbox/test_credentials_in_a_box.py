"""Credential files with the real agent server in a real sandbox: in, changed by what runs inside, out, and gone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.config import DockerConfig, ProcessConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import HOME_DIR, SandboxDriver, SandboxSpec
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.link import Link
from broker.sandbox.process import ProcessDriver
from broker.sandbox.slots import Slots, home_key
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.messages import AgentSpec, Attach, Hello, Refreshed, Status, Welcome
from tests.integration.sandbox.kinds import DOCKER, IMAGE, bwrap_missing, docker_missing
from tests.integration.sandbox.rig import UID
from tests.integration.sandbox.test_link_agent_server import Client

DEMO = AgentSpec(name="demo", protocol="acp", command=["{python}", "-I", "-S", "{sandbox_agent}/demo.py"])
KEY = home_key("ann", "main")
PATH = ".agent/auth.json"
EVERY = pytest.mark.parametrize("kind", [DOCKER, "process", "plain"])
CANARY = "canary-tiger"
LOOK = f"sha256sum < ~/{PATH} | cut -c-64"


def token(value: str) -> bytes:
    return json.dumps({"token": f"{CANARY}-{value}"}).encode()


def digest(value: str) -> str:
    return hashlib.sha256(token(value)).hexdigest()


class Box:
    """One slot and what runs in it; the broker's end is ``link``."""

    def __init__(self, kind: str, state: Path, driver: SandboxDriver) -> None:
        self.kind, self.driver, self.state = kind, driver, state
        self.slots = Slots(state, uid=UID if kind != "plain" else os.getuid())
        self.slots.check()
        self.slot = self.slots.create(self.slots.new_id())
        self.slots.adopt_home(self.slot.id, KEY)
        self.home = HOME_DIR if driver.isolated else str(self.slot.home_dir)
        self.refreshed: asyncio.Queue[Refreshed] = asyncio.Queue(100)
        self.ready = asyncio.Event()
        self.number = 0
        self.ref = ""

    def broker(self, *, welcomed: bool = False) -> None:
        self.sockets = SlotSockets(self.slot, gid=self.slots.gid)
        self.sockets.open()
        self.link = Link(
            self.sockets,
            1,
            installation_key=b"k" * 32,
            on_hello=self._hello,
            on_status=self._status,
            on_lost=lambda reason: None,
            on_refreshed=self.refreshed.put_nowait,
            journal=JournalFiles(self.slots.journal_dir(KEY)),
            welcomed=welcomed,
        )
        self.link.start()

    async def broker_dies(self) -> None:
        await self.link.close("killed")
        self.sockets.close()

    async def launch(self) -> None:
        paths = (self.slot.sock_dir, self.slot.vol_dir, self.slots.packages_dir)
        self.ref = await self.driver.create(SandboxSpec(self.slot.id, 1, *paths, self.slots.uid, gid=self.slots.gid))
        await self.driver.start(self.ref)
        await self.link.wait_hello(30)

    async def _hello(self, link: Link, hello: Hello) -> Welcome:
        place = self.driver.credentials_dir(self.slot.id, 1)
        return Welcome(0, b"", "s1", home=self.home, credentials_dir=place)

    def _status(self, status: Status) -> None:
        if status.agent == "ready":
            self.ready.set()

    async def bind(self, value: str | None, **more: Any) -> None:
        self.number += 1
        files = [] if value is None else [{"path": PATH, "mode": 0o600, "content": token(value)}]
        parts = {"files": files, "process": DEMO.encode(), **more}
        hashes = {"files": f"files-{value}", "process": "demo"} | dict.fromkeys(more, "h")
        bound = await self.link.bind(parts, hashes, self.number)
        assert bound.applied["files"] == f"files-{value}"
        async with asyncio.timeout(30):
            await self.ready.wait()

    async def told(self) -> bytes:
        async with asyncio.timeout(20):
            return (await self.refreshed.get()).content

    @asynccontextmanager
    async def shell(self) -> AsyncIterator[Shell]:
        client = Client(await self.link.take_stream(Attach("c", "acp")))
        await client.call(1, "initialize", {"protocolVersion": 1, "clientCapabilities": {}})
        made = await client.call(2, "session/new", {"cwd": "/", "mcpServers": []})
        try:
            yield Shell(client, made["result"]["sessionId"], self.slot.home_dir)
        finally:
            client.sock.close()

    def on_disk(self) -> list[str]:
        """Files of the host, below its state, that hold a credential."""
        found = subprocess.run(["grep", "-rlI", CANARY, str(self.state)], capture_output=True, text=True, timeout=20)
        return found.stdout.splitlines()


class Shell:
    """Runs commands in the sandbox, as the agent would."""

    def __init__(self, client: Client, session: str, home: Path) -> None:
        self._client, self._session, self._home, self._number = client, session, home, 10

    async def run(self, command: str) -> str:
        """What it prints; a command that fails is an AssertionError."""
        self._number += 1
        text = f"!({command}) > ~/out 2>&1; printf '\\n%s' $? >> ~/out"
        params = {"sessionId": self._session, "prompt": [{"type": "text", "text": text}]}
        assert "result" in await self._client.call(self._number, "session/prompt", params)
        *lines, code = (self._home / "out").read_text().splitlines()
        assert code == "0", lines
        return "\n".join(lines).strip()


def write(value: str, path: str = PATH) -> str:
    """A command that writes a token; what the demo agent remembers of it does not look like one."""
    head, _, tail = CANARY.partition("-")
    return f"""printf '{{"token": "%s-%s"}}' {head}''-{tail} {value} > ~/{path}"""


@asynccontextmanager
async def running(kind: str, tmp_path: Path) -> AsyncIterator[Box]:
    checks: dict[str, Callable[[], str]] = {"docker": docker_missing, "process": bwrap_missing}
    if kind in checks and (missing := checks[kind]()):
        pytest.skip(missing)
    tasks = TaskOwner("box")
    driver: SandboxDriver = (
        DockerDriver(DockerConfig(image=IMAGE), installation=f"box{os.getpid()}", node="here", tasks=tasks)
        if kind == "docker"
        else ProcessDriver(
            ProcessConfig(allow_unisolated=kind == "plain"),
            installation="box",
            state_dir=tmp_path / "driver",
            tasks=tasks,
            bwrap_path="no-bwrap-here" if kind == "plain" else "bwrap",
        )
    )
    for path in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(path, 0o755)
    await driver.open()
    box = Box(kind, tmp_path / "state", driver)
    box.broker()
    try:
        await box.launch()
        yield box
    finally:
        if box.ref:
            await driver.remove(box.ref)
        await box.broker_dies()
        await driver.close()
        await tasks.close()


@EVERY
async def test_in_changed_told_once_and_gone(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as box:
        await box.bind("1")
        link = box.slot.home_dir / PATH
        async with box.shell() as shell:
            assert await shell.run(LOOK) == digest("1")
            assert await shell.run(f"stat -L -c '%a %u' ~/{PATH}; id -u") == f"600 {box.slots.uid}\n{box.slots.uid}"
            assert await shell.run(f"stat -f -L -c %T ~/{PATH}") == "tmpfs"
            await shell.run(write("2"))
            assert await box.told() == token("2")
            await shell.run(f"{write('3', '.agent/new')} && chmod 600 ~/.agent/new && mv ~/.agent/new ~/{PATH}")
            assert await box.told() == token("3")
            await shell.run(f"until test -L ~/{PATH}; do :; done")
            assert await shell.run(LOOK) == digest("3")
            assert box.on_disk() == []
            await box.bind("3")  # the vault's answer
            await shell.run(f"rm -r ~/.agent && mkdir ~/.agent && {write('4')}")
            assert await box.told() == token("4")
            assert box.refreshed.empty()
            await shell.run(write("5"))
            await box.link.stop(5)
        assert await box.told() == token("5"), "the last word, told while it ends"
        assert not os.path.lexists(link)
        assert box.link.violations == 0
        await box.driver.remove(box.ref)
        assert box.on_disk() == []
        box.slots.release_home(box.slot.id, KEY)
        assert not list((tmp_path / "state").rglob("auth.json"))


@EVERY
async def test_nothing_is_left_of_a_sandbox_that_is_killed(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as box:
        await box.bind("1")
        async with box.shell() as shell:
            await shell.run(write("2"))
            assert await box.told() == token("2")
        place = Path(box.driver.credentials_dir(box.slot.id, 1))
        await box.driver.remove(box.ref)
        left = box.slot.home_dir / PATH
        assert left.is_symlink(), "killed, not stopped"
        assert not left.exists()
        assert stat.S_ISLNK(left.lstat().st_mode)
        assert not place.exists()
        assert box.on_disk() == []


@EVERY
async def test_what_a_broker_that_died_has_not_heard_is_told_to_the_next(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as box:
        await box.bind("1")
        async with box.shell() as shell:
            # Written when the broker is gone, and the way to the shell with it.
            waits = f"until test -e ~/go; do sleep 0.02; done; {write('2')}; touch ~/written"
            turn = asyncio.ensure_future(shell.run(f"touch ~/waits; {waits}"))
            await _there(box.slot.home_dir / "waits")
            await box.broker_dies()
            (box.slot.home_dir / "go").touch()
            await _there(box.slot.home_dir / "written")
            turn.cancel()
            await asyncio.wait([turn])
        box.broker(welcomed=True)
        assert (await box.link.wait_hello(30)).applied["files"] == "files-1"
        assert await box.told() == token("2")
        await box.bind("2")
        await box.broker_dies()
        box.broker(welcomed=True)
        assert (await box.link.wait_hello(30)).applied["files"] == "files-2"
        async with box.shell() as shell:
            await shell.run(write("3"))
        assert await box.told() == token("3"), "what the vault has answered is not told again"


@EVERY
async def test_an_agent_that_writes_without_end_breaks_nothing_and_is_told_of_in_few_words(
    kind: str, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as box:
        await box.bind("1")
        async with box.shell() as shell:
            loop = f"n=10; while test $n -lt 1500; do n=$((n+1)); {write('$n')}; ln -sf /etc/passwd ~/.agent/x; done"
            await shell.run(f"{loop}; {write('last')}")
            seen = [await box.told()]
            while seen[-1] != token("last"):
                seen.append(await box.told())
        assert len(seen) < 100
        assert box.link.violations == 0
        assert (await box.link.probe()).agent == "ready"


@EVERY
async def test_planted_links_lead_nowhere(kind: str, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as box:
        await box.bind(None)
        outside = tmp_path / "outside" if kind == "plain" else Path("/tmp/outside")
        async with box.shell() as shell:
            await shell.run(f"mkdir {outside} && ln -s {outside} ~/.agent")
            with pytest.raises(CortexError) as caught:
                await box.bind("1")
            assert caught.value.code is Code.BAD_SECTION
            assert await shell.run(f"ls -A {outside}") == ""
            await shell.run("rm ~/.agent")
            await box.bind("2")
            await shell.run(f"ln -sfn {outside}/elsewhere $(readlink ~/{PATH})")
            await shell.run(f"echo '{{}}' > ~/{PATH} && mkdir -p ~/.agent && {write('3', '.agent/new')}")
            await shell.run(f"mv ~/.agent/new ~/{PATH}")
            assert await box.told() == token("3")
            assert await shell.run(f"cat {outside}/elsewhere") == "{}", "the agent's own doing"


async def _there(path: Path) -> None:
    async with asyncio.timeout(20):
        while not path.exists():
            await asyncio.sleep(0.02)
