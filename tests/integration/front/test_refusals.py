"""Everything that must not come in, over real sockets: each gets a clear answer, and nothing hangs."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack

import pytest

from broker.metrics import REFUSED
from tests.integration.front.fakes import ORIGIN, attached, house, masked, raw, request


async def problem(client: object) -> tuple[int, dict[str, object]]:
    """Status and problem details of an HTTP refusal."""
    answer: bytes = await client.eof()  # type: ignore[attr-defined]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (request(token=""), 401, "token.missing"),
        (request(token="wrong"), 401, "token.invalid"),
        (request(token="expired"), 401, "token.expired"),
        (request(token="nobody"), 404, "session.not_found"),
        (request(origin="https://evil.example"), 403, "origin.forbidden"),
        (request(origin="null"), 403, "origin.forbidden"),
        (request(origin=ORIGIN + ".evil"), 403, "origin.forbidden"),
        (request(host="evil.example:1"), 403, "host.forbidden"),
        (request("/nothing"), 404, "request.not_found"),
        (request("/raw"), 409, "session.wrong_protocol"),
        (request(token="raw"), 409, "session.wrong_protocol"),
        (request(token="broken"), 500, "broker.internal"),
        (b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n", 426, "request.invalid"),
        (b"POST /acp HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Length: 3\r\n\r\nabc", 400, "request.invalid"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "request.invalid"),
        (b"GET /acp HTTP/1.1\r\nX: " + b"y" * 40_000, 431, "request.too_large"),
    ],
)
async def test_a_bad_request_is_answered_with_problem_details(data: bytes, status: int, code: str) -> None:
    async with house() as here:
        before = REFUSED.labels(code)._value.get()
        async with raw(here, data) as client:
            answer, body = await problem(client)
        assert (answer, body["code"]) == (status, code)
        assert body["hint"]
        assert not here.session.clients
        assert code == "request.too_large" or REFUSED.labels(code)._value.get() == before + 1


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (request(token="", protocols="acp.v1, bearer.wrong"), 4401),
        (request(token="", protocols="acp.v1, bearer.expired"), 4401),
        (request("/acp?ticket=wrong", token=""), 4401),
        (request(token="", protocols="acp.v1, bearer.good", origin="https://evil.example"), 4403),
        (request("/nothing", token="", protocols="acp.v1, bearer.good"), 4400),
        (request(token="", protocols="acp.v1, bearer.broken"), None),
    ],
)
async def test_a_browser_is_told_by_a_close_frame(data: bytes, code: int | None) -> None:
    async with house() as here, raw(here, data) as client:
        head = await client.head()
        if code is None:
            assert head.startswith(b"HTTP/1.1 500 ")
            return
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"bearer" not in head
        got, reason = await client.closed()
        assert got == code
        assert ": " in reason
        client.send(masked(got.to_bytes(2, "big"), 8))
        assert await client.eof() == b""
        assert len(here.door) == 0


async def test_a_ticket_works_once() -> None:
    async with house() as here:
        async with attached(here, target="/acp?ticket=once", token=""):
            pass
        async with raw(here, request("/acp?ticket=once", token="")) as client:
            await client.head()
            assert (await client.closed())[0] == 4401


async def test_half_a_handshake_is_given_up() -> None:
    async with house(handshake_timeout_s=0.2) as here, raw(here, request()[:40]) as client:
        status, body = await problem(client)
        assert (status, body["code"]) == (408, "request.invalid")


async def test_a_handshake_byte_by_byte_is_accepted() -> None:
    async with house() as here, raw(here, b"") as client:
        for byte in request():
            client.send(bytes((byte,)))
            await client.writer.drain()
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        (await here.session.stream()).close()


async def test_a_check_that_does_not_end_is_answered() -> None:
    async with house(handshake_timeout_s=0.2) as here:
        here.access.stuck = True
        async with raw(here) as client:
            status, body = await problem(client)
            assert (status, body["code"]) == (503, "session.overloaded")


async def test_a_client_that_leaves_during_the_check_leaves_nothing() -> None:
    async with house() as here:
        here.access.stuck = True
        async with raw(here):
            async with asyncio.timeout(5):
                while not len(here.door):
                    await asyncio.sleep(0)
        async with asyncio.timeout(5):
            while len(here.door) or len(here.tasks):
                await asyncio.sleep(0)


async def test_too_many_clients_of_a_session() -> None:
    async with house() as here:
        here.session.limit = 1
        async with attached(here), raw(here) as client:
            status, body = await problem(client)
            assert (status, body["code"]) == (429, "session.too_many_clients")


async def test_too_many_connections() -> None:
    async with house(max_connections=1) as here, attached(here), raw(here) as client:
        status, body = await problem(client)
        assert (status, body["code"]) == (503, "session.overloaded")


async def test_a_flood_of_connections_is_cut_off() -> None:
    async with house(max_connections=1, handshake_timeout_s=60) as here, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(here, b"")) for _ in range(100)]
        answers = [await client.eof() for client in clients[1:]]
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers[:60])
        assert answers[-1] == b""


async def test_a_closing_door_refuses() -> None:
    async with house() as here:
        await here.door.close(timeout=0.2)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", here.port)
        ours, theirs = socket.socketpair()
        await here.door.adopt(ours)
        theirs.setblocking(False)
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 4096), 5)
        assert data.startswith(b"HTTP/1.1 503 ")
        theirs.close()
