"""Requests that come together make one call; what fails there fails each by its own fault alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.gateway.batch import AT_ONCE, Batcher
from broker.gateway.cache import Recorded
from broker.gateway.heads import Headers
from broker.gateway.policy import Policy
from broker.host.tasks import TaskOwner

LONG_S = 3600.0
"""Only a full batch is sent."""


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Headers = field(default_factory=lambda: [(b"content-type", b"application/json"), (b"retry-after", b"7")])


class Client:
    """Awaits its answer."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.head: Recorded | None = None
        self.body = b""
        self.lost = ""

    def shared_head(self, recorded: Recorded) -> None:
        self.head = recorded

    def shared_body(self, pieces: list[bytes]) -> None:
        self.body += b"".join(pieces)

    def shared_end(self) -> None:
        assert not self.done.is_set()
        self.done.set()

    def shared_lost(self, why: str) -> None:
        self.lost = why
        self.shared_end()

    async def answer(self) -> tuple[int, Any]:
        async with asyncio.timeout(10):
            await self.done.wait()
        assert self.head is not None
        assert self.head.length == len(self.body)
        return self.head.status, json.loads(self.body)


class Provider:
    """Embeds a text as its length; refuses one that says "bad". ``sent``: the inputs of each call."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.running = self.most = 0
        self.reply: Callable[[list[str]], Answer] | None = None

    async def __call__(self, body: bytes) -> Answer:
        given = json.loads(body)["input"]
        self.sent.append(given)
        texts = [given] if isinstance(given, str) else given
        self.running += 1
        self.most = max(self.most, self.running)
        waited = asyncio.Event()
        asyncio.get_running_loop().call_soon(waited.set)
        await waited.wait()
        self.running -= 1
        if self.reply is not None:
            return self.reply(texts)
        if "bad" in texts:
            return Answer(400, b'{"error":{"message":"bad input"}}')
        data = [{"index": index, "embedding": [len(text)]} for index, text in enumerate(texts)]
        return Answer(200, json.dumps({"data": data, "usage": {"total_tokens": len("".join(texts))}}).encode())


class World:
    def __init__(self, size: int = 4, wait_s: float = LONG_S) -> None:
        self.tasks = TaskOwner("test")
        self.provider = Provider()
        policy = Policy(kind="openai", upstreams=("http://p",), batch_s=wait_s, batch_size=size)
        self.batcher = Batcher(policy, self.provider, self.tasks)

    def ask(self, given: Any, scope: str = "", **fields: Any) -> Client:
        client = Client()
        body = json.dumps({"model": "e", "input": given, **fields}).encode()
        assert self.batcher.add(body, client, scope) is not None
        return client


async def test_a_full_batch_is_one_call_and_each_gets_its_part() -> None:
    world = World(4)
    clients = [world.ask("a"), world.ask(["bb", "ccc"]), world.ask("dddd")]
    answers = [await each.answer() for each in clients]
    assert world.provider.sent == [["a", "bb", "ccc", "dddd"]]
    assert [[item["embedding"] for item in body["data"]] for _, body in answers] == [[[1]], [[2], [3]], [[4]]]
    assert sum(body["usage"]["total_tokens"] for _, body in answers) == 10
    assert clients[0].head is not None
    assert (b"x-cortex-cache", b"batched") in clients[0].head.headers


async def test_a_batch_that_does_not_fill_is_sent_after_its_time() -> None:
    world = World(4, wait_s=0.001)
    one, two = world.ask("a"), world.ask("b")
    assert (await one.answer())[0] == (await two.answer())[0] == 200
    assert world.provider.sent == [["a", "b"]]


async def test_a_batch_that_was_full_is_not_sent_again_when_its_time_comes() -> None:
    world, crashes = World(2, wait_s=0.001), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: crashes.append(context))
    full = [world.ask("a"), world.ask("b")]
    later = world.ask("c", "another scope")
    for each in (*full, later):
        await each.answer()
    assert world.provider.sent == [["a", "b"], "c"]
    assert not crashes


async def test_one_alone_is_sent_as_it_came() -> None:
    world = World(4, wait_s=0.001)
    assert (await world.ask("a").answer())[0] == 200
    assert world.provider.sent == ["a"]


async def test_neither_credentials_nor_other_fields_are_mixed() -> None:
    world = World(2)
    clients = [world.ask(text, scope) for text, scope in (("a", "s"), ("b", "t"), ("c", "s"), ("d", "t"))]
    clients += [world.ask("e", "s", dimensions=1), world.ask("f", "s", dimensions=2), world.ask("g", "s", dimensions=1)]
    for each in (*clients[:5], clients[6]):
        await each.answer()
    assert world.provider.sent == [["a", "c"], ["b", "d"], ["e", "g"]]
    world.batcher.close()
    assert clients[5].lost


async def test_a_request_that_would_overfill_begins_the_next() -> None:
    world = World(4)
    first = [world.ask(["a", "b"]), world.ask("c")]
    world.ask(["d", "e"])
    for each in first:
        await each.answer()
    assert world.provider.sent == [["a", "b", "c"]]
    world.batcher.close()


async def test_a_bad_input_fails_its_request_alone() -> None:
    world = World(4)
    clients = [world.ask(text) for text in ("a", "bad", "cc", "ddd")]
    answers = [await each.answer() for each in clients]
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert world.provider.sent[0] == ["a", "bad", "cc", "ddd"]
    assert sorted(world.provider.sent[1:]) == ["a", "bad", "cc", "ddd"]


async def test_a_refused_batch_is_not_a_flood() -> None:
    world = World(40)
    clients = [world.ask("bad") for _ in range(40)]
    assert {(await each.answer())[0] for each in clients} == {400}
    assert world.provider.most == AT_ONCE


@pytest.mark.parametrize("status", [401, 429, 500])
async def test_an_error_about_all_goes_to_all(status: int) -> None:
    world = World(2)
    world.provider.reply = lambda texts: Answer(status, b'{"error":{}}')
    clients = [world.ask("a"), world.ask("b")]
    assert [await each.answer() for each in clients] == [(status, {"error": {}})] * 2
    assert len(world.provider.sent) == 1
    assert clients[1].head is not None
    assert (b"retry-after", b"7") in clients[1].head.headers


async def test_an_answer_that_is_none_makes_each_ask_alone() -> None:
    world = World(2)
    world.provider.reply = lambda texts: Answer(200, b'{"data":[{"index":0}]}')
    for each in [world.ask("a"), world.ask("b")]:
        assert (await each.answer())[1] == {"data": [{"index": 0}]}
    assert len(world.provider.sent) == 3


async def test_a_call_that_cannot_be_made_is_told_to_each() -> None:
    world = World(2)

    def unreachable(texts: list[str]) -> Answer:
        raise CortexError(Code.UPSTREAM_FAILED, "p cannot be reached", hint="retry")

    world.provider.reply = unreachable
    for each in [world.ask("a"), world.ask("b")]:
        await each.done.wait()
        assert each.lost == "p cannot be reached"


async def test_who_is_gone_is_not_asked_for() -> None:
    world = World(3)
    gone, body = Client(), json.dumps({"model": "e", "input": "gone"}).encode()
    member = world.batcher.add(body, gone)
    assert member is not None
    member.cancel()
    clients = [world.ask("a"), world.ask("b")]
    for each in clients:
        assert (await each.answer())[0] == 200
    assert world.provider.sent == [["a", "b"]]
    assert not gone.done.is_set()


async def test_everybody_is_told_when_the_gateway_ends_in_the_midst() -> None:
    world = World(2)
    started = asyncio.Event()

    async def never(body: bytes) -> Answer:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    clients = [Client(), Client()]
    for each in clients:
        world.batcher.add(b'{"model":"e","input":"a"}', each, "", never)
    await started.wait()
    await world.tasks.close()
    assert all(each.lost for each in clients)


async def test_off_means_off() -> None:
    world = World(2, wait_s=0)
    assert world.batcher.add(b'{"model":"e","input":"a"}', Client()) is None
