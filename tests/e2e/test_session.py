"""The whole way with a client that is not ours, on both drivers, with the built-in agent."""

from __future__ import annotations

import asyncio
from typing import Any

import acp
import pytest
import websockets

from tests.e2e.harness import BrokerProcess, Client, connected, turn

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


async def test_from_a_signed_hook_to_a_streamed_answer(shared: BrokerProcess) -> None:
    status, answer = await shared.hook({"user": "ann", "agent": "demo"})
    assert status in (200, 201), answer
    client = Client()
    async with connected(answer["acp_url"], answer["token"], client) as agent:
        session = await agent.new_session(cwd="/Users/ann/src/shop", mcp_servers=[])
        result = await turn(agent, session.session_id, "hello from ann")
    assert result.stop_reason == "end_turn"
    assert "hello from ann" in client.text
    chunks = [update for update in client.updates if update.session_update == "agent_message_chunk"]
    assert len(chunks) > 1, "the reply is streamed"


async def test_a_replayed_hook_gets_the_first_answer_and_a_stale_one_none(shared: BrokerProcess) -> None:
    _, first = await shared.hook({"user": "bea"}, hook_id="m1")
    _, again = await shared.hook({"user": "bea"}, hook_id="m1")
    assert again["token"] == first["token"]
    assert again["session"] == first["session"]
    status, problem = await shared.hook({"user": "bea"}, hook_id="m2", at=1_000_000_000)
    assert (status, problem["code"]) == (401, "hook.outside_tolerance")


async def test_the_agent_works_in_the_sandbox_workspace_not_in_the_clients_path(shared: BrokerProcess) -> None:
    made = await shared.session("cal")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="C:\\Users\\cal", mcp_servers=[])
        await turn(agent, session.session_id, "!pwd; id -u; ls /")
    shown = client.text + "".join(str(update) for update in client.updates)
    assert "/workspace" in shown


async def test_permission_requests_reach_the_client_and_its_answer_the_agent(shared: BrokerProcess) -> None:
    made = await shared.session("dan")
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!ask echo permitted-$((40 + 2))")
    assert client.permissions
    assert "permitted-42" in "".join(str(update) for update in client.updates)


async def test_cancel_ends_the_turn(shared: BrokerProcess) -> None:
    made = await shared.session("eve")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running = asyncio.ensure_future(turn(agent, session.session_id, "/slow 400"))
        await client.until(lambda: len(client.updates) > 3)
        await agent.cancel(session_id=session.session_id)
        result = await running
    assert result.stop_reason == "cancelled"


async def test_a_second_client_loads_the_conversation_and_both_see_what_follows(shared: BrokerProcess) -> None:
    made = await shared.session("fay")
    one, two = Client(), Client()
    async with connected(made["acp_url"], made["token"], one) as first:
        session = await first.new_session(cwd="/", mcp_servers=[])
        await turn(first, session.session_id, "remember the word aubergine")
        async with connected(made["acp_url"], made["token"], two) as second:
            await second.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
            assert "aubergine" in two.text, "the history is replayed"
            await turn(second, session.session_id, "and the word celeriac")
            await one.until(lambda: "celeriac" in one.text)
            assert "celeriac" in two.text


async def test_work_goes_on_when_the_client_leaves_and_is_there_when_it_comes_back(shared: BrokerProcess) -> None:
    made = await shared.session("gil")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running = asyncio.ensure_future(turn(agent, session.session_id, "/slow 30"))
        await client.until(lambda: len(client.updates) >= 2)
    running.cancel()
    later = Client()
    async with connected(made["acp_url"], made["token"], later) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        await later.until(lambda: len(later.text.split()) > len(client.text.split()))
        seen = len(client.updates)
        await later.until(lambda: len(later.updates) >= max(30, seen))


async def test_a_config_change_reaches_the_running_sandbox_with_that_part_alone(shared: BrokerProcess) -> None:
    made = await shared.session("hal")
    before = await shared.api("GET", "/v1/sessions/hal/main")
    server = {"mcpServers": {"echo": {"command": "/bin/cat", "args": []}}}
    written = await shared.metric('cortex_state_writes_total{kind="mcp",result="written"}')
    settings = await shared.metric('cortex_state_writes_total{kind="settings",result="written"}')
    answer = await shared.api("PUT", "/v1/users/hal/config/mcp", server)
    assert answer["effect"] in ("next_session", "now"), answer
    assert await shared.metric('cortex_state_writes_total{kind="mcp",result="written"}') == written + 1
    assert await shared.metric('cortex_state_writes_total{kind="settings",result="written"}') == settings
    again = await shared.api("PUT", "/v1/users/hal/config/mcp", server)
    assert await shared.metric('cortex_state_writes_total{kind="mcp",result="written"}') == written + 1, again
    after = await shared.api("GET", "/v1/sessions/hal/main")
    assert after["sandbox"]["slot"] == before["sandbox"]["slot"]
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "/mcp")
    # The one entry behind which the agent server runs the user's servers.
    assert "cortex" in client.text


async def test_a_bad_section_is_refused_with_the_field_and_nothing_changes(shared: BrokerProcess) -> None:
    problem = await shared.api("PUT", "/v1/users/ida/config/mcp", {"mcpServer": {}}, expect=422)
    assert problem["code"] == "config.invalid_section"
    assert "mcpServers" in problem["hint"]
    unknown = await shared.api("PUT", "/v1/users/ida/config/mpc", {}, expect=404)
    assert "mcp" in unknown["hint"]


@pytest.mark.asyncio(loop_scope="function")
async def test_a_killed_broker_loses_nothing_and_takes_the_running_agent_over(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running = asyncio.ensure_future(turn(agent, session.session_id, "/slow 60"))
        await client.until(lambda: len(client.updates) >= 3)
        before = await broker.api("GET", "/v1/sessions/ann/main")
        await broker.kill()
    running.cancel()
    await broker.start()
    later = Client()
    async with connected(made["acp_url"], made["token"], later) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        await later.until(lambda: len(later.updates) >= 61, 30)
        result = await turn(agent, session.session_id, "still there?")
    assert result.stop_reason == "end_turn"
    after = await broker.api("GET", "/v1/sessions/ann/main")
    assert after["sandbox"]["agent_pid"] == before["sandbox"]["agent_pid"], "the same agent process"
    assert after["sandbox"]["slot"] == before["sandbox"]["slot"]


async def test_a_stopped_session_wakes_for_a_client_with_home_and_history(shared: BrokerProcess) -> None:
    made = await shared.session("jon")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!echo kept > note.txt")
    await shared.api("POST", "/v1/sessions/jon/main/stop")
    assert (await shared.api("GET", "/v1/sessions/jon/main"))["state"] == "stopped"
    later = Client()
    async with connected(made["acp_url"], made["token"], later) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        await turn(agent, session.session_id, "!cat note.txt")
    assert "kept" in "".join(str(update) for update in later.updates)


async def test_revoking_closes_live_sockets_within_a_second(shared: BrokerProcess) -> None:
    made = await shared.session("kim")
    headers = {"Authorization": f"Bearer {made['token']}"}
    async with websockets.connect(made["acp_url"], additional_headers=headers, compression=None) as socket:
        await shared.api("DELETE", "/v1/sessions/kim/main/tokens")
        async with asyncio.timeout(1):
            await socket.wait_closed()
        assert socket.close_code == 4401
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(made["acp_url"], additional_headers=headers)
    assert refused.value.response.status_code == 401


async def test_another_users_token_opens_only_that_users_session(shared: BrokerProcess) -> None:
    lea, leo = await shared.session("lea"), await shared.session("leo")
    one, two = Client(), Client()
    async with (
        connected(lea["acp_url"], lea["token"], one) as first,
        connected(leo["acp_url"], leo["token"], two) as second,
    ):
        session = await first.new_session(cwd="/", mcp_servers=[])
        with pytest.raises(acp.RequestError):
            await second.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])


async def test_the_warm_path_does_nothing(shared: BrokerProcess) -> None:
    made = await shared.session("max")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "first")
        while await shared.metric('cortex_sessions{state="starting"}'):
            await asyncio.sleep(0.05)  # those of other tests
        before = await counters(shared)
        for number in range(5):
            await turn(agent, session.session_id, f"message {number}")
        assert await counters(shared) == before


async def counters(broker: BrokerProcess) -> dict[str, float]:
    """Everything that would show work off the relay: store, engine, state, assembly. What users did is written now
    and then, whether there are messages or not."""
    kinds = tuple(
        f"cortex_{name}_total"
        for name in ("store_reads", "store_writes", "sandbox_calls", "state_writes", "config_assembly")
    )
    text: Any = await broker.api("GET", "/metrics")
    lines = [line.rsplit(" ", 1) for line in text.splitlines()]
    found = {name: float(value) for name, value in lines if name.startswith(kinds)}
    found["cortex_store_writes_total"] -= float(dict(lines)["cortex_activity_writes_total"])
    return found


async def test_one_turn_over_plain_http_is_streamed(shared: BrokerProcess) -> None:
    await shared.session("nat")
    text = await shared.api("POST", "/v1/sessions/nat/main/prompt", {"text": "over http"})
    assert "over" in text
    assert "event: result" in text or '"stopReason":"end_turn"' in text.replace(" ", "")


async def test_health_timeline_and_openapi(shared: BrokerProcess) -> None:
    await shared.session("oda")
    assert (await shared.api("GET", "/livez"))["status"] == "ok"
    assert (await shared.api("GET", "/readyz?verbose"))["checks"]["engine"] == "ok"
    stages = (await shared.api("GET", "/v1/sessions/oda/main/timeline"))["bringups"][0]["stages"]
    assert {"assemble", "place", "start", "hello", "bind", "agent"} <= {stage["stage"] for stage in stages}
    assert "/v1/sessions" in (await shared.api("GET", "/v1/openapi.json"))["paths"]
