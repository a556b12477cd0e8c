"""A whole small call: what a server says "not now" with is obeyed, and nothing is kept of one that was given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.gateway import direct
from broker.gateway.caller import Caller
from broker.gateway.fetch import Fetched
from broker.gateway.policy import Limit, Limits
from tests.unit.broker.gateway.calls import World, policy, world

ANN = Caller("slot", "ann")


async def ask(at: World) -> Fetched:
    plan, route = at.context.plans._named["p"], at.routes[b"p"]
    return await direct.ask(plan, route, ANN, at.context.pool, b"POST", b"/v1/embeddings", b"", b"{}", timeout_s=5)


@pytest.mark.parametrize("status", [429, 503, 529])
async def test_a_server_that_says_not_now_is_not_asked(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(*_: Any, **__: Any) -> Fetched:
        return Fetched(status, [(b"retry-after", b"600")], b"")

    monkeypatch.setattr(direct, "fetch", fetch)
    async with world(p=policy("a", keys=("sk",), limits=Limits(wait_s=5))) as at:
        assert (await ask(at)).status == status
        with pytest.raises(CortexError) as caught:
            await ask(at)
        assert caught.value.code is Code.GATEWAY_LIMITED
        assert at.idle()


async def test_a_turn_that_comes_as_it_is_given_up_is_given_back() -> None:
    async with world(p=policy("a", limits=Limits(provider=Limit(concurrency=1)))) as at:
        call, _ = at.ask()
        waiting = asyncio.ensure_future(ask(at))
        await asyncio.sleep(0)
        assert at.running()["p"][1] == 1
        call.abort()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert at.idle()
