"""A real agent CLI in a container whose home is replaced under it, as a claim does: by rename below ``/vol``.

The agent is driven over its own stdio, without the broker: what it bears is the CLI's property, and its
times are what the broker's are compared with. It reaches the stand-in provider through a loopback
port and a Unix socket, and no network; while the sandbox is nobody's, the gateway (``Gate``) answers 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.e2e.harness import IMAGE
from tests.e2e.stdio import Rpc, RpcError, Turn, words
from tests.standin.app import build_app
from tests.standin.record import RECORDS

UID = os.geteuid() or 64321
HOME = "/vol/home"
WORKSPACE = f"{HOME}/workspace"
GATEWAY_PORT, EGRESS_PORT = 8101, 8102

INSIDE = (Path(__file__).parent / "swap_inside.py").read_text()


@dataclass
class Gate:
    """The gateway as a slot sees it. ``claimed`` False: 503 to all. ``asked``: calls and CONNECTs, oldest first."""

    directory: Path
    claimed: bool = False
    asked: list[str] = field(default_factory=list)
    _app: web.Application = field(default_factory=build_app)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What the provider was asked, bodies included, refused calls left out."""
        return list(self._app[RECORDS])

    def forget(self) -> None:
        self._app[RECORDS].clear()
        self.asked.clear()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Gate]:
        self._app.middlewares.insert(0, self._admit)
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.UnixSite(runner, str(self.directory / "gateway")).start()
        egress = await asyncio.start_unix_server(self._connect, str(self.directory / "egress"))
        for name in ("gateway", "egress"):
            (self.directory / name).chmod(0o666)
        try:
            yield self
        finally:
            egress.close()
            await runner.cleanup()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path} {200 if self.claimed else 503}")
        if not self.claimed:
            return web.json_response({"code": "gateway.unclaimed"}, status=503)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(f"egress: {head.split(b' HTTP')[0].decode()}")
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
        writer.close()


class Box:
    """A running sandbox with a blank home in it. ``move_in`` is the claim."""

    def __init__(self, directory: Path, gate: Gate, mounts: Iterable[tuple[str, str]] = ()) -> None:
        self.directory = directory
        self.gate = gate
        self.mounts = mounts
        self.name = f"cortex-swap-{uuid.uuid4().hex[:8]}"
        self.rpc: Rpc = None  # type: ignore[assignment]
        self.servers: list[dict[str, Any]] = []
        """MCP servers of conversations (ACP objects)."""
        self.moved_at = 0.0
        self.info: dict[str, Any] = {}
        self.made: dict[str, Any] = {}
        """The last answer to ``session/new``, but for the id."""
        self._process: asyncio.subprocess.Process = None  # type: ignore[assignment]

    @property
    def home(self) -> Path:
        return self.directory / "vol" / "home"

    @property
    def blank(self) -> Path:
        """Where the home went that was there first."""
        return self.directory / "blank"

    async def start(self, argv: list[str], env: Mapping[str, str], cwd: str = "/") -> None:
        """Becomes the agent."""
        self._write({"argv": argv, "env": environment() | dict(env), "cwd": cwd})
        self.rpc = Rpc(self._process)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")

    async def initialize(self) -> None:
        """ACP's, as the agent server says it."""
        capabilities = {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}
        params: dict[str, Any] = {"protocolVersion": 1, "clientCapabilities": capabilities}
        if not self.gate.claimed:
            params["_meta"] = {"cortex": {"unclaimed": {"cwd": WORKSPACE, "mcpServers": self.servers}}}
        self.info = await self.rpc.call("initialize", params)

    async def new(self) -> str:
        """A conversation in the workspace, which is made if it is not there; its id."""
        workspace = self.home / "workspace"
        if not workspace.exists():
            workspace.mkdir()
            give(workspace)
        self.made = await self.rpc.call("session/new", {"cwd": WORKSPACE, "mcpServers": self.servers})
        return str(self.made.pop("sessionId"))

    async def discard(self, session: str) -> None:
        """Closes a conversation that nobody wants, as the agent server does: whatever the agent says to that."""
        with contextlib.suppress(RpcError):
            await self.rpc.call("session/close", {"sessionId": session})

    async def load(self, session: str, method: str = "session/load") -> str:
        """Opens an earlier conversation; what was said in it, where it is said again."""
        begin = len(self.rpc.seen)
        await self.rpc.call(method, {"sessionId": session, "cwd": WORKSPACE, "mcpServers": self.servers})
        with contextlib.suppress(RpcError):
            # Some answer before they replay; this is answered after.
            await self.rpc.call("_cortex/fence", {})
        kinds = ("agent_message_chunk", "user_message_chunk")
        return "".join(words(message, kinds) for _, message in self.rpc.seen[begin:])

    async def prompt(self, session: str, text: str, since: float | None = None) -> Turn:
        """One turn."""
        begin, since = len(self.rpc.seen), since or time.monotonic()
        said = {"sessionId": session, "prompt": [{"type": "text", "text": text}]}
        result = await self.rpc.call("session/prompt", said)
        heard = [(at, words(message)) for at, message in self.rpc.seen[begin:]]
        first = next((at for at, chunk in heard if chunk.startswith(("w0", "heard", "tool"))), 0.0)
        return Turn("".join(chunk for _, chunk in heard), first - since, result)

    def move_in(self, home: Path) -> None:
        """The user's home takes the place of the blank one; from here on the gateway serves them."""
        self.gate.claimed = True
        self.moved_at = time.monotonic()
        self.home.rename(self.blank)
        home.rename(self.home)

    def stay(self) -> None:
        """A new user: the blank home is theirs."""
        self.gate.claimed = True
        self.moved_at = time.monotonic()

    @property
    def last_words(self) -> str:
        """The agent's standard error."""
        return (self.directory / "stderr").read_text()

    async def frozen(self) -> None:
        """Stops every process for a moment, as a warm sandbox that is not hot."""
        await docker("pause", self.name)
        await docker("unpause", self.name)

    async def pss(self) -> dict[str, int]:
        """Bytes of each process of the agent and of what it started, by program."""
        size = "awk '/^Pss:/{print $2}' $p/smaps_rollup 2>/dev/null"
        script = f"for p in /proc/[0-9]*; do echo $({size}) $(tr '\\0' ' ' <$p/cmdline | cut -c1-100); done"
        found: dict[str, int] = {}
        for line in (await docker("exec", self.name, "sh", "-c", script)).splitlines():
            kilobytes, _, command = line.partition(" ")
            if kilobytes.isdigit() and command and not command.startswith(("python3", "sh -c", "/sbin/docker-init")):
                found[command] = found.get(command, 0) + int(kilobytes) * 1024
        return found

    async def end(self) -> None:
        """Lets the agent finish, as the broker does: the home may leave when this returns."""
        await docker("stop", "-t", "10", self.name)
        await self._process.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Box]:
        ports = [[GATEWAY_PORT, "/run/cortex/gateway"], [EGRESS_PORT, "/run/cortex/egress"]]
        self._process = await asyncio.create_subprocess_exec(
            *("docker", "run", "-i", "--rm", "--init", "--name", self.name, "--network", "none"),
            *("--user", f"{UID}:{UID}", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777,size=536870912", "--pids-limit", "512"),
            *("--memory", "2147483648", "--cpus", "2", "-v", f"{self.directory / 'vol'}:/vol"),
            *("-v", f"{self.gate.directory}:/run/cortex:ro", "-w", "/"),
            *(word for source, target in self.mounts for word in ("-v", f"{source}:{target}:ro")),
            *("-e", f"HOME={HOME}", "-e", "USER=cortex", "-e", "LOGNAME=cortex", "-e", "SHELL=/bin/sh"),
            *(IMAGE, "python3", "-I", "-S", "-c", INSIDE, json.dumps(ports)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=(self.directory / "stderr").open("wb"),
            limit=2**26,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(60):
                await self._process.stdout.readline()
            yield self
        finally:
            await docker("rm", "-f", self.name, check=False)
            await self._process.wait()
            if self.rpc is not None:
                await self.rpc.close()


async def docker(*words: str, check: bool = True) -> str:
    process = await asyncio.create_subprocess_exec(
        "docker", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await process.communicate()
    assert not check or process.returncode == 0, error.decode()
    return out.decode()


def environment() -> dict[str, str]:
    """What the agent server gives every agent."""
    proxy, direct = f"http://127.0.0.1:{EGRESS_PORT}", "127.0.0.1,localhost,::1"
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    return {
        "PATH": "/opt/agents/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "USER": "cortex",
        "LOGNAME": "cortex",
        "SHELL": "/bin/sh",
        "SSL_CERT_FILE": certificates,
        "NODE_EXTRA_CA_CERTS": certificates,
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), direct),
    }


def give(path: Path) -> None:
    """Everything at and below ``path`` to the sandbox's uid."""
    for place in (path, *path.rglob("*")):
        os.chown(place, UID, UID, follow_symlinks=False)


def make_home(path: Path, files: Mapping[str, str]) -> Path:
    """A home with these files, and a workspace."""
    path.mkdir(mode=0o700, parents=True)
    (path / "workspace").mkdir()
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    give(path)
    return path


def copy_home(source: Path, target: Path) -> Path:
    """A home as it was."""
    shutil.copytree(source, target, symlinks=True)
    give(target)
    return target


def holding(home: Path, text: str) -> list[str]:
    """Paths of the files below ``home`` that hold ``text``."""
    found = []
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes():
            found.append(str(path.relative_to(home)))
    return found


@contextlib.contextmanager
def directories(root: Path) -> Iterator[Path]:
    """A slot's: ``vol`` with a blank home, ``sock``."""
    slot = root / uuid.uuid4().hex[:6]
    (slot / "vol").mkdir(parents=True)
    (slot / "sock").mkdir()
    (slot / "vol" / "home").mkdir(mode=0o700)
    give(slot / "vol" / "home")
    yield slot
    shutil.rmtree(slot, ignore_errors=True)


@asynccontextmanager
async def boxed(root: Path, mounts: Iterable[tuple[str, str]] = ()) -> AsyncIterator[Box]:
    """A sandbox that is nobody's, its agent not started. ``mounts``: more of them, read-only."""
    with directories(root) as slot:
        async with Gate(slot / "sock").serving() as gate, Box(slot, gate, mounts).running() as box:
            yield box
