"""Which conversation an id means, and which prompt ran, whatever agents number and wherever files begin."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_agent import conversations as conversations_module
from sandbox_agent.journal import Segment
from tests.unit.sandbox_agent.acp.kit import Agent, Bench, of_kind, prompt

LOAD = {"cwd": "/", "mcpServers": []}


def offer_next_file(bench: Bench) -> None:
    """The broker's next journal file has come; the next write goes on in it."""
    journal = bench.hub._journal
    given = bench.files.files.open(journal._last.number + 1)
    journal._next = Segment(given.number, given.fd, 0)


async def begun(bench: Bench, number: int) -> None:
    async with asyncio.timeout(5):
        while bench.hub._journal._last.number < number:
            await asyncio.sleep(0.001)


async def loads_slowly(bench: Bench) -> Agent:
    """The agent process is a new one and takes its time to load."""
    agent = Agent()
    agent.on["session/load"] = lambda params: None
    bench.restart_agent(agent)
    return agent


async def test_a_prompt_that_was_accepted_as_a_journal_file_ended_runs_once(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    offer_next_file(bench)
    await bench.prompt(peer, session, "once", "m1")
    await bench.agent.asked("session/prompt")
    await begun(bench, 1)
    await bench.crash()
    bench.start(agent=Agent())
    reply = await bench.connect().request("session/prompt", prompt(session, "once", "m1"))
    assert reply["error"]["data"]["code"] == "agent.failed"
    assert not bench.agent.all("session/prompt")


async def test_a_prompt_that_was_started_as_a_journal_file_ended_runs_once(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    agent = await loads_slowly(bench)
    await bench.prompt(peer, session, "once", "m1")
    await agent.asked("session/load")
    offer_next_file(bench)
    agent.answer("session/load", {})
    await agent.asked("session/prompt")
    await begun(bench, 1)
    await bench.crash()
    bench.start(agent=Agent())
    reply = await bench.connect().request("session/prompt", prompt(session, "once", "m1"))
    assert reply["error"]["data"]["code"] == "agent.failed"
    assert not bench.agent.all("session/prompt")


async def test_a_conversation_that_was_deleted_as_a_journal_file_ended_stays_deleted(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    offer_next_file(bench)
    await peer.request("session/delete", {"sessionId": session})
    await begun(bench, 1)
    await bench.crash()
    bench.start(agent=Agent({}))
    assert (await bench.connect().request("session/list"))["result"]["sessions"] == []


async def test_an_agent_id_that_is_given_again_is_taken_from_the_older_conversation(bench: Bench) -> None:
    """An agent that numbers anew with each process: "old" lives on as the second one's s1, then a third process
    calls a new conversation s1. Neither may get what is said in the other."""
    bench.start(agent=Agent({}))
    peer, other = bench.connect(), bench.connect()
    bench.agent.prefix = "old"
    old = await bench.session(peer)
    second = Agent({})
    bench.restart_agent(second)
    await bench.prompt(peer, old, "goes on as s1")
    assert (await second.asked("session/prompt"))["params"]["sessionId"] == "s1"
    second.answer("session/prompt", {"stopReason": "end_turn"})

    third = Agent()
    bench.restart_agent(third)
    new = await bench.session(other)
    await bench.prompt(peer, old, "mine")
    asked = await third.asked("session/prompt")
    assert asked["params"]["sessionId"] != "s1"
    third.update("s1", "for the new one")
    third.update(asked["params"]["sessionId"], "for the old one")
    assert await other.texts(1) == ["for the new one"]
    assert await peer.texts(1) == ["for the old one"]
    assert new != old


async def test_agent_ids_are_not_mixed_up_after_a_restart_either(bench: Bench) -> None:
    bench.start(agent=Agent({}))
    peer = bench.connect()
    first, second = await bench.session(peer), await bench.session(peer)
    bench.restart_agent(Agent({}))
    await bench.prompt(peer, second, "I am s1 now")
    assert (await bench.agent.asked("session/prompt"))["params"]["sessionId"] == "s1"
    await bench.crash()
    bench.start(agent=Agent())
    bench.agent.prefix = "n"
    peer = bench.connect()
    await peer.request("session/load", {"sessionId": first, **LOAD})
    await peer.request("session/load", {"sessionId": second, **LOAD})
    loaded = [message["params"]["sessionId"] for message in bench.agent.all("session/load")]
    assert loaded == ["s1"]
    bench.agent.update("s1", "to the second")
    said = await peer.until(lambda m: of_kind(m) == "agent_message_chunk")
    assert said["params"]["sessionId"] == second


async def test_nobody_adopts_a_conversation_by_the_agents_own_id_for_it(bench: Bench) -> None:
    bench.start(agent=Agent({}))
    peer = bench.connect()
    bench.agent.prefix = "old"
    old = await bench.session(peer)
    bench.restart_agent(Agent())
    bench.agent.on["session/load"] = lambda params: (_ for _ in ()).throw(ValueError("it is gone"))
    await bench.prompt(peer, old, "goes on as s1")
    assert (await bench.agent.asked("session/prompt"))["params"]["sessionId"] == "s1"
    reply = await bench.connect().request("session/load", {"sessionId": "s1", **LOAD})
    assert reply["error"]["data"]["code"] == "session.not_found"
    bench.agent.update("s1", "still to the first")
    assert await peer.texts(1) == ["still to the first"]


async def test_two_that_adopt_one_conversation_both_get_its_history(bench: Bench) -> None:
    bench.start()
    bench.agent.on["session/load"] = lambda params: None
    one, two = bench.connect(), bench.connect()
    first = await one.ask("session/load", {"sessionId": "foreign", **LOAD})
    await bench.agent.asked("session/load")
    second = await two.ask("session/load", {"sessionId": "foreign", **LOAD})
    await two.request("session/list")
    bench.agent.update("foreign", "long ago")
    bench.agent.answer("session/load", {})
    assert "result" in await one.answer_to(first)
    assert "result" in await two.answer_to(second)
    assert await one.texts(1) == ["long ago"]
    assert await two.texts(1) == ["long ago"]
    assert len(bench.agent.all("session/load")) == 1


async def test_conversations_are_bounded_and_the_one_unused_longest_goes_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations_module, "MAX_CONVERSATIONS", 3)
    bench.start()
    early = bench.connect()
    first, second = await bench.session(early), await bench.session(early)
    await bench.prompt(early, first, "used later")
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    early.close()
    while bench.hub.clients:
        await asyncio.sleep(0.001)
    peer = bench.connect()
    made = [await bench.session(peer), await bench.session(peer)]
    listed = {s["sessionId"] for s in (await peer.request("session/list"))["result"]["sessions"]}
    assert listed == {first, *made}
    assert second not in listed
    made.append(await bench.session(peer))
    refused = await peer.request("session/new", LOAD)
    assert refused["error"]["data"]["code"] == "session.overloaded"
    assert refused["error"]["data"]["hint"]
    await peer.request("session/close", {"sessionId": made[0]})
    assert "result" in await peer.request("session/new", LOAD)


async def test_a_prompt_that_waits_for_a_load_outlives_the_agents_death_in_it(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    agent = Agent()
    agent.on["_cortex/fence"] = lambda params: None
    bench.restart_agent(agent)
    request = await bench.prompt(peer, session, "patience", "m1")
    await agent.asked("_cortex/fence")
    bench.restart_agent(Agent())
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert (await peer.answer_to(request))["result"]["stopReason"] == "end_turn"


async def test_after_a_quiet_load_what_the_agent_says_is_heard_again(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    bench.restart_agent(Agent())
    await peer.request("session/load", {"sessionId": session, **LOAD})
    assert bench.agent.all("session/load")
    bench.agent.update(session, "by itself")
    assert await peer.texts(1) == ["by itself"]


async def test_the_agents_ids_and_extras_are_bounded(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    bench.agent.on["session/new"] = lambda params: {"sessionId": "x" * 2000}
    assert (await peer.request("session/new", LOAD))["error"]["data"]["code"] == "agent.failed"
    bench.agent.on["session/new"] = lambda params: {"sessionId": "s1", "modes": {"huge": "y" * 2**20}}
    assert len((await peer.request("session/new", LOAD))["result"]["modes"]["huge"]) == 2**20
    request = await bench.prompt(peer, "s1", "hi", "m1")
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn", "huge": "z" * 2**20})
    await peer.answer_to(request)
    state = bench.hub._conversations.snapshot()
    assert len(str(state)) < 5000
    again = await peer.request("session/prompt", prompt("s1", "hi", "m1"))
    assert again["result"]["stopReason"] == "end_turn"


async def test_what_is_said_before_a_session_made_anew_has_its_id_is_not_lost(bench: Bench) -> None:
    bench.start(agent=Agent({}))
    peer = bench.connect()
    session = await bench.session(peer)
    agent = Agent({})
    agent.on["session/new"] = lambda params: None
    bench.restart_agent(agent)
    await bench.prompt(peer, session)
    await agent.asked("session/new")
    agent.update("fresh", "commands")
    agent.answer("session/new", {"sessionId": "fresh"})
    await agent.asked("session/prompt")
    agent.update("fresh", "reply")
    assert await peer.texts(2) == ["commands", "reply"]
    assert bench.hub.garbage == 0


async def test_a_model_that_was_chosen_is_followed(bench: Bench) -> None:
    bench.start()
    models = {"currentModelId": "a", "availableModels": [{"modelId": "a", "name": "A"}, {"modelId": "b", "name": "B"}]}
    bench.agent.on["session/new"] = lambda params: {"sessionId": "s1", "models": models}
    bench.agent.on["session/set_model"] = lambda params: {}
    peer = bench.connect()
    session = await bench.session(peer)
    await peer.request("session/set_model", {"sessionId": session, "modelId": "b"})
    reply = await peer.request("session/load", {"sessionId": session, **LOAD})
    assert reply["result"]["models"]["currentModelId"] == "b"
