"""What passes between conversations and servers: ids, progress, cancelling, questions, logs, subscriptions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.integration.sandbox_agent.mux.kit import DEADLINE_S, Agent, Place, RpcError, server, text


async def test_answers_find_their_call_whatever_their_order_and_ids(place: Place) -> None:
    place.mux.set([server("one")])
    first, second = await place.agent(), await place.agent()
    calls = []
    for agent in (first, second):
        for request_id in (7, "7", "seven"):
            params = {"name": "one__wait", "arguments": {}}
            calls.append(agent.begin("tools/call", params, request_id)[1])
    await first.ask("ping")
    await second.ask("ping")
    await first.text("one__release")
    answers = [text(await asyncio.wait_for(call, DEADLINE_S)) for call in calls]
    assert len(set(answers)) == 6
    assert not first.strays
    assert not second.strays


async def test_an_id_in_use_is_refused(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    _, waiting = agent.begin("tools/call", {"name": "one__wait"}, "same")
    agent.send({"id": "same", "method": "tools/call", "params": {"name": "one__echo"}})
    with pytest.raises(RpcError, match="in use"):
        await waiting


async def test_progress_reaches_the_call_that_wants_it(place: Place) -> None:
    place.mux.set([server("one")])
    agent, other = await place.agent(), await place.agent()
    for token in ("mine", 5):
        assert text(await agent.call("one__progress", meta={"progressToken": token})) == "done"
        for step in (1, 2):
            params = await agent.noted("notifications/progress")
            assert params == {"progressToken": token, "progress": step, "total": 2}
    await other.ask("ping")
    assert not [note for note in other.notes if note["method"].endswith("/progress")]


async def test_a_cancelled_call_is_cancelled_at_its_server_and_never_answered(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    number, _ = agent.begin("tools/call", {"name": "one__wait", "arguments": {}})
    agent.tell("notifications/cancelled", requestId=number, reason="enough")
    notes = await agent.value("one__heard")
    (theirs,) = [params for method, params in notes if method == "notifications/cancelled"]
    await agent.text("one__release")
    assert theirs["reason"] == "enough"
    await agent.ask("ping")
    assert number in agent._open, "no answer came"


async def test_calls_of_a_conversation_that_ends_are_cancelled(place: Place) -> None:
    place.mux.set([server("one")])
    agent, other = await place.agent(), await place.agent()
    agent.begin("tools/call", {"name": "one__wait", "arguments": {}})
    await agent.ask("ping")
    await agent.close()
    async with asyncio.timeout(DEADLINE_S):
        while not [note for note in await other.value("one__heard") if note[0] == "notifications/cancelled"]:
            pass


async def test_questions_of_a_server_go_to_the_conversation_that_called(place: Place) -> None:
    place.mux.set([server("one")])
    agents = [await place.agent() for _ in range(3)]
    for number, agent in enumerate(agents):
        agent.replies = {"elicitation/create": {"action": "accept", "content": {"who": number}}}
        agent.replies["sampling/createMessage"] = {"role": "assistant", "model": str(number)}
        agent.replies["roots/list"] = {"roots": [{"uri": f"file:///{number}"}]}
    for number, agent in enumerate(agents):
        answer = await agent.value("one__ask", method="elicitation/create", params={"message": "who?"})
        assert answer["content"] == {"who": number}
        assert (await agent.asked("elicitation/create"))["params"] == {"message": "who?"}
        assert (await agent.value("one__ask", method="sampling/createMessage"))["model"] == str(number)
        assert (await agent.value("one__ask", method="roots/list"))["roots"] == [{"uri": f"file:///{number}"}]


async def test_questions_that_a_client_cannot_answer_are_refused(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent({})
    for method in ("elicitation/create", "sampling/createMessage", "made/up"):
        answer = await agent.value("one__ask", method=method)
        assert answer["code"] == -32601
    roots = (await agent.value("one__ask", method="roots/list"))["roots"]
    assert roots == [{"uri": f"file://{place.work}", "name": "work"}]
    assert await agent.value("one__ask", method="ping") == {}
    assert not agent.requests


async def test_a_question_dies_with_the_conversation_that_was_asked(place: Place) -> None:
    place.mux.set([server("one")])
    agent, other = await place.agent(), await place.agent()
    agent.call("one__ask", method="elicitation/create")
    await agent.asked("elicitation/create")
    await agent.close()
    assert (await other.value("one__echo"))["name"] == "one", "the server has had an answer and goes on"


async def test_a_question_is_withdrawn_when_its_server_dies(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    call = agent.call("one__ask", method="elicitation/create")
    question = await agent.asked("elicitation/create")
    await agent.call("one__die")
    assert (await agent.noted("notifications/cancelled"))["requestId"] == question["id"]
    assert (await call)["isError"]
    agent.send({"id": question["id"], "result": {"action": "accept"}})
    assert (await agent.value("one__echo"))["name"] == "one"


async def logged(agent: Agent, level: str) -> None:
    assert await agent.text("one__log", level=level, data=f"it is {level}") == "logged"


async def test_logs_go_to_all_who_want_that_much(place: Place) -> None:
    place.mux.set([server("one")])
    await place.settled()
    loud, quiet = await place.agent(), await place.agent()
    await loud.ask("logging/setLevel", {"level": "debug"})
    await quiet.ask("logging/setLevel", {"level": "error"})
    levels = [params["level"] for method, params in await loud.value("one__heard") if method == "logging/setLevel"]
    assert levels == ["debug", "debug"], "the server logs as much as any wants"
    await logged(loud, "info")
    await logged(loud, "critical")
    assert (await quiet.noted("notifications/message"))["data"] == "it is critical"
    expected = {"level": "info", "data": "it is info", "logger": "one: inner"}
    assert await loud.noted("notifications/message") == expected


async def test_a_resource_is_subscribed_to_once_and_let_go_by_the_last(place: Place) -> None:
    place.mux.set([server("one", resources=["mem://a"]), server("two", resources=["mem://a"])])
    first, second, third = [await place.agent() for _ in range(3)]
    public = "cortex:two:mem://a"
    for agent in (first, second):
        await agent.names("prompts")
        await agent.ask("resources/list")
        assert await agent.ask("resources/subscribe", {"uri": public}) == {}

    async def theirs(method: str) -> list[Any]:
        return [params for name, params in await third.value("two__heard") if name == method]

    assert await theirs("resources/subscribe") == [{"uri": "mem://a"}]
    await third.text("two__change", uri="mem://a")
    for agent in (first, second):
        assert await agent.noted("notifications/resources/updated") == {"uri": public}
    assert not [note for note in third.notes if note["method"].endswith("/updated")]
    assert await first.ask("resources/unsubscribe", {"uri": public}) == {}
    assert await theirs("resources/unsubscribe") == []
    await third.text("two__change", uri="mem://a/below")
    assert await second.noted("notifications/resources/updated") == {"uri": "mem://a/below"}
    await second.close()
    async with asyncio.timeout(DEADLINE_S):
        while await theirs("resources/unsubscribe") != [{"uri": "mem://a"}]:
            pass


async def test_subscriptions_and_levels_are_told_to_a_server_that_starts_anew(place: Place) -> None:
    place.mux.set([server("one", resources=["mem://a"])])
    agent = await place.agent()
    await agent.ask("resources/list")
    await agent.ask("resources/subscribe", {"uri": "mem://a"})
    await agent.ask("logging/setLevel", {"level": "notice"})
    await agent.call("one__die")
    heard = await agent.value("one__heard")
    assert ["resources/subscribe", {"uri": "mem://a"}] in heard
    assert ["logging/setLevel", {"level": "notice"}] in heard


async def test_changed_roots_are_passed_on(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    await agent.names()
    agent.tell("notifications/roots/list_changed")
    assert ["notifications/roots/list_changed", None] in [note[:2] for note in await agent.value("one__heard")]


async def test_messages_of_a_batch_are_each_answered(place: Place) -> None:
    agent = await place.agent()
    calls = [agent.begin("ping", request_id=f"unsent-{number}") for number in range(2)]
    batch = [{"jsonrpc": "2.0", "id": f"in-{number}", "method": "ping"} for number in range(2)]
    agent.writer.write(json.dumps(batch).encode() + b"\n")
    await agent.until(lambda: len(agent.strays) == 2)
    assert {stray["id"] for stray in agent.strays} == {"in-0", "in-1"}
    for _, call in calls:
        assert await call == {}
