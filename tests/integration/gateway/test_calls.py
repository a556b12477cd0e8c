"""Whole calls through a real gateway process: sent elsewhere, in turn, from the cache, together, accounted."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from broker.gateway.link import Provider
from broker.gateway.policy import CacheRule, CacheStore, Limit, Limits, Policy
from tests.integration.gateway.support import ME, Rig, app_server, rig

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ASK = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
EMBEDDINGS = "/p/v1/embeddings"
CHAT = "/p/v1/chat/completions"


class Server:
    """A provider that does what ``script`` says of its n-th request (from 1); ``keys``: which it was asked with."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: list[str] = []
        self.bodies: list[bytes] = []
        self.port = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.script: Callable[[int], tuple[int, dict[str, str]]] = lambda number: (200, {})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.keys.append(request.headers.get("authorization", "").removeprefix("Bearer "))
        self.bodies.append(body)
        status, headers = self.script(len(self.keys))
        await self.gate.wait()
        if status != 200:
            return web.json_response({"error": {"message": self.name}}, status=status, headers=headers)
        asked = json.loads(body) if body else {}
        if "input" in asked:
            inputs = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
            data = [{"index": at, "object": "embedding", "embedding": [len(text)]} for at, text in enumerate(inputs)]
            return web.json_response({"object": "list", "model": "e", "data": data, "usage": USAGE})
        if asked.get("stream"):
            return await self._stream(request, headers)
        return web.json_response({"model": "m-1", "by": self.name, "usage": USAGE}, headers=headers)

    async def _stream(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(3):
            await response.write(b'data: {"model": "m-1", "n": %d}\n\n' % number)
            if "cut" in headers:
                assert request.transport is not None
                request.transport.abort()
                return response
        await response.write(b'data: {"model": "m-1", "usage": %s}\n\ndata: [DONE]\n\n' % json.dumps(USAGE).encode())
        return response


class Place:
    """A gateway with one slot and servers; ``policies`` says how they are used."""

    def __init__(self, gateway: Rig, servers: list[Server]) -> None:
        self.gateway = gateway
        self.servers = servers
        self.path = self.user = ""

    async def use(self, cache: CacheStore | None = None, **policies: Policy) -> None:
        self.gateway.link.set_policies(policies, cache or CacheStore())
        names = {name: Provider("openai", self.servers[0].url, policy=name) for name in policies}
        self.user = f"user of {self.gateway.slot}"
        sockets = await self.gateway.put(names, identity={**ME, "user": self.user})
        self.path = str(sockets.gateway_path)

    def policy(self, *servers: int, **rest: Any) -> Policy:
        urls = tuple(self.servers[number].url for number in servers or (0,))
        return Policy(kind="openai", upstreams=urls, **rest)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession("http://g", connector=aiohttp.UnixConnector(self.path)) as session:
            yield session

    async def ask(self, body: Any = ASK, path: str = CHAT) -> tuple[int, Any, Mapping[str, str]]:
        data = io.BytesIO(json.dumps(body).encode())
        headers = {"content-type": "application/json"}
        async with self.client() as client, client.post(path, data=data, headers=headers) as response:
            return response.status, await response.json(), response.headers

    async def waiting(self, count: int) -> None:
        """Returns when so many calls wait for a limit."""
        async with asyncio.timeout(10):
            while self.gateway.link.view.get("providers", {}).get("p", {}).get("limits", {}).get("waiting") != count:
                await asyncio.sleep(0.02)

    async def records(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` records of calls that were told since the slot was put."""
        async with asyncio.timeout(10):
            while True:
                found = [
                    each
                    for report in self.gateway.reports
                    for each in report.get("records", ())
                    if each["user"] == self.user
                ]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def place(gateway: Rig) -> AsyncIterator[Place]:
    servers = [Server("a"), Server("b"), Server("c")]
    async with (
        app_server(servers[0].serve) as servers[0].port,
        app_server(servers[1].serve) as servers[1].port,
        app_server(servers[2].serve) as servers[2].port,
        gateway.own_slot(),
    ):
        yield Place(gateway, servers)


# Elsewhere


@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_another_server_is_asked_where_one_fails(place: Place, status: int) -> None:
    place.servers[0].script = lambda number: (status, {})
    place.servers[1].script = lambda number: (status, {})
    await place.use(p=place.policy(0, 1, 2, retries=2))
    assert (await place.ask())[1]["by"] == "c"
    assert place.servers[2].bodies == [json.dumps(ASK).encode()], "the whole body, once more"
    (record,) = await place.records(1)
    assert (record["attempts"], record["upstream"], record["status"]) == (3, 2, 200)


async def test_a_dead_server_is_passed_over_and_after_a_while_not_asked(place: Place) -> None:
    place.servers[0].port, kept = 1, place.servers[0].port
    await place.use(p=place.policy(0, 1, max_fails=2, fail_timeout_s=600))
    place.servers[0].port = kept
    for _ in range(4):
        assert (await place.ask())[1]["by"] == "b"
    async with asyncio.timeout(10):
        while place.gateway.link.view.get("providers", {}).get("p", {}).get("servers", [{}])[0].get("state") != "open":
            await asyncio.sleep(0.05)


async def test_retries_are_bounded(place: Place) -> None:
    for server in place.servers:
        server.script = lambda number: (500, {})
    await place.use(p=place.policy(0, 1, 2, retries=1))
    status, body, _ = await place.ask()
    assert status == 500
    assert "error" in body
    assert sum(len(server.keys) for server in place.servers) == 2


async def test_with_one_server_its_error_is_the_clients(place: Place) -> None:
    place.servers[0].script = lambda number: (500, {"x-should-retry": "true"})
    await place.use(p=place.policy(0))
    status, _, headers = await place.ask()
    assert (status, headers["x-should-retry"]) == (500, "true")
    assert len(place.servers[0].keys) == 1


async def test_another_key_is_tried_where_one_is_refused_and_that_one_rests(place: Place) -> None:
    server = place.servers[0]
    server.script = lambda number: (429, {"retry-after": "600"}) if server.keys[-1] == "sk-1" else (200, {})
    await place.use(p=place.policy(0, keys=("sk-1", "sk-2")))
    for _ in range(6):
        assert (await place.ask())[0] == 200
    assert server.keys.count("sk-1") == 1
    assert server.keys.count("sk-2") == 6


async def test_when_all_keys_rest_the_refusal_says_how_long(place: Place) -> None:
    place.servers[0].script = lambda number: (429, {"retry-after": "600"})
    await place.use(p=place.policy(0, keys=("sk-1",), limits=Limits(wait_s=5)))
    assert (await place.ask())[0] == 429
    status, body, headers = await place.ask()
    assert (status, body["code"]) == (429, "gateway.limited")
    assert 590 <= int(headers["retry-after"]) <= 600
    assert len(place.servers[0].keys) == 1, "the provider is not asked again before its time"


async def test_a_provider_that_stands_in(place: Place) -> None:
    place.servers[0].script = lambda number: (503, {})
    await place.use(p=place.policy(0, fallback=("q",)), q=place.policy(1, keys=("sk-q",)))
    assert (await place.ask())[1]["by"] == "b"
    assert place.servers[1].keys == ["sk-q"]
    (record,) = await place.records(1)
    assert record["provider"] == "q"


async def test_a_stand_in_answers_while_the_first_has_asked_for_a_pause(place: Place) -> None:
    place.servers[0].script = lambda number: (429, {"retry-after": "600"})
    await place.use(p=place.policy(0, fallback=("q",), limits=Limits(wait_s=1)), q=place.policy(1, keys=("sk-q",)))
    for _ in range(3):
        assert (await place.ask())[1]["by"] == "b"
    assert len(place.servers[0].keys) == 1


async def test_no_stand_in_answers_what_is_over_a_limit(place: Place) -> None:
    limits = Limits(sandbox=Limit(rpm=1), wait_s=0.1)
    await place.use(p=place.policy(0, fallback=("q",), limits=limits), q=place.policy(1))
    assert (await place.ask())[0] == 200
    assert (await place.ask())[0] == 429
    assert place.servers[1].keys == []


async def test_a_large_body_is_sent_once(place: Place) -> None:
    place.servers[0].script = place.servers[1].script = lambda number: (500, {})
    await place.use(p=place.policy(0, 1, retries=3))
    assert (await place.ask(ASK | {"pad": "x" * 2**21}))[0] == 500
    assert sum(len(server.keys) for server in place.servers) == 1


async def test_nothing_is_sent_again_once_an_answer_has_begun(place: Place) -> None:
    place.servers[0].script = place.servers[1].script = lambda number: (200, {"cut": "1"})
    await place.use(p=place.policy(0, 1, retries=3))
    async with place.client() as client, client.post(CHAT, json=ASK | {"stream": True}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert sum(len(server.keys) for server in place.servers[:2]) == 1
    (record,) = await place.records(1)
    assert record["outcome"] == "cut"


# In turn


async def test_so_many_at_once_and_the_rest_in_turn(place: Place) -> None:
    server = place.servers[0]
    server.gate.clear()
    await place.use(p=place.policy(0, limits=Limits(provider=Limit(concurrency=2))))
    calls = [asyncio.ensure_future(place.ask()) for _ in range(5)]
    await place.waiting(3)
    assert len(server.keys) == 2
    server.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 5


async def test_a_sandbox_over_its_rate_is_told_when_to_come_again(place: Place) -> None:
    await place.use(p=place.policy(0, limits=Limits(sandbox=Limit(rpm=2), wait_s=0.1)))
    answers = [await place.ask() for _ in range(3)]
    assert [status for status, _, _ in answers][:2] == [200, 200]
    assert answers[2][1]["code"] == "gateway.limited"
    assert int(answers[2][2]["retry-after"]) >= 1


async def test_a_client_that_goes_while_it_waits_is_not_waited_for(place: Place) -> None:
    server = place.servers[0]
    server.gate.clear()
    await place.use(p=place.policy(0, limits=Limits(provider=Limit(concurrency=1))))
    first = asyncio.ensure_future(place.ask(ASK | {"user": "0"}))
    async with asyncio.timeout(10):
        while not server.bodies:
            await asyncio.sleep(0.01)
    second, third = [asyncio.ensure_future(place.ask(ASK | {"user": str(at)})) for at in (1, 2)]
    await place.waiting(2)
    second.cancel()
    await place.waiting(1)
    server.gate.set()
    assert [(await each)[0] for each in (first, third)] == [200, 200]
    assert {json.loads(body)["user"] for body in server.bodies} == {"0", "2"}


# From before, and together


async def test_an_equal_question_is_answered_from_before(place: Place) -> None:
    await place.use(p=place.policy(0, cache=CacheRule(enabled=True)))
    first = await place.ask()
    second = await place.ask(dict(reversed(ASK.items())))
    assert first[1] == second[1]
    assert second[2]["x-cortex-cache"] == "hit"
    assert len(place.servers[0].keys) == 1
    records = await place.records(2)
    assert [each.get("cached", "") for each in records] == ["", "hit"]
    assert records[1].get("output") is None, "what was not asked for costs nothing"
    assert (await place.ask(ASK | {"temperature": 1}))[0] == 200
    assert len(place.servers[0].keys) == 2, "what is random is asked anew"


async def test_a_stream_is_given_again_as_a_stream(place: Place) -> None:
    await place.use(p=place.policy(0, cache=CacheRule(enabled=True)))
    seen = []
    for _ in range(2):
        async with place.client() as client, client.post(CHAT, json=ASK | {"stream": True}) as response:
            seen.append((response.headers["content-type"], await response.read()))
    assert seen[0] == seen[1]
    assert len(place.servers[0].keys) == 1


async def test_equal_questions_at_once_are_asked_once(place: Place) -> None:
    server = place.servers[0]
    server.gate.clear()
    await place.use(p=place.policy(0, coalesce=True))
    body = ASK | {"temperature": 1, "tools": [{"type": "function"}]}
    calls = [asyncio.ensure_future(place.ask(body)) for _ in range(4)]
    async with asyncio.timeout(10):
        while not server.keys:
            await asyncio.sleep(0.01)
    other = asyncio.ensure_future(place.ask(body | {"seed": 1}))
    async with asyncio.timeout(10):
        while len(server.keys) < 2:
            await asyncio.sleep(0.01)
    server.gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer[1]["by"] for answer in answers] == ["a"] * 4
    await other
    assert len(server.keys) == 2
    assert sorted(each.get("cached", "") for each in await place.records(5)) == ["", "", *["coalesced"] * 3]


async def test_who_asked_first_may_go(place: Place) -> None:
    server = place.servers[0]
    server.gate.clear()
    await place.use(p=place.policy(0, coalesce=True))
    first = asyncio.ensure_future(place.ask())
    async with asyncio.timeout(10):
        while not server.keys:
            await asyncio.sleep(0.01)
    second = asyncio.ensure_future(place.ask())
    async with asyncio.timeout(10):
        while place.gateway.link.view["providers"]["p"]["coalesced"] != 1:
            await asyncio.sleep(0.02)
    first.cancel()
    server.gate.set()
    assert (await second)[1]["by"] == "a"


async def test_the_failure_of_a_shared_call_is_nobody_elses(place: Place) -> None:
    server = place.servers[0]
    server.gate.clear()
    server.script = lambda number: (500 if number == 1 else 200, {})
    await place.use(p=place.policy(0, coalesce=True))
    first = asyncio.ensure_future(place.ask())
    async with asyncio.timeout(10):
        while not server.keys:
            await asyncio.sleep(0.01)
    second = asyncio.ensure_future(place.ask())
    server.gate.set()
    assert sorted([(await first)[0], (await second)[0]]) in ([200, 500], [200, 200])
    assert (await second)[0] == 200 or (await first)[0] == 500


async def test_embeddings_are_asked_for_together(place: Place) -> None:
    await place.use(p=place.policy(0, batch_s=0.3, keys=("sk-1",)))
    texts = ["a", ["bb", "ccc"], "dddd"]
    calls = [place.ask({"model": "e", "input": text}, EMBEDDINGS) for text in texts]
    answers = await asyncio.gather(*calls)
    found = [[each["embedding"][0] for each in body["data"]] for _, body, _ in answers]
    assert found == [[1], [2, 3], [4]]
    assert place.servers[0].keys == ["sk-1"]
    records = await place.records(3)
    assert sum(each["input"] for each in records) == USAGE["prompt_tokens"]


async def test_a_call_of_many_carries_nothing_for_who_has_spent_a_budget(place: Place, gateway: Rig) -> None:
    await place.use(p=place.policy(0, batch_s=0.3, keys=("sk-1",)))
    gateway.link.spent = lambda: {"users": [place.user], "teams": [], "for_s": 60.0}
    gateway.link.budgets_changed()
    try:
        # Told after the budgets, so these are known by now.
        providers = {"p": Provider("openai", place.servers[0].url, policy="p")}
        sockets = await gateway.put(providers, slot="free", identity={**ME, "user": "free"})
        other = Place(gateway, place.servers)
        other.path = str(sockets.gateway_path)
        free, spent = await asyncio.gather(
            other.ask({"model": "e", "input": "a"}, EMBEDDINGS), place.ask({"model": "e", "input": "b"}, EMBEDDINGS)
        )
        assert (free[0], spent[0]) == (200, 429)
    finally:
        await gateway.link.drop_slot("free")
        gateway.slots.pop("free").close()
        gateway.link.spent = lambda: {"users": [], "teams": [], "for_s": 0.0}
        gateway.link.budgets_changed()


# Accounted


async def test_each_call_is_accounted_with_whom_and_what(place: Place) -> None:
    await place.use(p=place.policy(0))
    await place.ask()
    async with place.client() as client, client.post(CHAT, json=ASK | {"stream": True}) as response:
        await response.read()
    for record in await place.records(2):
        assert (record["provider"], record["model"], record["user"]) == ("p", "m", place.user)
        assert (record["input"], record["output"], record["outcome"]) == (3, 2, "ok")
        assert record["duration_s"] >= record["ttft_s"] > 0


async def test_answers_that_are_read_here_are_not_compressed_and_others_may_be(place: Place) -> None:
    async def serve(request: web.Request) -> web.Response:
        body = gzip.compress(b'{"data": []}')
        encoded = {"content-encoding": "gzip"} if "gzip" in request.headers.get("accept-encoding", "") else {}
        return web.Response(body=body if encoded else b'{"data": []}', headers=encoded)

    async with app_server(serve) as port:
        place.servers[0].port, kept = port, place.servers[0].port
        await place.use(p=place.policy(0))
        place.servers[0].port = kept
        async with place.client() as client:
            async with client.post(CHAT, json=ASK, headers={"accept-encoding": "gzip, br"}) as response:
                assert "content-encoding" not in response.headers
            async with client.get("/p/v1/models", headers={"accept-encoding": "gzip"}) as response:
                assert response.headers["content-encoding"] == "gzip"


async def test_an_answer_that_is_compressed_all_the_same_passes_and_is_counted(place: Place) -> None:
    async def serve(request: web.Request) -> web.Response:
        heard.append(request.headers["accept-encoding"])
        return web.Response(body=b"packed", headers={"content-type": "application/json", "content-encoding": "br"})

    heard: list[str] = []
    async with app_server(serve) as port:
        place.servers[0].port, kept = port, place.servers[0].port
        await place.use(p=place.policy(0))
        place.servers[0].port = kept
        before = place.gateway.link.health().get("unread", 0)
        headers = {"accept-encoding": "br, identity;q=0"}
        connector = aiohttp.UnixConnector(place.path)
        async with (
            aiohttp.ClientSession("http://g", connector=connector, auto_decompress=False) as client,
            client.post(CHAT, json=ASK, headers=headers) as response,
        ):
            assert (await response.read(), response.headers["content-encoding"]) == (b"packed", "br")
    assert heard == ["identity"]
    async with asyncio.timeout(10):
        while place.gateway.link.health().get("unread", 0) != before + 1:
            await asyncio.sleep(0.02)


# Changes while it runs


async def test_another_policy_holds_from_the_next_call_on(place: Place) -> None:
    await place.use(p=place.policy(0))
    assert (await place.ask())[1]["by"] == "a"
    await place.use(p=place.policy(1))
    assert (await place.ask())[1]["by"] == "b"
