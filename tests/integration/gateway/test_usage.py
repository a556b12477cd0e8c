"""Usage from the gateway process into the store: what providers say, each call once, however links break."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from broker.config import Config
from broker.gateway.link import GatewayLink, Provider
from broker.gateway.policy import CacheStore, Policy
from broker.session.usage import Accounting
from broker.store.db import Database
from broker.store.usage import UsageFilter, UsageStore, UsageSum
from tests.integration.gateway.support import KEY, Rig, app_server, client, rig

WAIT_S = 20.0
ME = {"user": "u1", "workspace": "main", "session": "s1", "agent": "claude", "team": "red"}
PRICE = {"sonnet": {"input": 1.0, "output": 10.0}}
START = {"input_tokens": 3, "cache_read_input_tokens": 2000, "cache_creation_input_tokens": 100, "output_tokens": 1}
EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "message_start", "message": {"model": "sonnet", "usage": START}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 50}},
    {"type": "message_stop"},
)


async def provider(request: web.Request) -> web.StreamResponse:
    """Anthropic's shape as a stream, OpenAI's as JSON; fails where it is asked to."""
    body = await request.json()
    if body.get("fail"):
        return web.json_response({"error": {"type": "invalid_request_error"}}, status=400)
    if body.get("stream"):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b'data: {"model":"sonnet","choices":[{"delta":{"content":"four"}}],"usage":null}\n\n')
        if body.get("cut"):
            assert request.transport is not None
            request.transport.abort()
        return response
    if request.path.endswith("/chat/completions"):
        usage = {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 30}}
        return web.json_response({"model": body["model"], "choices": [], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in EVENTS:
        await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    return response


class Books:
    """A broker's store and accounting on a rig's link, again and again."""

    def __init__(self, gw: Rig, directory: Path, **settings: Any) -> None:
        self.gw = gw
        self._directory = directory
        self.providers: dict[str, Provider] = {}
        self.policies: dict[str, Policy] = {}
        self.set(**settings)
        self.changed = asyncio.Event()
        self.answer = True

    def set(self, **settings: Any) -> None:
        """config.toml."""
        self._config = Config.model_validate({"gateway": {"prices": PRICE, **settings}})

    async def open(self) -> None:
        self._db = await Database.open(self._directory)
        self.accounting = Accounting(UsageStore(self._db), lambda: self._config)
        await self.accounting.open()
        self.accounting.start(_Answers(self))
        self.attach()

    def attach(self) -> None:
        """Listens to the link that the rig has now."""
        self.gw.link.set_policies(self.policies, CacheStore())
        self.gw.link.spent = self.accounting.spent
        self.gw.link._on_report = self._heard

    def _heard(self, facts: Mapping[str, Any]) -> None:
        if facts["kind"] == "usage":
            self.accounting.heard(facts)

    async def close(self) -> None:
        await self.accounting.close()
        await self._db.close()

    async def sums(self) -> dict[str | int, UsageSum]:
        return {one.key: one for one in await self.accounting.sums(UsageFilter(), "model")}

    async def until(self, calls: int) -> dict[str | int, UsageSum]:
        """What there is once so many calls are stored."""
        async with asyncio.timeout(WAIT_S):
            while True:
                found = await self.sums()
                if sum(one.calls for one in found.values()) >= calls:
                    return found
                self.changed.clear()
                await self.changed.wait()


class _Answers:
    """The link of the moment; its answers may be kept back."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def usage_seen(self, boot: str, upto: int) -> None:
        self._books.changed.set()
        if self._books.answer:
            self._books.gw.link.usage_seen(boot, upto)

    def budgets_changed(self) -> None:
        self._books.gw.link.budgets_changed()


@asynccontextmanager
async def world(directory: Path, **settings: Any) -> AsyncIterator[tuple[Books, Callable[..., Any]]]:
    async with rig() as gw, app_server(provider) as port:
        books = Books(gw, directory, **settings)
        url = f"http://127.0.0.1:{port}"
        books.providers = {
            "anthropic": Provider("anthropic", url, KEY, policy="anthropic"),
            "openai": Provider("openai", url, KEY),
        }
        books.policies = {"anthropic": Policy(kind="anthropic", upstreams=(url,))}
        await books.open()
        await gw.put(books.providers, identity=ME)

        async def ask(path: str = "/anthropic/v1/messages", **body: Any) -> int:
            async with client(gw.slots[gw.slot].gateway_path) as http:
                response = await http.post(path, json={"model": "sonnet", **body})
                try:
                    await response.read()
                except aiohttp.ClientPayloadError:
                    assert body["cut"]
                return response.status

        try:
            yield books, ask
        finally:
            await books.close()


async def test_what_providers_say_is_what_is_stored(tmp_path: Path) -> None:
    async with world(tmp_path) as (books, ask):
        for _ in range(20):
            assert await ask() == 200
        assert await ask("/openai/v1/chat/completions", model="gpt-x") == 200
        assert await ask(fail=True) == 400
        found = await books.until(22)
        sonnet, gpt = found["sonnet"], found["gpt-x"]
        assert (sonnet.calls, sonnet.errors, sonnet.ttft_calls >= 20) == (21, 1, True)
        assert (sonnet.input, sonnet.output) == (20 * 2103, 20 * 50)
        assert (sonnet.cache_read, sonnet.cache_write) == (20 * 2000, 20 * 100)
        assert sonnet.cost_usd == pytest.approx(20 * (2103 + 500) / 1e6)
        assert (gpt.input, gpt.output, gpt.cache_read, gpt.cost_usd) == (40, 7, 30, 0.0)
        who = await books._db.read("SELECT DISTINCT user, team, workspace, agent FROM usage_calls")
        assert who == [("u1", "red", "main", "claude")]


@pytest.mark.parametrize("cut", [False, True])
async def test_who_does_not_let_the_provider_say_what_was_used_spends_a_budget_too(tmp_path: Path, cut: bool) -> None:
    # 100 tokens of output are 0.001 USD.
    async with world(tmp_path, budgets={"period": "month", "user_usd": 0.0011}) as (books, ask):
        chat = "/openai/v1/chat/completions"
        assert await ask(chat, stream=True, cut=cut, messages="x" * 400) == 200
        (sonnet,) = (await books.until(1)).values()
        assert (sonnet.key, sonnet.estimated, sonnet.output) == ("sonnet", 1, 100)
        assert 100 < sonnet.input < 150
        await books.gw.put(books.providers, identity=ME)
        assert await ask() == 429


async def test_a_broker_that_dies_before_it_answers_counts_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as (books, ask):
        books.answer = False
        assert [await ask() for _ in range(3)] == [200] * 3
        await books.until(3)
        gw = books.gw
        await gw.link.close()
        await gw.tasks.close()
        await books.close()
        # The gateway serves on, and nobody hears of it.
        assert [await ask() for _ in range(2)] == [200] * 2
        gw._fresh()
        books.answer = True
        await books.open()
        await _start(gw.link)
        assert (await books.until(5))["sonnet"].calls == 5
        assert await ask() == 200
        assert (await books.until(6))["sonnet"].output == 6 * 50


async def test_a_gateway_that_is_killed_has_no_call_counted_twice(tmp_path: Path) -> None:
    async with world(tmp_path) as (books, ask):
        assert await ask() == 200
        await books.until(1)
        pid = books.gw.link.peer_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        # The broker holds the listener: the request waits for the next gateway.
        assert await ask() == 200
        found = (await books.until(2))["sonnet"]
        assert (found.calls, found.input) == (2, 2 * 2103)


async def test_a_spent_budget_is_refused_by_this_gateway_and_the_next(tmp_path: Path) -> None:
    async with world(tmp_path, budgets={"period": "month", "user_usd": 0.002}) as (books, ask):
        assert await ask() == 200
        await books.until(1)
        # The link keeps order: what it tells next is heard after the budgets.
        await books.gw.put(books.providers, identity=ME)
        assert await ask() == 429
        pid = books.gw.link.peer_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await ask() == 429
        books.set(budgets={"period": "month", "user_usd": 50.0})
        books.accounting.settings_changed()
        await books.gw.put(books.providers, identity=ME)
        assert await ask() == 200


async def _start(link: GatewayLink) -> None:
    await link.start()
    await link.wait_connected(WAIT_S)
