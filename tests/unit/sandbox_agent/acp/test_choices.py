"""What clients have chosen in a conversation, and that it is so again when the agent has opened it anew."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import choices
from sandbox_agent.choices import Choice
from sandbox_agent.conversations import MAX_CHOICE_BYTES, Conversation
from tests.unit.sandbox_agent.acp.kit import Agent, Bench, Message, Peer

LOAD = {"cwd": "/", "mcpServers": []}
MODES = {"currentModeId": "ask", "availableModes": [{"id": "ask"}, {"id": "code"}]}
MODELS = {"currentModelId": "big", "availableModels": [{"modelId": "big"}, {"modelId": "small"}]}
MODE = {"id": "mode", "category": "mode", "currentValue": "ask"}
EFFORT = {"id": "effort", "currentValue": "low"}


def held(**extras: Any) -> Conversation:
    return Conversation(1, "c", "s1", "/", extras=extras)


def options(mode: str = "ask", effort: str = "low") -> list[Message]:
    return [MODE | {"currentValue": mode}, EFFORT | {"currentValue": effort}]


def set_mode(mode: str) -> Choice:
    return Choice("session/set_mode", {"modeId": mode})


def set_option(name: str, value: Any) -> Choice:
    return Choice("session/set_config_option", {"configId": name, "value": value})


def test_what_was_not_chosen_is_the_agents_to_say() -> None:
    found = held(modes=MODES, configOptions=options())
    assert choices.again(found.chosen, {"modes": MODES | {"currentModeId": "code"}}) == []


def test_what_was_chosen_is_chosen_again_where_it_is_not_so() -> None:
    found = held(modes=MODES, models=MODELS, configOptions=[EFFORT])
    assert choices.follow(found, set_mode("code"), {"result": {}})
    assert choices.follow(found, Choice("session/set_model", {"modelId": "small"}), {"result": None})
    assert choices.follow(
        found, set_option("effort", "high"), {"result": {"configOptions": [EFFORT | {"currentValue": "high"}]}}
    )
    assert choices.again(found.chosen, found.extras) == []
    anew = {"modes": MODES, "models": MODELS, "configOptions": [EFFORT]}
    assert choices.again(found.chosen, anew) == [
        set_mode("code"),
        Choice("session/set_model", {"modelId": "small"}),
        set_option("effort", "high"),
    ]
    assert choices.again(found.chosen, {}) == [], "nothing says that there is such a choice"


def test_of_a_mode_that_is_an_option_too_the_latest_choice_counts() -> None:
    found = held(modes=MODES, configOptions=options())
    choices.follow(found, set_mode("code"), {"result": {}})
    choices.follow(found, set_option("mode", "ask"), {"result": {"configOptions": options("ask")}})
    assert found.chosen == {"option:mode": "ask"}
    choices.follow(found, set_mode("code"), {"result": {}})
    assert found.chosen == {"mode": "code"}
    choices.follow(found, set_option("effort", "high"), {"result": {"configOptions": options("ask", "high")}})
    assert found.chosen == {"mode": "code", "option:effort": "high"}


def test_what_the_agent_says_later_counts() -> None:
    found = held(modes=MODES, configOptions=options())
    choices.follow(found, set_mode("code"), {"result": {}})
    choices.follow(found, set_option("effort", "high"), {"result": {"configOptions": options("ask", "high")}})
    found.set_mode("ask")
    found.set_options(options("ask", "medium"))
    choices.said_by_agent(found)
    assert found.chosen == {"mode": "ask", "option:effort": "medium"}


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        (set_mode("code"), {"error": {"code": 1, "message": "no"}}),
        (Choice("session/set_mode", {"modeId": 7}), {"result": {}}),
        (Choice("session/set_mode", {}), {"result": {}}),
        (Choice("session/set_model", {"modelId": "small"}), {"result": {}}),
        (set_option("effort", "high"), {"result": {}}),
        (Choice("session/other", {}), {"result": {}}),
    ],
)
def test_what_was_not_taken_or_means_nothing_is_not_kept(choice: Choice, reply: Message) -> None:
    found = held(modes=MODES, configOptions=[EFFORT])
    assert not choices.follow(found, choice, reply)
    assert found.chosen == {}


def test_what_is_kept_is_bounded() -> None:
    found = held(configOptions=[])
    for number in range(100):
        choices.follow(found, set_option(f"o{number}", "x" * 40), {"result": {"configOptions": []}})
    assert 5 < len(found.chosen) < 60
    assert len(str(found.chosen)) <= MAX_CHOICE_BYTES * 1.2


NAMES = [
    "modes",
    "models",
    "configOptions",
    "currentModeId",
    "currentModelId",
    "currentValue",
    "id",
    "category",
    "mode",
]
Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(NAMES), Json, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(["session/set_mode", "session/set_model", "session/set_config_option"]), Json),
        max_size=4,
    ),
    Json,
)
def test_nothing_that_an_agent_or_a_client_says_is_too_much(extras: Message, asked: Any, answer: Any) -> None:
    found = held(**extras)
    for method, value in asked:
        params = {"modeId": value, "modelId": value, "configId": value, "value": value}
        choices.follow(found, Choice(method, params), {"result": answer})
    choices.said_by_agent(found)
    assert choices.again(found.chosen, found.extras) == []


# -- in conversations --------------------------------------------------------------------------------


def choosing(agent: Agent) -> Agent:
    agent.on["session/set_mode"] = lambda params: {}
    return agent


async def chosen(bench: Bench, peer: Peer, session: str, mode: str = "code") -> None:
    assert "result" in await peer.request("session/set_mode", {"sessionId": session, "modeId": mode})


async def spoken(bench: Bench, peer: Peer, session: str) -> None:
    """A prompt, so that there is something to lose."""
    count = len(bench.agent.all("session/prompt"))
    request = await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt", count + 1)
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    await peer.answer_to(request)


async def test_an_agent_that_was_started_anew_is_in_the_chosen_mode_before_it_gets_a_prompt(bench: Bench) -> None:
    bench.start(agent=choosing(Agent()))
    peer = bench.connect()
    session = await bench.session(peer)
    await spoken(bench, peer, session)
    await chosen(bench, peer, session)
    agent = choosing(Agent())
    modes = {"currentModeId": "ask", "availableModes": []}
    agent.on["session/load"] = lambda params: {"modes": modes}
    bench.restart_agent(agent)
    await spoken(bench, peer, session)
    methods = [message["method"] for message in agent.got]
    assert methods.index("session/set_mode") < methods.index("session/prompt")
    assert agent.last("session/set_mode")["params"] == {"sessionId": session, "modeId": "code"}
    loaded = await peer.request("session/load", {"sessionId": session, **LOAD})
    assert loaded["result"]["modes"]["currentModeId"] == "code"


async def test_so_is_one_that_has_the_conversation_from_the_journal(bench: Bench) -> None:
    bench.start(agent=choosing(Agent()))
    peer = bench.connect()
    session = await bench.session(peer)
    await spoken(bench, peer, session)
    await chosen(bench, peer, session)
    await bench.crash()
    agent = choosing(Agent())
    agent.on["session/load"] = lambda params: {"modes": {"currentModeId": "ask", "availableModes": []}}
    bench.start(agent=agent)
    await spoken(bench, bench.connect(), session)
    assert agent.last("session/set_mode")["params"]["modeId"] == "code"


async def test_a_mode_that_cannot_be_set_any_more_is_no_obstacle(bench: Bench) -> None:
    def refuses(params: Message) -> Message:
        raise ValueError("no such mode")

    bench.start(agent=choosing(Agent()))
    peer = bench.connect()
    session = await bench.session(peer)
    await chosen(bench, peer, session)
    agent = Agent()
    agent.on["session/load"] = lambda params: {"modes": {"currentModeId": "ask", "availableModes": []}}
    agent.on["session/set_mode"] = refuses
    bench.restart_agent(agent)
    await spoken(bench, peer, session)
    loaded = await peer.request("session/load", {"sessionId": session, **LOAD})
    assert loaded["result"]["modes"]["currentModeId"] == "ask", "what is so is said, not what was wished"


async def test_what_an_agent_begins_with_is_not_a_choice(bench: Bench) -> None:
    """It says its own mode while it opens the conversation again."""
    capabilities: Message = {"sessionCapabilities": {"resume": {}}}
    bench.start(agent=choosing(Agent(capabilities)))
    peer = bench.connect()
    session = await bench.session(peer)
    await spoken(bench, peer, session)
    await chosen(bench, peer, session)
    agent = choosing(Agent(capabilities))
    agent.on["session/resume"] = lambda params: None
    bench.restart_agent(agent)
    request = await bench.prompt(peer, session)
    await agent.asked("session/resume")
    said = {"sessionUpdate": "current_mode_update", "currentModeId": "ask"}
    agent.say({"method": "session/update", "params": {"sessionId": session, "update": said}})
    agent.answer("session/resume", {})
    await agent.asked("session/prompt")
    assert agent.last("session/set_mode")["params"]["modeId"] == "code"
    agent.answer("session/prompt", {"stopReason": "end_turn"})
    await peer.answer_to(request)


async def test_an_agent_that_dies_while_it_is_told_is_told_again(bench: Bench) -> None:
    bench.start(agent=choosing(Agent()))
    peer = bench.connect()
    session = await bench.session(peer)
    await chosen(bench, peer, session)
    dying, next_one = Agent(), choosing(Agent())
    for agent in (dying, next_one):
        agent.on["session/load"] = lambda params: {"modes": {"currentModeId": "ask", "availableModes": []}}
    bench.restart_agent(dying)
    request = await bench.prompt(peer, session)
    await dying.asked("session/set_mode")
    bench.restart_agent(next_one)
    await next_one.asked("session/prompt")
    assert next_one.last("session/set_mode")["params"]["modeId"] == "code"
    next_one.answer("session/prompt", {"stopReason": "end_turn"})
    assert "result" in await peer.answer_to(request)
