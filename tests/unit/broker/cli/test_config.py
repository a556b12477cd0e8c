"""cortex config, cortex doctor and what stands around all verbs."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.cli import findings
from broker.cli.main import main
from broker.config import BrokerConfig, Config, ControlConfig, SandboxSettings, VaultConfig
from broker.control.keyfiles import admin_token, hook_keys
from broker.errors import Code, CortexError
from broker.store.keys import KeyFile

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A verb with nothing of this host's settings: status, stdout, stderr."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    monkeypatch.setattr("broker.settings.SYSTEM_CONFIG", tmp_path / "none.toml")
    monkeypatch.setattr("broker.host.logs.setup", lambda *_, **__: None)  # it would outlive the test

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        told = capsys.readouterr()
        return int(caught.value.code or 0), told.out, told.err

    return call


def test_wrong_settings_exit_78_and_say_where(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[front]\nlisten = "127.0.0.1:0"\nallowed_orgins = []\n')
    for verb in (("config", "check", str(file)), ("serve", "--config", str(file))):
        status, out, err = run(*verb)
        assert (status, out) == (78, "")
        assert f"{file}:3" in err
        assert 'did you mean "allowed_origins"?' in err


def test_right_settings_exit_0(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[session]\ntoken_ttl_s = 60\n")
    assert run("config", "check", str(file))[0] == 0
    assert json.loads(run("config", "check", str(file), "--json")[1]) == {"valid": True, "path": str(file)}
    assert run("config", "check")[0] == 0


def test_defaults_of_user_sections_are_checked_too(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[defaults.mcp]\nmcpServer = {}\n")
    assert run("config", "check", str(file))[0] == 78


def test_show_says_where_a_value_is_from(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[session]\ntoken_ttl_s = 60\n")
    monkeypatch.setenv("CORTEX_FRONT__LISTEN", "127.0.0.1:9")
    lines = run("config", "show", "--origin", "--config", str(file))[1].splitlines()
    assert f"session.token_ttl_s = 60.0  # {file}:2" in lines
    assert 'front.listen = "127.0.0.1:9"  # environment CORTEX_FRONT__LISTEN' in lines
    assert "front.max_connections = 10000  # default" in lines
    shown = json.loads(run("config", "show", "--origin", "--json", "--config", str(file))[1])
    assert shown["session.token_ttl_s"] == {"value": 60.0, "origin": f"{file}:2"}


def test_version_and_help(run: Run) -> None:
    assert run("--version")[1].startswith("cortex ")
    assert "Commands:" in run("-h")[1]
    assert run("bench", "../x")[0] == 1
    assert run("bench", "nothing_such")[0] == 1
    assert run("bench", "relay", "--only", "compare")[0] == 1
    assert run("bench", "gateway", "--only", "nothing_such")[0] == 2


def levels(found: list[findings.Finding]) -> dict[str, str]:
    return {finding.code: finding.level for finding in found}


def test_doctor_on_limits_versions_and_users() -> None:
    assert findings.check_sqlite((3, 51, 3)).level == "ok"
    assert findings.check_sqlite((3, 40, 1)).level == "note"
    assert findings.check_python((3, 13, 1)).level == "ok"
    assert findings.check_python((3, 14, 0)).level == "note"
    assert levels(findings.check_limits(1024, 1024)) == {"host.nofile": "warning"}
    assert levels(findings.check_limits(1024, 65_536)) == {"host.nofile": "ok"}
    assert levels(findings.check_limits(1024, resource.RLIM_INFINITY)) == {"host.nofile": "ok"}
    assert "root" in findings.check_user(Config(), 0, 64321, ())[0].what
    assert "share that uid" in findings.check_user(Config(), 1000, 1000, ())[0].what
    assert levels(findings.check_user(Config(), 1000, 64321, ())) == {"host.user": "ok"}


def config_in(state: Path) -> Config:
    control = ControlConfig(admin_token_file=str(state / "admin.token"), hook_secrets_file=str(state / "hook.secrets"))
    vault = VaultConfig(key_file=str(state / "vault.key"))
    return Config(broker=BrokerConfig(state_dir=state), control=control, vault=vault)


def test_doctor_on_the_state_directory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert "will be made" in findings.check_state(config_in(state))[0].what
    assert not state.exists()
    state.mkdir()
    deep = tmp_path / ("d" * 90)
    (found,) = findings.check_state(config_in(deep))
    assert (found.level, "too long" in found.what) == ("failure", True)
    assert not deep.exists()
    deep.mkdir()
    (found,) = findings.check_state(config_in(deep))
    assert (found.level, "too long" in found.what) == ("failure", True)


def test_doctor_on_secrets(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    good = {"access.admin_token": "ok", "access.hook_secrets": "ok", "vault.key": "ok"}
    assert levels(findings.check_secrets(config)) == good
    admin_token(tmp_path / "admin.token", make=True)
    hook_keys(tmp_path / "hook.secrets", make=True)
    KeyFile(tmp_path / "vault.key").create()
    assert levels(findings.check_secrets(config)) == good
    (tmp_path / "admin.token").chmod(0o644)
    (tmp_path / "vault.key").chmod(0o644)
    found = findings.check_secrets(config)
    assert levels(found) == good | {"access.admin_token": "failure", "vault.key": "failure"}
    assert all("chmod 600" in finding.fix for finding in found if finding.level == "failure")


async def test_doctor_on_an_engine_that_is_not_there(tmp_path: Path) -> None:
    config = Config(sandbox=SandboxSettings.model_validate({"docker": {"host": f"unix://{tmp_path}/none.sock"}}))
    (found,) = await findings.check_docker(config)
    assert (found.code, found.level) == ("docker.engine", "failure")
    assert found.fix
    process = config.model_copy(update={"sandbox": config.sandbox.model_copy(update={"driver": "process"})})
    assert (await findings.check_docker(process))[0].level == "note"


async def test_doctor_on_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(*_: object) -> CortexError:
        return CortexError(Code.ISOLATION_MISSING, "bwrap is not installed", hint="apt install bubblewrap")

    monkeypatch.setattr(findings, "driver_problem", missing)
    needs = Config(sandbox=SandboxSettings(driver="process"))
    (found,) = await findings.check_bwrap(needs)
    assert (found.level, found.fix) == ("failure", "apt install bubblewrap")
    assert (await findings.check_bwrap(Config()))[0].level == "note"


def test_doctor_reports_all_and_fails_on_a_failure(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[sandbox.docker]\nhost = "unix://{tmp_path}/none.sock"\n[broker]\nstate_dir = "{tmp_path}/x"\n')
    status, out, _ = run("doctor", "--json", "--config", str(file))
    told = json.loads(out)
    assert (status, told["ok"]) == (1, False)
    codes = {finding["code"] for finding in told["findings"]}
    assert codes >= {"config.valid", "host.python", "host.sqlite", "host.nofile", "state.directory", "docker.engine"}
    assert all(finding["fix"] for finding in told["findings"] if finding["level"] == "failure")
    file.write_text("[nonsense]\n")
    status, out, _ = run("doctor", "--config", str(file))
    assert (status, "config.valid" in out) == (1, True)
