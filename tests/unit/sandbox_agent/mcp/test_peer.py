"""Requests between two peers, whatever their order: each is answered once, by the other's answer or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_agent import mcp_peer
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_peer import Gone, Peer, cross
from sandbox_agent.mcp_protocol import McpError


class Recorder(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)


def call(request_id: Any, **params: Any) -> Message:
    return {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}


@settings(max_examples=200)
@given(st.data())
def test_each_call_is_answered_at_most_once_and_by_its_own_answer(data: st.DataObject) -> None:
    async def run() -> None:
        sources, target = [Recorder(), Recorder()], Recorder()
        theirs: dict[int, tuple[Recorder, int]] = {}
        given_up: set[tuple[int, int]] = set()
        answered: set[int] = set()
        for step in range(data.draw(st.integers(0, 30))):
            source = data.draw(st.sampled_from(sources))
            match data.draw(st.sampled_from(["call", "answer", "again", "cancel"])):
                case "call":
                    number = cross(source, call(step), target, {"step": step}).number
                    theirs[number] = source, step
                case "answer" | "again" if theirs:
                    number = data.draw(st.sampled_from(sorted(theirs)))
                    target.answered({"id": number, "result": {"for": number}})
                    answered.add(number)
                case "cancel" if source.asking:
                    request_id = data.draw(st.sampled_from(sorted(source.asking)))  # type: ignore[type-var]
                    source.cancelled({"requestId": request_id})
                    given_up.add((sources.index(source), request_id))
        for index, source in enumerate(sources):
            ids = [message["id"] for message in source.sent]
            assert len(ids) == len(set(ids))
            for message in source.sent:
                assert theirs[message["result"]["for"]] == (source, message["id"])
                assert (index, message["id"]) not in given_up
        under_way = {number for number, (source, step) in theirs.items() if number not in answered}
        gone = {number for number in under_way if (sources.index(theirs[number][0]), theirs[number][1]) in given_up}
        assert set(target.open) == under_way - gone
        target.lost("over")
        assert not target.open
        assert not any(source.asking for source in sources)

    asyncio.run(run())


async def test_progress_goes_to_who_asked_for_it_with_their_token() -> None:
    source, target = Recorder(), Recorder()
    with_token = cross(source, call(1), target, {"_meta": {"progressToken": "mine", "x": 1}})
    without = cross(source, call(2), target, {"_meta": {"x": 1}})
    assert target.sent[0]["params"] == {"_meta": {"progressToken": with_token.number, "x": 1}}
    assert target.sent[1]["params"] == {"_meta": {"x": 1}}
    target.progressed({"progressToken": with_token.number, "progress": 1})
    target.progressed({"progressToken": without.number, "progress": 1})
    target.progressed({"progressToken": 77, "progress": 1})
    target.progressed({"progressToken": "mine", "progress": 1})
    target.progressed({})
    (told,) = source.sent
    assert told["params"] == {"progressToken": "mine", "progress": 1}


async def test_a_cancelled_call_is_told_under_the_targets_id() -> None:
    source, target = Recorder(), Recorder()
    crossing = cross(source, call("a"), target, {})
    source.cancelled({"requestId": "a", "reason": "why"})
    assert target.sent[-1]["method"] == "notifications/cancelled"
    assert target.sent[-1]["params"] == {"requestId": crossing.number, "reason": "why"}
    source.cancelled({"requestId": "a"})
    source.cancelled({"requestId": ["a"]})
    source.cancelled({})
    assert len(target.sent) == 2


async def test_what_was_asked_of_a_peer_that_is_lost_fails_and_what_it_asked_is_cancelled() -> None:
    source, target = Recorder(), Recorder()
    cross(source, call(1), target, {})
    cross(source, {"id": 2, "method": "prompts/get"}, target, {})
    question = cross(target, {"id": "q", "method": "sampling/createMessage"}, source, {})
    target.lost("it died")
    tool, prompt, cancelled = source.sent[1:]
    assert tool["result"] == {"content": [{"type": "text", "text": "it died"}], "isError": True}
    assert prompt["error"]["message"] == "it died"
    assert cancelled["params"] == {"requestId": question.number, "reason": "it died"}


async def test_an_error_that_is_none_is_replaced() -> None:
    source, target = Recorder(), Recorder()
    number = cross(source, call(1), target, {}).number
    target.answered({"id": number, "error": "no"})
    assert isinstance(source.sent[0]["error"]["code"], int)


async def test_a_call_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_peer, "LONGEST_CALL_S", 0.0)
    source, target = Recorder(), Recorder()
    number = cross(source, call(1), target, {}).number
    while not source.sent:
        await asyncio.sleep(0)
    assert source.sent[0]["result"]["isError"]
    assert target.sent[-1]["params"]["requestId"] == number
    assert not target.open


async def test_a_query_of_our_own_is_answered_refused_or_given_up() -> None:
    peer = Recorder()
    good, bad, lost, late = (peer.query("m", {}, timeout) for timeout in (60, 60, 60, 0))
    peer.answered({"id": peer.sent[0]["id"], "result": {"a": 1}})
    peer.answered({"id": peer.sent[1]["id"], "error": {"code": -5, "message": "no"}})
    assert await good == {"a": 1}
    with pytest.raises(McpError, match="no"):
        await bad
    with pytest.raises(Gone, match="no answer within 0 s"):
        await late
    peer.lost("dead")
    with pytest.raises(Gone, match="dead"):
        await lost
    assert not peer.open
