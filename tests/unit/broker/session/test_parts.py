from __future__ import annotations

from typing import Any

from broker.config import Config
from broker.session.parts import BOUND, KINDS, Wanted, agent_spec, servers, wanted
from broker.session.sections import SandboxConfig, assemble
from sandbox_agent.wire.messages import Bind, Preamble, Refreshed, Welcome

CONFIG = Config.model_validate(
    {
        "agents": {
            "claude": {
                "command": ["agent", "--stdio"],
                "env": {"A": "operator", "B": "operator"},
                "files": {".claude/settings.json": "{}"},
                "model": "small",
                "model_env": {"MODEL": "x/{model}"},
                "model_args": ["--model", "{model}"],
                "live_mcp": True,
                "max_restarts": 2,
            },
            "plain": {"command": ["plain"], "model_env": {"MODEL": "{model}"}},
        }
    }
)


def user(**sections: Any) -> SandboxConfig:
    return assemble(sections)


def parts(config: SandboxConfig, *, agent: str = "claude", key: bytes = b"k", **changes: Any) -> Wanted:
    options: dict[str, Any] = {"home": "/vol/home", "image": "i", "mcp": servers(config)} | changes
    return wanted(key, CONFIG, agent, config, **options)


def changed(one: Wanted, other: Wanted) -> set[str]:
    return {name for name in one.hashes if one.hashes[name] != other.hashes[name]}


def test_the_users_environment_lies_over_the_operators_and_the_agents_options_over_both() -> None:
    config = user(
        env={"B": "user", "C": "user"}, settings={"agent": {"claude": {"env": {"C": "option"}, "args": ["-v"]}}}
    )
    spec = agent_spec("claude", CONFIG.agents["claude"], config, home="/vol/home", init_timeout_s=9)
    assert spec.env == {"A": "operator", "B": "user", "C": "option", "MODEL": "x/small"}
    assert spec.command == ["agent", "--stdio", "-v", "--model", "small"]
    assert (spec.cwd, spec.max_restarts, spec.live_mcp, spec.init_timeout_s) == ("/vol/home/workspace", 2, True, 9)
    assert spec.files == {".claude/settings.json": "{}"}


def test_where_the_agent_has_a_credential_file_no_placeholder_stands_before_it() -> None:
    agent = CONFIG.agents["plain"].model_copy(
        update={"env": {"KEY": "placeholder", "URL": "a", "KEPT": ""}, "credential_env": {"KEY": "", "URL": "b"}}
    )

    def env(own: bool, config: SandboxConfig | None = None) -> dict[str, str]:
        config = config or user()
        return agent_spec("plain", agent, config, home="/h", init_timeout_s=9, own_credential=own).env

    assert env(False) == {"KEY": "placeholder", "URL": "a", "KEPT": ""}
    assert env(True) == {"URL": "b", "KEPT": ""}
    assert env(True, user(env={"KEY": "mine"}))["KEY"] == "mine"


def test_credential_files_are_a_part_of_their_own() -> None:
    none, one = parts(user()), parts(user(), files=[{"path": ".x", "mode": 0o600, "content": b"{}"}])
    assert changed(none, one) == {"files"}
    assert none.values["files"] == []
    assert "files" in one.bound_hashes


def test_the_users_model_wins_and_no_model_names_none() -> None:
    config = user(settings={"model": "large"})
    spec = agent_spec("claude", CONFIG.agents["claude"], config, home="/h", init_timeout_s=9)
    assert spec.env["MODEL"] == "x/large"
    assert spec.command[-1] == "large"
    spec = agent_spec("plain", CONFIG.agents["plain"], user(), home="/h", init_timeout_s=9)
    assert spec.env == {}
    assert spec.command == ["plain"]


def test_options_of_another_agent_are_not_taken() -> None:
    config = user(settings={"agent": {"codex": {"args": ["--danger"]}}})
    assert "--danger" not in parts(config).agent.command


def test_each_section_changes_its_own_parts_only() -> None:
    blank = parts(user())
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"env": {"A": "1"}}, {"process"}),
        ({"mcp": {"mcpServers": {"fs": {"command": "x"}}}}, {"mcp"}),
        ({"limits": {"pids": 64}}, {"boot"}),
        ({"plugins": {"packages": ["p"]}}, {"boot"}),
        ({"settings": {"permission_policy": "deny"}}, {"settings"}),
        ({"settings": {"allow_client_mcp": True}}, {"settings"}),
        ({"settings": {"model": "m"}}, {"process"}),
        ({"workspace": {"path": "code"}}, {"process", "settings"}),
        ({"egress": {"hosts": ["a.example"]}}, set()),
        ({"providers": {"anthropic": {"use": "eu"}}}, set()),
    ]
    for sections, expected in cases:
        assert changed(blank, parts(user(**sections))) == expected, sections


def test_equal_configurations_have_equal_hashes_whatever_was_written() -> None:
    one = user(env={"A": "1", "B": "2"}, mcp={"mcpServers": {"b": {"command": "x"}, "a": {"command": "y"}}})
    other = user(
        mcp={"mcpServers": {"a": {"command": "y", "args": []}, "b": {"command": "x"}}}, env={"B": "2", "A": "1"}
    )
    assert changed(parts(one), parts(other)) == set()


def test_image_and_key_matter() -> None:
    assert changed(parts(user()), parts(user(), image="j")) == {"boot"}
    assert changed(parts(user()), parts(user(), key=b"l")) == {"boot", "process", "mcp", "settings", "files"}


def test_what_is_bound_is_sent_and_counted() -> None:
    made = parts(user())
    assert set(made.bound_hashes) == set(BOUND)
    assert set(BOUND) <= set(KINDS)
    assert made.values["process"] == made.agent.encode()
    assert made.values["settings"]["workspace"] == "/vol/home/workspace"


def test_servers_come_by_name() -> None:
    config = user(mcp={"mcpServers": {"b": {"command": "x"}, "a": {"url": "https://a.example"}}})
    assert [server["name"] for server in servers(config)] == ["a", "b"]


def test_what_a_user_adds_to_a_command_names_nothing_of_the_host() -> None:
    """A driver shows what the program's words name; a user's words may name any file of the host."""
    config = user(settings={"model": "/etc/shadow", "agent": {"claude": {"args": ["/home/somebody/.ssh"]}}})
    assert parts(config).program == ("agent", "--stdio")
    assert parts(config).agent.command[2:] == ["/home/somebody/.ssh", "--model", "/etc/shadow"]


def test_what_is_on_its_way_to_or_from_a_sandbox_shows_no_secret() -> None:
    files = [{"path": ".cli/auth.json", "mode": 0o600, "content": b"hush-file"}]
    told = parts(user(env={"TOKEN": "hush-env"}), files=files)
    bind = Bind(1, 1, dict(told.values), dict(told.hashes))
    messages = (bind, Refreshed("p", b"hush-file"), Welcome(1, b"hush"), Preamble("control", 1, b"hush"))
    assert "hush" not in repr((told, *messages))
