"""A registry with sessions in memory whose agent is a script on a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any, Literal

from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.session.port import Applied, AttachedClient
from broker.session.port import State as SessionState
from sandbox_agent.wire.messages import Attach


class Agent:
    """An ACP agent server at the far end of a stream: answers, streams, asks for permission."""

    def __init__(self, sock: socket.socket, session: FakeSession) -> None:
        self.sock = sock
        self.session = session
        self.ws = ServerProtocol(state=State.OPEN, max_size=2**22)

    async def run(self) -> None:
        """Until the client leaves."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(self.sock), contextlib.suppress(OSError):
            while data := await loop.sock_recv(self.sock, 65_536):
                self.ws.receive_data(data)
                for frame in self.ws.events_received():
                    if isinstance(frame, Frame) and frame.opcode is Opcode.TEXT:
                        await self.take(json.loads(bytes(frame.data)))

    async def say(self, message: dict[str, Any]) -> None:
        """Sends one message, cut into two fragments, a ping before it."""
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.ws.send_ping(b"?")
        self.ws.send_text(data[:5], fin=False)
        self.ws.send_continuation(data[5:], fin=True)
        await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(self.ws.data_to_send()))

    async def update(self, text: str, seq: int) -> None:
        """One chunk."""
        update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
        params = {"sessionId": "s1", "update": update, "_meta": {"cortex": {"epoch": "e", "seq": seq}}}
        await self.say({"method": "session/update", "params": params})

    async def take(self, message: dict[str, Any]) -> None:
        """What the script does with one message."""
        self.session.heard.append(message)
        method, ident = message.get("method"), message.get("id")
        if method == "initialize":
            await self.say({"id": ident, "result": {"protocolVersion": 1}})
        elif method == "session/new":
            await self.say({"id": ident, "result": {"sessionId": "s1"}})
        elif method == "session/resume":
            await self.say({"id": ident, "result": {}})
        elif method == "session/prompt":
            await self.prompt(ident, message["params"]["prompt"][0]["text"])
        elif "method" not in message and ident == "perm":
            await self.update(json.dumps(message["result"]), 3)
            await self.say({"id": self.session.asked, "result": {"stopReason": "end_turn"}})

    async def prompt(self, ident: Any, text: str) -> None:
        """``fail``, ``die``, ``ask``, ``hang``, ``bad-frame``, JSON (``say``, ``result``); else an echo by words."""
        if text == "fail":
            error = {"code": -32000, "message": "no key", "data": {"code": "agent.failed", "hint": "give it one"}}
            await self.say({"id": ident, "error": error})
        elif text == "die":
            self.sock.shutdown(socket.SHUT_RDWR)
        elif text == "ask":
            self.session.asked = ident
            options = [{"optionId": "y", "kind": "allow_once"}, {"optionId": "n", "kind": "reject_once"}]
            params = {"sessionId": "s1", "toolCall": {"toolCallId": "t"}, "options": options}
            await self.say({"id": "perm", "method": "session/request_permission", "params": params})
        elif text == "bad-frame":
            await asyncio.get_running_loop().sock_sendall(self.sock, b"\xf3\x00")
        elif text.startswith("{"):
            script = json.loads(text)
            for message in script["say"]:
                await self.say(message)
            for message in self.session.extra:  # plain, no ping
                self.ws.send_text(json.dumps({"jsonrpc": "2.0", **message}).encode())
                await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(self.ws.data_to_send()))
            await self.say({"id": ident, "result": script["result"]})
            self.session.turns_done.set()
        elif text != "hang":
            for seq, word in enumerate(text.split(), 1):
                await self.update(word, seq)
                await self.session.step.wait()
            meta = {"_meta": {"cortex": {"epoch": "e", "seq": 9}}}
            await self.say({"id": ident, "result": {"stopReason": "end_turn", **meta}})
            self.session.turns_done.set()


class FakeSession:
    """A ``SessionPort``."""

    def __init__(self, user: str, workspace: str, agent: str, tasks: TaskOwner) -> None:
        self.id = f"id-{user}-{workspace}"
        self.user = user
        self.workspace = workspace
        self.agent = agent
        self.protocol: Literal["acp", "websocket"] = "websocket" if agent == "raw" else "acp"
        self.state: SessionState = "stopped"
        self.tasks = tasks
        self.clients: list[AttachedClient] = []
        self.closed: list[tuple[int, str]] = []
        self.heard: list[dict[str, Any]] = []
        self.asked: Any = None
        self.extra: list[dict[str, Any]] = []
        self.policy = "ask"
        self.broken: CortexError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.step = asyncio.Event()
        self.step.set()
        self.turns_done = asyncio.Event()
        self.stops = 0
        self.woken = 0
        self.announced = 0

    def attach(self, client: AttachedClient) -> None:
        self.clients.append(client)

    def detach(self, client: AttachedClient) -> None:
        if client in self.clients:
            self.clients.remove(client)

    async def open_stream(self, attach: Attach) -> socket.socket:
        await self.wait_ready()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.tasks.start(Agent(theirs, self).run(), "agent")
        return ours

    async def wait_ready(self) -> None:
        if self.broken is not None:
            raise self.broken
        self.state = "starting"
        await self.gate.wait()
        self.state = "ready"

    def prewarm(self, *, announced: bool = True) -> None:
        self.announced += announced

    async def let_go(self) -> None:
        self.stops += 1

    async def stop(self) -> None:
        self.stops += 1
        self.state = "stopped"

    async def config_changed(self, section: str) -> Applied:
        if self.state != "ready":
            return Applied(self.user, self.workspace, "stored", {})
        return Applied(self.user, self.workspace, "applied", {section: "next_session"})

    def close_clients(self, code: int, reason: str) -> int:
        self.closed.append((code, reason))
        clients = list(self.clients)
        for client in clients:
            client.close(code, reason)
        return len(clients)

    def view(self) -> dict[str, Any]:
        facts = {"session": self.id, "user": self.user, "workspace": self.workspace, "agent": self.agent}
        return facts | {"state": self.state, "clients": len(self.clients), "permission_policy": self.policy}

    def timeline(self) -> list[dict[str, Any]]:
        stages = [{"stage": "start", "start_ms": 0.0, "ms": 12.5}]
        return [{"path": "cold", "driver": "fake", "started_at": 1.0, "total_ms": 12.5, "stages": stages}]


class FakeRegistry:
    """A ``RegistryPort``."""

    def __init__(self, agents: Sequence[str] = ("demo", "raw", "other")) -> None:
        self.sessions: dict[tuple[str, str], FakeSession] = {}
        self.agents = agents
        self.creates = 0
        self.tasks = TaskOwner("fake")

    def held(self, user: str, workspace: str) -> FakeSession | None:
        return self.sessions.get((user, workspace))

    async def create(self, user: str, workspace: str, agent: str | None) -> tuple[FakeSession, bool]:
        self.creates += 1
        if agent is not None and agent not in self.agents:
            raise CortexError(Code.UNKNOWN_AGENT, f"no agent {agent!r}", hint="one of demo, raw")
        found = self.sessions.get((user, workspace))
        if found is None:
            found = self.sessions[user, workspace] = FakeSession(user, workspace, agent or "demo", self.tasks)
            found.woken += 1
            return found, True
        if agent not in (None, found.agent):
            raise CortexError(Code.SESSION_CONFLICT, "it has another agent", hint="delete it first")
        found.woken += 1
        return found, False

    async def prewarm(
        self, user: str, workspace: str, agent: str | None = None, *, create: bool = False, announced: bool = False
    ) -> FakeSession:
        found = self.held(user, workspace)
        if found is None and create:
            found = self.sessions[user, workspace] = FakeSession(user, workspace, agent or "demo", self.tasks)
        if found is None:
            raise CortexError(Code.NO_SESSION, "there is no such session", hint="create it")
        found.prewarm(announced=announced)
        return found

    async def load(self, user: str, workspace: str) -> FakeSession:
        found = self.sessions.get((user, workspace))
        if found is None:
            raise CortexError(Code.NO_SESSION, "there is no such session", hint="create it")
        return found

    async def list(self, *, after: str = "", limit: int = 100) -> tuple[list[dict[str, Any]], str]:
        keys = sorted(f"{user}/{workspace}" for user, workspace in self.sessions)
        rest = [key for key in keys if key > after]
        views = [self.sessions[tuple(key.split("/"))].view() for key in rest[:limit]]  # type: ignore[index]
        return views, rest[limit - 1] if len(rest) > limit else ""

    async def delete(self, user: str, workspace: str) -> None:
        await self.load(user, workspace)
        del self.sessions[user, workspace]

    async def erase_user(self, user: str) -> int:
        mine = [key for key in self.sessions if key[0] == user]
        for key in mine:
            del self.sessions[key]
        return len(mine)

    async def config_changed(self, user: str, section: str) -> Sequence[Applied]:
        return [await one.config_changed(section) for key, one in self.sessions.items() if key[0] == user]
