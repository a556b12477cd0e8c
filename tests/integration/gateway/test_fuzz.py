"""Any bytes from a sandbox, and any from a provider: answered as the table of errors says, and nobody else notices.

CORTEX_FUZZ_EXAMPLES: so many examples for each test, chosen anew each time, instead of few that stay the same.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count, pairwise

import h11
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.errors import Code
from broker.gateway.link import Provider
from broker.gateway.policy import CacheRule, CacheStore, Limit, Limits, Policy
from tests.integration.gateway.observed import ObservedRig, observed
from tests.integration.gateway.support import KEY, ME, app_server, ask, raw_server

EXAMPLES = int(os.environ.get("CORTEX_FUZZ_EXAMPLES", "0"))
pytestmark = pytest.mark.timeout(60 + EXAMPLES)
QUIET_S = 0.03
"""A connection on which nothing comes for so long is taken to wait for more."""
HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")
OURS = {code.slug: code.http_status for code in Code}
REFUSALS = {
    code.slug
    for code in (
        Code.BAD_REQUEST, Code.HEAD_TOO_LARGE, Code.HTTP_VERSION, Code.BAD_METHOD, Code.UNKNOWN_PROVIDER,
        Code.NO_WEBSOCKET, Code.GATEWAY_LIMITED,
    )
}  # fmt: skip
FAULTS = {Code.UPSTREAM_FAILED.slug, Code.UPSTREAM_UNREACHABLE.slug, Code.UPSTREAM_TIMEOUT.slug}
numbers = count()


def fuzzed(few: int) -> settings:
    return settings(
        max_examples=EXAMPLES or few, derandomize=not EXAMPLES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# The world


class World:
    """One gateway; slot ``a`` is of the guest with odd bytes, ``b`` a bystander's. ``say``: what ``bad`` answers."""

    def __init__(self, gw: ObservedRig) -> None:
        self.gw = gw
        self.pid = gw.pid
        self.seen: list[tuple[str, str, bytes]] = []
        self.say: list[bytes] = []
        self.reset = False

    async def good(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request.method, request.raw_path, body))
        return web.json_response({"model": "m", "choices": [], "usage": {}}, headers={"x-upstream": "yes"})

    async def bad(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in self.say:
            writer.write(piece)
            await writer.drain()
        if self.reset:
            writer.transport.abort()
        elif not writer.transport.is_closing():
            with suppress(OSError):  # it may be gone already
                writer.write_eof()
            while await reader.read(2**16):
                pass

    async def bystander(self) -> None:
        """Somebody else's call works, as if nothing were; the process lives."""
        body = b'{"model":"m","temperature":0,"messages":[{"role":"user","content":"%d"}]}' % next(numbers)
        raw = b"POST /p/v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        answer = await ask(self.gw.slots["b"].gateway_path, raw % (len(body), body))
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert self.gw.pid == self.pid


@asynccontextmanager
async def made() -> AsyncIterator[World]:
    async with observed(max_head_bytes=8192) as gw:
        world = World(gw)
        async with app_server(world.good) as good, raw_server(world.bad) as bad:
            limits = Limits(
                provider=Limit(concurrency=8, rpm=10**6, tpm=10**9), user=Limit(concurrency=4),
                sandbox=Limit(concurrency=4, rpm=10**6),
            )  # fmt: skip
            rule = CacheRule(enabled=True)
            policies = {
                name: Policy(
                    kind="openai", upstreams=(f"http://127.0.0.1:{port}",), limits=limits, cache=rule, coalesce=True,
                    batch_s=0.005, max_fails=2**31,
                )
                for name, port in (("p", good), ("bad", bad))
            }  # fmt: skip
            gw.link.set_policies(policies, CacheStore())
            providers = {name: Provider("openai", policies[name].upstreams[0], KEY, policy=name) for name in policies}
            await gw.put(providers, slot="a")
            await gw.put(providers, slot="b", identity={**ME, "user": "u2"})
            yield world


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., None]]:
    """Runs a coroutine function with the world, as often as one likes."""
    with asyncio.Runner() as runner:
        holder = made()
        world = runner.run(holder.__aenter__())
        yield lambda work, *args: runner.run(work(world, *args))
        world.gw.sound(world.pid)
        runner.run(holder.__aexit__(None, None, None))


async def converse(path: str, pieces: list[bytes]) -> bytes:
    """All that comes back for ``pieces``, until the other side ends or waits for more."""
    reader, writer = await asyncio.open_unix_connection(path)
    got = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), 10)
        while more := await asyncio.wait_for(reader.read(2**16), QUIET_S):
            got += more
    except TimeoutError:
        writer.write_eof()
        got += await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        pass
    finally:
        writer.close()
    return got


# Requests


@dataclass(frozen=True)
class Request:
    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    sizes: tuple[int, ...] | None
    """How it is cut into chunks; None: by its length."""

    @property
    def raw(self) -> bytes:
        lines = [b"%s %s HTTP/1.1" % (self.method, self.target), b"Host: x"]
        lines += [b"%s: %s" % header for header in self.headers]
        if self.sizes is None:
            lines += [b"Content-Length: %d" % len(self.body)] if self.body else []
            return b"\r\n".join(lines) + b"\r\n\r\n" + self.body
        edges = sorted({size % (len(self.body) + 1) for size in self.sizes} | {0, len(self.body)})
        chunks = [self.body[start:end] for start, end in pairwise(edges)]
        framed = b"".join(b"%X;x=y\r\n%s\r\n" % (len(each), each) for each in chunks) + b"0\r\nA: b\r\n\r\n"
        return b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n" + framed


TARGETS = (
    b"/p/v1/chat/completions", b"/p/v1/embeddings", b"/p/v1/models", b"/p/v1/responses", b"/p/x?key=a&b=c", b"/p/",
    b"/p/a%2fb//c", b"/p/v1/messages/count_tokens", b"/p/%7e",
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([
        b"", b"{", b'{"model":"m","temperature":0,"messages":[]}', b'{"model":"e","input":["a","b"]}', b"[" * 3000,
        b'{"model":"e","input":{}}', b'{"model":1e999}', b'{"input":' + b"9" * 5000 + b"}", b'"\xff"', b"null",
        b"GET /p/smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"0\r\n\r\nGET /p/smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
        b"z" * 100_000,
    ]),
)  # fmt: skip
HEADERS = st.sampled_from([
    (b"Content-Type", b"application/json"), (b"Authorization", b"Bearer x"), (b"Expect", b"100-continue"),
    (b"Connection", b"keep-alive, x-a"), (b"X-A", b"\xff\x80"), (b"X-Empty", b""), (b"Accept-Encoding", b"br"),
    (b"Upgrade", b"h2c"), (b"TE", b"trailers"), (b"Cookie", b"a=b"), (b"X-Long", b"v" * 3000),
])  # fmt: skip
VALID = st.builds(
    Request,
    st.sampled_from([b"POST", b"POST", b"POST", b"PUT", b"DELETE", b"PATCH"]),
    st.sampled_from(TARGETS),
    st.lists(HEADERS, max_size=4, unique=True).map(tuple),
    BODIES,
    st.none() | st.lists(st.integers(0, 10**6), max_size=6).map(tuple),
)
ODD = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([
        b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b":", b"\r\n ", b"Content-Length: 5\r\n",
        b"\r\nContent-Length: 0", b"\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding: identity",
        b"\r\nTransfer-Encoding:\x0bchunked", b"\r\nHost: y", b"\r\nConnection: close", b"\r\nConnection: upgrade",
        b"\r\nUpgrade: websocket", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT ", b"HEAD ", b"OPTIONS *", b"TRACE ", b"http://h/", b"/../", b"%2e%2e/", b"FFFFFFFFFFFFFFFF\r\n",
        b"-1\r\n", b"0\r\n", b"0x5", b"5 \r\n", b"A" * 9000, b"\r\nA: b" * 300,
        b"\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, strategy: st.SearchStrategy[bytes]) -> bytes:
    """Something valid with a few cuts, doublings and insertions, most of them where heads are."""
    raw = draw(strategy)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(len(raw), 400)))
        upto = at + draw(st.sampled_from([0, 0, 0, 1, 2, 10, 10**6]))
        raw = raw[:at] + draw(ODD | st.just(raw[max(0, at - 30) : at])) + raw[upto:]
    return raw


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({each % (len(raw) + 1) for each in cuts} | {0, len(raw)})
    return [raw[start:end] for start, end in pairwise(edges)]


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


def test_any_request_is_passed_on_or_refused_as_the_table_says(run: Callable[..., None]) -> None:
    async def one(world: World, raws: list[bytes], cuts: list[int]) -> None:
        raw = b"".join(raws)
        got = await converse(str(world.gw.slots["a"].gateway_path), cut(raw, cuts))
        heads = HEAD.findall(got)
        assert heads or not got, got
        assert len(re.findall(rb"HTTP/1\.1 \d{3} ", got)) == len(heads), got
        for status, lines in heads:
            slug = re.search(rb"x-cortex-error: (\S+)\r\n", lines)
            if slug is not None:
                assert slug[1].decode() in REFUSALS, (raw, got)
                assert OURS[slug[1].decode()] == int(status)
            else:
                # The server there is stricter about headers that do not frame.
                theirs = b"x-upstream: yes" in lines or b"x-cortex-cache: " in lines
                theirs |= status == b"400" and b"Server: Python" in lines
                assert status == b"100" or theirs, (raw, got)
        assert KEY.encode() not in got
        await world.bystander()

    @fuzzed(150)
    @given(st.lists(mutated(VALID.map(lambda request: request.raw)), min_size=1, max_size=4), CUTS)
    def check(raws: list[bytes], cuts: list[int]) -> None:
        run(one, raws, cuts)

    check()


def test_valid_requests_arrive_as_they_were_however_they_are_framed_and_cut(run: Callable[..., None]) -> None:
    async def one(world: World, requests: list[Request], cuts: list[int]) -> None:
        world.seen.clear()
        last = Request(b"DELETE", b"/p/last", ((b"Connection", b"close"),), b"", None)
        raw = b"".join(request.raw for request in [*requests, last])
        reader, writer = await asyncio.open_unix_connection(str(world.gw.slots["a"].gateway_path))
        for piece in cut(raw, cuts):
            writer.write(piece)
        got = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        statuses = [status for status, _ in HEAD.findall(got) if status != b"100"]
        assert statuses == [b"200"] * (len(requests) + 1), (raw, got)
        asked = [(each.method.decode(), _target(each.target), each.body) for each in requests]
        left = iter(asked)
        # Those that were answered from before are missing; embeddings may be made into others.
        for seen in [each for each in world.seen if each[1] not in ("/last", "/v1/embeddings")]:
            assert seen in left, (seen, asked)
        plain = [each for each in asked if not each[1].startswith("/v1/")]
        assert [each for each in world.seen if each in plain] == plain
        await world.bystander()

    @fuzzed(60)
    @given(st.lists(VALID, min_size=1, max_size=5), CUTS)
    def check(requests: list[Request], cuts: list[int]) -> None:
        run(one, requests, cuts)

    check()


def _target(target: bytes) -> str:
    return target.removeprefix(b"/p").replace(b"key=a&", b"").decode()


# Responses

ANSWERS = st.sampled_from([
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 26\r\n\r\n" + b'{"usage":{"total_tokens":1}',
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'13\r\ndata: {"usage":{}}\n\r\nE\r\ndata: [DONE]\n\n\r\n0\r\n\r\n',
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 404 Not\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n{}", b"HTTP/1.0 200 OK\r\n\r\nold", b"",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n"
    b"\x1f\x8b\x08\x00",
])  # fmt: skip


def read_by_another(raw: bytes) -> tuple[int, bytes] | None:
    """Status and body of a whole response as another parser reads it; None: there is none."""
    peer = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**20)
    peer.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(raw)
    if raw:
        peer.receive_data(b"")
    status, body = 0, b""
    try:
        while True:
            event = peer.next_event()
            match event:
                case h11.Response():
                    status = event.status_code
                case h11.Data():
                    body += bytes(event.data)
                case h11.EndOfMessage():
                    return status, body
                case h11.ConnectionClosed() | h11.NEED_DATA | h11.PAUSED:
                    return None
    except h11.RemoteProtocolError:
        return None


def test_any_response_is_passed_on_whole_or_ends_as_an_error(run: Callable[..., None]) -> None:
    async def one(world: World, raw: bytes, cuts: list[int], reset: bool, path: bytes) -> None:
        world.say, world.reset = cut(raw, cuts), reset
        body = b'{"model":"m","temperature":0,"input":"%d"}' % next(numbers)
        request = b"POST /bad%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        try:
            got = await ask(world.gw.slots["a"].gateway_path, request % (path, len(body), body))
        except ConnectionError:
            got = b""
        told = read_by_another(got)
        slug = re.search(rb"x-cortex-error: (\S+)\r\n", got)
        if slug is not None:
            assert slug[1].decode() in FAULTS, (raw, got)
            assert told is not None
            assert told[0] == OURS[slug[1].decode()]
        elif told is not None:
            # Empty lines before an answer are passed over by ours and by many others, not by this one.
            assert told == read_by_another(raw.lstrip(b"\r\n")), (raw, got)
        assert KEY.encode() not in got
        await world.bystander()

    paths = st.sampled_from([b"/v1/chat/completions", b"/v1/embeddings", b"/v1/responses", b"/x"])

    @fuzzed(200)
    @given(mutated(ANSWERS), CUTS, st.booleans(), paths)
    def check(raw: bytes, cuts: list[int], reset: bool, path: bytes) -> None:
        run(one, raw, cuts, reset, path)

    check()
