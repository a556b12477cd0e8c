"""Providers, names, clocks, Redis, the gateway itself and its broker fail; what a sandbox sees of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from broker.gateway.caller import Endpoint
from broker.gateway.link import Egress, Provider
from broker.gateway.policy import CacheRule, CacheStore, Limit, Limits, Policy
from tests.integration.gateway.observed import ObservedRig, observed
from tests.integration.gateway.support import KEY, Rig, SlotSockets, app_server, ask, client, problem, raw_server
from tests.integration.gateway.test_redis import Server

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]

CHAT = "/p/v1/chat/completions"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[ObservedRig]:
    async with observed(idle_timeout_s=1.0, connect_timeout_s=1.0) as made:
        pid = made.pid
        yield made
        made.sound(pid)


@pytest_asyncio.fixture(loop_scope="module")
async def gw(gateway: ObservedRig) -> AsyncIterator[ObservedRig]:
    async with gateway.own_slot():
        yield gateway


async def use(gw: Rig, where: int | str, **policy: Any) -> SlotSockets:
    """A slot whose provider ``p`` is at a port or URL, treated by ``policy``."""
    url = f"http://127.0.0.1:{where}" if isinstance(where, int) else where
    gw.link.set_policies({"p": Policy(kind="openai", upstreams=(url,), **policy)}, CacheStore())
    return await gw.put({"p": Provider("openai", url, KEY, policy="p")})


async def post(slot: SlotSockets, content: str = "hi", **more: Any) -> tuple[int, Any]:
    body = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": content}], **more}
    async with client(slot.gateway_path) as http, http.post(CHAT, json=body) as answer:
        return answer.status, await answer.json()


def says(
    *parts: bytes, then: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None
) -> Any:
    """A server that answers ``parts`` to anything, whatever it may be, and then does ``then`` or closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
        if then is not None:
            await then(reader, writer)

    return serve


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Nothing, until the other side is gone."""
    while await reader.read(2**16):
        pass


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    writer.transport.abort()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """More and more of one header."""
    while True:
        writer.write(b"x" * 2**16)
        await writer.drain()


# Providers


@pytest.mark.parametrize(
    ("server", "status", "code"),
    [
        (says(then=hang), 504, "gateway.upstream_timeout"),
        (says(b"HTTP/1.1 200 OK\r\n", then=hang), 504, "gateway.upstream_timeout"),
        (says(then=reset), 502, "gateway.upstream_failed"),
        (says(b"HTTP/1.1 2", then=reset), 502, "gateway.upstream_failed"),
        (says(b"HTTP/1.1 200 OK\r\nx: ", then=flood), 502, "gateway.upstream_failed"),
        (says(b"\x00" * 100_000), 502, "gateway.upstream_failed"),
        (says(b"HTTP/1.1 000 Zero\r\ncontent-length: 0\r\n\r\n"), 502, "gateway.upstream_failed"),
        (says(b"HTTP/1.1 200 O\x00K\r\ncontent-length: 0\r\n\r\n"), 502, "gateway.upstream_failed"),
        (says(b"HTTP/2.0 200 OK\r\n\r\n"), 502, "gateway.upstream_failed"),
        (says(OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab"), 502, "gateway.upstream_failed"),
        (says(OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), 502,
         "gateway.upstream_failed"),
        (says(OK + b"transfer-encoding: gzip\r\n\r\nab"), 502, "gateway.upstream_failed"),
        (says(OK + b"x: a\nset-cookie: b\r\n\r\n"), 502, "gateway.upstream_failed"),
        (says(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"), 502,
         "gateway.upstream_failed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "all on"])
async def test_no_answer_is_an_error_of_the_gateway(
    gw: ObservedRig, server: Any, status: int, code: str, shared: bool
) -> None:
    async with raw_server(server) as port:
        slot = await use(
            gw, port, retries=0, **({"cache": CacheRule(enabled=True), "coalesce": True} if shared else {})
        )
        found, got = await post(slot)
    assert (found, got["code"]) == (status, code)
    assert got["hint"]
    assert got["error"]["message"]
    assert KEY not in json.dumps(got)
    assert str(port) not in json.dumps(got)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "all on"])
@pytest.mark.parametrize("end", [None, reset], ids=["closes", "resets"])
@pytest.mark.parametrize(
    "half",
    [
        OK + b"content-length: 100\r\n\r\ndata: half\n\n",
        OK + b"transfer-encoding: chunked\r\n\r\nc\r\ndata: half\n\n\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nc\r\ndata: half\n\n\r\n0\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nc\r\ndata: half\n\n\r\nzz\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nc\r\ndata: half\n\nXX",
        OK + b"transfer-encoding: chunked\r\n\r\nffffff\r\ndata: half\n\n",
    ],
    ids=["length", "chunks", "no trailer", "bad size", "long chunk", "in a chunk"],
)
async def test_half_a_stream_never_ends_cleanly_and_is_given_to_nobody_else(
    gw: ObservedRig, half: bytes, end: Any, shared: bool
) -> None:
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await says(half, then=end)(reader, writer)

    rules = {"cache": CacheRule(enabled=True), "coalesce": True} if shared else {}
    async with raw_server(serve) as port:
        slot = await use(gw, port, retries=0, max_fails=100, **rules)
        for _ in range(2):
            async with client(slot.gateway_path) as http:
                answer = await http.post(CHAT, json={"model": "m", "temperature": 0, "stream": True, "messages": []})
                assert answer.status in (200, 502)
                if answer.status == 200:
                    with pytest.raises(aiohttp.ClientError):
                        await answer.read()
    assert asked == 2


async def test_a_stream_that_stops_is_cut(gw: ObservedRig) -> None:
    async with raw_server(says(OK + b"transfer-encoding: chunked\r\n\r\nc\r\ndata: half\n\n\r\n", then=hang)) as port:
        slot = await use(gw, port, coalesce=True)
        async with client(slot.gateway_path) as http:
            answer = await http.post(CHAT, json={"model": "m", "stream": True, "messages": []})
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await answer.read()


async def test_a_stream_that_trickles_is_no_fault(gw: ObservedRig) -> None:
    """Longer than the idle timeout in all, never in one wait."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in OK + b"content-length: 8\r\n\r\nabcdefgh":
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    async with raw_server(serve) as port:
        slot = await use(gw, port)
        async with client(slot.gateway_path) as http:
            answer = await http.post(CHAT, json={})
            assert (answer.status, await answer.read()) == (200, b"abcdefgh")


async def test_a_500_is_passed_on_as_it_is(gw: ObservedRig) -> None:
    async with raw_server(says(b"HTTP/1.1 500 Oh\r\nx-request-id: r\r\ncontent-length: 4\r\n\r\n\xff\x00{}")) as port:
        slot = await use(gw, port, cache=CacheRule(enabled=True), coalesce=True)
        async with client(slot.gateway_path) as http:
            answer = await http.post(CHAT, json={"model": "m"})
            assert (answer.status, await answer.read()) == (500, b"\xff\x00{}")
            assert answer.headers["x-request-id"] == "r"
            assert "x-cortex-error" not in answer.headers


async def test_a_provider_that_does_not_take_the_connection(gw: ObservedRig) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        slot = await use(gw, full.getsockname()[1])
        status, got = await post(slot)
    assert (status, got["code"]) == (502, "gateway.upstream_unreachable")


async def test_who_goes_ends_the_providers_work_wherever_it_is(gw: ObservedRig) -> None:
    """Before the head, and in a stream; with all that looks at a body on."""
    came, gone = asyncio.Queue[bytes](), asyncio.Queue[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"x-begin" in head:
            writer.write(OK + b"transfer-encoding: chunked\r\n\r\n3\r\nab\n\r\n")
        came.put_nowait(head)
        await hang(reader, writer)
        gone.put_nowait(head)

    async with raw_server(serve) as port:
        slot = await use(gw, port, cache=CacheRule(enabled=True), coalesce=True)
        for extra in (b"", b"x-begin: 1\r\n"):
            _, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
            writer.write(b"POST /p/v1/chat/completions HTTP/1.1\r\nHost: x\r\n%sContent-Length: 2\r\n\r\n{}" % extra)
            await asyncio.wait_for(came.get(), 10)
            writer.close()
            # The idle timeout is 1 s: it must not be what ends it.
            await asyncio.wait_for(gone.get(), 0.9)


# Names and clocks


@asynccontextmanager
async def strange() -> AsyncIterator[ObservedRig]:
    async with observed(strange=True, idle_timeout_s=20.0, connect_timeout_s=5.0) as gw:
        pid = gw.pid
        yield gw
        gw.sound(pid)


async def model(request: web.Request) -> web.StreamResponse:
    await request.read()
    return web.json_response({"model": "m-1", "usage": USAGE})


async def test_names_fail_come_back_and_turn_private() -> None:
    async with strange() as gw, app_server(model) as port:
        slot = await use(gw, f"http://model.test:{port}", keep_alive=False, max_fails=100)
        status, got = await post(slot)
        assert (status, got["code"]) == (502, "gateway.upstream_unreachable")
        gw.tell_world(model_test="127.0.0.1", files_test="127.0.0.1")
        assert (await post(slot))[0] == 200
        # What was known does where nothing newer is to be had.
        gw.tell_world()
        assert (await post(slot))[0] == 200

        # A host on the way out: its name may not lead to this machine, whatever it led to before.
        slot = await gw.put({}, Egress(hosts=(f"files.test:{port}",)))
        connect = f"CONNECT files.test:{port} HTTP/1.1\r\nHost: files.test:{port}\r\n\r\n".encode()
        status, got = problem(await ask(slot.egress_path, connect))
        assert (status, got["code"]) == (502, "gateway.upstream_unreachable")
        for private in ("127.0.0.1", "10.0.0.1", "169.254.169.254"):
            gw.tell_world(files_test=private)
            status, got = problem(await ask(slot.egress_path, connect))
            assert (status, got["code"]) == (403, "egress.address_refused")


@pytest.mark.parametrize("off", [-400 * 86400.0, 400 * 86400.0], ids=["back", "ahead"])
async def test_a_wall_clock_that_jumps_changes_nothing(off: float) -> None:
    go_on = asyncio.Event()
    asked = 0

    async def serve(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if not (await request.json()).get("stream"):
            return web.json_response({"model": "m-1", "usage": USAGE})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b'data: {"model":"m-1","usage":%s}\n\n' % json.dumps(USAGE).encode())
        return response

    async with strange() as gw, app_server(serve) as port:
        limits = Limits(provider=Limit(concurrency=4, interval_s=0.01, rpm=100, tpm=10**6), sandbox=Limit(rpm=100))
        slot = await use(gw, port, cache=CacheRule(enabled=True), limits=limits)
        assert (await post(slot))[0] == 200
        async with client(slot.gateway_path) as http:
            stream = await http.post(CHAT, json={"model": "m", "stream": True})
            assert await stream.content.readexactly(9) == b"data: 1\n\n"
            gw.tell_world(off=off)
            assert (await post(slot))[0] == 200
            assert asked == 2  # from the cache, still
            assert (await post(slot, "else"))[0] == 200
            go_on.set()
            assert (await stream.read()).endswith(b"}\n\n")
        for record in await gw.used(4):
            assert 0 <= record["duration_s"] < 60
            assert 0 <= record.get("queue_s", 0) < 60
            assert 0 <= (record.get("ttft_s") or 0) < 60


async def test_redis_that_is_not_there_costs_the_cache_alone_and_is_told(gw: ObservedRig) -> None:
    async with app_server(model) as port:
        url = f"http://127.0.0.1:{port}"
        rules = Policy(kind="openai", upstreams=(url,), cache=CacheRule(enabled=True), coalesce=True)
        gw.link.set_policies({"p": rules}, CacheStore(backend="redis", redis_url="redis://127.0.0.1:1/0"))
        slot = await gw.put({"p": Provider("openai", url, KEY, policy="p")})
        for _ in range(3):
            assert (await post(slot))[0] == 200
    assert "redis" in gw.log.lower()


async def test_redis_is_killed_and_comes_back_and_no_call_fails(gw: ObservedRig) -> None:
    asked = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return await model(request)

    async def until_hit(slot: SlotSockets, content: str) -> None:
        async with asyncio.timeout(20):
            before = -1
            while asked != before:
                before = asked
                assert (await post(slot, content))[0] == 200
                await asyncio.sleep(0.02)

    with tempfile.TemporaryDirectory(prefix="cortex-redis-") as directory:
        server = Server(Path(directory))
        server.start()
        async with app_server(count) as port:
            url = f"http://127.0.0.1:{port}"
            rules = Policy(kind="openai", upstreams=(url,), cache=CacheRule(enabled=True))
            gw.link.set_policies({"p": rules}, server.store())
            slot = await gw.put({"p": Provider("openai", url, KEY, policy="p")})
            await until_hit(slot, "before")
            server.kill()
            asked = 0
            for _ in range(3):
                assert (await post(slot, "before"))[0] == 200
            assert asked == 3
            server.start()
            await until_hit(slot, "after")
            server.kill()
    assert "redis" in gw.log.lower()


# The gateway and its broker


async def ticking(request: web.Request) -> web.StreamResponse:
    """A stream that goes on as long as it is read, or says all at once and its usage."""
    if not (await request.json()).get("stream"):
        return web.json_response({"model": "m-1", "usage": USAGE})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    while True:
        await response.write(b"data: tick\n\n")
        await asyncio.sleep(0.01)


async def test_a_gateway_killed_under_load_is_back_and_counts_no_call_twice() -> None:
    async with observed() as gw, app_server(ticking) as port:
        slot = await use(gw, port)
        stop = asyncio.Event()
        done: list[int] = []
        failed = 0

        async def load(number: int) -> None:
            nonlocal failed
            while not stop.is_set():
                try:
                    done.append((await post(slot, f"load {number}"))[0])
                except aiohttp.ClientError:
                    failed += 1

        async def stream(http: aiohttp.ClientSession, begun: asyncio.Queue[None]) -> None:
            async with http.post(CHAT, json={"model": "m", "stream": True, "messages": []}) as answer:
                assert await answer.content.readexactly(12) == b"data: tick\n\n"
                begun.put_nowait(None)
                with pytest.raises(aiohttp.ClientError):
                    await answer.read()

        begun = asyncio.Queue[None]()
        loop = asyncio.get_running_loop()
        async with client(slot.gateway_path) as http, asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(stream(http, begun)) for _ in range(8)]
            for _ in range(4):
                tasks.create_task(load(_))
            for _ in streams:
                await asyncio.wait_for(begun.get(), 10)
            await gw.used(20, status=200)
            pid, killed = gw.pid, loop.time()
            os.kill(pid, signal.SIGKILL)
            await asyncio.wait_for(asyncio.wait(streams), 10)
            assert (await post(slot, "after"))[0] == 200
            back = loop.time() - killed
            stop.set()
        assert gw.pid != pid
        assert set(done) == {200}
        assert failed <= 4  # one of each at most: those that were under way
        # What the last moment of the dead one held is lost, not doubled. Records come in order, so this one is last.
        async with client(slot.gateway_path) as http:
            assert (await http.post("/p/v1/embeddings", json={"input": "last"})).status == 200
        await gw.used(1, endpoint=Endpoint.EMBED.value)
        counted = {each["id"] for each in await gw.used(0, endpoint=Endpoint.GENERATE.value, outcome="ok")}
        assert len({each.rpartition("-")[0] for each in counted}) == 2
        assert len(counted) <= len(done) + failed + 1
        print(f"serving again after {back:.2f} s, {failed} calls cut")
        assert back < 10


async def test_streams_go_on_without_a_broker_and_are_counted_by_the_next() -> None:
    step, ended = asyncio.Event(), asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await step.wait()
        await response.write(b'data: {"model":"m-1","usage":%s}\n\ndata: [DONE]\n\n' % json.dumps(USAGE).encode())
        ended.set()
        return response

    async with observed() as gw, app_server(serve) as port:
        slot = await use(gw, port)
        pid = gw.pid
        async with client(slot.gateway_path) as http:
            answers = [await http.post(CHAT, json={"model": "m", "stream": True}) for _ in range(5)]
            for answer in answers:
                assert await answer.content.readexactly(9) == b"data: 1\n\n"
            await gw.lose_broker()
            step.set()
            for answer in answers:
                assert (await asyncio.wait_for(answer.read(), 10)).endswith(b"data: [DONE]\n\n")
        assert gw.reports == [] or not any(report.get("records") for report in gw.reports)
        await gw.new_broker()
        records = await gw.used(5, outcome="ok")
        assert gw.pid == pid
        assert len({each["id"] for each in records}) == 5
        assert [(each["input"], each["output"]) for each in records] == [(3, 2)] * 5
