"""The stdio shim against a WebSocket server that breaks."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from broker.cli import shim as shim_module
from broker.cli.shim import Shim
from broker.cli.stdio import LineReader
from broker.errors import Code, CortexError

Script = Callable[[ServerConnection, int], Awaitable[None]]


class Ide:
    """Both ends of the shim's stdio, and the server behind."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tokens = iter(f"token-{number}" for number in range(100))
        stdin, self._to = os.pipe()
        self._from, stdout = os.pipe()
        self.shim = Shim(self.where, stdin, stdout)
        self.lines = LineReader(self._from, limit=2**20)
        self.fds = [stdin, stdout, self._from]

    async def where(self) -> tuple[str, str]:
        return self.url, next(self.tokens)

    def say(self, ident: Any, method: str, **params: Any) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params} | ({} if ident is None else {"id": ident})
        os.write(self._to, json.dumps(message).encode() + b"\n")

    def raw(self, data: bytes) -> None:
        os.write(self._to, data)

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            line = await self.lines.next()
        assert line is not None
        message: dict[str, Any] = json.loads(line)
        return message

    def leave(self) -> None:
        os.close(self._to)


class Server:
    """``script`` is run for each connection with its number."""

    def __init__(self) -> None:
        self.script: Script = self.idle
        self.heard: list[list[dict[str, Any]]] = []
        self.requests: list[Request] = []
        self.refuse: list[Response] = []

    async def idle(self, ws: ServerConnection, number: int) -> None:
        await ws.wait_closed()

    async def handle(self, ws: ServerConnection) -> None:
        assert ws.request is not None
        self.requests.append(ws.request)
        self.heard.append([])
        await self.script(ws, len(self.heard) - 1)

    async def take(self, ws: ServerConnection) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await ws.recv())
        self.heard[-1].append(message)
        return message

    def check(self, ws: ServerConnection, request: Request) -> Response | None:
        return self.refuse.pop(0) if self.refuse else None


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def ide(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ide]:
    monkeypatch.setattr(shim_module, "BACKOFF_MIN_S", 0.01)
    async with serve(
        server.handle,
        "127.0.0.1",
        0,
        process_request=server.check,
        subprotocols=["cortex.acp.v1"],  # type: ignore[list-item]
    ) as listening:
        ide = Ide(f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/acp")
        yield ide
        for fd in ide.fds:
            os.close(fd)


def answer(message: dict[str, Any], **result: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}, indent=1)


def update(seq: int) -> str:
    params = {"sessionId": "s1", "update": {}, "_meta": {"cortex": {"epoch": "e", "seq": seq}}}
    return json.dumps({"jsonrpc": "2.0", "method": "session/update", "params": params})


async def test_a_connection_that_breaks_in_a_turn_goes_unnoticed(server: Server, ide: Ide) -> None:
    async def script(ws: ServerConnection, number: int) -> None:
        await ws.send(answer(await server.take(ws)))
        opened = await server.take(ws)
        if number == 0:
            await ws.send(answer(opened, sessionId="s1"))
            await server.take(ws)
            await ws.send(update(3))
            ws.transport.abort()
            return
        for seq in (3, 4):
            await ws.send(update(seq))
        await ws.send(answer(opened))
        await ws.send(answer(await server.take(ws), stopReason="end_turn"))
        await ws.wait_closed()

    server.script = script
    running = asyncio.ensure_future(ide.shim.run())
    ide.say(0, "initialize", protocolVersion=1)
    assert (await ide.hear())["id"] == 0
    ide.say(1, "session/new", cwd="/mine")
    assert (await ide.hear())["result"] == {"sessionId": "s1"}
    ide.say(2, "session/prompt", sessionId="s1", prompt=[])
    seqs = [(await ide.hear())["params"]["_meta"]["cortex"]["seq"] for _ in range(2)]
    assert seqs == [3, 4]
    assert (await ide.hear()) == {"jsonrpc": "2.0", "id": 2, "result": {"stopReason": "end_turn"}}
    ide.leave()
    assert await asyncio.wait_for(running, 10) == 0
    first, second = server.heard
    assert [message["method"] for message in second] == ["initialize", "session/load", "session/prompt"]
    assert second[2] == first[2]
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer token-0", "Bearer token-1"]


async def test_stdin_closed_waits_for_the_answer_on_its_way(server: Server, ide: Ide) -> None:
    async def script(ws: ServerConnection, number: int) -> None:
        message = await server.take(ws)
        await asyncio.sleep(0.05)
        await ws.send(answer(message, done=True))
        await ws.wait_closed()

    server.script = script
    running = asyncio.ensure_future(ide.shim.run())
    ide.say("a", "session/list")
    ide.leave()
    assert (await ide.hear())["result"] == {"done": True}
    assert await asyncio.wait_for(running, 10) == 0


async def test_a_line_that_is_not_json_is_answered_and_the_rest_goes_on(server: Server, ide: Ide) -> None:
    async def script(ws: ServerConnection, number: int) -> None:
        await ws.send(answer(await server.take(ws), ok=True))
        await ws.wait_closed()

    server.script = script
    running = asyncio.ensure_future(ide.shim.run())
    ide.raw(b"nonsense\n\n[1]\n")
    ide.say(1, "session/list")
    assert [(await ide.hear())["error"]["code"] for _ in range(2)] == [-32700, -32700]
    assert (await ide.hear())["result"] == {"ok": True}
    ide.leave()
    assert await asyncio.wait_for(running, 10) == 0


def refusal(status: int, code: str) -> Response:
    from websockets.datastructures import Headers

    body = json.dumps({"title": "no", "code": code, "hint": "stop", "status": status}).encode()
    return Response(status, "No", Headers({"Content-Length": str(len(body))}), body)


async def test_what_will_never_work_ends_it_and_the_ide_is_told(server: Server, ide: Ide) -> None:
    server.refuse = [refusal(403, "host.forbidden")]
    with pytest.raises(CortexError) as caught:
        await asyncio.wait_for(ide.shim.run(), 10)
    assert caught.value.code is Code.HOST_FORBIDDEN


async def test_a_token_is_tried_anew_once(server: Server, ide: Ide) -> None:
    server.refuse = [refusal(401, "token.expired")]
    running = asyncio.ensure_future(ide.shim.run())
    async with asyncio.timeout(10):
        while not server.requests:
            await asyncio.sleep(0.01)
    assert server.requests[0].headers["Authorization"] == "Bearer token-1"
    ide.leave()
    assert await asyncio.wait_for(running, 10) == 0
    server.refuse = [refusal(401, "token.expired"), refusal(401, "token.expired")]
    with pytest.raises(CortexError) as caught:
        await asyncio.wait_for(Shim(ide.where, *ide.fds[:2]).run(), 10)
    assert caught.value.code is Code.TOKEN_EXPIRED


async def test_a_close_frame_says_whether_to_come_back(server: Server, ide: Ide) -> None:
    async def script(ws: ServerConnection, number: int) -> None:
        await server.take(ws)
        if number:
            await ws.close(4409, "client.superseded: another client took over")
        else:
            await ws.close(1012, "broker.restarting: connect again")

    server.script = script
    running = asyncio.ensure_future(ide.shim.run())
    ide.say(1, "session/list")
    with pytest.raises(CortexError) as caught:
        await asyncio.wait_for(running, 10)
    assert caught.value.code is Code.SUPERSEDED
    told = await ide.hear()
    assert (told["id"], told["error"]["data"]["code"]) == (1, "client.superseded")
    assert len(server.heard) == 2
