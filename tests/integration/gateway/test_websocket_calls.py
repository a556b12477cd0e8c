"""WebSockets through the gateway process: where a provider's policy has them, with its credential, counted in usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
import websockets
from websockets.asyncio.server import ServerConnection

from broker.gateway.link import Provider
from broker.gateway.policy import CacheStore, Limit, Limits, Policy
from tests.integration.gateway.support import KEY, Rig, ask, problem, raw_server, rig

pytestmark = pytest.mark.asyncio(loop_scope="module")
USAGE = {"input_tokens": 120, "input_tokens_details": {"cached_tokens": 80}, "output_tokens": 40}
FEW = Limits(user=Limit(rpm=3), waiting=0)
SMALL = Limits(user=Limit(tpm=400), waiting=0)
HALF = (
    {"type": "response.created", "response": {"id": "r", "model": "gpt-5.5", "usage": None}},
    *({"type": "response.output_text.delta", "delta": "four"} for _ in range(50)),
)
FINAL = {"type": "response.completed", "response": {"id": "r", "model": "gpt-5.5", "usage": USAGE}}


async def model(socket: ServerConnection) -> None:
    """Says which credential and account came, then answers each message by the end of a response."""
    assert socket.request is not None
    headers = socket.request.headers
    who = {"authorization": headers["authorization"], "account": headers.get("openai-project")}
    await socket.send(json.dumps({"type": "hello", **who}))
    async for message in socket:
        if "half" in str(message):
            for event in HALF:
                await socket.send(json.dumps(event))
            if "cut" in str(message):
                socket.transport.abort()
        else:
            await socket.send(json.dumps(FINAL))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw() -> AsyncIterator[Rig]:
    async with websockets.serve(model, "127.0.0.1", 0) as server, rig() as made:
        url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        one = Limits(provider=Limit(concurrency=1), waiting=0)
        made.link.set_policies(
            {
                "openai": Policy(kind="openai", upstreams=(url,), websocket=True),
                "narrow": Policy(kind="openai", upstreams=(url,), websocket=True, limits=one),
                "few": Policy(kind="openai", upstreams=(url,), websocket=True, limits=FEW),
                "small": Policy(kind="openai", upstreams=(url,), websocket=True, limits=SMALL),
                "plain": Policy(kind="openai", upstreams=(url,)),
                "gone": Policy(kind="openai", upstreams=("http://127.0.0.1:9",), websocket=True, max_fails=1),
            },
            CacheStore(),
        )
        names = ("openai", "narrow", "few", "small", "plain", "gone")
        await made.put({name: Provider("openai", url, KEY, policy=name) for name in names})
        yield made


def path(gw: Rig) -> str:
    return str(gw.slots[gw.slot].gateway_path)


def connect(gw: Rig, provider: str = "openai") -> websockets.connect:
    headers = {"Authorization": "Bearer placeholder", "OpenAI-Project": "mine"}
    return websockets.unix_connect(path(gw), f"ws://localhost/{provider}/v1/responses", additional_headers=headers)


async def usage(gw: Rig, count: int) -> list[dict[str, Any]]:
    """``count`` records, as the broker is told them."""
    async with asyncio.timeout(10):
        while True:
            records = [each for report in gw.reports if report["kind"] == "usage" for each in report["records"]]
            if len(records) >= count:
                return records
            await asyncio.sleep(0.02)


async def test_the_credential_is_put_in_and_each_answer_is_counted(gw: Rig) -> None:
    gw.reports.clear()
    async with asyncio.timeout(20), connect(gw) as socket:
        told = json.loads(await socket.recv())
        assert (told["authorization"], told["account"]) == (f"Bearer {KEY}", None)
        for _ in range(2):
            await socket.send(json.dumps({"type": "response.create", "model": "gpt-5.5"}))
            assert json.loads(await socket.recv()) == FINAL
    for record in await usage(gw, 2):
        assert (record["provider"], record["model"], record["user"]) == ("openai", "gpt-5.5", "u1")
        assert (record["input"], record["cache_read"], record["output"]) == (120, 80, 40)


@pytest.mark.parametrize("by", ["the sandbox", "cut"])
async def test_an_answer_that_is_left_before_its_end_is_counted_too(gw: Rig, by: str) -> None:
    gw.reports.clear()
    async with asyncio.timeout(20), connect(gw) as socket:
        await socket.recv()
        await socket.send(json.dumps({"half": by, "input": "x" * 400}))
        for _ in HALF:
            await socket.recv()
        socket.transport.abort()
    (record,) = await usage(gw, 1)
    assert (record["model"], record["output"], record["estimated"]) == ("gpt-5.5", 50, True)
    assert 100 <= record["input"] < 120
    assert record["outcome"] in ("gone", "cut")


async def test_where_the_policy_has_no_websocket_the_answer_is_426_at_once(gw: Rig) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await connect(gw, "plain").__aenter__()
    assert refused.value.response.status_code == 426
    assert json.loads(refused.value.response.body)["code"] == "gateway.no_websocket"


@pytest.mark.parametrize(("provider", "count"), [("few", 3), ("small", 4)])
async def test_answers_count_against_limits_and_a_socket_that_is_over_one_is_ended(
    gw: Rig, provider: str, count: int
) -> None:
    answers = 0
    async with asyncio.timeout(20), connect(gw, provider) as socket:
        await socket.recv()
        with suppress(websockets.ConnectionClosed):
            while True:
                await socket.send("{}")
                await socket.recv()
                answers += 1
    assert answers == count, "the one that was too much is passed on"
    status, got = problem(await ask(path(gw), handshake(provider)))
    assert (status, got["code"]) == (429, "gateway.limited")


async def test_an_open_socket_takes_no_place_of_those_that_ask(gw: Rig) -> None:
    async with asyncio.timeout(20), connect(gw, "narrow") as first, connect(gw, "narrow") as second:
        await first.recv()
        await second.recv()


def handshake(provider: str, more: str = "") -> bytes:
    lines = f"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n{more}\r\n"
    return f"GET /{provider}/v1/responses HTTP/1.1\r\n{lines}".encode()


async def test_an_upgrade_with_a_body_is_refused_and_what_follows_it_is_not_read(gw: Rig) -> None:
    smuggled = handshake("openai", "Content-Length: 3\r\n") + b"abcGET / HTTP/1.1\r\nHost: x\r\n\r\n"
    status, got = problem(await ask(path(gw), smuggled))
    assert (status, got["code"]) == (400, "request.invalid")


async def test_a_server_that_is_gone_is_rested_and_where_it_lives_is_not_told(gw: Rig) -> None:
    codes = []
    for _ in range(2):
        status, got = problem(await ask(path(gw), handshake("gone")))
        assert "127.0.0.1" not in json.dumps(got)
        codes.append((status, got["code"]))
    assert codes == [(502, "gateway.upstream_unreachable"), (503, "gateway.upstream_busy")]


async def test_a_sandbox_that_gives_up_does_not_have_a_server_rested(gw: Rig) -> None:
    came: asyncio.Queue[None] = asyncio.Queue()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        came.put_nowait(None)
        await reader.read()

    async with raw_server(slow) as port, asyncio.timeout(20):
        url = f"http://127.0.0.1:{port}"
        policy = Policy(kind="openai", upstreams=(url,), websocket=True, max_fails=1)
        gw.link.set_policies({"slow": policy}, CacheStore())
        slot = await gw.put({"slow": Provider("openai", url, KEY, policy="slow")}, slot="other")
        for _ in range(2):
            _, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
            writer.write(handshake("slow"))
            await came.get()
            writer.transport.abort()
