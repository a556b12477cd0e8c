from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import mcp_catalog
from sandbox_agent.mcp_catalog import Catalog
from sandbox_agent.mcp_protocol import KINDS, Items, Listing

WORDS = st.text(st.sampled_from("abc:/_-."), min_size=1, max_size=6)
URIS = WORDS | WORDS.map(lambda word: f"cortex:a:{word}")


def listing(capabilities: dict[str, Any] | None = None, **lists: list[str]) -> Listing:
    """Of names and URIs."""
    able = {KINDS[kind].capability: {} for kind in lists} if capabilities is None else capabilities
    return Listing(able, "", {kind: items(kind, names) for kind, names in lists.items()})


def items(kind: str, names: list[str]) -> Items:
    return [{KINDS[kind].key: name, "description": f"of {name}"} for name in names]


def shown(catalog: Catalog, kind: str) -> list[str]:
    return [item[KINDS[kind].key] for item in json.loads(catalog.bodies[kind])[KINDS[kind].field]]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(URIS, max_size=6, unique=True), max_size=4))
def test_every_resource_is_reached_by_a_uri_of_its_own(servers: dict[str, list[str]]) -> None:
    catalog = Catalog({name: listing(resources=uris) for name, uris in servers.items()})
    public = shown(catalog, "resources")
    assert len(public) == len(set(public)) == sum(map(len, servers.values()))
    routes = [catalog.located(uri, {}) for uri in public]
    assert routes == [(name, uri) for name, uris in servers.items() for uri in uris]


@given(st.dictionaries(WORDS, st.lists(WORDS, max_size=6, unique=True), max_size=4))
def test_every_tool_is_reached_by_the_name_it_is_shown_by(servers: dict[str, list[str]]) -> None:
    catalog = Catalog({name: listing(tools=tools) for name, tools in servers.items()})
    routes = [catalog.named("tools", name) for name in shown(catalog, "tools")]
    assert routes == [(name, tool) for name, tools in servers.items() for tool in tools]


@given(st.lists(URIS, max_size=5, unique=True), st.lists(URIS, max_size=5, unique=True))
def test_a_uri_that_a_server_names_is_the_one_it_is_read_by(first: list[str], second: list[str]) -> None:
    catalog = Catalog({"x": listing(resources=first), "y": listing(resources=second)})
    for server, uris in (("x", first), ("y", second)):
        for uri in uris:
            assert catalog.located(catalog.public_uri(server, uri), {}) == (server, uri)


def test_who_is_configured_first_keeps_a_uri_that_two_have() -> None:
    catalog = Catalog({"x": listing(resources=["u:1"]), "y": listing(resources=["u:1"])})
    assert shown(catalog, "resources") == ["u:1", "cortex:y:u:1"]


def test_a_uri_that_looks_like_one_of_ours_takes_nothing_from_another_server() -> None:
    catalog = Catalog({"x": listing(resources=["u:1", "cortex:y:u:1"]), "y": listing(resources=["u:1"])})
    assert [catalog.located(uri, {}) for uri in shown(catalog, "resources")] == [
        ("x", "u:1"),
        ("x", "cortex:y:u:1"),
        ("y", "u:1"),
    ]


def test_the_first_of_two_tools_of_one_name_counts() -> None:
    twice = Listing({"tools": {}}, "", {"tools": [{"name": "t", "v": 1}, {"name": "t", "v": 2}]})
    assert json.loads(Catalog({"s": twice}).bodies["tools"]) == {"tools": [{"name": "s__t", "v": 1}]}


def test_what_is_in_no_list_is_found_by_hint_template_or_when_there_is_one_server() -> None:
    catalog = Catalog(
        {
            "x": listing(resources=["u:1"]),
            "y": listing(templates=["t://y/{a}", "t://y/long/{a}"]),
            "z": listing(templates=["t://y/lo{a}"]),
        }
    )
    assert catalog.located("t://y/5", {}) == ("y", "t://y/5")
    assert catalog.located("t://y/loop", {}) == ("z", "t://y/loop"), "the longest beginning"
    assert catalog.located("t://y/long/1", {}) == ("y", "t://y/long/1")
    assert catalog.located("t://y/{a}", {}) == ("y", "t://y/{a}"), "a template itself, for completions"
    assert catalog.located("else:1", {}) is None
    assert catalog.located("else:1", {"else:1": "x"}) == ("x", "else:1")
    assert catalog.located("else:1", {"else:1": "gone"}) is None
    assert Catalog({"x": listing(resources=[])}).located("else:1", {}) == ("x", "else:1")


def test_a_tool_of_a_server_whose_list_is_not_there_yet_goes_to_it() -> None:
    catalog = Catalog({"new": Listing(), "old": listing(tools=["t"])})
    assert catalog.named("tools", "new__anything") == ("new", "anything")
    assert catalog.named("tools", "old__other") is None
    assert catalog.named("tools", "other__t") is None
    assert catalog.named("tools", "t") is None


def test_a_hidden_server_is_routed_to_but_not_shown() -> None:
    catalog = Catalog({"x": listing(tools=["t"]), "y": listing(tools=["t"])}, frozenset({"x"}))
    assert shown(catalog, "tools") == ["y__t"]
    assert catalog.named("tools", "x__t") == ("x", "t")


def test_a_list_that_is_too_long_is_cut(monkeypatch: Any) -> None:
    monkeypatch.setattr(mcp_catalog, "MAX_BYTES", 200)
    catalog = Catalog({"x": listing(tools=["a", "b"]), "y": listing(tools=[f"t{n}" for n in range(20)])})
    assert len(catalog.bodies["tools"]) < 250
    assert shown(catalog, "tools")[:2] == ["x__a", "x__b"]
    assert catalog.left_out == {"y": 22 - len(shown(catalog, "tools"))}


def test_everything_but_the_name_is_as_the_server_said() -> None:
    tool = {"name": "t", "title": "T", "inputSchema": {"type": "object"}, "_meta": {"x": 1}, "icons": []}
    catalog = Catalog({"s": Listing({"tools": {}}, "", {"tools": [tool]})})
    assert json.loads(catalog.bodies["tools"])["tools"] == [{**tool, "name": "s__t"}]


def test_a_tool_that_only_runs_as_a_task_is_not_shown() -> None:
    tools = [{"name": name, "execution": {"taskSupport": name}} for name in ("required", "optional", "forbidden")]
    assert shown(Catalog({"s": Listing({"tools": {}}, "", {"tools": tools})}), "tools") == [
        "s__optional",
        "s__forbidden",
    ]
