"""Plays the broker for a real agent server: a real Unix socket, the real wire, real journal files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any, TypeVar

from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

import sandbox_agent
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import (
    FROM_SANDBOX,
    AgentSpec,
    Attach,
    Bind,
    Bound,
    Built,
    Grant,
    Hello,
    Message,
    Preamble,
    Probe,
    Status,
    Stop,
    Welcome,
    parse,
)

PACKAGE = Path(sandbox_agent.__file__).parent
SECRET = b"s" * 32
DEADLINE_S = 15.0
M = TypeVar("M", bound=Message)

DEMO = AgentSpec(name="demo", protocol="acp", command=["{python}", "-I", "-S", "{sandbox_agent}/demo.py"])


class ControlConnection:
    """The broker's end of one control connection."""

    def __init__(self, sock: socket.socket, preamble: Preamble, hello: Hello) -> None:
        self.sock = sock
        self.preamble = preamble
        self.hello = hello
        self.inbox: asyncio.Queue[Message] = asyncio.Queue(1000)
        self.statuses: list[Status] = []

    async def send(self, message: Message) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, codec.pack(message.encode()))

    async def read(self) -> None:
        decoder = codec.Decoder()
        with contextlib.suppress(OSError):
            while data := await asyncio.get_running_loop().sock_recv(self.sock, 65_536):
                for raw in decoder.feed(data):
                    message = parse(raw, FROM_SANDBOX)
                    if isinstance(message, Status):
                        self.statuses.append(message)
                    self.inbox.put_nowait(message)

    async def expect(self, kind: type[M], **wanted: Any) -> M:
        """The next message of ``kind`` whose fields are as ``wanted``; others are passed over."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                message = await self.inbox.get()
                if isinstance(message, kind) and all(getattr(message, k) == v for k, v in wanted.items()):
                    return message

    async def status(self, agent: str) -> Status:
        return await self.expect(Status, agent=agent)

    async def bind(self, number: int, parts: dict[str, Any], hashes: dict[str, str]) -> Bound:
        await self.send(Bind(number, number, parts, hashes))
        return await self.expect(Bound, id=number)

    async def built(self, number: int) -> Built:
        return await self.expect(Built, id=number)

    async def probe(self, number: int) -> Status:
        await self.send(Probe(number))
        return await self.expect(Status, id=number)


class Broker:
    """Listens on ``sock_dir/agent``. Welcomes with ``welcome``; None: hangs up on every hello."""

    def __init__(self, sock_dir: Path, journal_dir: Path, welcome: Welcome | None) -> None:
        self.path = sock_dir / "agent"
        self.journal_dir = journal_dir
        self.welcome = welcome
        self.greeting: bytes | None = None
        """Sent instead of the welcome, once."""
        self.controls: asyncio.Queue[ControlConnection] = asyncio.Queue(100)
        self.streams: asyncio.Queue[socket.socket] = asyncio.Queue(100)
        self.preambles: list[Preamble] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[socket.socket] = set()
        self._first = True

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(64)
        listener.setblocking(False)
        self._open.add(listener)
        self._spawn(self._accept(listener))

    async def stop(self) -> None:
        """As a broker that is killed: every connection it holds is gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in self._open:
            sock.close()
        self._open.clear()
        while not self.streams.empty():
            self.streams.get_nowait()

    async def control(self) -> ControlConnection:
        async with asyncio.timeout(DEADLINE_S):
            return await self.controls.get()

    async def stream(self) -> socket.socket:
        async with asyncio.timeout(DEADLINE_S):
            return await self.streams.get()

    def _spawn(self, coro: Any) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            sock.setblocking(False)
            self._open.add(sock)
            self._spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            preamble = Preamble.decode(await message(sock))
            self.preambles.append(preamble)
            if preamble.kind == "control":
                await self._serve_control(sock, preamble)
                return
            assert preamble.secret == SECRET
            if preamble.kind == "stream":
                self.streams.put_nowait(sock)
                return
            self._grant(sock, preamble.segment)
        sock.close()

    async def _serve_control(self, sock: socket.socket, preamble: Preamble) -> None:
        hello = Hello.decode(await message(sock))
        loop = asyncio.get_running_loop()
        if self.greeting is not None:
            greeting, self.greeting = self.greeting, None
            await loop.sock_sendall(sock, greeting)
            sock.close()
            return
        if self.welcome is None:
            sock.close()
            return
        connection = ControlConnection(sock, preamble, hello)
        await connection.send(self.welcome)
        self.controls.put_nowait(connection)
        await connection.read()

    def _grant(self, sock: socket.socket, segment: int) -> None:
        self.journal_dir.mkdir(exist_ok=True)
        have = sorted(int(path.name) for path in self.journal_dir.iterdir())
        newest = have[-1] if have else 0
        number = newest if segment < 0 else segment
        assert number <= newest + 1
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self.journal_dir / str(number), flags, 0o600)
        grant = Grant(number, have[0] if have else number, max(newest, number))
        sock.setblocking(True)
        socket.send_fds(sock, [codec.pack(grant.encode())], [file])
        os.close(file)


async def message(sock: socket.socket) -> dict[str, Any]:
    """One length-prefixed message. Raises ``EOFError``."""
    return codec.unpack(await exactly(sock, codec.length(await exactly(sock, codec.HEADER))))


async def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


class Client:
    """A client at the far end of a stream: masked frames out, unmasked frames in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._protocol = ClientProtocol(parse_uri("ws://x/"), state=State.OPEN, max_size=None)
        self._frames: list[Any] = []

    @classmethod
    async def attach(cls, broker: Broker, protocol: str = "acp", key: str = "c1", *, cortex: bool = False) -> Client:
        sock = await broker.stream()
        attach = Attach(connection=f"connection-{key}", protocol=protocol, client=key, cortex=cortex)
        await asyncio.get_running_loop().sock_sendall(sock, codec.pack(attach.encode(), limit=codec.MAX_PREAMBLE))
        return cls(sock)

    async def send(self, text: bytes) -> None:
        self._protocol.send_text(text)
        await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(self._protocol.data_to_send()))

    async def receive(self) -> Any:
        """The next frame (websockets' ``Frame``); None at the end of the stream."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._frames:
                data = await asyncio.get_running_loop().sock_recv(self.sock, 65_536)
                if not data:
                    return None
                self._protocol.receive_data(data)
                self._frames += self._protocol.events_received()
        return self._frames.pop(0)

    async def text(self) -> bytes:
        frame = await self.receive()
        assert frame is not None
        assert frame.opcode is Opcode.TEXT, frame
        return bytes(frame.data)


class Sandbox:
    """A slot's directories and the agent server that runs on them."""

    def __init__(self, root: Path) -> None:
        self.socks = root / "sock"
        self.vol = root / "vol"
        self.home = self.vol / "home"
        self.socks.mkdir()
        self.home.mkdir(parents=True)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *wrapper: str) -> int:
        """Starts it as the process driver does, inside ``wrapper`` if given; returns the pid."""
        arguments = ["--socket-dir", str(self.socks), "--vol", str(self.vol)]
        env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = [sys.executable, "-I", "-S", str(PACKAGE / "__main__.py")]
        self.process = await asyncio.create_subprocess_exec(
            *wrapper, *command, *arguments, env=env, cwd="/", stdin=asyncio.subprocess.DEVNULL
        )
        return self.process.pid

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()

    async def close(self) -> None:
        """Kills it, and what it started: nothing else ends an agent that does not read its stdin."""
        if self.process is not None and self.process.returncode is None:
            agents = children(self.process.pid)
            self.process.kill()
            await self.process.wait()
            for pid in agents:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Direct children of ``pid``."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def open_files(pid: int) -> dict[int, str]:
    """Descriptor → what it is."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def welcome(spec: AgentSpec | None = DEMO, **changes: Any) -> Welcome:
    """What the broker answers by default."""
    values: dict[str, Any] = {
        "incarnation": 1,
        "session": "s1",
        "secret": SECRET,
        "agent_spec": spec,
        "agent_hash": "a1",
    }
    return Welcome(**(values | changes))


__all__ = ["DEMO", "SECRET", "Broker", "Client", "Sandbox", "Stop", "children", "open_files", "shutil", "welcome"]
