"""A sandbox's connection: its limits in time and size, driven over a socket pair with the clock moved by hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.gateway import answers
from broker.gateway.context import Context
from broker.gateway.heads import RequestHead
from broker.gateway.server import CLOSE_S, DISCARD_S, HEAD_TIMEOUT_S, Connection
from broker.gateway.ways import Held, Way
from broker.host.tasks import TaskOwner

REQUEST = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


class NobodysFace:
    """A slot that nobody has claimed."""

    slot = "a"

    def __init__(self) -> None:
        self.open = 0

    def way(self, head: RequestHead) -> Way:
        raise answers.unclaimed()

    def opened(self, connection: Held) -> None:
        self.open += 1

    def closed(self, connection: Held) -> None:
        self.open -= 1


class Pair:
    """A connection and the sandbox's end of it."""

    def __init__(self, connection: Connection, far: socket.socket, face: NobodysFace) -> None:
        self.connection = connection
        self.far = far
        self.face = face

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.far, data)

    async def read(self) -> bytes:
        """What has come, at least something; nothing at the end."""
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.far, 2**20), 5)
        except ConnectionResetError:
            return b""

    async def rest(self) -> bytes:
        data = b""
        while piece := await self.read():
            data += piece
        return data

    def later(self, seconds: float) -> None:
        self.connection.check(asyncio.get_running_loop().time() + seconds)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[], Pair]]:
    tasks = TaskOwner("test")
    context = Context(tasks)
    pairs: list[Pair] = []

    async def make() -> Pair:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        face = NobodysFace()
        loop = asyncio.get_running_loop()
        _, connection = await loop.connect_accepted_socket(lambda: Connection(face, context), near)
        pairs.append(Pair(connection, far, face))
        return pairs[-1]

    yield make  # type: ignore[misc]
    for pair in pairs:
        pair.connection.abort()
        pair.far.close()
    await context.close()
    await tasks.close()


@pytest.fixture
async def pair(connect: Callable[[], object]) -> Pair:
    return await connect()  # type: ignore[misc, no-any-return]


async def test_unclaimed_keeps_the_connection(pair: Pair) -> None:
    for _ in range(3):
        await pair.send(REQUEST)
        assert (await pair.read()).startswith(b"HTTP/1.1 503 ")


async def test_a_head_that_trickles_is_given_up(pair: Pair) -> None:
    await pair.send(b"GET /x HT")
    await asyncio.sleep(0)
    pair.later(HEAD_TIMEOUT_S - 1)
    await pair.send(b"TP/1.1\r\n")
    await asyncio.sleep(0.01)
    pair.later(HEAD_TIMEOUT_S + 1)
    assert (await pair.rest()).startswith(b"HTTP/1.1 408 ")


async def test_the_rest_of_a_refused_body_is_read_for_a_while_only(pair: Pair) -> None:
    await pair.send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nsome")
    assert b"connection: close" in await pair.read()
    pair.later(DISCARD_S - 1)
    await pair.send(b"more")
    pair.later(DISCARD_S + 1)
    assert await pair.read() == b""


async def test_a_refused_body_that_is_read_to_its_end_ends_the_connection_in_order(pair: Pair) -> None:
    await pair.send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nso")
    assert (await pair.read()).startswith(b"HTTP/1.1 503 ")
    await pair.send(b"me" + REQUEST)
    assert await pair.rest() == b""


async def test_an_idle_connection_is_closed(pair: Pair) -> None:
    await pair.send(REQUEST)
    await pair.read()
    pair.later(599)
    pair.later(601)
    assert await pair.read() == b""
    assert pair.face.open == 0


async def test_a_client_that_does_not_close_is_aborted(pair: Pair) -> None:
    await pair.send(b"nonsense\r\n\r\n")
    assert (await pair.rest()).startswith(b"HTTP/1.1 400 ")
    assert pair.face.open == 1
    pair.later(CLOSE_S + 1)
    await asyncio.sleep(0.01)
    assert pair.face.open == 0


async def test_draining_closes_what_is_idle(pair: Pair) -> None:
    pair.connection.drain()
    assert await pair.read() == b""


async def test_many_pipelined_requests_do_not_nest(pair: Pair) -> None:
    sending = asyncio.ensure_future(pair.send(REQUEST * 2000))
    got = b""
    while got.count(b"HTTP/1.1 503 ") < 2000:
        got += await pair.read()
    await sending


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [
                b"GET /x HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"\n", b"5\r\nhello\r\n",
                b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"hello", b"\x00",
                b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"CONNECT x:1 HTTP/1.1\r\n",
                b"X: " + b"a" * 70_000, b"\xff" * 9,
            ]
        ),
        max_size=12,
    )
)  # fmt: skip
async def test_noise_gets_answers_or_an_end(connect: Callable[[], object], parts: list[bytes]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    await pair.send(b"".join(parts) + REQUEST)
    pair.far.shutdown(socket.SHUT_WR)
    got = await pair.rest()
    for line in got.split(b"HTTP/1.1 ")[1:]:
        assert line[:3] in (b"400", b"431", b"503", b"505") or not line[:3].isdigit()


async def test_answers_wait_for_a_sandbox_that_does_not_read(pair: Pair) -> None:
    requests, sent = 20_000, 0

    async def send() -> None:
        nonlocal sent
        for _ in range(requests // 100):
            await pair.send(REQUEST * 100)
            sent += 100

    sending = asyncio.ensure_future(send())
    await asyncio.wait([sending], timeout=0.5)
    assert sent < requests / 2, "requests were taken in although their answers are not read"
    # What was held back is answered once the sandbox reads.
    seen, tail = 0, b""
    while seen < requests:
        data = tail + await pair.read()
        seen += data.count(b"HTTP/1.1 503 ")
        tail = data[data.rfind(b"}") + 1 :][:12]
    await sending
