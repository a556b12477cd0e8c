"""What outlives an agent process, an agent server and a full disk."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_agent import journal as journal_module
from tests import host
from tests.unit.sandbox_agent.acp.kit import SPEC, Agent, Bench, Files, Peer, cortex, of_kind, prompt

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
LOAD = {"cwd": "/", "mcpServers": []}


def texts(peer: Peer) -> list[str]:
    return [m["params"]["update"]["content"]["text"] for m in peer.everything if of_kind(m)]


async def test_the_agents_death_ends_the_turn_and_the_next_prompt_finds_the_conversation_again(bench: Bench) -> None:
    bench.start()
    peer, plain = bench.connect(cortex=True), bench.connect()
    session = await bench.session(peer)
    await plain.request("session/resume", {"sessionId": session, "cwd": "/"})
    request, waiting = await bench.prompt(peer, session, "one"), await bench.prompt(peer, session, "two")
    await bench.agent.asked("session/prompt")
    ask = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": []}
    bench.agent.say({"id": 1, "method": "session/request_permission", "params": ask})
    asked = await peer.until(lambda m: m.get("method") == "session/request_permission")
    bench.hub.agent_down("killed by signal 9", final=False)
    assert bench.hub.agent_info == ""
    error = (await peer.answer_to(request))["error"]
    assert error["data"]["code"] == "agent.failed"
    assert error["data"]["hint"]
    assert "killed by signal 9" in error["message"]
    assert (await peer.until(lambda m: m.get("method") == "$/cancel_request"))["params"]["requestId"] == asked["id"]
    assert (await peer.until(lambda m: m.get("method") == "_cortex/status"))["params"]["state"] == "restarting"

    agent = bench.agent = Agent()
    agent.hub = bench.hub
    agent.on["session/load"] = agent.on["_cortex/fence"] = lambda params: None
    bench.hub.agent_up(agent, SPEC)
    assert (await agent.asked("session/load"))["params"]["sessionId"] == session
    agent.update(session, "replayed", "user_message_chunk")
    agent.answer("session/load", {})
    agent.update(session, "replayed late")
    assert not agent.all("session/prompt")
    agent.say({"id": agent.last("_cortex/fence")["id"], "error": {"code": -32601, "message": "no"}})
    assert (await agent.asked("session/prompt"))["params"]["prompt"][0]["text"] == "two"
    agent.update(session, "new")
    agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert "result" in await peer.answer_to(waiting)
    assert await plain.texts(1) == ["new"]
    assert texts(plain) == ["one", "two", "new"]
    assert not [m for m in plain.everything if m.get("method") == "_cortex/status"]


async def test_an_agent_that_cannot_load_gets_a_new_session_under_the_old_id(bench: Bench) -> None:
    bench.start(agent=Agent({}))
    peer = bench.connect(cortex=True)
    session = await bench.session(peer)
    agent = Agent({})
    agent.prefix = "other"
    bench.restart_agent(agent)
    request = await bench.prompt(peer, session, "again")
    assert (await agent.asked("session/prompt"))["params"]["sessionId"] == "other1"
    agent.update("other1", "hello")
    agent.answer("session/prompt", {"stopReason": "end_turn"})
    await peer.answer_to(request)
    update = next(m for m in peer.everything if of_kind(m))
    assert update["params"]["sessionId"] == session
    lost = [m["params"] for m in peer.everything if m.get("method") == "_cortex/status" and "code" in m["params"]]
    assert next(p for p in lost if p["code"] == "agent.context_lost")["sessionId"] == session


async def test_an_agent_that_numbers_its_sessions_anew_does_not_mix_conversations(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    old = await bench.session(peer)
    await bench.prompt(peer, old, "first")
    await bench.agent.asked("session/prompt")
    bench.restart_agent(Agent())
    new = await bench.session(peer)
    assert new != old
    bench.agent.update("s1", "for the new one")
    update = await peer.until(lambda m: of_kind(m) == "agent_message_chunk")
    assert update["params"]["sessionId"] == new
    await bench.prompt(peer, old, "second")
    asked = await bench.agent.asked("session/prompt")
    assert asked["params"]["sessionId"] == "s2"
    assert not bench.agent.all("session/load")


async def test_when_the_agent_is_given_up_everybody_is_told_and_history_can_still_be_read(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    requests = [await bench.prompt(peer, session, text, text) for text in ("one", "two")]
    await bench.agent.asked("session/prompt")
    await peer.request("session/list")
    bench.hub.agent_down("it exited with 1: no such model", final=True)
    for request in requests:
        assert (await peer.answer_to(request))["error"]["data"]["code"] == "agent.failed"
    assert bench.hub.open_turns == 0
    late = bench.connect()
    assert "result" in await late.request("initialize", {"protocolVersion": 1})
    assert "result" in await late.request("session/load", {"sessionId": session, **LOAD})
    assert texts(late) == ["one", "two"]
    for method, params in (("session/prompt", prompt(session)), ("session/new", LOAD), ("_vendor/x", {})):
        error = (await late.request(method, params))["error"]
        assert error["data"]["code"] == "agent.failed"
        assert "no such model" in error["message"]
    agent = bench.agent = Agent()
    agent.hub = bench.hub
    bench.hub.agent_up(agent, SPEC)
    assert "error" in await late.request("session/prompt", prompt(session, "one", "one"))
    await bench.prompt(late, session, "two", "two")
    assert (await agent.asked("session/prompt"))["params"]["prompt"][0]["text"] == "two"


async def test_an_agent_of_another_protocol_version_is_an_error_and_not_a_wait(bench: Bench) -> None:
    agent = Agent()
    agent.version = 2
    bench.start(agent=agent)
    error = (await bench.connect().request("initialize", {"protocolVersion": 1}))["error"]
    assert error["data"]["code"] == "agent.failed"
    assert bench.hub.agent_info == ""


async def test_a_request_that_the_agent_never_answers_has_a_deadline(bench: Bench) -> None:
    bench.start(up=False)
    bench.hub.agent_up(bench.agent, replace(SPEC, init_timeout_s=0.2))
    bench.agent.on["session/new"] = lambda params: None
    peer = bench.connect()
    error = (await peer.request("session/new", LOAD))["error"]
    assert "within 0.2 s" in error["message"]
    bench.agent.answer("session/new", {"sessionId": "late"})
    assert bench.hub.garbage == 1


async def test_after_a_crash_of_the_agent_server_everything_is_there(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    done, running = await bench.session(peer), await bench.session(peer)
    first = await bench.prompt(peer, done, "paid?", "m1")
    await bench.agent.asked("session/prompt")
    bench.agent.update(done, "yes")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn", "usage": {"n": 1}})
    before = cortex(await peer.answer_to(first))
    await bench.prompt(peer, running, "working", "m2")
    await bench.agent.asked("session/prompt", 2)
    await bench.prompt(peer, running, "waiting", "m3")
    await peer.request("session/list")
    await bench.crash()

    bench.start(agent=Agent())
    again = bench.connect()
    listed = (await again.request("session/list"))["result"]["sessions"]
    assert {s["sessionId"]: s["title"] for s in listed} == {done: "paid?", running: "working"}
    loaded = await again.request("session/load", {"sessionId": done, **LOAD})
    assert texts(again) == ["paid?", "yes"]
    assert loaded["result"]["modes"]["currentModeId"] == "ask"
    assert cortex(loaded)["epoch"] == before["epoch"]
    assert cortex(loaded)["seq"] > before["seq"]
    reply = await again.request("session/prompt", prompt(done, "paid?", "m1"))
    assert reply["result"]["stopReason"] == "end_turn"
    assert reply["result"]["usage"] == {"n": 1}
    reply = await again.request("session/prompt", prompt(running, "working", "m2"))
    assert reply["error"]["data"]["code"] == "agent.failed"
    assert not bench.agent.all("session/prompt")
    await again.ask("session/prompt", prompt(running, "waiting", "m3"))
    assert (await bench.agent.asked("session/prompt"))["params"]["prompt"][0]["text"] == "waiting"
    await bench.crash()

    bench.start(agent=Agent())
    third = bench.connect()
    for message_id in ("m2", "m3"):
        reply = await third.request("session/prompt", prompt(running, "x", message_id))
        assert reply["error"]["data"]["code"] == "agent.failed"
    assert not bench.agent.all("session/prompt")


async def test_state_outlives_the_segment_that_it_was_written_in(bench: Bench) -> None:
    bench.files = Files(bench.files.directory, keep=2)
    bench.start(journal_segment_bytes=20_000)
    peer = bench.connect()
    session = await bench.session(peer)
    request = await bench.prompt(peer, session, "remember", "m1")
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    await peer.answer_to(request)
    await bench.prompt(peer, session, "still open", "m2")
    await bench.agent.asked("session/prompt", 2)
    for number in range(60):
        bench.agent.update(session, f"{number:04}" + "x" * 3000)
        await peer.texts(1)
    assert len(list(bench.files.directory.glob("*.seg"))) == 2
    assert not (bench.files.directory / "0000000000.seg").exists()
    await bench.crash()
    bench.start(agent=Agent())
    again = bench.connect()
    reply = await again.request("session/prompt", prompt(session, "remember", "m1"))
    assert reply["result"]["stopReason"] == "end_turn"
    reply = await again.request("session/prompt", prompt(session, "still open", "m2"))
    assert "error" in reply
    await again.request("session/load", {"sessionId": session, **LOAD})
    kept = [text[:4] for text in texts(again)]
    assert kept == [f"{number:04}" for number in range(60 - len(kept), 60)]
    assert len(kept) > 5


async def test_an_answer_is_held_back_until_it_is_on_disk_and_nothing_overtakes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.start()
    one, two = bench.connect(), bench.connect()
    session = await bench.session(one)
    await two.request("session/resume", {"sessionId": session, "cwd": "/"})
    request = await bench.prompt(one, session)
    await bench.agent.asked("session/prompt")
    released, really = threading.Event(), journal_module._sync_files

    def slow_disk(files: list[int]) -> None:
        released.wait(5)
        really(files)

    monkeypatch.setattr(journal_module, "_sync_files", slow_disk)
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    bench.agent.update(session, "afterwards")
    listing = await one.ask("session/list", {})
    assert await two.texts(1) == ["afterwards"]
    reading = asyncio.ensure_future(one.answer_to(request))
    await asyncio.sleep(0.1)
    assert not reading.done()
    assert not texts(one)
    released.set()
    await reading
    await one.answer_to(listing)
    await one.texts(1)
    seqs = [cortex(m)["seq"] for m in one.everything]
    assert seqs == sorted(set(seqs))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs of 256 KiB."""
    with host.small_disk(tmp_path / "disk", "256k") as path:
        yield path


@ROOT
async def test_a_full_disk_refuses_prompts_holds_the_agent_and_loses_nothing(bench: Bench, small_disk: Path) -> None:
    bench.files = Files(small_disk / "journal")
    bench.start()
    peer, watching = bench.connect(), bench.connect(cortex=True)
    session = await bench.session(peer)
    request = await bench.prompt(peer, session, "talk")
    await bench.agent.asked("session/prompt")
    said = 0
    while not bench.agent.held:
        bench.agent.update(session, f"{said:04}" + "x" * 5000)
        said += 1
    assert bench.agent.held == [True]
    bench.agent.update(session, "while full")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    refused = await peer.request("session/prompt", prompt(session, "more", "m9"))
    assert refused["error"]["data"]["code"] == "store.disk_full"
    assert refused["error"]["data"]["hint"]
    assert (await peer.request("session/new", LOAD))["error"]["data"]["code"] == "store.disk_full"
    status = await watching.until(lambda m: m.get("method") == "_cortex/status")
    assert status["params"]["code"] == "store.disk_full"
    host.grow(small_disk, "1m")
    assert (await peer.answer_to(request))["result"]["stopReason"] == "end_turn"
    assert bench.agent.held == [True, False]
    assert [text[:4] for text in texts(peer)] == [*(f"{n:04}" for n in range(said)), "whil"]
    await bench.prompt(peer, session, "more", "m9")
    await bench.agent.asked("session/prompt", 2)
    await bench.crash()
    bench.start(agent=Agent())
    again = bench.connect()
    await again.request("session/load", {"sessionId": session, **LOAD})
    assert len(texts(again)) == said + 3


@ROOT
async def test_a_disk_that_stays_full_ends_the_turn_with_an_error(bench: Bench, small_disk: Path) -> None:
    bench.files = Files(small_disk / "journal")
    bench.start(stall_timeout_s=0.3)
    peer = bench.connect()
    session = await bench.session(peer)
    running, waiting = await bench.prompt(peer, session, "talk"), await bench.prompt(peer, session, "next", "m2")
    await bench.agent.asked("session/prompt")
    while not bench.agent.held:
        bench.agent.update(session, "x" * 5000)
    for request in (running, waiting):
        assert (await peer.answer_to(request))["error"]["data"]["code"] == "store.disk_full"
    await bench.agent.asked("session/cancel")
    host.grow(small_disk, "1m")
    bench.agent.answer("session/prompt", {"stopReason": "cancelled"})
    await bench.prompt(peer, session, "next", "m2")
    await bench.agent.asked("session/prompt", 2)


async def test_a_disk_that_fails_closes_clients_with_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)

    def fails(files: list[int]) -> None:
        raise OSError(5, "bad disk")

    monkeypatch.setattr(journal_module, "_sync_files", fails)
    await bench.prompt(peer, session)
    closed = await peer.until_closed()
    assert closed is not None
    assert closed[0] == 1011
    assert "bad disk" in closed[1]
    closed = await bench.connect().until_closed()
    assert closed is not None
    assert closed[0] == 1011


async def test_the_broker_may_be_away_while_agent_and_journal_work(bench: Bench) -> None:
    bench.start(journal_segment_bytes=20_000)
    peer = bench.connect()
    session = await bench.session(peer)
    bench.files.refuse = True
    for number in range(15):
        bench.agent.update(session, f"{number:04}" + "x" * 3000)
    assert len(await peer.texts(15)) == 15
    bench.files.refuse = False
    async with asyncio.timeout(5):
        while not (bench.files.directory / "0000000001.seg").exists():
            await asyncio.sleep(0.02)
    bench.agent.update(session, "next file")
    late = bench.connect()
    await late.request("session/load", {"sessionId": session, **LOAD})
    assert len(texts(late)) == 16


async def test_wherever_the_journal_was_cut_off_it_opens_and_gives_what_is_whole(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for number in range(3):
        request = await bench.prompt(peer, session, f"q{number}", f"m{number}")
        await bench.agent.asked("session/prompt", number + 1)
        bench.agent.update(session, f"a{number}")
        bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
        await peer.answer_to(request)
    await bench.crash()
    [path] = bench.files.directory.glob("*.seg")
    whole = path.read_bytes()
    lengths = []
    for cut in range(len(whole), 0, -97):
        path.write_bytes(whole[:cut])
        bench.start(agent=Agent())
        again = bench.connect()
        if (await again.request("session/list"))["result"]["sessions"]:
            await again.request("session/load", {"sessionId": session, **LOAD})
        expected = [f"{who}{number}" for number in range(3) for who in "qa"]
        assert texts(again) == expected[: len(texts(again))]
        lengths.append(len(texts(again)))
        await bench.crash()
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (6, 0)
