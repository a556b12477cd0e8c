from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent.mcp_names import MAX_ALIAS, MAX_NAME, aliases, prefixed, safe_names, split, unprefixed

SAFE = re.compile(r"[A-Za-z0-9_-]+")
NAMES = st.text(st.sampled_from("ab_-.A ü/"), max_size=70) | st.text(max_size=10)
SERVERS = st.lists(NAMES, max_size=6, unique=True)


@given(st.dictionaries(NAMES, st.lists(NAMES, max_size=8, unique=True), max_size=5))
def test_every_tool_of_every_server_has_a_name_of_its_own(servers: dict[str, list[str]]) -> None:
    shown: dict[str, tuple[str, str]] = {}
    for server, alias in aliases(servers).items():
        for tool, name in safe_names(alias, servers[server]).items():
            assert SAFE.fullmatch(name)
            assert len(name) <= MAX_NAME
            assert split(name)[0] == alias
            assert name not in shown
            shown[name] = (server, tool)
    assert sorted(shown.values()) == sorted((server, tool) for server in servers for tool in servers[server])


@given(SERVERS)
def test_an_alias_can_be_told_from_what_follows_it(servers: list[str]) -> None:
    made = aliases(servers)
    assert set(made) == set(servers)
    assert len(set(made.values())) == len(made)
    for alias in made.values():
        assert 0 < len(alias) <= MAX_ALIAS
        assert "__" not in alias
        assert not alias.endswith("_")


@given(SERVERS)
def test_names_do_not_depend_on_the_order(servers: list[str]) -> None:
    assert aliases(servers) == aliases(servers[::-1])
    assert safe_names("s", servers) == safe_names("s", servers[::-1])


@given(st.lists(st.from_regex(r"[a-z0-9]{1,10}", fullmatch=True), max_size=6, unique=True), NAMES)
def test_who_has_an_ordinary_name_keeps_it(names: list[str], other: str) -> None:
    made = safe_names("files", [*names, *([] if other in names else [other])])
    assert all(made[name] == f"files__{name}" for name in names)


def test_long_names_differ_by_a_hash_of_all_of_them() -> None:
    made = safe_names("files", ["x" * 60, "x" * 61])
    assert made["x" * 60] != made["x" * 61]
    assert made["x" * 60] == safe_names("files", ["x" * 60, "y"])["x" * 60], "whatever else there is"
    assert all(name.startswith("files__xxxxx") for name in made.values())


def test_only_names_that_would_be_alike_are_changed_further() -> None:
    assert safe_names("s", ["a.b"]) == {"a.b": "s__a_b"}
    assert len(set(safe_names("s", ["a.b", "a b"]).values()) - {"s__a_b"}) == 2, "neither has more right to it"
    both = safe_names("s", ["a.b", "a_b", "a b"])
    assert both["a_b"] == "s__a_b"
    assert re.fullmatch(r"s__a_b_[0-9a-f]{8}", both["a.b"])
    assert re.fullmatch(r"s__a_b_[0-9a-f]{8}", both["a b"])


def test_a_name_that_is_like_the_hash_of_another_takes_nothing_from_it() -> None:
    forged = safe_names("s", ["a.b", "a b"])["a.b"].removeprefix("s__")
    made = safe_names("s", ["a.b", "a b", forged])
    assert made[forged] == f"s__{forged}"
    assert len(set(made.values())) == 3


@given(st.text(max_size=20))
def test_a_uri_comes_back_from_behind_its_prefix(uri: str) -> None:
    for alias in aliases(["files", "a b", "ü"]).values():
        assert unprefixed(prefixed(alias, uri)) == (alias, uri)


def test_an_ordinary_uri_has_no_prefix() -> None:
    for uri in ("file:///x", "cortex:", "cortex", "", "mem://cortex:a:b"):
        assert unprefixed(uri) == ("", uri)
