"""Servers and clients that break, lie, flood or hang: the others notice nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sandbox_agent import mcp_budget, mcp_process, mcp_protocol, mcp_server, mux, mux_requests
from sandbox_agent.stdio import AgentStdio
from tests.integration.sandbox_agent.mux.kit import DEADLINE_S, Agent, Place, RpcError, alive, gone, server, text


async def works(agent: Agent, name: str) -> None:
    assert (await agent.value(f"{name}__echo"))["name"] == name


async def given_up(place: Place, agent: Agent, name: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while place.mux._board.servers[name].state != "failed":
            await agent.ask("ping")


async def test_a_server_that_dies_in_a_call_says_so_and_comes_back(place: Place) -> None:
    place.mux.set([server("one"), server("two")])
    agent, other = await place.agent(), await place.agent()
    pid = (await agent.value("one__echo"))["pid"]
    waiting = other.call("one__wait")
    elsewhere = other.call("two__wait")
    await other.ask("ping")
    for answer in (await agent.call("one__die"), await waiting):
        assert answer["isError"]
        assert "'one' exited with code 3" in text(answer)
        assert "the last words" in text(answer)
    assert "one" in place.mux.problems()
    assert (await agent.value("one__echo"))["pid"] != pid
    assert place.mux.problems() == {}
    assert not elsewhere.done()
    assert "one__echo" in await agent.names()


async def test_a_server_that_keeps_dying_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "MAX_RESTARTS", 1)
    place.mux.set([server("bad", die=True), server("good")])
    agent = await place.agent()
    await works(agent, "good")
    await given_up(place, agent, "bad")
    assert "born dead" in place.mux.problems()["bad"]
    assert place.mux.settled
    answer = await agent.call("bad__anything")
    assert answer["isError"]
    assert "born dead" in text(answer)
    await works(agent, "good")


async def test_a_server_that_was_given_up_is_listed_no_more_but_still_says_why(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_server, "MAX_RESTARTS", 0)
    place.mux.set([server("one", prompts=["p"])])
    agent = await place.agent()
    assert "one__echo" in await agent.names()
    assert (await agent.call("one__die"))["isError"]
    await agent.noted("notifications/tools/list_changed")
    assert await agent.names() == []
    assert "last words" in text(await agent.call("one__echo"))
    with pytest.raises(RpcError, match="last words"):
        await agent.ask("prompts/get", {"name": "one__p"})


async def test_a_program_that_is_not_there_is_said_at_once(place: Place) -> None:
    place.mux.set([{"name": "ghost", "command": "/no/such/program", "args": [], "env": []}, server("one")])
    await place.settled()
    assert "'/no/such/program' is not in the sandbox" in place.mux.problems()["ghost"]
    agent = await place.agent()
    assert "/no/such/program" in text(await agent.call("ghost__x"))
    await works(agent, "one")


async def test_a_server_that_never_says_hello_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "INIT_S", 0.3)
    monkeypatch.setattr(mcp_server, "MAX_RESTARTS", 0)
    place.mux.set([server("mute", hang=True), server("one")])
    agent = await place.agent()
    call = agent.call("mute__echo")
    await works(agent, "one")
    assert "no answer within 0.3 s" in text(await asyncio.wait_for(call, DEADLINE_S))
    await given_up(place, agent, "mute")


@pytest.mark.parametrize("setup", [{"refuse": True}, {"version": "1999-01-01"}, {"version": 7}])
async def test_a_server_that_speaks_something_else_is_given_up(
    place: Place, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_server, "MAX_RESTARTS", 0)
    place.mux.set([server("odd", **setup)])
    await place.settled()
    assert "could not be initialized" in place.mux.problems()["odd"]


async def test_entries_that_are_wrong_are_problems_of_their_own(place: Place) -> None:
    place.mux.set(
        [
            {"name": "http", "type": "http", "url": "https://x", "headers": []},
            {"name": "args", "command": "x", "args": [1], "env": []},
            {"name": "env", "command": "x", "args": [], "env": [{"name": "A=B", "value": ""}]},
            server("one"),
        ]
    )
    assert set(place.mux.problems()) == {"http", "args", "env"}
    await works(await place.agent(), "one")


async def test_garbage_is_passed_over(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    assert await agent.text("one__garbage") == "clean"
    await works(agent, "one")


async def test_a_server_that_prints_nothing_but_garbage_is_started_anew(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    answer = await agent.call("one__garbage", times=400)
    assert "prints what is no message" in text(answer)
    await works(agent, "one")


async def test_the_second_answer_to_a_call_is_dropped(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    assert await agent.text("one__twice") == "first"
    await works(agent, "one")
    assert not agent.strays


async def test_a_big_answer_passes_and_one_that_is_too_big_is_said_to_be(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    size = mcp_protocol.MAX_LINE - 1000
    assert len(await agent.text("one__big", size=size)) == size
    answer = await agent.call("one__big", size=mcp_protocol.MAX_LINE + 1)
    assert answer["isError"]
    assert "more than 8 MiB" in text(answer)
    await works(agent, "one")


async def test_a_flood_of_one_server_holds_up_nobody_else(place: Place) -> None:
    place.mux.set([server("one"), server("two")])
    agent, other = await place.agent(), await place.agent()
    await agent.ask("logging/setLevel", {"level": "error"})
    await other.ask("logging/setLevel", {"level": "error"})
    flood = agent.call("one__flood", count=6000)
    for _ in range(20):
        await works(other, "two")
    assert text(await asyncio.wait_for(flood, DEADLINE_S)) == "flooded"


async def test_who_says_too_much_is_not_heard_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_budget, "MESSAGES", 100)
    monkeypatch.setattr(mcp_budget, "WINDOW_S", 0.05)
    held: list[bool] = []
    hold = AgentStdio.hold

    def noted(self: AgentStdio, on: bool) -> None:
        held.append(on)
        hold(self, on)

    monkeypatch.setattr(AgentStdio, "hold", noted)
    place.mux.set([server("one")])
    agent = await place.agent()
    assert await agent.text("one__flood", count=3000) == "flooded"
    assert held[:2] == [True, False]
    for _ in range(300):
        agent.send({"id": None, "method": "ping"})
    assert await agent.ask("ping") == {}


async def test_a_server_that_will_not_go_is_killed_with_all_it_started(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_process, "END_GRACE_S", 0.2)
    place.mux.set([server("one", stubborn=True)])
    agent = await place.agent()
    pids = [(await agent.value("one__echo"))["pid"], await agent.value("one__bear")]
    assert all(map(alive, pids))
    place.mux.set([])
    for pid in pids:
        await gone(pid)


# -- clients ------------------------------------------------------------------------------------


async def test_a_client_that_never_reads_is_dropped(place: Place) -> None:
    place.mux.set([server("one")])
    deaf, agent = await place.agent(), await place.agent()
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(8):
        deaf.call("one__big", size=4 * 2**20)
    async with asyncio.timeout(DEADLINE_S):
        while len(place.mux._board.clients) > 1:
            await works(agent, "one")
    await works(agent, "one")


async def test_nonsense_of_a_client_is_answered_with_errors(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    for line in (b"hello", b"[1, 2", b"42", b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}', b'{"id": {}}', b"\xff"):
        agent.writer.write(line + b"\n")
    await agent.until(lambda: len(agent.strays) == 6)
    assert all(stray["id"] is None and stray["error"]["code"] in (-32700, -32600) for stray in agent.strays)
    agent.send({"id": None, "method": "ping"})
    agent.send({"id": 999, "result": {}})
    agent.tell("notifications/cancelled", requestId=[])
    agent.tell("notifications/progress", progressToken={})
    agent.send({"method": "notifications/cancelled", "params": []})
    await works(agent, "one")


async def test_a_message_of_a_client_that_is_too_long_is_refused(place: Place) -> None:
    agent = await place.agent()
    agent.writer.write(b"x" * (mcp_protocol.MAX_LINE + 10) + b"\n")
    await agent.until(lambda: agent.strays)
    assert "8 MiB" in agent.strays[0]["error"]["message"]
    assert await agent.ask("ping") == {}


async def test_calls_under_way_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mux_requests, "MAX_OPEN", 5)
    place.mux.set([server("one")])
    agent, other = await place.agent(), await place.agent()
    calls = [agent.call("one__wait") for _ in range(6)]
    assert "under way" in text(await asyncio.wait_for(calls[5], DEADLINE_S))
    await other.text("one__release")
    for call in calls[:5]:
        assert "released" in text(await asyncio.wait_for(call, DEADLINE_S))


async def test_what_waits_for_a_server_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "MAX_HELD", 3)
    place.mux.set([server("mute", hang=True)])
    agent = await place.agent()
    calls = [agent.call("mute__echo") for _ in range(4)]
    assert "too much waits" in text(await asyncio.wait_for(calls[3], DEADLINE_S))
    assert not any(call.done() for call in calls[:3])


async def test_clients_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mux, "MAX_CLIENTS", 2)
    first, second = await place.agent(), await place.agent()
    third = await place.connect()
    await third.until(lambda: third.closed)
    assert await first.ask("ping") == await second.ask("ping") == {}
    await second.close()
    async with asyncio.timeout(DEADLINE_S):
        while len(place.mux._board.clients) > 1:
            await first.ask("ping")
    assert await (await place.agent()).ask("ping") == {}


async def test_a_client_that_sends_half_a_message_and_goes_leaves_nothing(place: Place) -> None:
    agent, other = await place.agent(), await place.agent()
    agent.writer.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call"}).encode()[:20])
    await agent.close()
    async with asyncio.timeout(DEADLINE_S):
        while len(place.mux._board.clients) > 1:
            await other.ask("ping")
