"""Clients that come, go and come back: what each is asked, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent import calls as calls_module
from tests import host
from tests.unit.sandbox_agent.acp.kit import Bench, Files, Message, Peer, of_kind
from tests.unit.sandbox_agent.acp.test_durable import ROOT, small_disk, texts

__all__ = ["small_disk"]
PERMISSION = "session/request_permission"
LOAD = {"cwd": "/", "mcpServers": []}


def ask(session: str, number: Any = "p1") -> Message:
    params = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": []}
    return {"id": number, "method": PERMISSION, "params": params}


def asked(peer: Peer) -> list[Message]:
    return [m for m in peer.everything if m.get("method") == PERMISSION]


async def test_a_client_that_sends_its_prompt_again_is_asked_what_is_open(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session, "work", "m1")
    await bench.agent.asked("session/prompt")
    bench.agent.say(ask(session))
    await peer.until(lambda m: m.get("method") == PERMISSION)
    peer.close()
    again = bench.connect()
    await bench.prompt(again, session, "work", "m1")
    found = await again.until(lambda m: m.get("method") == PERMISSION)
    await again.send({"id": found["id"], "result": {"outcome": {"outcome": "cancelled"}}})
    await bench.agent.until(lambda: any(m.get("id") == "p1" for m in bench.agent.got))


async def test_nobody_is_asked_the_same_twice_on_one_connection(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    bench.agent.say(ask(session), {"id": 7, "method": "_vendor/choose", "params": {}})
    await peer.until(lambda m: m.get("method") == "_vendor/choose")
    await peer.request("initialize", {"protocolVersion": 1})
    await peer.request("session/load", {"sessionId": session, **LOAD})
    await bench.prompt(peer, session)
    await peer.request("session/list")
    assert len(asked(peer)) == 1
    assert len([m for m in peer.everything if m.get("method") == "_vendor/choose"]) == 1
    await peer.request("session/close", {"sessionId": session})


async def test_open_questions_hold_on_to_no_client_that_is_gone(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    bench.agent.say(ask(session))
    for _ in range(3):
        other = bench.connect()
        await other.request("session/resume", {"sessionId": session, "cwd": "/"})
        await other.send({"id": asked(other)[0]["id"], "error": {"code": -32601, "message": "cannot"}})
        await other.request("session/list")
        other.close()
    while bench.hub.clients > 1:
        await asyncio.sleep(0.001)
    (open_ask,) = bench.hub._asks._open.values()
    assert len(open_ask.declined) == 0
    assert len(open_ask.delivered) == 1


async def test_a_client_that_sends_much_and_leaves_is_no_subscriber(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    peer.close()
    leaver = bench.connect()
    for _ in range(150):
        await leaver.notify("$/ping", {})
    await leaver.ask("session/load", {"sessionId": session, **LOAD})
    await bench.prompt(leaver, session)
    leaver.close()
    await bench.agent.asked("session/prompt")
    while bench.hub.clients:
        await asyncio.sleep(0.001)
    assert not bench.hub._conversations.by_id[session].subscribers


async def test_a_permission_that_crosses_a_cancel_is_answered_and_asked_of_nobody(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    running = await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    await peer.notify("session/cancel", {"sessionId": session})
    await bench.agent.asked("session/cancel")
    bench.agent.say(ask(session))
    assert bench.agent.got[-1] == {"jsonrpc": "2.0", "id": "p1", "result": {"outcome": {"outcome": "cancelled"}}}
    bench.agent.answer("session/prompt", {"stopReason": "cancelled"})
    await peer.answer_to(running)
    assert asked(peer) == []
    await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt", 2)
    bench.agent.say(ask(session))
    await peer.until(lambda m: m.get("method") == PERMISSION)


async def test_closing_a_conversation_ends_what_goes_on_in_it(bench: Bench) -> None:
    bench.start()
    peer, other = bench.connect(), bench.connect()
    session = await bench.session(peer)
    await other.request("session/resume", {"sessionId": session, "cwd": "/"})
    running, waiting = await bench.prompt(peer, session), await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    await peer.request("session/close", {"sessionId": session})
    assert not bench.agent.all("session/cancel")
    await other.request("session/close", {"sessionId": session})
    assert (await peer.answer_to(waiting))["result"]["stopReason"] == "cancelled"
    await bench.agent.asked("session/cancel")
    bench.agent.answer("session/prompt", {"stopReason": "cancelled"})
    assert (await peer.answer_to(running))["result"]["stopReason"] == "cancelled"


async def test_requests_that_the_agent_never_answers_do_not_stop_prompts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module, "MAX_CALLS", 5)
    bench.start()
    peer, other = bench.connect(), bench.connect()
    session = await bench.session(peer)
    for number in range(5):
        await other.ask("_vendor/never", {}, request_id=f"n{number}")
    refused = await other.request("_vendor/never")
    assert refused["error"]["data"]["code"] == "session.overloaded"
    await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert all(call.deadline is not None for call in bench.hub._agent._calls.values())


@ROOT
async def test_a_load_while_the_disk_is_full_loses_and_doubles_nothing(bench: Bench, small_disk: Path) -> None:
    bench.files = Files(small_disk / "journal")
    bench.start()
    peer = bench.connect()
    talk, quiet = await bench.session(peer), await bench.session(peer)
    while not bench.agent.held:
        bench.agent.update(talk, "filler" + "x" * 5000)
    bench.agent.update(talk, "one")
    await peer.ask("session/load", {"sessionId": quiet, **LOAD}, request_id="load")
    bench.agent.update(talk, "two")
    await asyncio.sleep(0.05)
    host.grow(small_disk, "1m")
    while "two" not in texts(peer):
        await asyncio.wait_for(peer.read(), 5)
    bench.agent.update(talk, "three")
    await peer.until(lambda m: of_kind(m) != "" and m["params"]["update"]["content"]["text"] == "three")
    assert [text for text in texts(peer) if not text.startswith("filler")] == ["one", "two", "three"]


async def test_a_journal_that_has_failed_keeps_nothing_in_memory(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    bench.hub._journal._fail("bad disk")
    await peer.until_closed()
    for _ in range(50):
        bench.agent.update(session, "x" * 1000)
    assert bench.hub._journal._pending_bytes == 0
    assert bench.hub._outbox._items == []
