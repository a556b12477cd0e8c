"""Plays agents to a real multiplexer with real servers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from sandbox_agent.mux import Mux

SERVER = Path(__file__).with_name("server.py")
DEADLINE_S = 20.0
CAPABILITIES = {"roots": {"listChanged": True}, "sampling": {}, "elicitation": {}}


def server(name: str, **setup: Any) -> dict[str, Any]:
    """The ACP entry of a stand-in server."""
    words = ["-I", "-S", str(SERVER), json.dumps({"name": name, **setup})]
    return {"name": name, "command": sys.executable, "args": words, "env": [{"name": "WHO", "value": name}]}


class RpcError(Exception):
    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code = error["code"]


class Agent:
    """A client. ``replies``: what it answers to requests, by method."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.notes: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.strays: list[dict[str, Any]] = []
        self.replies: dict[str, Any] = {}
        self.closed = False
        self._reader = reader
        self.writer = writer
        self._open: dict[Any, asyncio.Future[Any]] = {}
        self._number = 0
        self._news = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            async for line in self._reader:
                self._heard(json.loads(line))
        self.closed = True
        for future in self._open.values():
            if not future.done():
                future.set_exception(ConnectionError("closed"))
        self._news.set()

    def _heard(self, message: dict[str, Any]) -> None:
        if "method" in message and "id" in message:
            self.requests.append(message)
            if message["method"] in self.replies:
                self.send({"id": message["id"], "result": self.replies[message["method"]]})
        elif "method" in message:
            self.notes.append(message)
        elif message["id"] in self._open:
            future = self._open.pop(message["id"])
            if "error" in message:
                future.set_exception(RpcError(message["error"]))
            else:
                future.set_result(message["result"])
        else:
            self.strays.append(message)
        self._news.set()

    def send(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    def begin(self, method: str, params: Any = None, request_id: Any = None) -> tuple[Any, asyncio.Future[Any]]:
        """Sends a request; its id and what will hold the answer."""
        self._number += 1
        number = request_id if request_id is not None else self._number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        self.send({"id": number, "method": method, "params": params or {}})
        return number, future

    async def ask(self, method: str, params: Any = None) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await self.begin(method, params)[1]

    def call(self, tool: str, /, meta: Any = None, **arguments: Any) -> asyncio.Future[Any]:
        params = {"name": tool, "arguments": arguments} | ({"_meta": meta} if meta else {})
        return self.begin("tools/call", params)[1]

    async def text(self, tool: str, /, **arguments: Any) -> str:
        """The text that a tool answers."""
        async with asyncio.timeout(DEADLINE_S):
            return text(await self.call(tool, **arguments))

    async def value(self, tool: str, /, **arguments: Any) -> Any:
        return json.loads(await self.text(tool, **arguments))

    def tell(self, method: str, **params: Any) -> None:
        self.send({"method": method, "params": params})

    async def names(self, kind: str = "tools") -> list[str]:
        return [item["name"] for item in (await self.ask(f"{kind}/list"))[kind]]

    async def hello(self, capabilities: Any = None, version: str = "2025-06-18") -> Any:
        info = {"name": "test", "version": "1"}
        able = CAPABILITIES if capabilities is None else capabilities
        answer = await self.ask("initialize", {"protocolVersion": version, "capabilities": able, "clientInfo": info})
        self.tell("notifications/initialized")
        return answer

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits until what has come in makes it true."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def noted(self, method: str) -> dict[str, Any]:
        """The params of the first notification of that method; it is taken out."""
        await self.until(lambda: any(note["method"] == method for note in self.notes))
        note = next(note for note in self.notes if note["method"] == method)
        self.notes.remove(note)
        params: dict[str, Any] = note.get("params", {})
        return params

    async def asked(self, method: str) -> dict[str, Any]:
        """The first request of that method."""
        await self.until(lambda: any(each["method"] == method for each in self.requests))
        return next(each for each in self.requests if each["method"] == method)

    async def close(self) -> None:
        self.writer.close()
        self._task.cancel()
        await asyncio.wait({self._task})


def text(result: Any) -> str:
    found: str = result["content"][0]["text"]
    return found


class Place:
    """A multiplexer in a directory of its own, and how to reach it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.work = root / "work"
        self.home.mkdir()
        self.work.mkdir()
        self.cached = True
        self.changes = 0
        self.agents: list[Agent] = []
        self._changed = asyncio.Event()
        self.mux = self.make()

    def make(self) -> Mux:
        return Mux(
            str(self.root / "run"),
            lambda: {"PATH": os.environ["PATH"], "HOME": str(self.home), "BASE": "1"},
            lambda: str(self.work),
            lambda: str(self.home / ".cache/cortex/mcp") if self.cached else None,
            self._on_change,
        )

    def _on_change(self) -> None:
        self.changes += 1
        self._changed.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits until a change of the multiplexer makes it true."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def settled(self) -> None:
        await self.until(lambda: self.mux.settled)

    async def connect(self) -> Agent:
        reader, writer = await asyncio.open_unix_connection(self.mux.entry()["args"][-1], limit=2**26)
        agent = Agent(reader, writer)
        self.agents.append(agent)
        return agent

    async def agent(self, capabilities: Any = None) -> Agent:
        """A client that has said hello."""
        made = await self.connect()
        await made.hello(capabilities)
        return made

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.mux.start()
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        for agent in self.agents:
            await agent.close()
        await self.mux.close()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def gone(pid: int) -> None:
    """Waits for the end of a process."""
    try:
        number = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(number, over.set)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await over.wait()
    finally:
        loop.remove_reader(number)
        os.close(number)
