"""ACP in the middle, end to end: scripted agent, real sockets, real journal."""

from __future__ import annotations

import asyncio

from tests.unit.sandbox_agent.acp.kit import SPEC, Agent, Bench, Mux, cortex, of_kind, prompt, update


async def test_initialize_is_answered_from_the_agents_cached_answer_without_auth_methods(bench: Bench) -> None:
    bench.start()
    for _ in range(2):
        peer = bench.connect()
        reply = await peer.request(
            "initialize", {"protocolVersion": 1, "clientCapabilities": {"fs": {"readTextFile": True}}}
        )
        result = reply["result"]
        assert result["protocolVersion"] == 1
        assert result["authMethods"] == []
        assert result["agentInfo"]["name"] == "scripted"
        assert result["agentCapabilities"]["loadSession"] is True
        assert set(result["agentCapabilities"]["sessionCapabilities"]) >= {"list", "resume"}
    asked = bench.agent.all("initialize")
    assert len(asked) == 1
    assert asked[0]["params"]["clientCapabilities"] == {
        "fs": {"readTextFile": False, "writeTextFile": False},
        "terminal": False,
    }


async def test_a_client_is_held_until_journal_and_agent_are_there(bench: Bench) -> None:
    bench.files.wait = asyncio.Event()
    hub = bench.start(up=False)
    peer = bench.connect()
    request = await peer.ask("initialize", {"protocolVersion": 1})
    hub.agent_up(bench.agent, SPEC)
    await bench.agent.asked("initialize")
    reading = asyncio.ensure_future(peer.answer_to(request))
    await asyncio.sleep(0.05)
    assert not reading.done()
    bench.files.wait.set()
    assert (await reading)["result"]["protocolVersion"] == 1


async def test_cwd_is_mapped_and_configured_servers_are_given(bench: Bench) -> None:
    hub = bench.start()
    peer = bench.connect()
    configured = {"name": "files", "command": "/bin/x", "args": [], "env": []}
    assert hub.set_mcp([configured]) == "now"
    theirs = {"name": "mine", "command": "/bin/y", "args": [], "env": []}
    workspace = str(bench.home / "workspace")
    await peer.request("session/new", {"cwd": "C:\\Users\\me", "mcpServers": [theirs]})
    assert bench.agent.last("session/new")["params"] == {"cwd": workspace, "mcpServers": [Mux.ENTRY]}
    assert (bench.home / "workspace").is_dir()
    assert hub.set_settings({"allow_client_mcp": True, "workspace": "code"}) == "next_session"
    await peer.request("session/new", {"cwd": str(bench.home / "code" / "sub"), "mcpServers": [theirs, 7]})
    params = bench.agent.last("session/new")["params"]
    assert params["cwd"] == str(bench.home / "code" / "sub")
    assert params["mcpServers"] == [Mux.ENTRY, theirs]
    assert bench.mux.servers == [configured]
    assert hub.set_mcp([]) == "next_turn"


async def test_every_message_is_stamped_with_one_epoch_and_a_growing_seq(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    await peer.request("initialize", {"protocolVersion": 1})
    session = await bench.session(peer)
    await peer.request("session/list")
    request = await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    for text in ("a", "b"):
        bench.agent.update(session, text)
    bench.agent.say({"method": "_vendor/note", "params": {"sessionId": session}})
    bench.agent.say({"method": "_vendor/global"})
    bench.agent.answer("session/prompt", {"stopReason": "end_turn", "_meta": {"mine": 1, "cortex": {"seq": 7}}})
    reply = await peer.answer_to(request)
    await peer.request("session/load", {"sessionId": "nope"})
    assert reply["result"]["_meta"]["mine"] == 1
    stamps = [cortex(message) for message in peer.everything]
    assert len({stamp["epoch"] for stamp in stamps}) == 1
    seqs = [stamp["seq"] for stamp in stamps]
    assert seqs == sorted(set(seqs))


async def test_one_client_streams_a_turn_and_the_other_sees_it_with_what_was_asked(bench: Bench) -> None:
    bench.start()
    one, two, stranger = bench.connect(), bench.connect(), bench.connect()
    session = await bench.session(one)
    await two.request("session/load", {"sessionId": session, "cwd": "/x", "mcpServers": []})
    await stranger.request("session/list")
    request = await bench.prompt(one, session, "what?")
    await bench.agent.asked("session/prompt")
    bench.agent.update(session, "this")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert (await one.answer_to(request))["result"]["stopReason"] == "end_turn"
    assert await two.texts(1, "user_message_chunk") == ["what?"]
    assert await two.texts(1) == ["this"]
    assert [of_kind(m) for m in one.everything if of_kind(m)] == ["agent_message_chunk"]
    await stranger.request("session/list")
    assert not [m for m in stranger.everything if of_kind(m)]
    assert len([m for m in two.everything if "method" not in m]) == 1


async def test_two_clients_with_equal_ids_get_their_own_answers(bench: Bench) -> None:
    bench.start()
    bench.agent.on["_vendor/echo"] = lambda params: {"you": params["you"]}
    one, two = bench.connect(), bench.connect()
    await one.ask("_vendor/echo", {"you": "one"}, "x")
    await two.ask("_vendor/echo", {"you": "two"}, "x")
    assert (await one.answer_to("x"))["result"]["you"] == "one"
    assert (await two.answer_to("x"))["result"]["you"] == "two"


async def test_updates_that_come_before_the_answer_to_session_new_are_not_lost(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    bench.agent.on["session/new"] = lambda params: None
    request = await peer.ask("session/new", {"cwd": "/", "mcpServers": []})
    await bench.agent.asked("session/new")
    bench.agent.update("early", "hello")
    bench.agent.answer("session/new", {"sessionId": "early"})
    assert (await peer.answer_to(request))["result"]["sessionId"] == "early"
    assert await peer.texts(1) == ["hello"]
    bench.agent.update("unknown", "nobody asked")
    assert bench.hub.garbage == 1


async def test_a_turn_goes_on_without_its_client_and_load_shows_it(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session, "long job")
    await bench.agent.asked("session/prompt")
    bench.agent.update(session, "one")
    await peer.texts(1)
    peer.close()
    while bench.hub.clients:
        await asyncio.sleep(0.01)
    assert bench.hub.open_turns == 1
    bench.agent.update(session, "two")
    again = bench.connect()
    loading = await again.ask("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    reply = await again.answer_to(loading)
    history = [m["params"]["update"]["content"]["text"] for m in again.everything if of_kind(m)]
    assert history == ["long job", "one", "two"]
    assert reply["result"]["modes"]["currentModeId"] == "ask"
    assert not bench.agent.all("session/load")
    bench.agent.update(session, "three")
    assert await again.texts(3) == ["one", "two", "three"]
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert bench.hub.open_turns == 0


async def test_list_gives_titles_and_resume_gives_no_history(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session, "Mend the roof\nquickly")
    await bench.agent.asked("session/prompt")
    bench.agent.update(session, "done")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    other = bench.connect()
    listed = (await other.request("session/list"))["result"]["sessions"]
    assert [(s["sessionId"], s["title"], s["cwd"]) for s in listed] == [
        (session, "Mend the roof", str(bench.home / "workspace"))
    ]
    await other.request("session/resume", {"sessionId": session, "cwd": "/", "mcpServers": []})
    assert not [m for m in other.everything if of_kind(m)]
    bench.agent.update(session, "later")
    assert await other.texts(1) == ["later"]


async def test_modes_are_followed(bench: Bench) -> None:
    bench.start()
    bench.agent.on["session/set_mode"] = lambda params: {}
    peer = bench.connect()
    session = await bench.session(peer)
    await peer.request("session/set_mode", {"sessionId": session, "modeId": "code"})
    reply = await peer.request("session/resume", {"sessionId": session, "cwd": "/"})
    assert reply["result"]["modes"]["currentModeId"] == "code"
    change = {"sessionUpdate": "current_mode_update", "currentModeId": "ask"}
    bench.agent.say({"method": "session/update", "params": {"sessionId": session, "update": change}})
    reply = await peer.request("session/resume", {"sessionId": session, "cwd": "/"})
    assert reply["result"]["modes"]["currentModeId"] == "ask"


async def test_prompts_queue_up_to_a_bound_and_run_in_order(bench: Bench) -> None:
    bench.start(prompt_queue=2)
    peer = bench.connect()
    session = await bench.session(peer)
    requests = [await bench.prompt(peer, session, text) for text in ("1", "2", "3", "4")]
    refused = await peer.answer_to(requests[3])
    assert refused["error"]["data"]["code"] == "session.overloaded"
    assert refused["error"]["data"]["hint"]
    assert bench.hub.open_turns == 3
    for times, request in enumerate(requests[:3], 1):
        asked = await bench.agent.asked("session/prompt", times)
        assert asked["params"]["prompt"][0]["text"] == str(times)
        assert len(bench.agent.all("session/prompt")) == times
        bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
        assert "result" in await peer.answer_to(request)
    assert bench.hub.open_turns == 0


async def test_cancel_ends_what_waits_and_what_runs(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    running, waiting = await bench.prompt(peer, session), await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    ask = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": []}
    bench.agent.say({"id": "p1", "method": "session/request_permission", "params": ask})
    permission = await peer.until(lambda m: m.get("method") == "session/request_permission")
    await peer.notify("session/cancel", {"sessionId": session})
    assert (await peer.answer_to(waiting))["result"]["stopReason"] == "cancelled"
    await bench.agent.asked("session/cancel")
    answer = next(m for m in bench.agent.got if m.get("id") == "p1")
    assert answer["result"] == {"outcome": {"outcome": "cancelled"}}
    withdrawn = await peer.until(lambda m: m.get("method") == "$/cancel_request")
    assert withdrawn["params"]["requestId"] == permission["id"]
    bench.agent.answer("session/prompt", {"stopReason": "cancelled"})
    assert (await peer.answer_to(running))["result"]["stopReason"] == "cancelled"
    assert len(bench.agent.all("session/prompt")) == 1


async def test_permission_goes_to_all_and_the_first_answer_counts(bench: Bench) -> None:
    bench.start()
    one, two = bench.connect(), bench.connect()
    session = await bench.session(one)
    await two.request("session/resume", {"sessionId": session, "cwd": "/"})
    await bench.prompt(one, session)
    await bench.agent.asked("session/prompt")
    ask = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": [{"optionId": "yes"}]}
    bench.agent.say({"id": 0, "method": "session/request_permission", "params": ask})
    asked = [await p.until(lambda m: m.get("method") == "session/request_permission") for p in (one, two)]
    assert asked[0] == asked[1]
    assert asked[0]["params"]["toolCall"] == {"toolCallId": "t"}
    yes = {"outcome": {"outcome": "selected", "optionId": "yes"}}
    await two.send({"id": asked[1]["id"], "result": yes})
    await bench.agent.until(lambda: any(m.get("id") == 0 and "result" in m for m in bench.agent.got))
    gone = await one.until(lambda m: m.get("method") == "$/cancel_request")
    assert gone["params"]["requestId"] == asked[0]["id"]
    await one.send({"id": asked[0]["id"], "result": {"outcome": {"outcome": "cancelled"}}})
    await one.request("session/list")
    assert [m["result"] for m in bench.agent.got if m.get("id") == 0 and "result" in m] == [yes]
    assert not [m for m in two.everything if m.get("method") == "$/cancel_request"]


async def test_permission_is_delivered_again_after_a_reconnect(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await bench.prompt(peer, session)
    await bench.agent.asked("session/prompt")
    ask = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": []}
    bench.agent.say({"id": 3, "method": "session/request_permission", "params": ask})
    first = await peer.until(lambda m: m.get("method") == "session/request_permission")
    peer.close()
    again = bench.connect()
    await again.request("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    second = await again.until(lambda m: m.get("method") == "session/request_permission")
    assert second == first
    await again.send({"id": second["id"], "result": {"outcome": {"outcome": "cancelled"}}})
    await bench.agent.until(lambda: any(m.get("id") == 3 and "result" in m for m in bench.agent.got))
    later = bench.connect()
    await later.request("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    await later.request("session/list")
    assert not [m for m in later.everything if m.get("method") == "session/request_permission"]


async def test_one_client_that_cannot_answer_does_not_answer_for_the_others(bench: Bench) -> None:
    bench.start()
    one, two = bench.connect(), bench.connect()
    session = await bench.session(one)
    await two.request("session/resume", {"sessionId": session, "cwd": "/"})
    bench.agent.say({"id": 9, "method": "_vendor/ask", "params": {"sessionId": session}})
    asked = await one.until(lambda m: m.get("method") == "_vendor/ask")
    await one.send({"id": asked["id"], "error": {"code": -32601, "message": "what?"}})
    await one.request("session/list")
    assert not [m for m in bench.agent.got if m.get("id") == 9]
    await two.send({"id": asked["id"], "error": {"code": -32601, "message": "me neither"}})
    await bench.agent.until(lambda: any(m.get("id") == 9 for m in bench.agent.got))


async def test_the_agent_gets_no_files_and_terminals_of_a_clients_machine(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for number, method in enumerate(("fs/read_text_file", "terminal/create", "_cortex/status")):
        bench.agent.say({"id": f"f{number}", "method": method, "params": {"sessionId": session}})
        refused = next(m for m in bench.agent.got if m.get("id") == f"f{number}")
        assert refused["error"]["code"] == -32601
    bench.agent.say({"method": "_cortex/status", "params": {"state": "failed"}})
    await peer.request("session/list")
    assert {m.get("method") for m in peer.everything} == {None}


async def test_signing_in_and_providers_are_refused(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    for method in ("authenticate", "providers/set", "providers/list", "logout"):
        reply = await peer.request(method, {"methodId": "login"})
        assert reply["error"]["data"]["code"] == "access.forbidden"
        await peer.notify(method, {"methodId": "login"})
    for method in ("session/prompt", "session/new", "initialize"):
        await peer.notify(method, {"sessionId": "s1", "prompt": []})
    await peer.request("session/list")
    assert {m["method"] for m in bench.agent.got} == {"initialize"}


async def test_pings_are_swallowed_and_unknown_messages_pass_both_ways(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    await peer.notify("$/ping", {})
    await peer.notify("_vendor/hint", {"sessionId": session, "_meta": {"cortex": {"x": 1}, "kept": 1}})
    told = await bench.agent.asked("_vendor/hint")
    assert told["params"] == {"sessionId": session, "_meta": {"kept": 1}}
    assert not bench.agent.all("$/ping")
    bench.agent.on["_vendor/list"] = lambda params: None
    request = await peer.ask("_vendor/list", {})
    await bench.agent.asked("_vendor/list")
    bench.agent.answer("_vendor/list", [1, 2])
    assert (await peer.answer_to(request))["result"] == [1, 2]


async def test_set_mcp_reaches_an_open_conversation_when_it_is_loaded_again(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    server = {"type": "http", "name": "new", "url": "https://x.example", "headers": []}
    assert bench.hub.set_mcp([server]) == "next_session"
    await peer.request("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    assert bench.agent.last("session/load")["params"]["mcpServers"] == [server]
    await peer.request("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    assert len(bench.agent.all("session/load")) == 1


async def test_delete_and_close(bench: Bench) -> None:
    bench.start(agent=Agent({"loadSession": True, "sessionCapabilities": {"close": {}}}))
    bench.agent.on["session/close"] = lambda params: {}
    peer = bench.connect()
    first, second = await bench.session(peer), await bench.session(peer)
    await peer.request("session/close", {"sessionId": first})
    assert len(bench.agent.all("session/close")) == 1
    assert "result" in await peer.request("session/delete", {"sessionId": second})
    listed = (await peer.request("session/list"))["result"]["sessions"]
    assert [s["sessionId"] for s in listed] == [first]
    assert (await peer.request("session/load", {"sessionId": first}))["result"] is not None
    assert len(bench.agent.all("session/load")) == 1


async def test_a_message_id_runs_once_while_it_runs_and_after(bench: Bench) -> None:
    bench.start()
    one, two = bench.connect(), bench.connect()
    session = await bench.session(one)
    first = await bench.prompt(one, session, "pay", "m1")
    await bench.agent.asked("session/prompt")
    second = await two.ask("session/prompt", prompt(session, "pay", "m1"))
    third = await one.ask("session/prompt", prompt(session, "pay", "m1"))
    await two.request("session/list")
    await one.request("session/list")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    for peer, request in ((one, first), (two, second), (one, third)):
        assert (await peer.answer_to(request))["result"]["stopReason"] == "end_turn"
    reply = await two.request("session/prompt", prompt(session, "pay", "m1"))
    assert reply["result"]["stopReason"] == "end_turn"
    assert len(bench.agent.all("session/prompt")) == 1
    assert "_meta" not in bench.agent.last("session/prompt")["params"]


async def test_agents_update_is_sent_on_as_it_was_but_for_the_stamp(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    said = update(session, 'Grüße \u2028 "params":{ ok', "agent_thought_chunk")
    said["params"]["update"]["extra"] = {"params": {"a": [1.5, None, True]}}
    bench.agent.say(said)
    got = await peer.until(lambda m: of_kind(m) == "agent_thought_chunk")
    assert got["params"].pop("_meta")["cortex"]["seq"] > 0
    assert got == {"jsonrpc": "2.0", **said}
