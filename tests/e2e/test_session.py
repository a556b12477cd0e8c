"""The whole way with a client that is not ours, on both drivers, with the built-in agent."""

from __future__ import annotations

import asyncio
from typing import Any

import acp
import pytest
import websockets

from tests.e2e.harness import BrokerProcess, Client, connected, turn

pytestmark = pytest.mark.timeout(180)


async def test_from_a_signed_hook_to_a_streamed_answer(broker: BrokerProcess) -> None:
    status, answer = await broker.hook({"user": "ann", "agent": "demo"})
    assert status in (200, 201), answer
    client = Client()
    async with connected(answer["acp_url"], answer["token"], client) as agent:
        session = await agent.new_session(cwd="/Users/ann/src/shop", mcp_servers=[])
        result = await turn(agent, session.session_id, "hello from ann")
    assert result.stop_reason == "end_turn"
    assert "hello from ann" in client.text
    chunks = [update for update in client.updates if update.session_update == "agent_message_chunk"]
    assert len(chunks) > 1, "the reply is streamed"


async def test_a_replayed_hook_gets_the_first_answer_and_a_stale_one_none(broker: BrokerProcess) -> None:
    _, first = await broker.hook({"user": "ann"}, hook_id="m1")
    _, again = await broker.hook({"user": "ann"}, hook_id="m1")
    assert again["token"] == first["token"]
    assert again["session"] == first["session"]
    status, problem = await broker.hook({"user": "ann"}, hook_id="m2", at=1_000_000_000)
    assert (status, problem["code"]) == (401, "hook.outside_tolerance")


async def test_the_agent_works_in_the_sandbox_workspace_not_in_the_clients_path(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="C:\\Users\\ann", mcp_servers=[])
        await turn(agent, session.session_id, "!pwd; id -u; ls /")
    shown = client.text + "".join(str(update) for update in client.updates)
    assert "/workspace" in shown


async def test_permission_requests_reach_the_client_and_its_answer_the_agent(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client(permission="allow_once")
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!ask echo permitted-$((40 + 2))")
    assert client.permissions
    assert "permitted-42" in "".join(str(update) for update in client.updates)


async def test_cancel_ends_the_turn(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running = asyncio.ensure_future(turn(agent, session.session_id, "/slow 400"))
        await client.until(lambda: len(client.updates) > 3)
        await agent.cancel(session_id=session.session_id)
        result = await running
    assert result.stop_reason == "cancelled"


async def test_a_second_client_loads_the_conversation_and_both_see_what_follows(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
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


async def test_work_goes_on_when_the_client_leaves_and_is_there_when_it_comes_back(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
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


async def test_a_config_change_reaches_the_running_sandbox_with_that_part_alone(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    before = await broker.api("GET", "/v1/sessions/ann/main")
    server = {"mcpServers": {"echo": {"command": "/bin/cat", "args": []}}}
    written = await broker.metric('cortex_state_writes_total{kind="mcp",result="written"}')
    settings = await broker.metric('cortex_state_writes_total{kind="settings",result="written"}')
    answer = await broker.api("PUT", "/v1/users/ann/config/mcp", server)
    assert answer["effect"] in ("next_session", "now"), answer
    assert await broker.metric('cortex_state_writes_total{kind="mcp",result="written"}') == written + 1
    assert await broker.metric('cortex_state_writes_total{kind="settings",result="written"}') == settings
    again = await broker.api("PUT", "/v1/users/ann/config/mcp", server)
    assert await broker.metric('cortex_state_writes_total{kind="mcp",result="written"}') == written + 1, again
    after = await broker.api("GET", "/v1/sessions/ann/main")
    assert after["sandbox"]["slot"] == before["sandbox"]["slot"]
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "/mcp")
    assert "echo" in client.text


async def test_a_bad_section_is_refused_with_the_field_and_nothing_changes(broker: BrokerProcess) -> None:
    problem = await broker.api("PUT", "/v1/users/ann/config/mcp", {"mcpServer": {}}, expect=422)
    assert problem["code"] == "config.invalid_section"
    assert "mcpServers" in problem["hint"]
    unknown = await broker.api("PUT", "/v1/users/ann/config/mpc", {}, expect=404)
    assert "mcp" in unknown["hint"]


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


async def test_a_stopped_session_wakes_for_a_client_with_home_and_history(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "!echo kept > note.txt")
    await broker.api("POST", "/v1/sessions/ann/main/stop")
    assert (await broker.api("GET", "/v1/sessions/ann/main"))["state"] == "stopped"
    later = Client()
    async with connected(made["acp_url"], made["token"], later) as agent:
        await agent.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])
        await turn(agent, session.session_id, "!cat note.txt")
    assert "kept" in "".join(str(update) for update in later.updates)


async def test_revoking_closes_live_sockets_within_a_second(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    headers = {"Authorization": f"Bearer {made['token']}"}
    async with websockets.connect(made["acp_url"], additional_headers=headers, compression=None) as socket:
        await broker.api("DELETE", "/v1/sessions/ann/main/tokens")
        async with asyncio.timeout(1):
            await socket.wait_closed()
        assert socket.close_code == 4401
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(made["acp_url"], additional_headers=headers)
    assert refused.value.response.status_code == 401


async def test_another_users_token_opens_only_that_users_session(broker: BrokerProcess) -> None:
    ann, bob = await broker.session("ann"), await broker.session("bob")
    one, two = Client(), Client()
    async with (
        connected(ann["acp_url"], ann["token"], one) as first,
        connected(bob["acp_url"], bob["token"], two) as second,
    ):
        session = await first.new_session(cwd="/", mcp_servers=[])
        with pytest.raises(acp.RequestError):
            await second.load_session(cwd="/", session_id=session.session_id, mcp_servers=[])


async def test_the_warm_path_does_nothing(broker: BrokerProcess) -> None:
    made = await broker.session("ann")
    client = Client()
    async with connected(made["acp_url"], made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        await turn(agent, session.session_id, "first")
        before = await counters(broker)
        for number in range(5):
            await turn(agent, session.session_id, f"message {number}")
        assert await counters(broker) == before


async def counters(broker: BrokerProcess) -> dict[str, str]:
    """Everything that would show work off the relay: store, engine, state, assembly."""
    kinds = tuple(
        f"cortex_{name}_total"
        for name in ("store_reads", "store_writes", "sandbox_calls", "state_writes", "config_assembly")
    )
    text: Any = await broker.api("GET", "/metrics")
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(kinds))


async def test_one_turn_over_plain_http_is_streamed(broker: BrokerProcess) -> None:
    await broker.session("ann")
    text = await broker.api("POST", "/v1/sessions/ann/main/prompt", {"text": "over http"})
    assert "over" in text
    assert "event: result" in text or '"stopReason":"end_turn"' in text.replace(" ", "")


async def test_health_timeline_and_openapi(broker: BrokerProcess) -> None:
    await broker.session("ann")
    assert (await broker.api("GET", "/livez"))["status"] == "ok"
    assert (await broker.api("GET", "/readyz?verbose"))["checks"]["engine"] == "ok"
    stages = (await broker.api("GET", "/v1/sessions/ann/main/timeline"))["bringups"][0]["stages"]
    assert {"assemble", "place", "start", "hello", "bind", "agent"} <= {stage["stage"] for stage in stages}
    assert "/v1/sessions" in (await broker.api("GET", "/v1/openapi.json"))["paths"]
