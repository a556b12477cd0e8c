"""The operator's secrets on disk."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from broker.control.keyfiles import admin_token, hook_keys
from broker.errors import CortexError


def test_they_are_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "admin.token"
    token = admin_token(path, make=True)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert admin_token(path, make=True) == admin_token(path) == token
    assert [entry.name for entry in path.parent.iterdir()] == ["admin.token"]
    keys = hook_keys(tmp_path / "hook.secrets", make=True)
    assert [len(key) for key in keys] == [32]
    assert hook_keys(tmp_path / "hook.secrets") == keys


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_file_that_others_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "admin.token"
    admin_token(path, make=True)
    path.chmod(mode)
    with pytest.raises(CortexError, match="read by others") as caught:
        admin_token(path)
    assert "chmod 600" in caught.value.hint


def test_a_link_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    admin_token(tmp_path / "real", make=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("link", "missing"):
        with pytest.raises(CortexError, match="cannot read"):
            admin_token(tmp_path / name)


@pytest.mark.parametrize("text", ["", "short", "a b" * 20, "ä" * 40])
def test_a_token_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "admin.token"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(CortexError, match="admin token"):
        admin_token(path)


def test_hook_secrets_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "hook.secrets"
    path.touch(mode=0o600)
    path.write_text("# old\nwhsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n\nwhsec_" + "QUFB" * 8 + "\n")
    assert [len(key) for key in hook_keys(path)] == [24, 24]
    for line in ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_AAAA", "whsec_!!!!"):
        path.write_text(f"# x\n{line}\n")
        with pytest.raises(CortexError, match=r"hook\.secrets:2"):
            hook_keys(path)
