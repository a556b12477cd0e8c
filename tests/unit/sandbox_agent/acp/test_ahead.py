"""The conversation that is opened before its client asks, and sandboxes that are nobody's yet."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sandbox_agent import acp as acp_module
from sandbox_agent import ahead as ahead_module
from sandbox_agent.journal import JournalFull
from tests.unit.sandbox_agent.acp.kit import SPEC, Agent, Bench, Message, Mux, Peer, cortex, of_kind, update

LIVE = replace(SPEC, live_mcp=True)
NEW = {"cwd": "/Users/me/project", "mcpServers": []}
AHEAD = {"open_ahead": True}


def closing() -> Agent:
    """An agent that can close sessions."""
    agent = Agent({"loadSession": True, "sessionCapabilities": {"close": {}}})
    agent.on["session/close"] = lambda params: {}
    return agent


def waiting(agent: Agent | None = None) -> Agent:
    """An agent that answers ``session/new`` when it is told to."""
    agent = agent or Agent()
    agent.on["session/new"] = lambda params: None
    return agent


async def settled() -> None:
    """What is due in this turn of the loop and the next ones has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


async def bound(bench: Bench, mcp: list[Message] | None = None, **settings: Any) -> None:
    """A bind, and what follows from it."""
    bench.hub.set_settings(AHEAD | settings)
    bench.hub.set_mcp(mcp or [])
    await settled()


def closed(bench: Bench) -> list[str]:
    return [message["params"]["sessionId"] for message in bench.agent.all("session/close")]


# -- opening -----------------------------------------------------------------------------------------


async def test_it_is_opened_in_the_workspace_when_the_agent_is_ready_and_everything_is_bound(bench: Bench) -> None:
    bench.start(up=False)
    await bound(bench, [{"type": "http", "name": "web", "url": "https://x", "headers": []}])
    assert bench.hub.ahead == ""
    bench.hub.agent_up(bench.agent, SPEC)
    await bench.agent.asked("session/new")
    await settled()
    workspace = bench.home / "workspace"
    servers = [{"type": "http", "name": "web", "url": "https://x", "headers": []}]
    assert bench.agent.last("session/new")["params"] == {"cwd": str(workspace), "mcpServers": servers}
    assert workspace.is_dir()
    assert bench.hub.ahead == "open"


@pytest.mark.parametrize("settings", [{}, {"open_ahead": False}, {"open_ahead": 1}])
async def test_it_is_not_opened_unless_that_is_wanted(bench: Bench, settings: Message) -> None:
    bench.start()
    bench.hub.set_settings(settings)
    bench.hub.set_mcp([])
    await settled()
    assert not bench.agent.all("session/new")


async def test_it_is_not_opened_before_the_servers_are_known(bench: Bench) -> None:
    bench.start()
    bench.hub.set_settings(AHEAD)
    await settled()
    assert not bench.agent.all("session/new")


async def test_its_states_are_told_as_they_come(bench: Bench) -> None:
    bench.start(agent=waiting())
    await settled()
    before = bench.changes
    await bound(bench)
    assert (bench.hub.ahead, bench.changes > before) == ("opening", True)
    before = bench.changes
    bench.agent.answer("session/new", {"sessionId": "s1"})
    assert (bench.hub.ahead, bench.changes > before) == ("open", True)
    await bench.session(bench.connect())
    assert bench.hub.ahead == ""


# -- given away --------------------------------------------------------------------------------------


async def test_the_first_client_that_wants_its_like_has_it_at_once_and_as_if_it_were_made_for_it(bench: Bench) -> None:
    bench.start()
    await bound(bench)
    peer = bench.connect()
    reply = await peer.request("session/new", NEW | {"_meta": {"cortex": {"x": 1}}, "additionalDirectories": []})
    assert reply["result"]["sessionId"] == "s1"
    assert reply["result"]["modes"]["currentModeId"] == "ask"
    assert len(bench.agent.all("session/new")) == 1
    bench.agent.update("s1", "to whom it is given")
    assert await peer.texts(1) == ["to whom it is given"]
    await bench.prompt(peer, "s1")
    assert (await bench.agent.asked("session/prompt"))["params"]["sessionId"] == "s1"
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    await bench.crash()
    bench.start(agent=Agent())
    listed = await bench.connect().request("session/list")
    assert [session["sessionId"] for session in listed["result"]["sessions"]] == ["s1"]


async def test_what_the_agent_said_of_it_follows_the_answer(bench: Bench) -> None:
    """Before the agent had named it, while it was open, and after it was given away."""
    bench.start(agent=waiting())
    await bound(bench)
    bench.agent.update("s1", "before its name")
    bench.agent.answer("session/new", {"sessionId": "s1"})
    commands = {"sessionUpdate": "available_commands_update", "availableCommands": []}
    bench.agent.say({"method": "session/update", "params": {"sessionId": "s1", "update": commands}})
    bench.agent.say(update("s2", "of another session"))
    assert bench.hub.garbage == 1
    peer = bench.connect()
    await bench.session(peer)
    bench.agent.update("s1", "after")
    assert await peer.texts(2) == ["before its name", "after"]
    kinds = [of_kind(message) for message in peer.everything]
    assert kinds == ["", "agent_message_chunk", "available_commands_update", "agent_message_chunk"]
    seqs = [cortex(message)["seq"] for message in peer.everything]
    assert seqs == sorted(set(seqs))


@pytest.mark.parametrize(("lines", "size", "kept"), [(3, 10**6, "8yz"), (64, 5000, "yz")])
async def test_what_is_kept_of_it_is_bounded_and_the_newest_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, lines: int, size: int, kept: str
) -> None:
    monkeypatch.setattr(ahead_module, "MAX_SAID", lines)
    monkeypatch.setattr(ahead_module, "MAX_SAID_BYTES", size)
    bench.start()
    await bound(bench)
    for number in range(9):
        bench.agent.update("s1", f"{number}" + "x" * 1000)
    bench.agent.update("s1", "y" * 1000)
    bench.agent.update("s1", "z" * 3000)
    peer = bench.connect()
    await bench.session(peer)
    await peer.request("session/list")
    said = [m["params"]["update"]["content"]["text"][:1] for m in peer.everything if of_kind(m)]
    assert "".join(said) == kept


@pytest.mark.parametrize(
    "other",
    [
        {"cwd": "/else", "mcpServers": [{"name": "x", "command": "/bin/x", "args": [], "env": []}]},
        {"_meta": {"claudeCode": {"options": {}}}},
        {"additionalDirectories": ["HOME/workspace/lib"]},
        {"cwd": "HOME/workspace/below"},
        {"vendor": 1},
    ],
)
async def test_a_client_that_wants_something_else_has_it_made(bench: Bench, other: Message) -> None:
    bench.start()
    await bound(bench, allow_client_mcp=True)
    here = str(bench.home)
    wanted = {k: v.replace("HOME", here) if isinstance(v, str) else v for k, v in other.items()}
    if "additionalDirectories" in wanted:
        wanted["additionalDirectories"] = [f"{here}/workspace/lib"]
    peer = bench.connect()
    assert (await peer.request("session/new", NEW | wanted))["result"]["sessionId"] == "s2"
    assert (await peer.request("session/new", NEW))["result"]["sessionId"] == "s1", "it is still there"


async def test_only_one_has_it_and_it_is_not_opened_again(bench: Bench) -> None:
    bench.start()
    await bound(bench)
    peer = bench.connect()
    assert [await bench.session(peer) for _ in range(2)] == ["s1", "s2"]
    await bound(bench, [{"type": "http", "name": "web", "url": "https://x", "headers": []}])
    assert len(bench.agent.all("session/new")) == 2


async def test_a_client_that_comes_while_it_is_opened_waits_for_it_and_others_do_not(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    one, two = bench.connect(), bench.connect()
    first = await one.ask("session/new", NEW)
    await one.request("session/list")
    second = await two.ask("session/new", NEW)
    await bench.agent.asked("session/new", 2)
    opened, another = bench.agent.all("session/new")
    bench.agent.say({"id": another["id"], "result": {"sessionId": "b"}})
    assert (await two.answer_to(second))["result"]["sessionId"] == "b"
    bench.agent.say({"id": opened["id"], "result": {"sessionId": "a"}})
    bench.agent.update("a", "to the first")
    assert (await one.answer_to(first))["result"]["sessionId"] == "a"
    assert await one.texts(1) == ["to the first"]
    assert len(bench.agent.all("session/new")) == 2


async def test_a_client_that_waits_counts_it_among_those_it_has_in_the_making(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    peer = bench.connect()
    for _ in range(8):
        await peer.ask("session/new", NEW)
    error = (await peer.request("session/new", NEW))["error"]
    assert error["data"]["code"] == "session.overloaded"
    for number, asked in enumerate(bench.agent.all("session/new")):
        bench.agent.say({"id": asked["id"], "result": {"sessionId": f"n{number}"}})
    await peer.request("session/list")
    bench.agent.on["session/new"] = lambda params: {"sessionId": "last"}
    assert "result" in await peer.request("session/new", NEW)


async def test_a_client_that_has_gone_meanwhile_finds_it_in_the_list(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    peer = bench.connect()
    await peer.ask("session/new", NEW)
    await peer.request("session/list")
    peer.close()
    await settled()
    bench.agent.answer("session/new", {"sessionId": "s1"})
    listed = await bench.connect().request("session/list")
    assert [session["sessionId"] for session in listed["result"]["sessions"]] == ["s1"]


async def test_nobody_comes_by_it_with_the_agents_name_for_it(bench: Bench) -> None:
    bench.start()
    await bound(bench)
    peer = bench.connect()
    reply = await peer.request("session/load", {"sessionId": "s1", **NEW})
    assert reply["error"]["data"]["code"] == "session.not_found"
    assert not bench.agent.all("session/load")


async def test_what_is_said_of_it_never_goes_to_an_older_conversation_of_that_name(bench: Bench) -> None:
    """An agent that numbers anew calls it as it called one of before."""
    bench.start()
    peer = bench.connect()
    old = await bench.session(peer)
    await bench.crash()
    bench.start(agent=Agent())
    await bound(bench)
    bench.agent.update("s1", "of the new one")
    peer = bench.connect()
    new = await bench.session(peer)
    assert new != old
    assert (await peer.until(lambda m: of_kind(m) == "agent_message_chunk"))["params"]["sessionId"] == new
    history = bench.connect()
    bench.agent.on["session/load"] = lambda params: {}
    await history.request("session/load", {"sessionId": old, **NEW})
    assert not [message for message in history.everything if of_kind(message)]


# -- failing -----------------------------------------------------------------------------------------


async def test_when_it_fails_clients_ask_for_real(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    peer = bench.connect()
    request = await peer.ask("session/new", NEW)
    await peer.request("session/list")
    opened = bench.agent.last("session/new")
    bench.agent.say({"id": opened["id"], "error": {"code": -32000, "message": "no model"}})
    assert bench.hub.ahead == "failed"
    again = await bench.agent.asked("session/new", 2)
    bench.agent.say({"id": again["id"], "error": {"code": -32000, "message": "no model at all"}})
    assert (await peer.answer_to(request))["error"]["message"] == "no model at all"
    bench.agent.on["session/new"] = lambda params: {"sessionId": "s9"}
    assert await bench.session(peer) == "s9"


@pytest.mark.parametrize("result", [{}, {"sessionId": 7}, {"sessionId": ""}, {"sessionId": "x" * 2000}, []])
async def test_an_answer_without_a_session_is_a_failure(bench: Bench, result: Any) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    bench.agent.answer("session/new", result)
    assert bench.hub.ahead == "failed"


async def test_a_workspace_that_cannot_be_made_is_a_failure(bench: Bench) -> None:
    (bench.home / "workspace").write_text("a file")
    bench.start()
    await bound(bench)
    assert bench.hub.ahead == "failed"
    assert not bench.agent.all("session/new")
    error = (await bench.connect().request("session/new", NEW))["error"]
    assert error["data"]["code"] == "config.invalid_section"


async def test_a_failed_one_is_tried_again_when_something_else_is_bound(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    opened = bench.agent.last("session/new")
    bench.agent.say({"id": opened["id"], "error": {"code": -32000, "message": "no"}})
    await bound(bench)
    assert len(bench.agent.all("session/new")) == 1
    await bound(bench, workspace="elsewhere")
    assert bench.agent.last("session/new")["params"]["cwd"] == str(bench.home / "elsewhere")
    assert bench.hub.ahead == "opening"


async def test_an_agent_that_dies_takes_it_along_and_the_next_one_opens_another(bench: Bench) -> None:
    bench.start()
    await bound(bench)
    bench.agent.update("s1", "of the one that is gone")
    agent = Agent()
    agent.prefix = "t"
    bench.restart_agent(agent)
    await agent.asked("session/new")
    peer = bench.connect()
    assert await bench.session(peer) == "t1"
    await peer.request("session/list")
    assert not [message for message in peer.everything if of_kind(message)]


async def test_a_client_that_waits_is_told_when_the_agent_dies(bench: Bench) -> None:
    bench.start(agent=waiting())
    await bound(bench)
    peer = bench.connect()
    request = await peer.ask("session/new", NEW)
    await peer.request("session/list")
    bench.restart_agent(Agent())
    assert (await peer.answer_to(request))["error"]["data"]["code"] == "agent.failed"
    assert await bench.session(peer) == "s1"


async def test_once_given_away_it_is_not_opened_by_the_next_agent(bench: Bench) -> None:
    bench.start()
    await bound(bench)
    await bench.session(bench.connect())
    bench.restart_agent(Agent())
    await settled()
    assert not bench.agent.all("session/new")


# -- changes, and clients that go another way --------------------------------------------------------


async def test_other_servers_make_it_be_closed_and_opened_anew(bench: Bench) -> None:
    bench.start(agent=closing())
    await bound(bench)
    servers = [{"name": "a", "command": "/bin/a", "args": [], "env": []}]
    await bound(bench, servers)
    assert closed(bench) == ["s1"]
    assert bench.agent.last("session/new")["params"]["mcpServers"] == [Mux.ENTRY]
    await bound(bench, [{"name": "b", "command": "/bin/b", "args": [], "env": []}])
    assert closed(bench) == ["s1", "s2"]
    assert await bench.session(bench.connect()) == "s3"


async def test_an_agent_that_follows_changes_of_its_tools_keeps_it(bench: Bench) -> None:
    bench.spec = LIVE
    bench.start(agent=closing())
    await bound(bench)
    await bound(bench, [{"name": "a", "command": "/bin/a", "args": [], "env": []}])
    assert closed(bench) == []
    assert await bench.session(bench.connect()) == "s1"
    assert len(bench.agent.all("session/new")) == 1


async def test_one_that_is_replaced_while_it_is_opened_is_closed_when_it_is_there(bench: Bench) -> None:
    bench.start(agent=waiting(closing()))
    await bound(bench)
    await bound(bench, workspace="elsewhere")
    first, second = bench.agent.all("session/new")
    bench.agent.say({"id": second["id"], "result": {"sessionId": "b"}})
    bench.agent.say({"id": first["id"], "result": {"sessionId": "a"}})
    assert closed(bench) == ["a"]
    assert await bench.session(bench.connect()) == "b"


async def test_a_change_does_not_take_it_from_a_client_that_waits(bench: Bench) -> None:
    bench.start(agent=waiting(closing()))
    await bound(bench)
    peer = bench.connect()
    request = await peer.ask("session/new", NEW)
    await peer.request("session/list")
    bench.hub.set_mcp([{"name": "a", "command": "/bin/a", "args": [], "env": []}])
    bench.hub._ahead.look()
    bench.agent.answer("session/new", {"sessionId": "s1"})
    assert (await peer.answer_to(request))["result"]["sessionId"] == "s1"
    await bench.prompt(peer, "s1")
    assert (await bench.agent.asked("session/new", 2))["params"]["mcpServers"] == [Mux.ENTRY]


async def test_when_it_is_not_wanted_any_more_it_is_closed(bench: Bench) -> None:
    bench.start(agent=closing())
    await bound(bench)
    await bound(bench, open_ahead=False)
    assert closed(bench) == ["s1"]
    assert bench.hub.ahead == ""


@pytest.mark.parametrize("method", ["session/load", "session/resume"])
async def test_a_client_that_goes_on_with_another_conversation_releases_it(bench: Bench, method: str) -> None:
    bench.start()
    old = await bench.session(bench.connect())
    await bench.crash()
    agent = closing()
    agent.prefix = "t"
    bench.start(agent=agent)
    await bound(bench)
    peer = bench.connect()
    assert "result" in await peer.request(method, {"sessionId": old, **NEW})
    assert closed(bench) == ["t1"]
    assert bench.hub.ahead == ""
    await bound(bench, workspace="elsewhere")
    assert len(bench.agent.all("session/new")) == 1


async def test_an_agent_that_cannot_close_it_keeps_it_for_who_wants_it_after_all(bench: Bench) -> None:
    bench.start()
    old = await bench.session(bench.connect())
    await bench.crash()
    bench.start(agent=Agent())
    bench.agent.prefix = "t"
    await bound(bench)
    peer = bench.connect()
    await peer.request("session/load", {"sessionId": old, **NEW})
    assert await bench.session(peer) == "t1"
    assert len(bench.agent.all("session/new")) == 1


async def test_clients_that_are_there_go_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was waiting for the agent has its own request made, and nothing is opened beside it."""
    monkeypatch.setattr(acp_module, "AHEAD_PAUSE_S", 0.05)
    bench.start(up=False)
    peer = bench.connect()
    initialize = await peer.ask("initialize", {"protocolVersion": 1})
    await settled()
    await bound(bench)
    bench.hub.agent_up(bench.agent, SPEC)
    await peer.answer_to(initialize)
    assert await bench.session(peer) == "s1"
    await asyncio.sleep(0.1)
    assert len(bench.agent.all("session/new")) == 1


async def test_a_client_that_is_there_and_asks_nothing_has_it_opened_after_a_moment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acp_module, "AHEAD_PAUSE_S", 0.02)
    bench.start()
    peer = bench.connect()
    await peer.request("session/list")
    await bound(bench)
    assert not bench.agent.all("session/new")
    await bench.agent.asked("session/new")
    assert await bench.session(peer) == "s1"


async def test_one_that_cannot_be_journaled_is_closed_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.start(agent=closing())
    await bound(bench)
    peer = bench.connect()
    await peer.request("session/list")
    journal = bench.hub._journal
    really = journal.flush

    def full_once() -> bool:
        if not journal._pending:
            return False
        monkeypatch.setattr(journal, "flush", really)
        raise JournalFull("no space")

    monkeypatch.setattr(journal, "flush", full_once)
    error = (await peer.request("session/new", NEW))["error"]
    assert error["data"]["code"] == "store.disk_full"
    assert closed(bench) == ["s1"]


# -- nobody's yet ------------------------------------------------------------------------------------


def journal_asked(bench: Bench) -> bool:
    return bool(bench.files.asked)


async def test_a_sandbox_that_is_nobodys_asks_for_no_journal_and_has_its_agent_ready(bench: Bench) -> None:
    bench.start(session="")
    await bound(bench)
    assert bench.hub.agent_info
    assert bench.hub.ahead == "open"
    assert not journal_asked(bench)
    bench.agent.say({"id": 7, "method": "fs/read_text_file", "params": {"sessionId": "s1", "path": "/x"}})
    await bench.agent.until(lambda: any(m.get("id") == 7 and "error" in m for m in bench.agent.got))
    await bench.stop()
    assert not journal_asked(bench)


async def test_a_claim_opens_the_journal_and_what_was_opened_before_serves(bench: Bench) -> None:
    bench.start()
    old = await bench.session(bench.connect())
    await bench.crash()
    agent = Agent()
    agent.prefix = "t"
    bench.files.asked.clear()
    bench.start(session="", agent=agent)
    await bound(bench)
    bench.agent.update("t1", "said before it was anybody's")
    bench.hub.claim(moved=False, keep_ahead=True)
    await bound(bench)
    assert journal_asked(bench)
    peer = bench.connect()
    assert await bench.session(peer) == "t1"
    assert await peer.texts(1) == ["said before it was anybody's"]
    listed = await peer.request("session/list")
    assert {session["sessionId"] for session in listed["result"]["sessions"]} == {old, "t1"}
    assert len(bench.agent.all("session/new")) == 1


async def test_a_claim_that_does_not_keep_it_has_another_opened_with_what_is_bound_then(bench: Bench) -> None:
    bench.start(session="", agent=closing())
    await bound(bench)
    bench.hub.claim(moved=True, keep_ahead=False)
    bench.hub.set_settings(AHEAD | {"workspace": "mine"})
    await settled()
    assert closed(bench) == ["s1"]
    assert len(bench.agent.all("session/new")) == 2
    assert bench.agent.last("session/new")["params"]["cwd"] == str(bench.home / "mine")
    assert await bench.session(bench.connect()) == "s2"


async def test_a_claim_of_a_sandbox_whose_home_moved_starts_servers_anew(bench: Bench) -> None:
    bench.start(session="")
    await bound(bench, [{"name": "a", "command": "/bin/a", "args": [], "env": []}])
    assert not bench.mux.claimed()
    bench.hub.claim(moved=True, keep_ahead=True)
    await settled()
    assert bench.mux.renewed == 1
    assert bench.mux.claimed()


async def test_clients_are_told_when_the_journal_cannot_be_had(bench: Bench) -> None:
    async def newer(segment: int) -> Any:
        raise AssertionError("a grant that is none")

    bench.files.grant = newer  # type: ignore[method-assign]
    bench.start(session="")
    await bound(bench)
    bench.hub.claim(moved=False, keep_ahead=True)
    closing_frame = await bench.connect().until_closed()
    assert closing_frame is not None
    assert closing_frame[0] == 1011


async def test_a_client_that_comes_before_the_journal_is_held(bench: Bench) -> None:
    bench.files.wait = asyncio.Event()
    bench.start(session="")
    await bound(bench)
    bench.hub.claim(moved=False, keep_ahead=True)
    peer: Peer = bench.connect()
    request = await peer.ask("session/new", NEW)
    await settled()
    assert not peer.everything
    bench.files.wait.set()
    assert (await peer.answer_to(request))["result"]["sessionId"] == "s1"


async def test_the_agent_may_die_before_the_claim(bench: Bench) -> None:
    bench.start(session="")
    await bound(bench)
    bench.agent.say({"id": 1, "method": "_vendor/ask", "params": {}})
    bench.restart_agent(Agent())
    await bench.agent.asked("session/new")
    bench.hub.claim(moved=False, keep_ahead=True)
    peer = bench.connect()
    assert await bench.session(peer) == "s1"
    await peer.request("session/list")
    assert not [m for m in peer.everything if m.get("method") == "_vendor/ask"], "the agent that asked is gone"


async def test_an_agent_is_told_of_the_session_to_come_as_long_as_the_sandbox_is_nobodys(bench: Bench) -> None:
    bench.start(session="", up=False)
    bench.hub.agent_up(bench.agent, LIVE)
    first = await bench.agent.asked("initialize")
    coming = {"cwd": str(bench.home / "workspace"), "mcpServers": [bench.mux.entry()]}
    assert first["params"]["_meta"] == {"cortex": {"unclaimed": coming}}
    bench.hub.claim(moved=False, keep_ahead=True)
    bench.hub.agent_down("it ended", final=False)
    bench.hub.agent_up(bench.agent, LIVE)
    await settled()
    assert len(bench.agent.all("initialize")) == 2
    assert "_meta" not in bench.agent.last("initialize")["params"]
