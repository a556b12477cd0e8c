"""What a sandbox may send that is wrong or too much, against a real gateway process that limits, caches and shares."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from broker.gateway.link import Provider
from broker.gateway.policy import CacheRule, CacheStore, Limit, Limits, Policy
from tests.integration.gateway.observed import ObservedRig, observed
from tests.integration.gateway.support import KEY, SlotSockets, app_server, ask, client, problem, raw_server

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]

MIB = 2**20
ALL_ON: dict[str, Any] = {
    "cache": CacheRule(enabled=True, with_tools=True, with_randomness=True),
    "coalesce": True,
    "batch_s": 0.005,
    "limits": Limits(provider=Limit(concurrency=8)),
}
CHAT = "/p/v1/chat/completions"
POST = b"POST /p/v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[ObservedRig]:
    async with observed() as made:
        pid = made.pid
        yield made
        made.sound(pid)


@pytest_asyncio.fixture(loop_scope="module")
async def gw(gateway: ObservedRig) -> AsyncIterator[ObservedRig]:
    async with gateway.own_slot():
        yield gateway


async def use(gw: ObservedRig, port: int, **policy: Any) -> SlotSockets:
    """A slot whose provider ``p`` is at ``port``, treated by ``policy``."""
    url = f"http://127.0.0.1:{port}"
    gw.link.set_policies({"p": Policy(kind="openai", upstreams=(url,), **policy)}, CacheStore())
    return await gw.put({"p": Provider("openai", url, KEY, policy="p")})


# Framing


SMUGGLED = b"GET /p/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("policy", [{}, ALL_ON], ids=["plain", "all on"])
@pytest.mark.parametrize(
    "rest",
    [
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5, 5\r\n\r\nhello",
        b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"Content-Length: +5\r\n\r\nhello",
        b"Content-Length: -5\r\n\r\nhello",
        b"Content-Length: 0x5\r\n\r\nhello",
        b"Content-Length: 5_0\r\n\r\nhello",
        b"Content-Length: 99999999999999999999\r\n\r\nhello",
        b"Content-Length:\r\n\r\n",
        b"Content-Length : 5\r\n\r\nhello",
        b" Content-Length: 5\r\n\r\nhello",
        b"Content-Length\r\n\r\n",
        b"Content-Length: 5\n\r\nhello",
        b"X: a\rb\r\n\r\n",
        b"X: a\x00b\r\n\r\n",
        b"X\x00: b\r\n\r\n",
        b": b\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    ],
    ids=lambda rest: repr(rest[:60]),
)
async def test_what_two_servers_could_read_differently_is_read_by_none(
    gw: ObservedRig, rest: bytes, policy: dict[str, Any]
) -> None:
    served: list[str] = []

    async def note(request: web.Request) -> web.StreamResponse:
        await request.read()
        served.append(request.path)
        return web.Response()

    async with app_server(note) as port:
        slot = await use(gw, port, **policy)
        answer = await ask(slot.gateway_path, POST + rest + SMUGGLED)
        assert problem(answer)[0] == 400
        assert answer.count(b"HTTP/1.1 4") == 1
        assert b"connection: close" in answer
        # Had the rest been taken for a request, it would come before this one.
        async with client(slot.gateway_path) as http:
            assert (await http.get("/p/after")).status == 200
    assert served == ["/after"]


async def test_heads_are_bounded_in_bytes_and_lines(gw: ObservedRig) -> None:
    slot = await use(gw, 1)
    for raw in (
        b"GET /" + b"a" * 70_000,
        b"GET /p/x HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % number for number in range(300)) + b"\r\n",
        b"\r\n" * 40_000 + b"x" * 70_000,
    ):
        assert problem(await ask(slot.gateway_path, raw))[0] in (400, 431)


async def test_a_head_without_end_is_not_read_on(gw: ObservedRig) -> None:
    slot = await use(gw, 1)
    reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
    gw.forget_peak()
    before = gw.peak_kib
    writer.write(b"GET /p/x HTTP/1.1\r\nHost: x\r\n")
    for _ in range(100):
        writer.write(b"A: " + b"b" * (MIB // 2) + b"\r\n")
        await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    writer.close()
    assert gw.peak_kib - before < 20 * 1024


# What is the provider's to judge


@pytest.mark.parametrize("path", [CHAT, "/p/v1/embeddings", "/p/v1/responses", "/p/v1/messages"])
@pytest.mark.parametrize(
    "body",
    [
        b"{", b"", b"\xff\xfe", b"[]", b"null", b'{"model": 1}', b'{"input": {}}', b"[" * 100_000,
        b'{"model": "\\ud800"}', b'{"a": 1, "a": 2}', b'{"model": 1e999}', b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"input": []}', b'{"input": [[1], "a"]}',
        b'{"model":"m","input":"x"', b'\xef\xbb\xbf{"model": "m"}', b'{"stream": "yes", "model": "m"}', b"NaN",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
async def test_bad_json_is_the_providers_to_judge(gw: ObservedRig, path: str, body: bytes) -> None:
    got: list[bytes] = []

    async def judge(request: web.Request) -> web.StreamResponse:
        got.append(await request.read())
        return web.json_response({"error": {"message": "I cannot read this"}}, status=400)

    async with app_server(judge) as port:
        slot = await use(gw, port, **ALL_ON)
        async with client(slot.gateway_path) as http:
            for _ in range(2):
                answer = await http.post(path, data=body, headers={"Content-Type": "application/json"})
                assert (answer.status, await answer.json()) == (400, {"error": {"message": "I cannot read this"}})
    assert got == [body, body]


@pytest.mark.parametrize("policy", [{}, ALL_ON], ids=["plain", "all on"])
async def test_who_waits_for_100_gets_it(gw: ObservedRig, policy: dict[str, Any]) -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read())

    async with app_server(serve) as port:
        slot = await use(gw, port, **policy)
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.write(POST + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 5\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"hello")


# Large bodies


@pytest.mark.parametrize("policy", [{}, ALL_ON], ids=["plain", "all on"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [100_000, MIB - 1, MIB + 1, 30_000_000])
async def test_bodies_arrive_byte_for_byte_and_are_not_kept(
    gw: ObservedRig, size: int, chunked: bool, policy: dict[str, Any]
) -> None:
    body = (b'{"model":"m","x":"' + bytes(range(32, 127)).replace(b'"', b"").replace(b"\\", b"") * (size // 90))[:size]

    async def serve(request: web.Request) -> web.StreamResponse:
        digest, length = hashlib.sha256(), 0
        async for piece in request.content.iter_any():
            digest.update(piece)
            length += len(piece)
        return web.json_response({"sha": digest.hexdigest(), "length": length})

    async with app_server(serve) as port:
        slot = await use(gw, port, **policy)
        gw.forget_peak()
        before = gw.peak_kib
        pieces = [body[at : at + 70_001] for at in range(0, size, 70_001)]
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.write(POST + framing + b"\r\nConnection: close\r\n\r\n")
        for piece in pieces:
            writer.writelines([b"%x\r\n" % len(piece), piece, b"\r\n"] if chunked else [piece])
            await asyncio.wait_for(writer.drain(), 10)
        writer.write(b"0\r\n\r\n" if chunked else b"")
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        status, told = _json(answer)
    assert (status, told) == (200, {"sha": hashlib.sha256(body).hexdigest(), "length": size})
    assert gw.peak_kib - before < 12 * 1024


def _json(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(body)


async def test_a_hundred_megabytes_that_nobody_reads_are_left_where_they_are(gw: ObservedRig) -> None:
    full = asyncio.Event()
    offered = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal offered
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100000000\r\n\r\n")
        while offered < 100_000_000:
            writer.write(b"data: %s\n\n" % (b"x" * 99_992))
            offered += 100_000
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                full.set()
                await writer.drain()

    async with raw_server(serve) as port:
        slot = await use(gw, port, **ALL_ON)
        gw.forget_peak()
        before = gw.peak_kib
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path), limit=2**16)
        body = b'{"model":"m","stream":true,"messages":[]}'
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await asyncio.wait_for(full.wait(), 20)
        assert gw.peak_kib - before < 12 * 1024
        assert offered < 30_000_000
        total = 0
        while piece := await asyncio.wait_for(reader.read(MIB), 10):
            total += len(piece)
        assert total > 100_000_000
        assert gw.peak_kib - before < 12 * 1024
        writer.close()


async def test_thirty_megabytes_that_the_provider_does_not_take_yet_wait_in_the_sandbox(gw: ObservedRig) -> None:
    go_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        await reader.readexactly(30_000_000)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with raw_server(serve) as port:
        slot = await use(gw, port, **ALL_ON)
        gw.forget_peak()
        before = gw.peak_kib
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(POST + b"Connection: close\r\nContent-Length: 30000000\r\n\r\n")
        for at in range(300):
            writer.write(b"x" * 100_000)
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                assert at < 200
                go_on.set()
                await asyncio.wait_for(writer.drain(), 10)
        assert go_on.is_set()
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200 ")
        assert gw.peak_kib - before < 12 * 1024
        writer.close()


# Credentials


FORGED = {
    "Authorization": "Bearer sk-forged", "X-Api-Key": "sk-forged", "Api-Key": "sk-forged",
    "X-Goog-Api-Key": "sk-forged", "X-Auth-Token": "sk-forged", "Cookie": "k=sk-forged",
    "Proxy-Authorization": "Basic sk-forged",
}  # fmt: skip
LEAKS = {
    "Set-Cookie": "session=leak", "Anthropic-Organization-Id": "leak", "OpenAI-Organization": "leak",
    "OpenAI-Project": "leak", "Alt-Svc": "leak", "Proxy-Authenticate": "leak",
}  # fmt: skip


@pytest.mark.parametrize("policy", [{}, ALL_ON], ids=["plain", "all on"])
async def test_forged_credentials_stay_in_and_leaks_stay_out(gw: ObservedRig, policy: dict[str, Any]) -> None:
    got: list[str] = []

    async def serve(request: web.Request) -> web.StreamResponse:
        got.append(f"{request.raw_path} {dict(request.headers)}")
        return web.json_response({"usage": {}}, headers={**LEAKS, "X-Request-Id": "r1"})

    async with app_server(serve) as port:
        slot = await use(gw, port, **policy)
        async with client(slot.gateway_path) as http:
            for _ in range(2):
                answer = await http.post(CHAT + "?key=sk-forged&a=b", json={"model": "m"}, headers=FORGED)
                assert answer.status == 200
                assert "leak" not in str(answer.headers)
                assert "X-Request-Id" in answer.headers or "X-Cortex-Cache" in answer.headers
    assert got
    assert all("sk-forged" not in each and f"Bearer {KEY}" in each and "?a=b" in each for each in got)


async def test_errors_never_carry_the_credential(gw: ObservedRig) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert KEY.encode() in head
        # What it was asked comes back as nonsense, in the status line even.
        writer.write(b"HTTP/1.1 " + head.replace(b"\r\n", b" ") + b"\r\n\r\n")

    async with raw_server(rude) as port:
        slot = await use(gw, port)
        status, got = problem(await ask(slot.gateway_path, POST + b"Connection: close\r\n\r\n"))
    assert status == 502
    assert KEY not in json.dumps(got)


@pytest.mark.parametrize("path", ["p/v1/models", "nobody", "p/../x", ""])
async def test_an_unclaimed_slot_is_503_whatever_is_asked(gw: ObservedRig, path: str) -> None:
    slot = await gw.put({"p": Provider("openai", "http://127.0.0.1:1", KEY)}, identity=None)
    raw = f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    status, got = problem(await ask(slot.gateway_path, raw))
    assert (status, got["code"]) == (503, "gateway.unclaimed")


async def test_an_upgrade_with_a_body_is_no_upgrade(gw: ObservedRig) -> None:
    slot = await use(gw, 1)
    raw = (
        b"GET /p/v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Content-Length: 39\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = await ask(slot.gateway_path, raw + SMUGGLED + SMUGGLED)
    assert problem(answer)[0] == 426
    assert answer.count(b"HTTP/1.1 ") == 1
