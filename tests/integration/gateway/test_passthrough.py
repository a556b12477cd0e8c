"""Requests of a sandbox to a provider and back, through the real process."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from broker.gateway.link import Provider
from tests.integration.gateway.support import (
    KEY,
    Rig,
    app_server,
    ask,
    client,
    echo,
    make_ca,
    problem,
    raw_server,
    rig,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def gw(shared: Rig) -> AsyncIterator[Rig]:
    """The module's gateway, with a slot that is this test's own."""
    async with shared.own_slot():
        yield shared


def anthropic(port: int, path: str = "") -> dict[str, Provider]:
    return {"anthropic": Provider("anthropic", f"http://127.0.0.1:{port}{path}", KEY)}


async def test_path_credential_and_host_are_the_providers(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(anthropic(port, "/base"))
        headers = {"x-api-key": "fake", "Authorization": "Bearer fake", "Cookie": "c=1", "anthropic-beta": "one,two"}
        headers |= {"OpenAI-Organization": "mine", "anthropic-workspace-id": "mine"}
        async with client(slot.gateway_path) as http:
            answer = await http.post("/anthropic/v1/messages?beta=true&key=fake", data=b"hi", headers=headers)
            got = await answer.json()
    assert answer.status == 200
    assert got["path"] == "/base/v1/messages?beta=true"
    assert got["body"] == "hi"
    names = [name.lower() for name, _ in got["headers"]]
    values = {name.lower(): value for name, value in got["headers"]}
    assert values["x-api-key"] == KEY
    assert names.count("x-api-key") == 1
    assert values["host"] == f"127.0.0.1:{port}"
    assert values["anthropic-beta"] == "one,two"
    assert not {"authorization", "cookie", "openai-organization", "anthropic-workspace-id"} & set(names)
    assert answer.headers["X-Kept"] == "yes"
    assert "Set-Cookie" not in answer.headers


async def test_tls_with_its_own_ca_and_only_with_it(gw: Rig, tmp_path: Path) -> None:
    context, ca = make_ca(tmp_path, "localhost")
    async with app_server(echo, context) as port:
        url = f"https://localhost:{port}"
        slot = await gw.put({"good": Provider("openai", url, KEY, ca), "bad": Provider("openai", url, KEY)})
        async with client(slot.gateway_path) as http:
            good = await http.get("/good/v1/models")
            assert good.status == 200
            headers = {name.lower(): value for name, value in (await good.json())["headers"]}
            assert headers["authorization"] == f"Bearer {KEY}"
            bad = await http.get("/bad/v1/models")
            assert bad.status == 502
            assert (await bad.json())["code"] == "gateway.upstream_unreachable"
            assert KEY not in await bad.text()


@pytest.mark.parametrize("size", [0, 1, 54_000, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_pass_untouched_both_ways(gw: Rig, size: int, chunked: bool) -> None:
    body = os.urandom(size)

    async def mirror(request: web.Request) -> web.StreamResponse:
        got = await request.read()
        response = web.StreamResponse()
        if not chunked:
            response.content_length = len(got)
        await response.prepare(request)
        await response.write(got)
        await response.write_eof()
        return response

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, size, 70_000):
            yield body[at : at + 70_000]

    async with app_server(mirror) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            for _ in range(2):
                answer = await http.post("/anthropic/x", data=pieces() if chunked else io.BytesIO(body))
                assert await answer.read() == body


async def test_connections_to_the_provider_are_kept(gw: Rig) -> None:
    seen = set()

    async def note(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        seen.add(request.transport.get_extra_info("peername"))
        return web.Response(text="ok")

    async with app_server(note) as port:
        slot = await gw.put(anthropic(port))
        for _ in range(5):
            async with client(slot.gateway_path) as http:
                assert (await http.get("/anthropic/x")).status == 200
    assert len(seen) == 1


async def test_events_come_as_they_are_sent(gw: Rig) -> None:
    step = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(5):
            await response.write(f"data: {number}\n\n".encode())
            await step.wait()
            step.clear()
        return response

    async with app_server(stream) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            answer = await http.post("/anthropic/x", data=b"{}")
            for number in range(5):
                # The next event is only sent once this one has arrived.
                assert await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5) == f"data: {number}\n\n".encode()
                step.set()
            assert await answer.read() == b""


async def test_client_gone_cancels_the_provider(gw: Rig) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert await reader.read(1) == b""
        gone.set()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.write(b"GET /anthropic/x HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"x\r\n")
        writer.close()
        await asyncio.wait_for(gone.wait(), 5)


@pytest.mark.parametrize(
    "framing", [b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", b"content-length: 10\r\n\r\nhello"]
)
async def test_a_response_cut_short_is_an_error_for_the_client(gw: Rig, framing: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing)
        await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            answer = await http.get("/anthropic/x")
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await answer.read()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 2", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 101 x\r\nupgrade: y\r\n\r\n"])
async def test_a_provider_that_breaks_off_before_answering(gw: Rig, reply: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            answer = await http.post("/anthropic/x", data=b"{}")
            assert answer.status == 502
            assert (await answer.json())["code"] == "gateway.upstream_failed"
            again = await http.post("/anthropic/x", data=b"{}")
            assert again.status == 502


async def test_a_provider_that_is_not_there(gw: Rig) -> None:
    slot = await gw.put(anthropic(1))
    async with client(slot.gateway_path) as http:
        answer = await http.post("/anthropic/x", data=b"{}" * 50_000)
        got = await answer.json()
    assert (answer.status, got["code"]) == (502, "gateway.upstream_unreachable")
    assert got["hint"]
    assert got["error"]["message"]


async def test_websocket_upgrade_is_refused_at_once(gw: Rig) -> None:
    slot = await gw.put({"openai": Provider("openai", "http://127.0.0.1:1", KEY)})
    raw = (
        b"GET /openai/v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    status, got = problem(await ask(slot.gateway_path, raw))
    assert (status, got["code"]) == (426, "gateway.no_websocket")


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET /anthropic/x HTTP/1.1\r\nHost: x\r\nA: b\n\r\n",
        b"GET /anthropic/x HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"GET /anthropic/x HTTP/1.1\r\n\r\n",
        b"GET /anthropic/x HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /anthropic/../x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
    ],
)
async def test_bad_requests_are_400_and_end_the_connection(gw: Rig, raw: bytes) -> None:
    hits = []

    async def note(request: web.Request) -> web.StreamResponse:
        hits.append(await request.read())
        return web.Response()

    async with app_server(note) as port:
        slot = await gw.put(anthropic(port))
        smuggled = b"" if b".." in raw else b"GET /anthropic/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        response = await ask(slot.gateway_path, raw + smuggled, eof=not smuggled)
    assert response.count(b"HTTP/1.1 400") == 1
    assert response.startswith(b"HTTP/1.1 400")
    assert b"HTTP/1.1 200" not in response
    assert problem(response)[0] == 400
    assert hits == []


async def test_a_head_that_is_too_large(gw: Rig) -> None:
    slot = await gw.put(anthropic(1))
    raw = b"GET /anthropic/x HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"x" * 100_000
    assert problem(await ask(slot.gateway_path, raw))[0] == 431


async def test_pipelined_requests_are_answered_in_order(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(anthropic(port))
        raw = b"".join(
            b"POST /anthropic/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n%s\r\nok" % (n, extra)
            for n, extra in enumerate([b"", b"", b"Connection: close\r\n"])
        )
        response = await ask(slot.gateway_path, raw)
    assert response.count(b"HTTP/1.1 200") == 3
    assert [response.index(b'"/%d"' % n) for n in range(3)] == sorted(response.index(b'"/%d"' % n) for n in range(3))


async def test_expect_100_continue_and_interim_answers(gw: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"expect" not in head.lower()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n")
        body = await reader.readexactly(5)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n" + body)
        await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.write(b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert b"103 Early Hints" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(b"hello")
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert await reader.readexactly(5) == b"hello"
        writer.close()


async def test_head_and_empty_answers_keep_the_connection(gw: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (
            b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        ):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
        await reader.read(1)

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            head = await http.head("/anthropic/x")
            assert (head.status, head.headers["Content-Length"]) == (200, "500")
            assert (await http.get("/anthropic/x")).status == 204
            assert (await http.get("/anthropic/x")).status == 304
            assert (await http.head("/anthropic/x")).status == 200


async def test_an_answer_that_lasts_until_the_close_becomes_chunked(gw: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")
        await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            assert await (await http.get("/anthropic/x")).read() == b"all of it"


async def test_an_early_answer_reaches_a_client_that_is_still_sending(gw: Rig) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        await writer.drain()
        while await reader.read(65536):
            pass

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        async with client(slot.gateway_path) as http:
            answer = await http.post("/anthropic/x", data=io.BytesIO(b"x" * 3_000_000))
            assert (answer.status, await answer.read()) == (413, b"big")
            unknown = await http.post("/nobody/x", data=io.BytesIO(b"x" * 3_000_000))
            assert unknown.status == 404
            assert "anthropic" in (await unknown.json())["hint"]


async def test_a_slow_reader_holds_the_provider_back(gw: Rig) -> None:
    sent = 0
    stuck = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        writer.transport.set_write_buffer_limits(high=65536)
        while sent < 100_000_000:
            writer.write(b"x" * 100_000)
            sent += 100_000
            try:
                await asyncio.wait_for(writer.drain(), 1.0)
            except TimeoutError:
                stuck.set()
                await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path), limit=2**16)
        writer.write(b"GET /anthropic/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await asyncio.wait_for(stuck.wait(), 20)
        assert sent < 30_000_000
        total = 0
        while piece := await reader.read(2**20):
            total += len(piece)
        assert total > 100_000_000
        writer.close()


async def test_a_slow_provider_holds_the_sandbox_back(gw: Rig) -> None:
    go_on = asyncio.Event()
    got = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        while got < 100_000_000:
            got += len(await reader.read(2**20))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async with raw_server(serve) as port:
        slot = await gw.put(anthropic(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        writer.transport.set_write_buffer_limits(high=65536)
        writer.write(b"POST /anthropic/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        sent = 0

        async def send(drain_timeout: float) -> None:
            nonlocal sent
            while sent < 100_000_000:
                writer.write(b"x" * 100_000)
                sent += 100_000
                await asyncio.wait_for(writer.drain(), drain_timeout)

        with pytest.raises(TimeoutError):
            await send(1.0)
        assert sent < 30_000_000
        go_on.set()
        await send(10.0)
        assert b"200" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert got == 100_000_000
        writer.close()
