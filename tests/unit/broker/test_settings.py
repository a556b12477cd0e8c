from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker import settings
from broker.config import Config
from broker.errors import Code, CortexError
from broker.problems import Problem
from broker.session.sections import default_problems
from broker.settings import changed, find, leaves, load

ENV = {"HOME": "/home/ann"}


@pytest.fixture(autouse=True)
def _no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", tmp_path / "etc" / "config.toml")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, env: dict[str, str] | None = None, **more: Any) -> list[dict[str, Any]]:
    with pytest.raises(CortexError) as caught:
        load(path, env or ENV, **more)
    assert caught.value.code is Code.BAD_CONFIG
    assert caught.value.hint
    found: list[dict[str, Any]] = caught.value.details["problems"]
    return found


def test_without_a_file_the_defaults_live_below_the_xdg_directories() -> None:
    loaded = load(None, ENV, root=False)
    assert loaded.path is None
    assert loaded.config.broker.state_dir == Path("/home/ann/.local/state/cortex")
    assert loaded.config.broker.runtime_dir == Path("/home/ann/.local/state/cortex/run")
    assert loaded.config.broker.users_dir == Path("/home/ann/.local/state/cortex/users")
    assert loaded.config.control.admin_token_file == "/home/ann/.local/state/cortex/admin.token"
    assert loaded.config.gateway.link == "/home/ann/.local/state/cortex/run/gateway.sock"
    assert loaded.config.broker.node
    assert loaded.config.sandbox.docker.host == "unix:///var/run/docker.sock"
    assert set(loaded.origins.values()) == {"default"}


def test_xdg_and_systemd_directories() -> None:
    xdg = ENV | {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/run/user/5", "DOCKER_HOST": "tcp://127.0.0.1:1"}
    loaded = load(None, xdg, root=False)
    assert (loaded.config.broker.state_dir, loaded.config.broker.runtime_dir) == (
        Path("/s/cortex"),
        Path("/run/user/5/cortex"),
    )
    assert loaded.config.sandbox.docker.host == "tcp://127.0.0.1:1"
    assert loaded.origins["sandbox.docker.host"] == "environment DOCKER_HOST"
    unit = xdg | {"STATE_DIRECTORY": "/var/lib/cortex:/x", "RUNTIME_DIRECTORY": "/run/cortex"}
    loaded = load(None, unit, root=False)
    assert (loaded.config.broker.state_dir, loaded.config.broker.runtime_dir) == (
        Path("/var/lib/cortex"),
        Path("/run/cortex"),
    )
    assert loaded.origins["broker.state_dir"] == "environment STATE_DIRECTORY"


def test_the_file_is_looked_for_in_order(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    assert find(None, env, root=True) is None
    user = tmp_path / "xdg" / "cortex" / "config.toml"
    user.parent.mkdir(parents=True)
    user.touch()
    assert find(None, env, root=True) == user
    settings.SYSTEM_CONFIG.parent.mkdir()
    settings.SYSTEM_CONFIG.touch()
    assert find(None, env, root=True) == settings.SYSTEM_CONFIG
    assert find(None, env, root=False) == user
    assert find(None, env | {"INVOCATION_ID": "x"}, root=False) == settings.SYSTEM_CONFIG
    named = env | {"CORTEX_CONFIG": str(tmp_path / "named")}
    assert find(None, named, root=True) == tmp_path / "named"
    assert find(tmp_path / "flag", named, root=True) == tmp_path / "flag"


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, '[front]\nlisten = "127.0.0.1:1"\nmax_connections = 11\nhold_bytes = 5\n')
    env = ENV | {"CORTEX_FRONT__LISTEN": "127.0.0.1:2", "CORTEX_FRONT__MAX_CONNECTIONS": "22"}
    loaded = load(path, env, overrides={"front.listen": "127.0.0.1:3"})
    assert loaded.config.front.listen == "127.0.0.1:3"
    assert loaded.config.front.max_connections == 22
    assert loaded.config.front.hold_bytes == 5
    assert loaded.origins["front.listen"] == "command line"
    assert loaded.origins["front.max_connections"] == "environment CORTEX_FRONT__MAX_CONNECTIONS"
    assert loaded.origins["front.hold_bytes"] == f"{path}:4"
    assert loaded.origins["front.stall_timeout_s"] == "default"
    assert set(loaded.origins) == {settings.dotted(key) for key, _ in leaves(loaded.config)}


@pytest.mark.parametrize(
    ("name", "value", "key", "wanted"),
    [
        ("SANDBOX__DOCKER__CPUS", "1.5", "sandbox.docker.cpus", 1.5),
        ("SANDBOX__DOCKER__IMAGE", "1.5", "sandbox.docker.image", "1.5"),
        ("SANDBOX__PROCESS__ALLOW_UNISOLATED", "true", "sandbox.process.allow_unisolated", True),
        ("FRONT__ALLOWED_ORIGINS", "https://a, https://b", "front.allowed_origins", ["https://a", "https://b"]),
        ("FRONT__ALLOWED_ORIGINS", '["https://a"]', "front.allowed_origins", ["https://a"]),
        ("FRONT__ALLOWED_ORIGINS", "", "front.allowed_origins", []),
        ("AGENTS__MY_AGENT__PROVIDER", "p", "agents.my-agent.provider", "p"),
        ("AGENTS__MY_AGENT__ENV__Some_Name", "1", "agents.my-agent.env.Some_Name", "1"),
        ("GATEWAY__PROVIDERS__P__BASE_URL", "http://x", "gateway.providers.p.base_url", "http://x"),
    ],
)
def test_environment_values_take_the_type_of_the_schema(
    tmp_path: Path, name: str, value: str, key: str, wanted: object
) -> None:
    path = write(
        tmp_path,
        '[agents.my-agent]\ncommand = ["x"]\n[gateway.providers.p]\nkind = "openai"\nbase_url = "http://y"\n',
    )
    loaded = load(path, ENV | {f"CORTEX_{name}": value, "CORTEX_TOKEN": "not a setting"})
    assert {settings.dotted(k): v for k, v in leaves(loaded.config)}[key] == wanted


def test_all_problems_are_told_at_once_with_place_and_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
[front]
listn = "127.0.0.1:1"
max_connections = "5"
allowed_hosts = ["a", 5]
[agent.x]
command = ["x"]
[agents.bad]
command = ["x"]
env = { A = 1 }
""",
    )
    found = {item["path"]: item for item in problems(path, ENV | {"CORTEX_CONTROL__LISTEN": "nowhere"})}
    assert set(found) == {
        *("front.listn", "front.max_connections", "front.allowed_hosts.1"),
        *("agent", "agents.bad.env.A", "control.listen"),
    }
    assert found["front.listn"]["hint"] == 'did you mean "listen"?'
    assert found["front.listn"]["origin"] == f"{path}:2"
    assert found["front.listn"]["line"] == 2
    assert found["front.max_connections"]["line"] == 3
    assert found["front.allowed_hosts.1"]["line"] == 4
    assert found["agent"]["hint"] == 'did you mean "agents"?'
    assert found["agents.bad.env.A"]["line"] == 9
    assert found["control.listen"]["origin"] == "environment CORTEX_CONTROL__LISTEN"
    assert found["control.listen"]["line"] is None
    assert "host:port" in found["control.listen"]["hint"]


def test_names_that_point_nowhere_get_their_line_and_a_hint(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[agents.a]\ncommand = ["x"]\nprovider = "antropic"\n'
        '[gateway.providers.anthropic]\nkind = "anthropic"\nbase_url = "https://x"\n',
    )
    (found,) = problems(path)
    assert (found["path"], found["line"]) == ("agents.a.provider", 3)
    assert found["hint"] == 'did you mean "anthropic"?'
    (found,) = problems(None, ENV | {"CORTEX_SESSION__DEFAULT_AGENT": "dem"}, root=False)
    assert found["hint"] == 'did you mean "demo"?'


def test_what_is_not_toml_says_where(tmp_path: Path) -> None:
    path = write(tmp_path, "[front]\nlisten = 127.0.0.1:1\n")
    (found,) = problems(path)
    assert found["line"] == 2
    assert found["origin"].startswith(f"{path}:2:")


@pytest.mark.parametrize("value", ["inf", "nan", "2026-01-01", "[1979-05-27T07:32:00Z]"])
def test_values_that_json_does_not_have_are_refused(tmp_path: Path, value: str) -> None:
    (found,) = problems(write(tmp_path, f"[front]\nstall_timeout_s = {value}\n"))
    assert found["path"].startswith("front.stall_timeout_s")
    assert found["line"] == 2


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CortexError) as caught:
        load(tmp_path / "none.toml", ENV)
    assert caught.value.code is Code.BAD_CONFIG
    assert "--config" in caught.value.hint


def test_paths_are_resolved(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
[broker]
state_dir = "state"
runtime_dir = "~/run"
[control]
admin_token_file = "{state_dir}/a"
[sandbox]
ca_file = "../ca.pem"
[gateway]
link = "{runtime_dir}/g"
[gateway.providers.p]
kind = "openai"
base_url = "https://x"
credential_file = "{credentials}/p"
""",
    )
    config = load(path, ENV | {"CREDENTIALS_DIRECTORY": "/run/credentials/cortex"}).config
    assert config.broker.state_dir == tmp_path / "state"
    assert config.broker.runtime_dir == Path("/home/ann/run")
    assert config.control.admin_token_file == f"{tmp_path}/state/a"
    assert config.sandbox.ca_file == f"{tmp_path.parent}/ca.pem"
    assert config.gateway.link == "/home/ann/run/g"
    assert config.gateway.providers["p"].credential_file == "/run/credentials/cortex/p"
    assert config.gateway.providers["p"].ca_file == ""
    (found,) = problems(path)
    assert (found["path"], found["line"]) == ("gateway.providers.p.credential_file", 13)
    assert "LoadCredential" in found["hint"]


def test_unknown_placeholders_are_problems(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, '[control]\nadmin_token_file = "{statedir}/a"\n'))
    assert found["hint"] == 'did you mean "state_dir"?'


def test_checks_of_higher_layers_are_told_with_their_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[defaults.settings]\n\nallow_client_mpc = true\n")
    (found,) = problems(path, checks=[default_problems])
    assert (found["path"], found["line"]) == ("defaults.settings.allow_client_mpc", 3)
    assert found["hint"] == 'did you mean "allow_client_mcp"?'

    def check(config: Config) -> list[Problem]:
        assert config.broker.state_dir is not None
        return [Problem(("front", "listen"), "no")]

    (found,) = problems(None, checks=[check], root=False)
    assert (found["path"], found["origin"], found["line"]) == ("front.listen", "", None)


def test_changed_names_keys_and_those_that_need_a_restart(tmp_path: Path) -> None:
    old = load(None, ENV, root=False).config
    new = load(None, ENV | {"CORTEX_FRONT__LISTEN": "127.0.0.1:1", "CORTEX_FRONT__HOLD_BYTES": "1"}, root=False).config
    assert changed(old, old) == ([], [])
    assert changed(old, new) == (["front.hold_bytes", "front.listen"], ["front.listen"])


@pytest.mark.parametrize(
    ("key", "value", "restart"),
    [
        ("FRONT__MAX_CONNECTIONS", "7", False),
        ("CONTROL__MAX_BODY_BYTES", "7", False),
        ("BROKER__LOG_LEVEL", "debug", False),
        ("CONTROL__ADMIN_TOKEN_FILE", "/x", True),
        ("CONTROL__HOOK_SECRETS_FILE", "/x", True),
        ("SANDBOX__CA_FILE", "/x", True),
        ("VAULT__KEY_FILE", "/x", True),
        ("SANDBOX__DOCKER__IMAGE", "x", True),
        ("SANDBOX__DOCKER__PIDS", "16", True),
    ],
)
def test_what_is_read_once_needs_a_restart_and_nothing_else(key: str, value: str, restart: bool) -> None:
    old = load(None, ENV, root=False).config
    keys, need_restart = changed(old, load(None, ENV | {f"CORTEX_{key}": value}, root=False).config)
    assert keys == [key.lower().replace("__", ".")]
    assert need_restart == (keys if restart else [])


def test_the_vaults_keys_are_what_systemd_passes_else_a_file_of_the_state(tmp_path: Path) -> None:
    env = ENV | {"STATE_DIRECTORY": "/s", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(None, env, root=False).config.vault.key_file == "/s/vault.key"
    (tmp_path / "cortex-vault.key").touch()
    loaded = load(None, env, root=False)
    assert loaded.config.vault.key_file == str(tmp_path / "cortex-vault.key")
    assert loaded.origins["vault.key_file"] == "environment CREDENTIALS_DIRECTORY"
    named = write(tmp_path, '[vault]\nkey_file = "keys"\n')
    assert load(named, env).config.vault.key_file == str(tmp_path / "keys")


def test_an_unknown_table_in_the_environment_is_told_by_its_variable() -> None:
    with pytest.raises(CortexError) as caught:
        load(None, ENV | {"CORTEX_FRNT__LISTEN": "x"}, root=False)
    (found,) = caught.value.details["problems"]
    assert (found["path"], found["origin"]) == ("frnt", "environment CORTEX_FRNT__LISTEN")
    assert found["hint"] == 'did you mean "front"?'


@pytest.mark.parametrize("listen", ["127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1:٣٣"])
def test_a_port_that_would_be_another_one_is_a_problem(tmp_path: Path, listen: str) -> None:
    (found,) = problems(write(tmp_path, f'[front]\nlisten = "{listen}"\n'))
    assert found["path"] == "front.listen"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a"])
def test_a_credential_file_lies_below_home(tmp_path: Path, path: str) -> None:
    (found,) = problems(write(tmp_path, f'[agents.a]\ncommand = ["x"]\ncredential_path = "{path}"\n'))
    assert found["path"] == "agents.a.credential_path"
    assert "below HOME" in found["what"]


@pytest.mark.parametrize("url", ["redis://:geheim@h/0", "rediss://me:geheim@h:1/0", "unix:///r.sock?password=geheim"])
def test_a_password_in_the_url_of_redis_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    path = write(tmp_path, f'[gateway.cache]\nredis_url = "{url}"\n')
    with pytest.raises(CortexError) as caught:
        load(path, ENV)
    assert "redis_password_file" in str(caught.value.problem())
    assert "geheim" not in str(caught.value.problem())


@pytest.mark.parametrize("url", ["redis://me@h/0", "unix:///r.sock?db=1", ""])
def test_a_url_of_redis_without_a_password_is_fine(tmp_path: Path, url: str) -> None:
    path = write(tmp_path, f'[gateway.cache]\nredis_url = "{url}"\n')
    assert load(path, ENV).config.gateway.cache.redis_url == url
