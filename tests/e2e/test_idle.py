"""Sessions that nobody uses, on both drivers: they stand still, and whoever comes sees nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

SOON = "[pool.idle]\npause_after_s = 0.3\nattached_pause_after_s = 0.3\nfallback_keep_s = {keep}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(driver: str) -> AsyncIterator[BrokerProcess]:
    """Pauses soon, and keeps for a long time."""
    with short_directory() as directory:
        async with running(directory, driver, process_config() + SOON.format(keep=600)) as process:
            yield process


async def shown(broker: BrokerProcess, user: str) -> dict[str, Any]:
    found: dict[str, Any] = await broker.api("GET", f"/v1/sessions/{user}/main")
    return found


async def becomes(broker: BrokerProcess, user: str, state: str) -> dict[str, Any]:
    """Its view, once it is in ``state``."""
    async with asyncio.timeout(30):
        while (view := await shown(broker, user))["state"] != state:
            await asyncio.sleep(0.02)
    return view


async def test_the_next_message_of_a_silent_client_wakes_its_session(shared: BrokerProcess) -> None:
    made = await shared.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        for word in ("aubergine", "celeriac"):
            view = await becomes(shared, "ann", "paused")
            assert view["clients"] == 1
            result = await turn(agent, session.session_id, f"say {word}")
            assert result.stop_reason == "end_turn"
            assert word in client.text


async def test_a_client_that_connects_finds_all_as_it_was(shared: BrokerProcess) -> None:
    made = await shared.session("bea")
    one, two = Client(), Client()
    async with connected(made["acp_url"], made["token"], one) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!echo 42 > kept; sleep 600 >/dev/null 2>&1 & echo started")
    before = await becomes(shared, "bea", "paused")
    assert before["warm"] is True
    claims = await shared.metric('cortex_pool_claims_total{kind="user",result="hit"}')
    async with connected(made["acp_url"], made["token"], two) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        await turn(agent, session.session_id, "!cat kept")
    assert "42" in "".join(str(update) for update in two.updates)
    assert await shared.metric('cortex_pool_claims_total{kind="user",result="hit"}') == claims + 1
    after = await shown(shared, "bea")
    for fact in ("slot", "incarnation", "agent_pid"):
        assert after["sandbox"][fact] == before["sandbox"][fact]
    newest = (await shared.api("GET", "/v1/sessions/bea/main/timeline"))["bringups"][0]
    assert newest["path"] == "user_warm"
    assert [stage["stage"] for stage in newest["stages"]] == ["resume"]


async def test_a_turn_over_http_wakes_it(shared: BrokerProcess) -> None:
    await shared.session("cal")
    await becomes(shared, "cal", "paused")
    events = await shared.api("POST", "/v1/sessions/cal/main/prompt", {"text": "hello again"})
    assert "event: result" in events
    assert "again" in events


async def test_a_running_turn_is_never_paused(shared: BrokerProcess) -> None:
    made = await shared.session("dan")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!sleep 2; echo done")
        assert "done" in "".join(str(update) for update in client.updates)
        going = asyncio.ensure_future(turn(agent, session.session_id, "!sleep 2; echo over"))
        await client.until(lambda: any("sleep 2; echo over" in str(update) for update in client.updates))
    # Nobody is attached any more, and it goes on.
    going.cancel()
    while (view := await shown(shared, "dan"))["state"] == "ready":
        last = view
        await asyncio.sleep(0.02)
    assert last["sandbox"]["open_turns"] == 0
    assert view["state"] == "paused"
    later = Client()
    async with connected(made["acp_url"], made["token"], later) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
    assert "over" in "".join(str(update) for update in later.updates)


async def test_a_change_waits_for_whoever_comes(shared: BrokerProcess) -> None:
    made = await shared.session("eve")
    await becomes(shared, "eve", "paused")
    answer = await shared.api("PUT", "/v1/users/eve/config/env", {"GREETING": "salve"})
    assert answer["applied"][0]["state"] == "stored"
    assert (await shown(shared, "eve"))["state"] == "paused"
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!echo $GREETING")
    assert "salve" in "".join(str(update) for update in client.updates)


async def test_intent_has_it_awake_and_waiting(shared: BrokerProcess) -> None:
    await shared.api("POST", "/v1/sessions/fay/main/prewarm")
    view = await becomes(shared, "fay", "paused")
    assert (view["warm"], view["clients"]) == (True, 0)
    status, _ = await shared.hook({"user": "fay", "action": "prewarm"})
    assert status == 202
    made = await shared.session("fay")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "hello from fay")
    assert "fay" in client.text
    bringups = (await shared.api("GET", "/v1/sessions/fay/main/timeline"))["bringups"]
    assert (bringups[-1]["path"], bringups[-1]["intent"]) == ("cold", "announced")
    assert bringups[0]["path"] == "user_warm"


async def test_many_wakes_lose_nothing(shared: BrokerProcess) -> None:
    """Clients speak at whatever moment of a pause, a wake and what lies between."""
    made = await shared.session("gil")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        for number in range(30):
            await asyncio.sleep(0.27 + 0.003 * number)
            result = await turn(agent, session.session_id, f"word-{number}-end")
            assert result.stop_reason == "end_turn"
            assert f"word-{number}-end" in client.text


async def test_a_broker_that_is_killed_takes_paused_ones_over(place: Path, driver: str) -> None:
    async with running(place, driver, process_config() + SOON.format(keep=600)) as broker:
        made = await broker.session("ann")
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, "remember aubergine")
        before = await becomes(broker, "ann", "paused")
        await broker.kill()
        await broker.start()
        again = Client()
        async with connected(made["acp_url"], made["token"], again) as agent:
            await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
            assert "aubergine" in again.text
            await turn(agent, session.session_id, "and celeriac")
        assert "celeriac" in again.text
        after = await shown(broker, "ann")
        assert after["sandbox"]["slot"] == before["sandbox"]["slot"]
        await becomes(broker, "ann", "paused")


async def test_one_that_nobody_comes_back_to_is_stopped_and_forgets_nothing(place: Path, driver: str) -> None:
    async with running(place, driver, process_config() + SOON.format(keep=1)) as broker:
        made = await broker.session("ann")
        client = Client()
        async with connected(made["acp_url"], made["token"], client) as agent:
            session = await agent.new_session(cwd="/", mcp_servers=[])
            await turn(agent, session.session_id, "remember aubergine")
        view = await becomes(broker, "ann", "stopped")
        assert "nobody used the session" in view["reason"]
        assert view["sandbox"] is None
        again = Client()
        async with connected(made["acp_url"], made["token"], again) as agent:
            await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        assert "aubergine" in again.text
        assert view["idle"]["paused_s"] > 0
