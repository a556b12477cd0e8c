"""A driver without sandboxes: scripted agent servers in this process, for tests of what lies above.

They speak the wire over the slot's real ``agent`` socket: hello, welcome, bind, status, streams that
send each WebSocket frame back. ``FakeEngine`` outlives drivers, as a container engine does.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass, field

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import SANDBOX_CALLS
from broker.sandbox.driver import CREDENTIALS_DIR, Exit, Found, Liveness, SandboxSpec
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import (
    FROM_BROKER,
    Attach,
    Bind,
    Bound,
    Build,
    Built,
    Hello,
    Message,
    Preamble,
    Probe,
    Status,
    Stop,
    Welcome,
    parse,
)

AGENT_INFO = '{"protocolVersion":1,"agentCapabilities":{"loadSession":true},"authMethods":[]}'
REDIAL_S = 0.02


@dataclass
class Script:
    """How a fake sandbox behaves; set the fields at any time.

    ``create_error``, ``start_error``: raised by the driver. ``hello``: says hello at all. ``hellos``: how
    often. ``garbage``: sent instead of a preamble. ``die_after_hello``: exit code. ``agent_fails``: code of
    the agent's failure. ``bind_error``: code of a refusal. ``bind_hangs``: no answer. ``die_at_claim``: when
    it is told whose it is. ``stream_hangs``: streams are never dialled. ``secret``: presented instead of the right one.
    """

    create_error: CortexError | None = None
    start_error: CortexError | None = None
    hello: bool = True
    hellos: int = 1
    garbage: bytes = b""
    die_after_hello: int | None = None
    agent_fails: str = ""
    bind_error: str = ""
    bind_hangs: bool = False
    die_at_claim: bool = False
    stream_hangs: bool = False
    secret: bytes | None = None
    effect: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeSandbox:
    """One sandbox. ``binds``: what was bound; ``attached``: clients that came; for assertions. ``open_turns``,
    ``turns``, ``pending``: what it says when it is asked."""

    ref: str
    installation: str
    spec: SandboxSpec
    script: Script
    image: str = ""
    liveness: Liveness = "created"
    welcome: Welcome | None = None
    applied: dict[str, str] = field(default_factory=dict)
    binds: list[Bind] = field(default_factory=list)
    attached: list[Attach] = field(default_factory=list)
    agent: str = "stopped"
    ahead: str = ""
    open_turns: int = 0
    turns: int = 0
    pending: int = 0
    exit: Exit = field(default_factory=lambda: Exit(0))
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    running: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: TaskOwner | None = None


class FakeEngine:
    """Holds the sandboxes. ``script``: given to each new one. ``calls``: every driver call, in order.

    ``error``: raised by every call, as an engine does that is down. ``image``: id of the image; ``image_error``:
    why there is none. ``memory``: bytes that each sandbox takes.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.sandboxes: dict[str, FakeSandbox] = {}
        self.calls: list[tuple[str, str]] = []
        self.error: CortexError | None = None
        self.image = "image-1"
        self.image_error: CortexError | None = None
        self.memory = 64 * 2**20
        self.numbers = itertools.count(1)
        self._deaths = TaskOwner("fake-engine")

    def end_soon(self, ref: str, code: int) -> None:
        """``end`` for a sandbox that ends itself."""
        self._deaths.start(self.end(ref, code), ref)

    async def end(self, ref: str, code: int | None = 137) -> None:
        """The sandbox dies of itself."""
        box = self.sandboxes[ref]
        if box.tasks is not None:
            owner, box.tasks = box.tasks, None
            box.liveness, box.exit = "exited", Exit(code)
            await owner.close()
            box.ended.set()

    async def close(self) -> None:
        """Ends all sandboxes."""
        for ref in list(self.sandboxes):
            await self.end(ref)
        await self._deaths.close()


class FakeDriver:
    """The driver port over a ``FakeEngine``."""

    name = "fake"

    def __init__(self, engine: FakeEngine | None = None, *, installation: str = "fake", isolated: bool = True) -> None:
        self.engine = engine or FakeEngine()
        self.isolated = isolated
        self._installation = installation

    def _called(self, call: str, ref: str = "") -> None:
        SANDBOX_CALLS.labels("fake", call).inc()
        self.engine.calls.append((call, ref))
        if self.engine.error is not None:
            raise self.engine.error

    async def open(self) -> None:
        self._called("open")

    async def close(self) -> None:
        """Sandboxes go on."""

    async def prepare_image(self) -> str:
        self._called("prepare_image")
        if self.engine.image_error is not None:
            raise self.engine.image_error
        return self.engine.image

    async def create(self, spec: SandboxSpec) -> str:
        self._called("create", spec.slot)
        if self.engine.image_error is not None:
            raise self.engine.image_error
        script = self.engine.script
        if script.create_error is not None:
            raise script.create_error
        for box in list(self.engine.sandboxes.values()):
            if box.spec.slot == spec.slot and box.spec.incarnation == spec.incarnation and box.liveness == "created":
                del self.engine.sandboxes[box.ref]
        ref = f"fake-{next(self.engine.numbers)}"
        self.engine.sandboxes[ref] = FakeSandbox(ref, self._installation, spec, script, self.engine.image)
        return ref

    async def start(self, ref: str) -> None:
        self._called("start", ref)
        box = self._box(ref)
        if box.script.start_error is not None:
            raise box.script.start_error
        if box.liveness in ("created", "exited"):
            box.liveness, box.ended, box.welcome, box.applied = "running", asyncio.Event(), None, {}
            box.running.set()
            box.tasks = TaskOwner(ref)
            box.tasks.start(_Server(self.engine, box).run(), "agent-server")

    async def pause(self, ref: str) -> None:
        self._called("pause", ref)
        box = self._alive(ref)
        box.liveness = "paused"
        box.running.clear()

    async def resume(self, ref: str) -> None:
        self._called("resume", ref)
        box = self._alive(ref)
        box.liveness = "running"
        box.running.set()

    async def stop(self, ref: str, grace_s: float) -> None:
        self._called("stop", ref)
        if ref in self.engine.sandboxes:
            await self.engine.end(ref, 143)

    async def remove(self, ref: str) -> None:
        self._called("remove", ref)
        if ref in self.engine.sandboxes:
            await self.engine.end(ref)
            box = self.engine.sandboxes.pop(ref)
            if box.liveness == "created":
                box.exit = Exit(None)
            box.liveness = "gone"
            box.ended.set()

    async def wait(self, ref: str) -> Exit:
        box = self.engine.sandboxes.get(ref)
        if box is None:
            return Exit(None)
        await box.ended.wait()
        return box.exit

    async def inspect(self, ref: str) -> Liveness:
        self._called("inspect", ref)
        box = self.engine.sandboxes.get(ref)
        return "gone" if box is None else box.liveness

    def credentials_dir(self, slot: str, incarnation: int) -> str:
        return CREDENTIALS_DIR

    async def memory(self, ref: str) -> int:
        self._called("memory", ref)
        self._alive(ref)
        return self.engine.memory

    async def list(self) -> list[Found]:
        self._called("list")
        return [
            Found(box.ref, box.spec.slot, box.spec.incarnation, box.liveness, box.image)
            for box in self.engine.sandboxes.values()
            if box.installation == self._installation
        ]

    def _box(self, ref: str) -> FakeSandbox:
        box = self.engine.sandboxes.get(ref)
        if box is None:
            raise CortexError(Code.SANDBOX_DIED, f"sandbox {ref} is gone", hint="Start the session again.")
        return box

    def _alive(self, ref: str) -> FakeSandbox:
        box = self._box(ref)
        if box.liveness not in ("running", "paused"):
            raise CortexError(Code.SANDBOX_DIED, f"sandbox {ref} does not run", hint="Start the session again.")
        return box


class _Server:
    """The scripted agent server of one sandbox."""

    def __init__(self, engine: FakeEngine, box: FakeSandbox) -> None:
        self._engine = engine
        self._box = box
        self._path = box.spec.sock_dir / "agent"

    def _start(self, name: str) -> None:
        if self._box.tasks is not None:
            self._box.tasks.start(self._stream(), name, on_error=lambda _: None)

    async def run(self) -> None:
        """Dials control again and again, as the real one does when the broker is away."""
        while self._box.script.hello:
            await self._box.running.wait()
            with suppress(OSError, asyncio.IncompleteReadError, codec.WireError):
                await self._control()
            await asyncio.sleep(REDIAL_S)
        await asyncio.Event().wait()

    def _preamble(self, kind: str) -> bytes:
        box = self._box
        secret = box.welcome.secret if box.welcome is not None else b""
        if box.script.secret is not None:
            secret = box.script.secret
        return codec.pack(Preamble(kind, codec.VERSION, secret).encode())

    async def _control(self) -> None:
        box, script = self._box, self._box.script
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            if script.garbage:
                writer.write(script.garbage)
                await reader.read(1)
                return
            writer.write(self._preamble("control"))
            info = AGENT_INFO if box.agent == "ready" else ""
            for _ in range(script.hellos):
                _send(writer, Hello(pid=2, applied=dict(box.applied), agent=box.agent, agent_info=info))
            if script.die_after_hello is not None:
                self._engine.end_soon(box.ref, script.die_after_hello)
                await asyncio.Event().wait()
            while True:
                await self._handle(writer, parse(await _receive(reader), FROM_BROKER))
        finally:
            writer.close()

    async def _handle(self, writer: asyncio.StreamWriter, message: Message) -> None:
        await self._box.running.wait()
        if isinstance(message, Welcome):
            self._welcomed(writer, message)
        elif isinstance(message, Bind):
            self._bind(writer, message)
        elif isinstance(message, Probe):
            _send(writer, self._status(message.id))
        elif isinstance(message, Build):
            _send(writer, Built(message.id, ok=True, integrity="0" * 64, bins={}, version="1.0.0"))
        elif isinstance(message, Stop):
            self._engine.end_soon(self._box.ref, 0)

    def _welcomed(self, writer: asyncio.StreamWriter, welcome: Welcome) -> None:
        again = self._box.welcome is not None
        self._box.welcome = welcome
        if welcome.session:
            self._box.applied["claim"] = welcome.session
        if welcome.agent_spec is not None and not again:
            self._box.applied["process"] = welcome.agent_hash
            self._agent_up(writer)
        if not self._box.script.stream_hangs:
            for number in range(welcome.streams):
                self._start(f"stream-{number}")

    def _agent_up(self, writer: asyncio.StreamWriter) -> None:
        self._box.agent = "failed" if self._box.script.agent_fails else "ready"
        _send(writer, self._status(0))

    def _status(self, number: int) -> Status:
        box = self._box
        what = "the fake agent fails" if box.agent == "failed" else ""
        info = AGENT_INFO if box.agent == "ready" else ""
        return Status(
            box.agent,
            number,
            info,
            agent_pid=3,
            code=box.script.agent_fails,
            what=what,
            ahead=box.ahead,
            open_turns=box.open_turns,
            turns=box.turns,
            pending=box.pending if number else 0,
            started_ms=1.0,
        )

    def _bind(self, writer: asyncio.StreamWriter, bind: Bind) -> None:
        box = self._box
        box.binds.append(bind)
        if box.script.bind_hangs:
            return
        if "claim" in bind.parts and box.script.die_at_claim:
            self._engine.end_soon(box.ref, 1)
            return
        if box.script.bind_error:
            _send(writer, Bound(bind.id, ok=False, code=box.script.bind_error, what="refused", hint="It is a fake."))
            return
        starts = "process" in bind.parts and box.agent == "stopped"
        box.applied |= bind.hashes
        if bind.parts.get("settings", {}).get("open_ahead"):
            box.ahead = "open"
        effect = {part: box.script.effect.get(part, "now") for part in bind.parts}
        _send(writer, Bound(bind.id, ok=True, applied=dict(box.applied), effect=effect))
        if starts:
            self._agent_up(writer)
        elif "settings" in bind.parts:
            _send(writer, self._status(0))

    async def _stream(self) -> None:
        """One stream: waits for a client, then echoes its frames; another takes its place in the waiting row."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(self._preamble("stream"))
            attach = Attach.decode(await _receive(reader))
            self._box.attached.append(attach)
            self._start(f"stream-{attach.connection}")
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head, payload = await read_frame(reader)
                    await self._box.running.wait()
                    writer.write(frame(head, payload))
                    await writer.drain()
        finally:
            writer.close()


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One WebSocket frame (RFC 6455 section 5.2): its first byte and its payload, unmasked."""
    head, size = await reader.readexactly(2)
    length = size & 0x7F
    if length > 125:
        length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8), "big")
    mask = await reader.readexactly(4) if size & 0x80 else b""
    payload = await reader.readexactly(length)
    if not mask:
        return head, payload
    repeated = (mask * (length // 4 + 1))[:length]
    return head, (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(length, "big")


def frame(head: int, payload: bytes) -> bytes:
    """An unmasked frame with first byte ``head``."""
    size = len(payload)
    if size < 126:
        return bytes((head, size)) + payload
    if size < 65536:
        return bytes((head, 126)) + size.to_bytes(2, "big") + payload
    return bytes((head, 127)) + size.to_bytes(8, "big") + payload


def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    writer.write(codec.pack(message.encode()))


async def _receive(reader: asyncio.StreamReader) -> dict[str, object]:
    size = codec.length(await reader.readexactly(codec.HEADER))
    return codec.unpack(await reader.readexactly(size))
