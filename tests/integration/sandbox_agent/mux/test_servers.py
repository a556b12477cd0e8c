"""Several servers as one: names, routes, what agents see of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.sandbox_agent.mux.kit import Place, RpcError, alive, gone, server
from tests.integration.sandbox_agent.mux.server import TOOLS


async def test_tools_of_two_servers_are_called_by_their_names(place: Place) -> None:
    place.mux.set([server("one"), server("two")])
    agent = await place.agent()
    names = await agent.names()
    assert {"one__echo", "two__echo"} <= set(names)
    assert (await agent.value("one__echo", text="a"))["name"] == "one"
    assert (await agent.value("two__echo", text="b")) | {"pid": 0} == {"name": "two", "pid": 0, "text": "b"}


async def test_a_server_runs_once_for_all_conversations(place: Place) -> None:
    place.mux.set([server("one")])
    pids = {(await (await place.agent()).value("one__echo"))["pid"] for _ in range(3)}
    assert len(pids) == 1


async def test_titles_and_schemas_are_kept(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    tools = {tool["name"]: tool for tool in (await agent.ask("tools/list"))["tools"]}
    assert tools["one__echo"] == {"name": "one__echo", "title": "T echo", "inputSchema": {"type": "object"}}


async def test_a_list_in_pages_arrives_whole(place: Place) -> None:
    more = [f"extra-{number}" for number in range(20)]
    place.mux.set([server("one", page=3, tools=more)])
    names = await (await place.agent()).names()
    assert {f"one__{name}" for name in more} <= set(names)
    assert len(names) == len(set(names))


async def test_odd_names_reach_the_tool_they_came_from(place: Place) -> None:
    odd = ["a.b", "a_b", "sp ace", "x" * 90, "x" * 91, "ünï"]
    place.mux.set([server("my server!", tools=odd), server("my server?", tools=odd)])
    agent = await place.agent()
    names = await agent.names()
    assert all(len(f"mcp__cortex__{name}") <= 64 for name in names)
    answers = {await agent.text(name) for name in names if name.split("__", 1)[1] not in TOOLS}
    assert answers == {f"my server{mark} did {name}" for mark in "!?" for name in odd}


async def test_hello_is_answered_before_any_server_runs(place: Place) -> None:
    place.mux.set([server("one", hang=True)])
    answer = await (await place.connect()).hello()
    assert answer["serverInfo"]["name"] == "cortex"
    assert answer["capabilities"]["tools"] == {"listChanged": True}


@pytest.mark.parametrize(
    ("wanted", "given"),
    [("2024-11-05", "2024-11-05"), ("2025-11-25", "2025-11-25"), ("2026-07-28", "2025-11-25"), (None, "2025-11-25")],
)
async def test_the_version_is_the_clients_if_we_speak_it(place: Place, wanted: Any, given: str) -> None:
    assert (await (await place.connect()).hello(version=wanted))["protocolVersion"] == given


async def test_a_server_of_an_older_version_serves(place: Place) -> None:
    place.mux.set([server("old", version="2024-11-05")])
    assert (await (await place.agent()).value("old__echo"))["name"] == "old"


async def test_what_nobody_knows_is_said_to_be_unknown(place: Place) -> None:
    agent = await place.connect()
    with pytest.raises(RpcError) as caught:
        await agent.ask("server/discover")
    assert caught.value.code == -32601
    await agent.hello()
    assert await agent.ask("ping") == {}
    for method, params, code in (
        ("tools/call", {"name": "nobody__x"}, -32602),
        ("tools/call", {"name": 7}, -32602),
        ("prompts/get", {"name": "nobody__x"}, -32602),
        ("resources/read", {"uri": "what://ever"}, -32002),
        ("tools/list", {"cursor": "page-2"}, -32602),
        ("logging/setLevel", {"level": "loud"}, -32602),
        ("completion/complete", {"ref": []}, -32602),
        ("tasks/list", {}, -32601),
    ):
        with pytest.raises(RpcError) as caught:
            await agent.ask(method, params)
        assert caught.value.code == code, method


async def test_prompts_go_by_name_and_resources_by_uri(place: Place) -> None:
    place.mux.set(
        [
            server("one", prompts=["greet"], resources=["mem://a", "mem://same"], templates=["tpl://one/{x}"]),
            server("two", prompts=["greet"], resources=["mem://b", "mem://same"]),
        ]
    )
    agent = await place.agent()
    assert await agent.names("prompts") == ["one__greet", "two__greet"]
    got = await agent.ask("prompts/get", {"name": "two__greet", "arguments": {"a": "b"}})
    assert got["messages"][0]["content"]["text"] == "two: greet {'a': 'b'}"
    uris = [item["uri"] for item in (await agent.ask("resources/list"))["resources"]]
    assert uris == ["mem://a", "mem://same", "mem://b", "cortex:two:mem://same"]
    for uri, owner, own in (
        ("mem://a", "one", "mem://a"),
        ("mem://b", "two", "mem://b"),
        ("mem://same", "one", "mem://same"),
        ("cortex:two:mem://same", "two", "mem://same"),
        ("tpl://one/5", "one", "tpl://one/5"),
    ):
        (content,) = (await agent.ask("resources/read", {"uri": uri}))["contents"]
        assert content == {"uri": uri, "text": f"{owner} has {own}"}


async def test_a_resource_that_a_tool_links_to_can_be_read(place: Place) -> None:
    place.mux.set([server("one", resources=["mem://a"]), server("two", resources=["mem://b"])])
    agent = await place.agent()
    await agent.ask("resources/list")
    for owner, own, public in (("two", "mem://new", "mem://new"), ("two", "mem://a", "cortex:two:mem://a")):
        (link,) = (await agent.call(f"{owner}__link", uri=own))["content"]
        assert link["uri"] == public
        (content,) = (await agent.ask("resources/read", {"uri": public}))["contents"]
        assert content == {"uri": public, "text": f"{owner} has {own}"}


async def test_completions_are_asked_of_the_server_that_has_the_prompt(place: Place) -> None:
    place.mux.set([server("one", prompts=["greet"]), server("two", templates=["tpl://two/{x}"])])
    await place.settled()
    agent = await place.agent()
    await agent.names("prompts")

    async def completed(ref: dict[str, str]) -> list[str]:
        found = await agent.ask("completion/complete", {"ref": ref, "argument": {"name": "a", "value": ""}})
        values: list[str] = found["completion"]["values"]
        return values

    assert await completed({"type": "ref/prompt", "name": "one__greet"}) == ['{"name": "greet", "type": "ref/prompt"}']
    assert await completed({"type": "ref/resource", "uri": "tpl://two/{x}"}) == [], "two has no completions"


async def test_what_all_servers_can_is_said_once_it_is_known(place: Place) -> None:
    assert "completions" not in (await (await place.connect()).hello())["capabilities"]
    place.mux.set([server("one", prompts=["greet"], instructions="Be kind.")])
    await place.settled()
    answer = await (await place.connect()).hello()
    assert {"completions", "logging"} <= set(answer["capabilities"])
    assert "one__" in answer["instructions"]
    assert "Be kind." in answer["instructions"]


async def test_a_server_gets_its_environment_directory_and_group(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    found = await agent.value("one__environment")
    assert found["env"]["WHO"] == "one"
    assert found["env"]["BASE"] == "1"
    assert found["env"]["HOME"] == str(place.home)
    assert found["cwd"] == str(place.work)
    assert found["leader"], "it has a process group of its own"


async def test_servers_are_told_what_the_clients_of_this_sandbox_can(place: Place) -> None:
    agent = await place.agent({"sampling": {"tools": {}}})
    place.mux.set([server("one")])
    hello = (await agent.value("one__environment"))["hello"]
    assert hello["capabilities"] == {"roots": {"listChanged": True}, "sampling": {"tools": {}}}
    assert hello["protocolVersion"] == "2025-11-25"


async def test_servers_come_and_go_in_an_open_conversation(place: Place) -> None:
    agent = await place.agent()
    assert await agent.names() == []
    assert place.mux.set([server("one")])
    await agent.noted("notifications/tools/list_changed")
    assert "one__echo" in await agent.names()
    pid = (await agent.value("one__echo"))["pid"]

    assert place.mux.set([server("one"), server("two", prompts=["p"])])
    await agent.noted("notifications/tools/list_changed")
    await agent.noted("notifications/prompts/list_changed")
    assert await agent.names("prompts") == ["two__p"]
    assert (await agent.value("one__echo"))["pid"] == pid, "what is equal keeps running"

    assert place.mux.set([server("two", prompts=["p"])])
    await agent.noted("notifications/tools/list_changed")
    assert not [name for name in await agent.names() if name.startswith("one__")]
    await gone(pid)


async def test_the_same_servers_again_are_no_change(place: Place) -> None:
    assert place.mux.set([server("one")])
    agent = await place.agent()
    pid = (await agent.value("one__echo"))["pid"]
    assert not place.mux.set([server("one")])
    assert (await agent.value("one__echo"))["pid"] == pid


async def test_another_configuration_of_a_server_is_another_process(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    pid = (await agent.value("one__echo"))["pid"]
    assert place.mux.set([server("one", tools=["more"])])
    await agent.until(lambda: any("list_changed" in note["method"] for note in agent.notes))
    assert (await agent.value("one__echo"))["pid"] != pid
    await gone(pid)


async def test_a_new_home_is_a_new_process_of_each(place: Place) -> None:
    place.mux.set([server("one")])
    agent = await place.agent()
    pid = (await agent.value("one__echo"))["pid"]
    place.home.rename(place.root / "old")
    place.home.mkdir()
    place.mux.renew()
    assert (await agent.value("one__echo"))["pid"] != pid


async def test_a_tool_that_appears_is_told_and_can_be_called(place: Place) -> None:
    place.mux.set([server("one")])
    first, second = await place.agent(), await place.agent()
    for agent in (first, second):
        await agent.names()
    await first.text("one__add", tool="fresh")
    for agent in (first, second):
        await agent.noted("notifications/tools/list_changed")
        assert "one__fresh" in await agent.names()
    assert await second.text("one__fresh") == "one did fresh"


async def test_all_is_gone_after_close(root: Path) -> None:
    root.mkdir(exist_ok=True)
    place = Place(root)
    async with place.running():
        place.mux.set([server("one"), server("two")])
        agent = await place.agent()
        pids = [(await agent.value(f"{name}__echo"))["pid"] for name in ("one", "two")]
        await place.mux.close()
        for pid in pids:
            assert not alive(pid)
        await agent.until(lambda: agent.closed)
    assert not Path(place.mux.entry()["args"][-1]).exists()
