"""Verbs against the control API on a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.cli.client import address_of, locate
from broker.cli.main import main
from broker.cli.options import seconds, whose
from broker.config import Config, ControlConfig
from broker.errors import CortexError
from tests.unit.broker.control.conftest import ADMIN, Api, api

__all__ = ["api"]

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def run(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a verb in a thread, as it runs an event loop of its own: status, stdout, stderr."""
    monkeypatch.setenv("CORTEX_CONTROL_URL", api.url)
    monkeypatch.setenv("CORTEX_ADMIN_TOKEN", ADMIN)

    async def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            await asyncio.to_thread(main, arguments)
        told = capsys.readouterr()
        return int(caught.value.code or 0), told.out, told.err

    with capture_logs():  # the server of these tests runs in this process
        yield call


async def data(run: Run, *arguments: str) -> Any:
    status, out, err = await run(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


async def test_the_life_of_a_session(run: Run, api: Api) -> None:
    created = await data(run, "session", "create", "alice", "--wait")
    assert (created["user"], created["state"]) == ("alice", "ready")
    await data(run, "session", "create", "bob/side", "--agent", "other")
    listed = await data(run, "session", "list")
    assert [(one["user"], one["workspace"]) for one in listed["sessions"]] == [("alice", "main"), ("bob", "side")]
    assert (await data(run, "session", "show", "bob/side"))["agent"] == "other"
    assert (await data(run, "session", "stop", "alice"))["state"] == "stopped"
    assert (await data(run, "session", "timeline", "alice"))["bringups"][0]["path"] == "cold"
    assert (await data(run, "session", "delete", "alice", "--yes"))["deleted"] is True
    assert api.registry.held("alice", "main") is None


async def test_tables_are_for_people(run: Run) -> None:
    status, out, err = await run("session", "list")
    assert (status, out) == (0, "")
    assert "cortex session create" in err
    await run("session", "create", "alice")
    _, out, _ = await run("session", "list")
    assert out.splitlines()[0].split() == ["user", "workspace", "agent", "state", "clients"]
    assert out.splitlines()[1].split() == ["alice", "main", "demo", "stopped", "0"]
    _, out, _ = await run("session", "timeline", "alice")
    assert [line.split() for line in out.splitlines()] == [
        ["bring-up:", "cold,", "fake"],
        ["stage", "start", "ms", "took", "ms"],
        ["start", "0.0", "12.5"],
        ["total", "0.0", "12.5"],
    ]


async def test_errors_have_a_code_and_a_hint_on_stderr(run: Run) -> None:
    status, out, err = await run("session", "show", "nobody")
    assert (status, out) == (1, "")
    assert "session.not_found" in err
    assert "hint: create it" in err
    for bad in ("..", "a/..", "a/b/c"):
        status, _, err = await run("session", "show", bad)
        assert status == 1
        assert "user.invalid_id" in err
    assert (await run("session", "shwo"))[0] == 2


async def test_erasing_asks_first(run: Run, api: Api) -> None:
    await api.registry.create("alice", "main", None)
    status, _, err = await run("session", "delete", "alice")
    assert status == 2
    assert "--yes" in err
    assert api.registry.held("alice", "main") is not None


async def test_tokens(run: Run, api: Api) -> None:
    await run("session", "create", "alice")
    _, out, _ = await run("token", "create", "alice", "--ttl", "2m")
    grant = await api.access.verify(out.strip())
    assert grant.expires_at == pytest.approx(api.clock[0] + 120, abs=1)
    _, _, err = await run("token", "revoke", "alice")
    assert err.strip() == "revoked 2, closed 0"


async def test_user_sections(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "env.toml"
    file.write_text('GREETING = "hello"\n')
    status, out, err = await run("user", "config", "set", "alice", "env", str(file))
    assert (status, out) == (0, "")
    assert "version 1; takes effect: next start" in err
    assert json.loads((await run("user", "config", "get", "alice", "env"))[1]) == {"GREETING": "hello"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"GREETING": "bye"}')))
    assert (await data(run, "user", "config", "set", "alice", "env"))["version"] == 2
    file.write_text("GREETING = ")
    assert "cannot read a section" in (await run("user", "config", "set", "alice", "env", str(file)))[2]
    status, _, err = await run("user", "config", "get", "alice", "evn")
    assert (status, "config.unknown_section" in err) == (1, True)


async def test_credentials_come_from_stdin_and_are_never_printed(
    run: Run, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = {"kind": "anthropic", "base_url": "https://a.example"}
    config = Config.model_validate({"gateway": {"providers": {"anthropic": provider}}})
    object.__setattr__(api.control, "config", lambda: config)

    def given(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    status, out, err = await run("user", "credential", "list", "alice")
    assert (status, out) == (0, "")
    assert "cortex user credential set" in err
    given(b"sk-told-1\n")
    status, out, err = await run("user", "credential", "set", "alice", "anthropic")
    assert (status, out) == (0, "")
    assert "stored with fingerprint" in err
    given(b'{"a": "sk-told-2"}')
    file = await data(run, "user", "credential", "set", "alice", "anthropic", "--kind", "file")
    assert (file["kind"], file["mode"]) == ("file", "file")
    _, out, _ = await run("user", "credential", "list", "alice")
    assert out.splitlines()[1].split()[:3] == ["anthropic", "file", "file"]
    given(b"sk-told-3\xff")
    status, _, err = await run("user", "credential", "set", "alice", "anthropic")
    assert (status, "not UTF-8" in err) == (1, True)
    assert "told" not in err
    _, _, err = await run("user", "credential", "delete", "alice", "anthropic")
    assert "erased" in err
    assert (await run("user", "credential", "delete", "alice", "anthropic"))[0] == 1


async def test_the_vaults_keys(run: Run) -> None:
    _, out, err = await run("vault", "status")
    assert out.splitlines()[0].split() == ["key", "sealed"]
    assert "keep a copy" in err
    _, _, err = await run("vault", "rotate")
    assert out.split()[2] in err.partition("dropped:")[2]
    assert (await data(run, "vault", "rotate"))["sealed"] == 0
    assert len((await data(run, "vault", "status"))["keys"]) == 1


async def test_a_broker_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = await run("session", "list", "--control", "http://127.0.0.1:1")
    assert status == 1
    assert "broker.unreachable" in err
    assert "cortex serve" in err
    monkeypatch.setenv("CORTEX_ADMIN_TOKEN", "wrong")
    assert "access.admin_required" in (await run("session", "list"))[2]


async def test_the_unix_socket_is_found_by_the_settings(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CORTEX_CONTROL_URL")
    monkeypatch.delenv("CORTEX_ADMIN_TOKEN")
    config = tmp_path / "config.toml"
    config.write_text(f'[control]\nlisten = "unix:{tmp_path}/c.sock"\n')
    status, _, err = await run("session", "list", "--config", str(config))
    assert (status, "no sessions" in err) == (0, True)


def test_addresses() -> None:
    def address(listen: str) -> str:
        return address_of(Config(control=ControlConfig(listen=listen)))

    assert address("0.0.0.0:8766") == "http://127.0.0.1:8766"
    assert address("[::]:80") == "http://[::1]:80"
    assert address("unix:/run/x") == "unix:/run/x"
    with pytest.raises(CortexError, match="only systemd knows"):
        address("systemd:control")
    assert locate(None, "https://control.example").address == "https://control.example"


def test_durations_and_targets() -> None:
    assert [seconds(text) for text in ("90", "90s", "15m", "2h", "1d", "1.5m")] == [90, 90, 900, 7200, 86_400, 90]
    for text in ("", "m", "1w", "-1s", "1 0"):
        with pytest.raises(Exception, match="duration"):
            seconds(text)
    assert str(whose("alice")) == "alice/main"
    assert str(whose("a@b.c/x")) == "a@b.c/x"
    with pytest.raises(CortexError):
        whose("alice/")
