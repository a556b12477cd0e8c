"""A hub between a scripted agent and clients that speak masked frames over real socket pairs."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from broker.sandbox.journal_files import JournalFiles
from sandbox_agent.acp import AcpHub
from sandbox_agent.wire.messages import AgentSpec, Attach, Grant, Welcome

Message = dict[str, Any]
SPEC = AgentSpec(name="scripted", protocol="acp", command=["scripted"], init_timeout_s=5.0)


class Files:
    """Grants journal files as the broker does. ``refuse``: it is down. ``wait``: it answers when this is set."""

    def __init__(self, directory: Path, *, keep: int = 4) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.files = JournalFiles(directory, keep=keep)
        self.refuse = False
        self.wait: asyncio.Event | None = None
        self.asked: list[int] = []

    async def grant(self, segment: int) -> tuple[int, Grant]:
        self.asked.append(segment)
        if self.wait is not None:
            await self.wait.wait()
        if self.refuse:
            raise ConnectionRefusedError("the broker is down")
        found = self.files.open(segment)
        return found.fd, Grant(segment=found.number, first=found.first, last=found.last)


def _unknown(params: Message) -> Message:
    raise ValueError("no such method")


class Agent:
    """The agent's end: keeps what it was sent; answers what ``on`` says, at once.

    ``on[method]`` takes the params and returns the result, None for no answer, or an exception's
    message as an error when it raises ``ValueError``.
    """

    def __init__(self, capabilities: Message | None = None) -> None:
        self.congested = False
        self.held: list[bool] = []
        self.got: list[Message] = []
        self.hub: AcpHub | None = None
        self.version = 1
        self.capabilities = {"loadSession": True} if capabilities is None else capabilities
        self.sessions = 0
        self.prefix = "s"
        self.on: dict[str, Callable[[Message], Message | None]] = {
            "initialize": self._initialize,
            "session/new": self._new,
            "session/load": lambda params: {},
            "_cortex/fence": _unknown,
        }
        self._arrived = asyncio.Event()

    def _initialize(self, params: Message) -> Message:
        return {
            "protocolVersion": self.version,
            "agentCapabilities": self.capabilities,
            "agentInfo": {"name": "scripted", "version": "1"},
            "authMethods": [{"id": "login", "name": "Sign in"}],
        }

    def _new(self, params: Message) -> Message:
        self.sessions += 1
        modes = {
            "currentModeId": "ask",
            "availableModes": [{"id": "ask", "name": "Ask"}, {"id": "code", "name": "Code"}],
        }
        return {"sessionId": f"{self.prefix}{self.sessions}", "modes": modes}

    def hold(self, held: bool) -> None:
        self.held.append(held)

    def write(self, line: bytes) -> None:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        message = json.loads(line)
        self.got.append(message)
        self._arrived.set()
        handler = self.on.get(message.get("method", ""))
        if handler is None or "id" not in message:
            return
        try:
            result = handler(message.get("params", {}))
        except ValueError as error:
            reply: Message = {"error": {"code": -32603, "message": str(error)}}
        else:
            if result is None:
                return
            reply = {"result": result}
        asyncio.get_running_loop().call_soon(self.say, {"id": message["id"], **reply})

    def say(self, *messages: Message) -> None:
        """Lines on the agent's standard output."""
        assert self.hub is not None
        self.hub.agent_lines([json.dumps({"jsonrpc": "2.0", **message}).encode() for message in messages])

    def update(self, session: str, text: str, kind: str = "agent_message_chunk") -> None:
        self.say(update(session, text, kind))

    def answer(self, method: str, result: Any) -> None:
        """Answers the newest request for ``method``."""
        self.say({"id": self.last(method)["id"], "result": result})

    def all(self, method: str) -> list[Message]:
        return [message for message in self.got if message.get("method") == method]

    def last(self, method: str) -> Message:
        return self.all(method)[-1]

    async def until(self, ready: Callable[[], bool]) -> None:
        """Waits until ``ready``, looking again after each message to the agent."""
        async with asyncio.timeout(5):
            while not ready():
                self._arrived.clear()
                await self._arrived.wait()

    async def asked(self, method: str, times: int = 1) -> Message:
        """The ``times``-th message of that method, when it has come."""
        await self.until(lambda: len(self.all(method)) >= times)
        return self.all(method)[times - 1]


def update(session: str, text: str, kind: str = "agent_message_chunk") -> Message:
    what = {"sessionUpdate": kind, "content": {"type": "text", "text": text}}
    return {"method": "session/update", "params": {"sessionId": session, "update": what}}


class Mux:
    """The multiplexer: keeps what it is set to. ``settled`` and ``followed`` go with ``settle`` and ``follow``."""

    ENTRY: ClassVar[Message] = {"name": "cortex", "command": "shim", "args": [], "env": []}

    def __init__(self, cwd: Callable[[], str], claimed: Callable[[], bool], on_change: Callable[[], None]) -> None:
        self.cwd = cwd
        self.claimed = claimed
        self.servers: list[Message] = []
        self.renewed = 0
        self.settled = self.followed = True
        self.started = False
        self._on_change = on_change

    def set(self, servers: list[Message]) -> bool:
        changed, self.servers = servers != self.servers, list(servers)
        return changed

    def renew(self) -> None:
        self.renewed += 1

    def settle(self, settled: bool = True) -> None:
        self.settled = settled
        self._on_change()

    def follow(self, followed: bool = True) -> None:
        self.followed = followed
        self._on_change()

    def entry(self) -> Message:
        return dict(self.ENTRY)

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.servers = []


class Peer:
    """A client: ``request`` waits for the answer; everything else that came is in ``seen``."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.seen: list[Message] = []
        self.everything: list[Message] = []
        self.closed: tuple[int, str] | None = None
        self.ended = False
        self._ws = ClientProtocol(parse_uri("ws://sandbox/acp"), state=OPEN, max_size=None)
        self._next = 0

    async def send_raw(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def send_text(self, text: str | bytes) -> None:
        self._ws.send_text(text.encode() if isinstance(text, str) else text)
        for data in self._ws.data_to_send():
            await self.send_raw(data)

    async def send(self, message: Message) -> None:
        await self.send_text(json.dumps({"jsonrpc": "2.0", **message}))

    async def notify(self, method: str, params: Message) -> None:
        await self.send({"method": method, "params": params})

    async def ask(self, method: str, params: Message, request_id: Any = None) -> Any:
        """Sends a request, returns its id."""
        if request_id is None:
            request_id, self._next = self._next, self._next + 1
        await self.send({"id": request_id, "method": method, "params": params})
        return request_id

    async def request(self, method: str, params: Message | None = None, request_id: Any = None) -> Message:
        return await self.answer_to(await self.ask(method, params or {}, request_id))

    async def answer_to(self, request_id: Any) -> Message:
        return await self.until(lambda m: "method" not in m and m.get("id") == request_id)

    async def until(self, wanted: Callable[[Message], bool]) -> Message:
        """The first message that is ``wanted``, taken out of ``seen``; the others stay there."""
        async with asyncio.timeout(10):
            while True:
                for index, message in enumerate(self.seen):
                    if wanted(message):
                        return self.seen.pop(index)
                await self.read()

    async def texts(self, count: int, kind: str = "agent_message_chunk") -> list[str]:
        """The texts of the next ``count`` updates of one kind."""
        found = []
        for _ in range(count):
            message = await self.until(lambda m: of_kind(m) == kind)
            found.append(message["params"]["update"]["content"]["text"])
        return found

    async def read(self) -> None:
        """Takes some bytes; ``EOFError`` when there are no more."""
        if self.ended:
            raise EOFError("the stream has ended")
        try:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 262_144)
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
            return
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                message = json.loads(bytes(event.data))
                self.seen.append(message)
                self.everything.append(message)
            elif isinstance(event, Frame) and event.opcode is Opcode.CLOSE and self._ws.close_rcvd:
                self.closed = (self._ws.close_rcvd.code, self._ws.close_rcvd.reason)

    async def until_closed(self) -> tuple[int, str] | None:
        async with asyncio.timeout(10):
            while not self.ended:
                await self.read()
        return self.closed

    def close(self) -> None:
        self.sock.close()


def of_kind(message: Message) -> str:
    """The kind of session update, "" for another message."""
    if message.get("method") != "session/update":
        return ""
    return str(message["params"]["update"].get("sessionUpdate", ""))


def cortex(message: Message) -> Message:
    """The stamp."""
    if "method" in message:
        found = message["params"]["_meta"]["cortex"]
    elif "error" in message:
        found = message["error"]["data"]["cortex"]
    else:
        found = message["result"]["_meta"]["cortex"]
    assert isinstance(found, dict)
    return found


class Bench:
    """One hub at a time over one journal directory."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.home.mkdir(exist_ok=True)
        self.files = Files(directory / "journal")
        self.welcome = Welcome(incarnation=1, session="s", secret=b"s" * 32, home=str(self.home), stall_timeout_s=5.0)
        self.agent = Agent()
        self.spec = SPEC
        self.muxes: list[Mux] = []
        self.changes = 0
        self.peers: list[Peer] = []
        self._hub: AcpHub | None = None

    @property
    def hub(self) -> AcpHub:
        assert self._hub is not None
        return self._hub

    def start(self, *, agent: Agent | None = None, up: bool = True, **welcome: Any) -> AcpHub:
        """A new hub; ``welcome`` overrides fields of the welcome."""
        self.welcome = replace(self.welcome, **welcome)
        self.muxes = []
        self._hub = AcpHub(
            welcome=self.welcome,
            grant=self.files.grant,
            on_change=self._changed,
            mux=self._make_mux,
            spec=lambda: self.spec,
        )
        if agent is not None:
            self.agent = agent
        self.agent.hub = self._hub
        if up:
            self._hub.agent_up(self.agent, self.spec)
        return self._hub

    def _changed(self) -> None:
        self.changes += 1

    def _make_mux(self, cwd: Callable[[], str], claimed: Callable[[], bool], on_change: Callable[[], None]) -> Mux:
        self.muxes.append(Mux(cwd, claimed, on_change))
        return self.muxes[-1]

    @property
    def mux(self) -> Mux:
        """There is one at most."""
        (mux,) = self.muxes
        return mux

    def restart_agent(self, agent: Agent) -> None:
        """The process died and another one runs."""
        self.hub.agent_down("killed", final=False)
        self.agent = agent
        agent.hub = self.hub
        self.hub.agent_up(agent, self.spec)

    def connect(self, *, key: str = "", cortex: bool = False, name: str = "c") -> Peer:
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        self.hub.serve(theirs, Attach(connection=name, protocol="acp", client=key, cortex=cortex))
        peer = Peer(ours)
        self.peers.append(peer)
        return peer

    async def session(self, peer: Peer) -> str:
        """A new ACP session's id."""
        reply = await peer.request("session/new", {"cwd": "/Users/me/project", "mcpServers": []})
        found = reply["result"]["sessionId"]
        assert isinstance(found, str)
        return found

    async def prompt(self, peer: Peer, session: str, text: str = "hi", message_id: str = "") -> Any:
        """Sends a prompt, returns its request id."""
        return await peer.ask("session/prompt", prompt(session, text, message_id))

    async def stop(self) -> None:
        """Ends the hub in order."""
        for peer in self.peers:
            peer.close()
        self.peers = []
        if self._hub is not None:
            hub, self._hub = self._hub, None
            await hub.close()

    async def crash(self) -> None:
        """Ends the hub as a kill would: nothing is flushed or synced, descriptors close."""
        hub, self._hub = self.hub, None
        for peer in self.peers:
            peer.close()
        self.peers = []
        hub._journal._pending = []
        hub._journal._dirty = set()
        hub._outbox._items = []
        hub._agent.close()
        await hub.close()


def prompt(session: str, text: str = "hi", message_id: str = "") -> Message:
    params: Message = {"sessionId": session, "prompt": [{"type": "text", "text": text}]}
    if message_id:
        params["_meta"] = {"cortex": {"messageId": message_id}}
    return params


def open_files(directory: Path) -> list[str]:
    """Files below ``directory`` that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return [path for path in found if path.startswith(str(directory))]
