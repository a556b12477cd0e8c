"""A small call over the pool, whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from broker.errors import Code, CortexError
from broker.gateway.context import Context
from broker.gateway.fetch import Fetched, fetch
from broker.gateway.routes import Origin
from broker.host.tasks import TaskOwner

CUT = b"<cut>"
OK = b"HTTP/1.1 200 OK\r\nx-a: b\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers the n-th request (from 1) with what ``script`` says: bytes (closes behind ``CUT``), None to close,
    "hang" to say nothing."""

    def __init__(self) -> None:
        self.context = Context(TaskOwner("test"))
        self.requests: list[bytes] = []
        self.connections = 0
        self.script: Callable[[int], bytes | str | None] = lambda number: OK
        self.origin: Origin
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                answer = self.script(len(self.requests))
                if answer is None:
                    break
                if isinstance(answer, bytes):
                    writer.write(answer.removesuffix(CUT))
                    if answer.endswith(CUT):
                        break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def ask(self, method: bytes = b"GET", body: bytes = b"", timeout_s: float = 5.0) -> Fetched:
        pool = self.context.pool
        return await fetch(
            pool, self.origin, method, b"/p?q", b"host: h\r\n", body, timeout_s=timeout_s, max_bytes=1000
        )

    async def stop(self) -> None:
        await self.context.close()
        await self.context.tasks.close()
        for writer in self._writers:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    listener = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.origin = Origin("http", "127.0.0.1", listener.sockets[0].getsockname()[1], "", True)
    yield made
    await made.stop()
    listener.close()


async def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    answer = await server.ask()
    assert answer == Fetched(200, [(b"x-a", b"b"), (b"content-length", b"2")], b"ok")
    chunks = b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
    server.script = lambda number: b"HTTP/1.1 100 Continue\r\n\r\n" + chunks
    answer = await server.ask(b"POST", b"body")
    assert (answer.status, answer.body) == (404, b"abc")
    assert server.requests[0] == b"GET /p?q HTTP/1.1\r\nhost: h\r\n\r\n"
    assert server.requests[1] == b"POST /p?q HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbody"
    assert server.connections == 1, "the connection was used again"


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        ("hang", Code.UPSTREAM_TIMEOUT, "in time"),
        (OK[:-1], Code.UPSTREAM_TIMEOUT, "in time"),
        (None, Code.UPSTREAM_FAILED, "closed before"),
        (b"nonsense\r\n\r\n", Code.UPSTREAM_FAILED, "malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + bytes(1001), Code.UPSTREAM_FAILED, "too large"),
    ],
)
async def test_no_whole_answer(server: Server, answer: bytes | str | None, code: Code, why: str) -> None:
    server.script = lambda number: answer
    with pytest.raises(CortexError, match=why) as caught:
        await server.ask(timeout_s=0.3)
    assert caught.value.code is code
    assert server.context.pool.take(server.origin) is None, "what came of it is not kept"
    assert len(server.requests) == 1


async def test_no_server(server: Server) -> None:
    server.origin = Origin("http", "127.0.0.1", 1, "", True)
    with pytest.raises(CortexError) as caught:
        await server.ask()
    assert caught.value.code is Code.UPSTREAM_UNREACHABLE


@pytest.mark.parametrize(
    ("method", "answer", "whole"), [(b"GET", None, True), (b"POST", None, False), (b"GET", OK[:-1] + CUT, False)]
)
async def test_an_idle_connection_that_is_closed_as_it_is_used(
    server: Server, method: bytes, answer: bytes | None, whole: bool
) -> None:
    """Asked again where that is harmless and nothing was heard."""
    await server.ask()
    server.script = lambda number: answer if number == 2 else OK
    if whole:
        assert (await server.ask(method)).body == b"ok"
    else:
        with pytest.raises(CortexError):
            await server.ask(method)
    assert len(server.requests) == (3 if whole else 2)


async def test_one_that_is_cancelled_leaves_nothing(server: Server) -> None:
    server.script = lambda number: "hang"
    server.context.pool.configure(server.origin, keep_alive=True, prewarm=0, max_connections=1)
    task = asyncio.ensure_future(server.ask())
    async with asyncio.timeout(5):
        while not server.requests:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    server.script = lambda number: OK
    assert (await server.ask()).body == b"ok", "its place is free again"
