"""WebSockets of a sandbox to a provider: handshakes passed on or refused, frames untouched, slow sides waited for."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import pytest_asyncio
import websockets
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from broker.gateway import upgrade
from broker.gateway.context import Context
from broker.gateway.heads import RequestHead
from broker.gateway.routes import Origin
from broker.gateway.server import Connection
from broker.gateway.tunnel import Tunnel
from broker.gateway.upgrade import Upgrade, upgrade_head
from broker.gateway.ways import Held, Way
from broker.host.tasks import TaskOwner
from tests.integration.gateway.support import Handler, ask, problem, raw_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHAKE = (
    b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
MORE = 2**20
LITTLE = 2**20
"""Both write buffers of a connection at their high mark, and a read on top of each."""


class Door(Connection):
    """A connection whose every request is an upgrade to ``origin``."""

    def __init__(self, room: Room, origin: Origin) -> None:
        super().__init__(room, room.context)
        self._room = room
        self._origin = origin

    def _begin(self, head: RequestHead) -> None:
        room = self._room
        ready = upgrade_head(head, head.target, b"x-kept: yes\r\n", b"host: up\r\nauthorization: Bearer real\r\n")
        context = room.context
        made = Upgrade(
            self, self._origin, ready, context.dialer, context.stats, context.tasks, room.heard.append,
            on_end=room.ended.append,
        )  # fmt: skip
        self._tunnel = cast(Tunnel, made)
        made.start()


class Room:
    """What the connections of a test share, and what was heard in them."""

    slot = "s"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tasks = TaskOwner("test")
        self.context = Context(self.tasks)
        self.heard: list[bytes] = []
        self.ended: list[int | None] = []
        self.doors: list[Connection] = []

    def way(self, head: RequestHead) -> Way:
        raise NotImplementedError

    def opened(self, connection: Held) -> None:
        self.doors.append(cast(Connection, connection))

    def closed(self, connection: Held) -> None:
        self.doors.remove(cast(Connection, connection))

    def piled_up(self) -> int:
        """Bytes in the gateway that either side has not taken yet."""
        ends = [end._transport for door in self.doors for end in (door, cast(Upgrade | None, door._tunnel)) if end]
        return sum(end.get_write_buffer_size() for end in ends if end is not None)

    @asynccontextmanager
    async def to(self, port: int) -> AsyncIterator[str]:
        """A socket whose requests go to ``port``."""
        origin = Origin("http", "127.0.0.1", port, "", True)
        server = await asyncio.get_running_loop().create_unix_server(lambda: Door(self, origin), str(self.path))
        try:
            yield str(self.path)
        finally:
            server.close()
            for door in list(self.doors):
                door.abort()
            self.path.unlink()


@pytest_asyncio.fixture(loop_scope="module")
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    made = Room(tmp_path / "door")
    yield made
    await made.context.close()
    await made.tasks.close()


@asynccontextmanager
async def provider(handler: object, **options: object) -> AsyncIterator[int]:
    """A WebSocket server that is not ours; gives its port."""
    async with websockets.serve(handler, "127.0.0.1", 0, max_size=2**26, **options) as server:  # type: ignore[arg-type]
        yield next(iter(server.sockets)).getsockname()[1]


@asynccontextmanager
async def connected(path: str, **options: object) -> AsyncIterator[websockets.ClientConnection]:
    async with (
        asyncio.timeout(20),
        websockets.unix_connect(path, "ws://localhost/v1/responses", max_size=2**26, **options) as socket,
    ):
        yield socket


async def mirror(socket: ServerConnection) -> None:
    async for message in socket:
        await socket.send(message)


async def drained(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    await reader.read()


async def test_messages_pass_both_ways_and_text_is_heard(room: Room) -> None:
    big, text = os.urandom(3_000_000), "x" * 900_000
    async with provider(mirror) as port, room.to(port) as path, connected(path) as socket:
        for message in (big, text, "", "ä"):
            await socket.send(message)
            assert await socket.recv() == message
        assert await (await socket.ping()) >= 0
        await socket.close(4321, "enough")
        assert (socket.close_code, socket.close_reason) == (4321, "enough")
    assert room.heard == [text.encode(), b"", "ä".encode()]
    assert room.ended == [101]
    assert room.context.stats.tunnels == 1


async def test_the_provider_gets_its_credential_and_the_sandbox_no_cookie(room: Room) -> None:
    async def tell(socket: ServerConnection) -> None:
        assert socket.request is not None
        await socket.send(json.dumps(dict(socket.request.headers.raw_items())))

    def cookie(_: ServerConnection, __: Request, response: Response) -> None:
        response.headers["Set-Cookie"] = "a=b"
        response.headers["X-Request-Id"] = "r1"

    headers = {"Authorization": "Bearer placeholder"}
    async with (
        provider(tell, process_response=cookie, subprotocols=["realtime"]) as port,
        room.to(port) as path,
        connected(path, additional_headers=headers, subprotocols=["realtime"]) as socket,
    ):
        got = {name.lower(): value for name, value in json.loads(await socket.recv()).items()}
        assert socket.response is not None
        answered = socket.response.headers
    assert got["authorization"] == "Bearer real"
    assert (got["host"], got["x-kept"]) == ("up", "yes")
    assert "sec-websocket-extensions" not in got
    assert answered["X-Request-Id"] == "r1"
    assert "Set-Cookie" not in answered
    assert socket.subprotocol == "realtime"


async def test_a_provider_that_ends_without_a_word_ends_the_sandboxs_side(room: Room) -> None:
    async def rude(socket: ServerConnection) -> None:
        await socket.recv()
        socket.transport.abort()

    async with provider(rude) as port, room.to(port) as path, connected(path) as socket:
        await socket.send("hello")
        with pytest.raises(websockets.ConnectionClosedError):
            await socket.recv()


async def test_a_sandbox_that_is_gone_ends_the_providers_side(room: Room) -> None:
    gone = asyncio.Event()

    async def wait(socket: ServerConnection) -> None:
        await socket.wait_closed()
        gone.set()

    async with provider(wait) as port, room.to(port) as path:
        async with connected(path) as socket:
            socket.transport.abort()
        async with asyncio.timeout(5):
            await gone.wait()
    assert room.ended == [101]


async def push(writer: asyncio.StreamWriter, stuck: asyncio.Future[int]) -> None:
    """Sends without end; says how much it had sent when nothing went on."""
    sent = 0
    while True:
        writer.write(bytes(2**16))
        sent += 2**16
        try:
            async with asyncio.timeout(None if stuck.done() else 0.5):
                await writer.drain()
        except TimeoutError:
            stuck.set_result(sent)
            await writer.drain()


async def test_each_side_is_held_while_the_other_does_not_read(room: Room) -> None:
    loop = asyncio.get_running_loop()
    down: asyncio.Future[int] = loop.create_future()
    up: asyncio.Future[int] = loop.create_future()
    over = loop.create_future()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ACCEPTED)
        pushing = room.tasks.start(push(writer, down), "push")
        size = await up
        assert room.piled_up() <= LITTLE
        assert await reader.readexactly(size + MORE)
        over.set_result(None)
        pushing.cancel()

    async with asyncio.timeout(20), raw_server(flood) as port, room.to(port) as path:
        reader, writer = await asyncio.open_unix_connection(path, limit=2**16)
        writer.write(SHAKE)
        await reader.readuntil(b"\r\n\r\n")
        pushing = room.tasks.start(push(writer, up), "push")
        size = await down
        assert room.piled_up() <= LITTLE
        assert await reader.readexactly(size + MORE)
        await over
        pushing.cancel()
        writer.close()


async def test_bytes_sent_before_the_answer_are_not_lost(room: Room) -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ACCEPTED + b"first:")
        await writer.drain()
        writer.write(await reader.readexactly(5))
        await writer.drain()

    async with raw_server(late) as port, room.to(port) as path:
        got = await ask(path, SHAKE + b"early")
    head, _, rest = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    assert rest == b"first:early"


def answering(raw: bytes, *, close: bool = False) -> Handler:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        if not close:
            await reader.read()

    return serve


JSON = b"Content-Type: application/json\r\nSet-Cookie: a=b\r\n"


@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (b"HTTP/1.1 401 No\r\n" + JSON + b"Content-Length: 7\r\n\r\n{\"a\":1}", 401, b'{"a":1}'),
        (b"HTTP/1.1 426 Up\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 426, b"abc"),
        (b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", 429, b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 204 No\r\n\r\n", 204, b""),
    ],
    ids=["length", "chunked", "empty", "until the close", "no content"],
)  # fmt: skip
async def test_a_refusal_is_passed_on_whole(room: Room, raw: bytes, status: int, body: bytes) -> None:
    async with raw_server(answering(raw, close=b"until" in raw)) as port, room.to(port) as path:
        got = await ask(path, SHAKE)
    head, _, rest = got.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert rest == body
    assert b"connection: close" in head
    assert (b"content-length: %d" % len(body) in head) == (status != 204)
    assert b"set-cookie" not in head.lower()
    assert (b"Retry-After: 7" in head) == (status == 429)
    assert room.ended == [status]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n", "gateway.no_websocket"),
        (b"HTTP/1.1 405 Not Allowed\r\nContent-Length: 0\r\n\r\n", "gateway.no_websocket"),
        (b"HTTP/1.1 501 Not Implemented\r\n\r\n", "gateway.no_websocket"),
        (b"", "gateway.upstream_failed"),
        (b"HTTP/1.1 101 Sw", "gateway.upstream_failed"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nhalf", "gateway.upstream_failed"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", "gateway.upstream_failed"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "gateway.upstream_failed"),
        (b"SSH-2.0-x\r\n\r\n", "gateway.upstream_failed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "gateway.upstream_failed"),
        (b"HTTP/1.1 403 No\r\n\r\n" + b"x" * 300_000, "gateway.upstream_failed"),
    ],
    ids=["404", "405", "501", "nothing", "half head", "half body", "h2c", "no upgrade", "SSH", "big head", "big body"],
)  # fmt: skip
async def test_what_cannot_be_passed_on_is_answered_by_the_gateway(room: Room, raw: bytes, code: str) -> None:
    closes = code.endswith("failed") and b"x" * 9 not in raw
    async with raw_server(answering(raw, close=closes)) as port, room.to(port) as path:
        status, got = problem(await ask(path, SHAKE))
    assert got["code"] == code
    assert status == (426 if code.endswith("no_websocket") else 502)


async def test_a_provider_that_never_answers_or_cannot_be_reached(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "ANSWER_S", 0.2)
    async with raw_server(drained) as port, room.to(port) as path:
        assert problem(await ask(path, SHAKE))[1]["code"] == "gateway.upstream_timeout"
    async with room.to(port) as path:
        got = problem(await ask(path, SHAKE))[1]
    assert got["code"] == "gateway.upstream_unreachable"
    assert "127.0.0.1" not in json.dumps(got)
    assert room.ended == [0, 0]
