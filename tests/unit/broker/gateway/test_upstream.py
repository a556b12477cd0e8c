"""Connections to a provider are shared by all sandboxes: none may carry anything over from one call to the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from broker.errors import Code, CortexError
from broker.gateway.call import Call
from broker.gateway.context import Context
from broker.gateway.framing import Body
from broker.gateway.heads import ResponseHead, parse_request
from broker.gateway.messages import Provider
from broker.gateway.routes import Route, compile_routes
from broker.gateway.upstream import Upstream
from broker.host.tasks import TaskOwner

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class World:
    """A gateway's context, and a provider that does what a test says; ``requests``: methods that it got."""

    def __init__(self) -> None:
        self.tasks = TaskOwner("test")
        self.context = Context(self.tasks)
        self.requests: list[bytes] = []
        self.script: Callable[[int], list[bytes] | None] = lambda number: [OK]
        self.writers: list[asyncio.StreamWriter] = []
        self.route: Route

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.route = compile_routes({"p": Provider("openai", f"http://127.0.0.1:{port}")})[b"p"]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head.split(b" ")[0])
                answer = self.script(len(self.requests))
                if answer is None:
                    break
                writer.writelines(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def dialled(self) -> Upstream:
        return await self.context.pool.dial(self.route.spot.origin)

    def pooled(self) -> Upstream | None:
        return self.context.pool.take(self.route.spot.origin)


class Ended:
    """A sink that says when its response is over."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.body = b""

    def upstream_interim(self, head: ResponseHead) -> None: ...

    def upstream_head(self, head: ResponseHead, body: Body) -> None: ...

    def upstream_body(self, pieces: list[bytes]) -> None:
        self.body += b"".join(pieces)

    def upstream_end(self) -> None:
        self.over.set()

    def upstream_lost(self, why: str) -> None:
        self.over.set()

    def upstream_flush(self) -> None: ...
    def upstream_congested(self, congested: bool) -> None: ...


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    server = await made.start()
    yield made
    await made.context.close()
    await made.tasks.close()
    for writer in made.writers:
        writer.close()
    server.close()
    await server.wait_closed()


async def asked(upstream: Upstream, *, whole: bool = True) -> bytes:
    sink = Ended()
    upstream.begin(sink, b"GET")
    upstream.write([b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
    upstream.request_done = whole
    await asyncio.wait_for(sink.over.wait(), 5)
    return sink.body


async def test_a_clean_connection_is_used_again(world: World) -> None:
    upstream = await world.dialled()
    assert await asked(upstream) == b"ok"
    assert world.pooled() is upstream


@pytest.mark.parametrize("more", [b"x", OK, b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_one_that_said_more_than_its_answer_is_not(world: World, more: bytes) -> None:
    world.script = lambda number: [OK + more]
    assert await asked(await world.dialled()) == b"ok"
    assert world.pooled() is None


async def test_one_whose_request_was_answered_early_is_not(world: World) -> None:
    assert await asked(await world.dialled(), whole=False) == b"ok"
    assert world.pooled() is None


async def test_one_that_speaks_while_it_is_idle_is_not(world: World) -> None:
    await asked(await world.dialled())
    world.writers[0].write(OK)
    async with asyncio.timeout(5):
        while world.context.stats.idle_upstreams:
            await asyncio.sleep(0.001)
    assert world.pooled() is None


class Down:
    """A sandbox's connection that notes how its call ended."""

    def __init__(self) -> None:
        self.congested = self.closing_soon = False
        self.sent = b""
        self.over: asyncio.Future[CortexError | None] = asyncio.get_running_loop().create_future()

    def send(self, parts: list[bytes]) -> None:
        self.sent += b"".join(parts)

    def hold(self, held: bool) -> None: ...

    def touch(self) -> None: ...

    def fail(self, error: CortexError) -> None:
        self.over.set_result(error)

    def cut(self) -> None:
        raise AssertionError("nothing was sent yet")

    def finish(self, keep_alive: bool) -> None:
        self.over.set_result(None)


async def called(world: World, method: bytes) -> CortexError | None:
    down = Down()
    head = parse_request(b"%s /p/x HTTP/1.1\r\nHost: x\r\n\r\n" % method)
    Call(down, head, world.route, b"/x", world.context).start()
    return await asyncio.wait_for(down.over, 5)


@pytest.mark.parametrize(("method", "repeated"), [(b"GET", True), (b"POST", False), (b"DELETE", False)])
async def test_only_what_does_no_harm_is_asked_again(world: World, method: bytes, repeated: bool) -> None:
    """The provider closes an idle connection just as it is used: it may have acted on the request."""
    await asked(await world.dialled())
    world.script = lambda number: None if number == 2 else [OK]
    error = await called(world, method)
    if repeated:
        assert error is None
        assert world.requests[1:] == [method, method]
    else:
        assert error is not None
        assert error.code is Code.UPSTREAM_FAILED
        assert world.requests[1:] == [method]


async def test_it_is_asked_again_once(world: World) -> None:
    await asked(await world.dialled())
    world.script = lambda number: None
    error = await called(world, b"GET")
    assert error is not None
    assert error.code is Code.UPSTREAM_FAILED
    assert len(world.requests) == 3
