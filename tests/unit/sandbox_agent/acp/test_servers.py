"""MCP servers: one entry for all on stdio, and when a change of them reaches a conversation that is open."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sandbox_agent import turns as turns_module
from tests.unit.sandbox_agent.acp.kit import SPEC, Agent, Bench, Message, Mux, of_kind, prompt

LIVE = replace(SPEC, live_mcp=True)
END = {"stopReason": "end_turn"}
LOAD = {"cwd": "/", "mcpServers": []}


def stdio(name: str) -> Message:
    return {"name": name, "command": f"/bin/{name}", "args": [], "env": []}


def http(name: str) -> Message:
    return {"type": "http", "name": name, "url": f"https://{name}.example", "headers": []}


async def turn(bench: Bench, peer: Any, session: str, text: str = "hi") -> None:
    """A whole one."""
    count = len(bench.agent.all("session/prompt"))
    request = await bench.prompt(peer, session, text)
    await bench.agent.asked("session/prompt", count + 1)
    bench.agent.answer("session/prompt", END)
    await peer.answer_to(request)


async def settled() -> None:
    """What is due in this turn of the loop and the next ones has happened."""
    for _ in range(5):
        await asyncio.sleep(0)


# -- entries -----------------------------------------------------------------------------------------


async def test_servers_on_stdio_are_behind_one_entry_and_others_stand_for_themselves(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a"), http("web"), stdio("b")])
    await bench.session(bench.connect())
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [Mux.ENTRY, http("web")]
    assert bench.mux.servers == [stdio("a"), stdio("b")]
    assert bench.mux.started


async def test_without_servers_there_is_no_multiplexer(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([http("web")])
    await bench.session(bench.connect())
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [http("web")]
    assert bench.muxes == []


async def test_an_agent_that_follows_changes_has_the_entry_from_the_start(bench: Bench) -> None:
    bench.spec = LIVE
    bench.start()
    bench.hub.set_mcp([])
    await bench.session(bench.connect())
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [Mux.ENTRY]


async def test_a_clients_own_servers_do_not_take_a_name_that_is_taken(bench: Bench) -> None:
    bench.start()
    bench.hub.set_settings({"allow_client_mcp": True})
    bench.hub.set_mcp([stdio("a"), http("web")])
    theirs = [stdio("a"), stdio("web"), stdio("cortex"), stdio("mine")]
    await bench.connect().request("session/new", {"cwd": "/", "mcpServers": theirs})
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [Mux.ENTRY, http("web"), stdio("mine")]


async def test_an_agent_that_speaks_its_own_protocol_has_no_servers_run_for_it(bench: Bench) -> None:
    bench.spec = replace(SPEC, protocol="websocket")
    bench.start(up=False)
    bench.hub.set_mcp([stdio("a")])
    await settled()
    assert bench.muxes == []


async def test_servers_are_started_anew_with_a_new_environment_or_home(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.restart_agent(Agent())
    await settled()
    assert bench.mux.renewed == 0
    bench.spec = replace(SPEC, env={"COLOUR": "green"})
    bench.restart_agent(Agent())
    await settled()
    assert bench.mux.renewed == 1
    bench.restart_agent(Agent())
    await settled()
    assert bench.mux.renewed == 1
    bench.hub._servers.home_moved()
    await settled()
    assert bench.mux.renewed == 2
    bench.restart_agent(Agent())
    await settled()
    assert bench.mux.renewed == 2


# -- changes -----------------------------------------------------------------------------------------


async def test_an_agent_that_follows_changes_has_new_servers_now(bench: Bench) -> None:
    bench.spec = LIVE
    bench.start()
    bench.hub.set_mcp([])
    peer = bench.connect()
    session = await bench.session(peer)
    assert bench.hub.set_mcp([stdio("a")]) == "now"
    await turn(bench, peer, session)
    assert not bench.agent.all("session/load")
    assert bench.mux.servers == [stdio("a")]


async def test_other_agents_have_new_servers_with_the_next_turn_and_nobody_sees_how(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await turn(bench, peer, session)
    assert bench.hub.set_mcp([stdio("a")]) == "next_turn"
    bench.agent.on["session/load"] = lambda params: None
    request = await bench.prompt(peer, session, "with tools")
    loaded = await bench.agent.asked("session/load")
    assert loaded["params"]["mcpServers"] == [Mux.ENTRY]
    assert len(bench.agent.all("session/prompt")) == 1
    bench.agent.update(session, "replayed")
    bench.agent.answer("session/load", {})
    await bench.agent.asked("session/prompt", 2)
    bench.agent.answer("session/prompt", END)
    assert "result" in await peer.answer_to(request)
    assert not [m for m in peer.everything if of_kind(m) == "agent_message_chunk"]
    await turn(bench, peer, session)
    assert len(bench.agent.all("session/load")) == 1


async def test_servers_that_change_within_a_turn_come_with_the_next_one(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    first = await bench.prompt(peer, session, "one")
    await bench.agent.asked("session/prompt")
    assert bench.hub.set_mcp([stdio("a")]) == "next_turn"
    second = await bench.prompt(peer, session, "two")
    await peer.request("session/list")
    assert not bench.agent.all("session/load")
    bench.agent.answer("session/prompt", END)
    await peer.answer_to(first)
    await bench.agent.asked("session/load")
    await bench.agent.asked("session/prompt", 2)
    bench.agent.answer("session/prompt", END)
    assert "result" in await peer.answer_to(second)


async def test_a_turn_that_runs_is_not_disturbed_by_who_loads_the_conversation(bench: Bench) -> None:
    bench.start()
    peer, other = bench.connect(), bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session, "one")
    await bench.agent.asked("session/prompt")
    bench.hub.set_mcp([stdio("a")])
    assert "result" in await other.request("session/load", {"sessionId": session, **LOAD})
    assert not bench.agent.all("session/load")


async def test_an_agent_that_can_reopen_nothing_has_new_servers_in_the_next_conversation(bench: Bench) -> None:
    bench.start(agent=Agent({}))
    peer = bench.connect()
    session = await bench.session(peer)
    assert bench.hub.set_mcp([stdio("a")]) == "next_session"
    await turn(bench, peer, session)
    assert len(bench.agent.all("session/new")) == 1
    await bench.session(peer)
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [Mux.ENTRY]


async def test_a_conversation_that_cannot_be_opened_again_goes_on_as_it_was(bench: Bench) -> None:
    def refuses(params: Message) -> Message:
        raise ValueError("no such file")

    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    bench.hub.set_mcp([stdio("a")])
    bench.agent.on["session/load"] = refuses
    await turn(bench, peer, session)
    await turn(bench, peer, session)
    assert len(bench.agent.all("session/load")) == 1
    assert len(bench.agent.all("session/new")) == 1


CLOSES = {"loadSession": True, "sessionCapabilities": {"close": {}, "resume": {}}}


async def test_a_conversation_is_closed_before_it_is_opened_again(bench: Bench) -> None:
    """codex-acp 2.6 goes on with the servers it has, as long as it has the conversation."""
    bench.start(agent=Agent(CLOSES))
    peer = bench.connect(cortex=True)
    session = await bench.session(peer)
    await turn(bench, peer, session)
    bench.hub.set_mcp([stdio("a")])
    bench.agent.on["session/close"] = lambda params: None
    bench.agent.on["session/resume"] = lambda params: {}
    request = await bench.prompt(peer, session)
    assert (await bench.agent.asked("session/close"))["params"] == {"sessionId": session}
    await peer.request("session/list")
    assert not bench.agent.all("session/resume")
    bench.agent.answer("session/close", {})
    assert (await bench.agent.asked("session/resume"))["params"]["mcpServers"] == [Mux.ENTRY]
    await bench.agent.asked("session/prompt", 2)
    bench.agent.answer("session/prompt", END)
    await peer.answer_to(request)
    assert not [m for m in peer.everything if m.get("method") == "_cortex/status"]


async def test_one_in_which_nothing_was_said_is_made_anew_and_nothing_is_lost(bench: Bench) -> None:
    """No agent has anything of it that it could open."""
    bench.start(agent=Agent(CLOSES))
    bench.agent.on["session/close"] = lambda params: {}
    peer = bench.connect(cortex=True)
    session = await bench.session(peer)
    bench.hub.set_mcp([stdio("a")])
    await bench.prompt(peer, session)
    asked = await bench.agent.asked("session/prompt")
    assert asked["params"]["sessionId"] == "s2"
    assert not bench.agent.all("session/resume")
    bench.agent.update("s2", "hello")
    assert (await peer.until(lambda m: of_kind(m) == "agent_message_chunk"))["params"]["sessionId"] == session
    assert not [m for m in peer.everything if m.get("method") == "_cortex/status"]


async def test_one_that_cannot_be_closed_may_still_be_opened_again_or_goes_on(bench: Bench) -> None:
    def refuses(params: Message) -> Message:
        raise ValueError("not now")

    bench.start(agent=Agent(CLOSES))
    bench.agent.on["session/close"] = bench.agent.on["session/resume"] = refuses
    peer = bench.connect(cortex=True)
    session = await bench.session(peer)
    bench.hub.set_mcp([stdio("a")])
    await turn(bench, peer, session)
    assert bench.agent.last("session/prompt")["params"]["sessionId"] == "s1"
    assert len(bench.agent.all("session/resume")) == 1
    assert not [m for m in peer.everything if m.get("method") == "_cortex/status"]


async def test_one_that_was_closed_and_cannot_be_opened_again_is_said_to_have_forgotten(bench: Bench) -> None:
    def refuses(params: Message) -> Message:
        raise ValueError("no such file")

    bench.start(agent=Agent(CLOSES))
    bench.agent.on["session/close"] = lambda params: {}
    bench.agent.on["session/resume"] = refuses
    peer = bench.connect(cortex=True)
    session = await bench.session(peer)
    await turn(bench, peer, session)
    bench.hub.set_mcp([stdio("a")])
    await turn(bench, peer, session)
    assert bench.agent.last("session/prompt")["params"]["sessionId"] == "s2"
    told = [m["params"] for m in peer.everything if m.get("method") == "_cortex/status"]
    assert [params["code"] for params in told] == ["agent.context_lost"]


async def test_an_agent_that_dies_between_closing_and_opening_is_asked_again(bench: Bench) -> None:
    bench.start(agent=Agent(CLOSES))
    peer = bench.connect()
    session = await bench.session(peer)
    await turn(bench, peer, session)
    bench.hub.set_mcp([stdio("a")])
    request = await bench.prompt(peer, session)
    await bench.agent.asked("session/close")
    agent = Agent(CLOSES)
    agent.on["session/resume"] = lambda params: {}
    bench.restart_agent(agent)
    await agent.asked("session/prompt")
    assert not agent.all("session/close")
    agent.answer("session/prompt", END)
    assert "result" in await peer.answer_to(request)


async def test_a_server_with_an_address_reaches_an_open_conversation_when_it_is_loaded(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    assert bench.hub.set_mcp([http("web")]) == "next_session"
    await turn(bench, peer, session)
    assert not bench.agent.all("session/load")
    await peer.request("session/load", {"sessionId": session, **LOAD})
    assert bench.agent.last("session/load")["params"]["mcpServers"] == [http("web")]
    assert bench.hub.set_mcp([http("web")]) == "now"


async def test_the_servers_as_they_were_when_it_was_asked_for_count_not_as_they_are_when_it_is_there(
    bench: Bench,
) -> None:
    bench.start()
    bench.agent.on["session/new"] = lambda params: None
    peer = bench.connect()
    request = await peer.ask("session/new", LOAD)
    await bench.agent.asked("session/new")
    bench.hub.set_mcp([stdio("a")])
    bench.agent.answer("session/new", {"sessionId": "s1"})
    await peer.answer_to(request)
    await turn(bench, peer, "s1")
    assert len(bench.agent.all("session/load")) == 1


# -- the first prompt --------------------------------------------------------------------------------


async def test_the_first_prompt_after_a_change_waits_for_the_tools_and_no_other_does(bench: Bench) -> None:
    bench.spec = LIVE
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    peer = bench.connect()
    session = await bench.session(peer)
    await turn(bench, peer, session)
    bench.mux.settle(False)
    await turn(bench, peer, session, "a server that has died is not waited for")
    bench.hub.set_mcp([stdio("b")])
    request = await bench.prompt(peer, session)
    await peer.request("session/list")
    assert len(bench.agent.all("session/prompt")) == 2
    bench.mux.settle()
    await bench.agent.asked("session/prompt", 3)
    bench.agent.answer("session/prompt", END)
    await peer.answer_to(request)


async def test_the_first_prompt_of_a_conversation_waits_for_the_tools_and_no_other_does(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.settle(False)
    peer = bench.connect()
    session = await bench.session(peer)
    request = await bench.prompt(peer, session)
    await peer.request("session/list")
    assert not bench.agent.all("session/prompt")
    assert bench.hub.open_turns == 1
    bench.mux.settle()
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", END)
    await peer.answer_to(request)
    bench.mux.settle(False)
    await turn(bench, peer, session, "second")


async def test_an_agent_that_follows_changes_is_waited_for_until_it_has(bench: Bench) -> None:
    bench.spec = LIVE
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.follow(False)
    peer = bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session)
    await peer.request("session/list")
    assert not bench.agent.all("session/prompt")
    bench.mux.follow()
    await bench.agent.asked("session/prompt")


async def test_an_agent_that_does_not_is_not(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.follow(False)
    peer = bench.connect()
    await turn(bench, peer, await bench.session(peer))


async def test_tools_of_servers_that_were_just_configured_are_not_known(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    assert not bench.hub._servers.settled
    await settled()
    assert bench.hub._servers.settled


async def test_it_waits_no_longer_than_that(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "TOOLS_S", 0.05)
    bench.start()
    bench.hub.set_mcp([stdio("slow")])
    await settled()
    bench.mux.settle(False)
    peer = bench.connect()
    session = await bench.session(peer)
    await turn(bench, peer, session)


async def test_a_prompt_that_waits_can_be_cancelled(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.settle(False)
    peer = bench.connect()
    session = await bench.session(peer)
    request = await bench.prompt(peer, session)
    await peer.notify("session/cancel", {"sessionId": session})
    assert (await peer.answer_to(request))["result"]["stopReason"] == "cancelled"
    bench.mux.settle()
    await peer.request("session/list")
    assert not bench.agent.all("session/prompt")


async def test_a_conversation_that_is_loaded_while_its_prompt_waits_goes_on(bench: Bench) -> None:
    bench.start()
    peer, other = bench.connect(), bench.connect()
    session = await bench.session(peer)
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.settle(False)
    request = await bench.prompt(peer, session)
    await bench.agent.asked("_cortex/fence")
    await settled()
    bench.hub.set_mcp([stdio("b")])
    bench.agent.on["session/load"] = lambda params: None
    loading = await other.ask("session/load", {"sessionId": session, **LOAD})
    await bench.agent.asked("session/load", 2)
    bench.mux.settle()
    bench.agent.answer("session/load", {})
    await other.answer_to(loading)
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", END)
    assert "result" in await peer.answer_to(request)


async def test_after_a_restart_of_the_agent_the_prompt_waits_again(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    peer = bench.connect()
    session = await bench.session(peer)
    await turn(bench, peer, session)
    bench.restart_agent(Agent())
    bench.mux.settle(False)
    await bench.prompt(peer, session)
    await bench.agent.asked("session/load")
    await peer.request("session/list")
    assert not bench.agent.all("session/prompt")
    bench.mux.settle()
    await bench.agent.asked("session/prompt")


async def test_prompt_params_are_not_lost_while_it_waits(bench: Bench) -> None:
    bench.start()
    bench.hub.set_mcp([stdio("a")])
    await settled()
    bench.mux.settle(False)
    peer = bench.connect()
    session = await bench.session(peer)
    await peer.ask("session/prompt", prompt(session, "words", "m1"))
    await peer.request("session/list")
    bench.mux.settle()
    assert (await bench.agent.asked("session/prompt"))["params"]["prompt"][0]["text"] == "words"
    assert bench.hub.turns == 1
