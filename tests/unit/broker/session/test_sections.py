from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Config
from broker.errors import Code, CortexError
from broker.session.sections import MAX_SECTION_BYTES, SECTIONS, assemble, default_problems, validate


def refused(section: str, value: object) -> list[dict[str, str]]:
    with pytest.raises(CortexError) as caught:
        validate(section, value)
    assert caught.value.code is Code.BAD_SECTION
    assert caught.value.hint
    problems: list[dict[str, str]] = caught.value.details["problems"]
    return problems


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("settings", {"model": "m", "permission_policy": "deny", "agent": {"claude": {"env": {"A": "1"}, "args": ["-x"]}}}),
    ("mcp", {"mcpServers": {"fs": {"command": "npx", "args": ["-y", "pkg"], "env": {"KEY": "v"}}}}),
    ("mcp", {"mcpServers": {"web": {"type": "sse", "url": "https://x/y", "headers": {"Authorization": "Bearer z"}}}}),
    ("plugins", {"packages": ["npm:@a/b@1.2"]}),
    ("providers", {"anthropic": {"use": "anthropic-eu"}}),
    ("env", {"FOO_bar1": "x\ny"}),
    ("workspace", {"path": "code/project"}),
    ("egress", {"hosts": ["api.example.com", "a.example:8443", "*.b.example", "*.c.example:80", "10.0.0.1:5000"]}),
    ("egress", {"ecosystems": ["python", "git"], "hosts": []}),
    ("limits", {"memory_bytes": 2**30, "cpus": 1.5, "pids": 100}),
    *((section, {}) for section in SECTIONS),
]


@pytest.mark.parametrize(("section", "value"), GOOD)
def test_good_sections_are_kept_as_written(section: str, value: dict[str, Any]) -> None:
    assert validate(section, value) == value


BAD: list[tuple[str, object, str]] = [
    ("settings", {"modle": "x"}, "modle"),
    ("settings", {"allow_client_mcp": "yes"}, "allow_client_mcp"),
    ("settings", {"permission_policy": "always"}, "permission_policy"),
    ("settings", {"agent": {"claude": {"env": {"LD_PRELOAD": "x"}}}}, "agent.claude.env.LD_PRELOAD"),
    ("mcp", {"fs": {"command": "x"}}, "fs"),
    ("mcp", {"mcpServers": {"fs": {"comand": "x"}}}, "mcpServers.fs.comand"),
    ("mcp", {"mcpServers": {"fs": {}}}, "mcpServers.fs"),
    ("mcp", {"mcpServers": {"fs": {"command": "x", "url": "http://y"}}}, "mcpServers.fs"),
    ("mcp", {"mcpServers": {"fs": {"type": "http", "command": "x"}}}, "mcpServers.fs"),
    ("mcp", {"mcpServers": {"fs": {"url": "file:///etc/passwd"}}}, "mcpServers.fs.url"),
    ("mcp", {"mcpServers": {"fs": {"url": "http://x", "headers": {"A": "x\r\nB: y"}}}}, "mcpServers.fs.headers.A"),
    ("mcp", {"mcpServers": {"../x": {"command": "x"}}}, "mcpServers.../x"),
    ("mcp", {"mcpServers": {"fs": {"command": "x", "args": ["a", 1]}}}, "mcpServers.fs.args.1"),
    ("mcp", {"mcpServers": {f"s{number}": {"command": "x"} for number in range(65)}}, "mcpServers"),
    ("plugins", {"packages": ["--evil"]}, "packages.0"),
    ("providers", {"anthropic": {"api_key": "x"}}, "anthropic.api_key"),
    ("env", {"A": 1}, "A"),
    ("env", {"1A": "x"}, "1A"),
    ("env", {"path": "x"}, "path"),
    ("env", {"https_proxy": "x"}, "https_proxy"),
    ("env", {"A": "x\0y"}, "A"),
    ("workspace", {"path": "/etc"}, "path"),
    ("workspace", {"path": "a/../../b"}, "path"),
    ("workspace", {"path": ""}, "path"),
    ("egress", {"hosts": ["https://x"]}, "hosts.0"),
    ("egress", {"hosts": ["*"]}, "hosts.0"),
    ("egress", {"ecosystems": ["cobol"]}, "ecosystems.0"),
    ("limits", {"pids": "64"}, "pids"),
    ("limits", {"pids": True}, "pids"),
    ("limits", {"memory_bytes": 1}, "memory_bytes"),
    ("limits", {"cpus": float("inf")}, ""),
    ("env", [], ""),
    ("env", None, ""),
    ("env", {"A": {1, 2}}, ""),
    ("env", {f"K{number}": "x" * 30_000 for number in range(10)}, ""),
]


@pytest.mark.parametrize(("section", "value", "path"), BAD)
def test_bad_sections_are_refused_where_they_are_wrong(section: str, value: object, path: str) -> None:
    assert path in [problem["path"] for problem in refused(section, value)]


def test_hints_name_the_nearest_key() -> None:
    assert refused("settings", {"modle": 1})[0]["hint"] == 'did you mean "model"?'
    assert refused("mcp", {"mcp_servers": {}})[0]["hint"] == 'did you mean "mcpServers"?'
    assert refused("mcp", {"mcpServers": {"a": {"commnd": "x"}}})[0]["hint"] == 'did you mean "command"?'


def test_unknown_sections() -> None:
    with pytest.raises(CortexError) as caught:
        validate("settigns", {})
    assert caught.value.code is Code.UNKNOWN_SECTION
    assert caught.value.hint == 'did you mean "settings"?'
    assert caught.value.details["sections"] == list(SECTIONS)


def test_depth_is_bounded() -> None:
    value: dict[str, Any] = {}
    for _ in range(100_000):
        value = {"a": value}
    refused("env", value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(SECTIONS), JSON)
def test_any_value_is_refused_with_a_code_or_stable(section: str, value: Any) -> None:
    try:
        once = validate(section, value)
    except CortexError as caught:
        error = caught
    else:
        assert validate(section, once) == once
        return
    assert error.code is Code.BAD_SECTION
    assert json.dumps(error.details)


def test_layers_are_laid_over_each_other() -> None:
    defaults: dict[str, dict[str, Any]] = {
        "settings": {"model": "m", "permission_policy": "deny", "agent": {"a": {"args": ["1"]}, "b": {}}},
        "mcp": {"mcpServers": {"fs": {"command": "old", "args": ["x"]}, "keep": {"command": "k"}}},
        "env": {"A": "1", "B": "1"},
        "egress": {"hosts": ["a.example"]},
    }
    user: dict[str, dict[str, Any]] = {
        "settings": {"model": "n", "agent": {"a": {"args": ["2"]}}},
        "mcp": {"mcpServers": {"fs": {"command": "new"}}},
        "env": {"B": "2"},
        "egress": {"hosts": ["b.example"]},
    }
    config = assemble(defaults, user)
    assert (config.settings.model, config.settings.permission_policy) == ("n", "deny")
    assert config.settings.agent["a"].args == ("2",)
    assert "b" in config.settings.agent
    assert config.mcp.servers["fs"].command == "new"
    assert config.mcp.servers["fs"].args == ()
    assert config.mcp.servers["keep"].command == "k"
    assert config.env == {"A": "1", "B": "2"}
    assert config.egress.hosts == ("b.example",)
    assert config.workspace.path == "workspace"


def test_what_is_left_out_and_what_is_its_default_are_equal() -> None:
    explicit = assemble({"settings": {"allow_client_mcp": False}, "mcp": {"mcpServers": {"a": {"command": "x"}}}})
    implicit = assemble({"mcp": {"mcpServers": {"a": {"args": [], "command": "x"}}}})
    assert explicit == implicit


def test_a_bad_layer_is_refused() -> None:
    with pytest.raises(CortexError) as caught:
        assemble({}, {"limits": {"pids": -1}})
    assert caught.value.code is Code.BAD_SECTION
    with pytest.raises(CortexError) as caught:
        assemble({"nope": {}})
    assert caught.value.code is Code.UNKNOWN_SECTION


def test_mcp_servers_become_acp_objects() -> None:
    config = assemble(
        {
            "mcp": {
                "mcpServers": {
                    "fs": {"command": "x", "args": ["a"], "env": {"K": "v"}},
                    "web": {"url": "https://x", "headers": {"H": "v"}},
                }
            }
        }
    )
    assert [server.acp(name) for name, server in config.mcp.servers.items()] == [
        {"name": "fs", "command": "x", "args": ["a"], "env": [{"name": "K", "value": "v"}]},
        {"type": "http", "name": "web", "url": "https://x", "headers": [{"name": "H", "value": "v"}]},
    ]


def test_defaults_of_the_settings_tree_are_checked() -> None:
    assert default_problems(Config()) == []
    bad = Config.model_validate({"defaults": {"env": {"LD_PRELOAD": "x"}, "limits": {"pidz": 5}}})
    assert [problem.path for problem in default_problems(bad)] == [
        ("defaults", "env", "LD_PRELOAD"),
        ("defaults", "limits", "pidz"),
    ]
    assert MAX_SECTION_BYTES < 2**20
