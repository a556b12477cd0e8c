from __future__ import annotations

import stat
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.store import identity


def test_made_once_private_and_stable(tmp_path: Path) -> None:
    first = identity.load(tmp_path)
    assert identity.load(tmp_path) == first
    assert len(first.key) == identity.KEY_BYTES
    assert first.key.hex() not in repr(first)
    path = tmp_path / identity.FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir()] == [identity.FILE_NAME]


def test_two_installations_differ(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert identity.load(tmp_path / "a").id != identity.load(tmp_path / "b").id


@pytest.mark.parametrize("damage", ["readable", "short", "link"])
def test_a_key_that_cannot_be_trusted_is_refused(tmp_path: Path, damage: str) -> None:
    identity.load(tmp_path)
    path = tmp_path / identity.FILE_NAME
    if damage == "readable":
        path.chmod(0o644)
    elif damage == "short":
        path.write_bytes(b"short")
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CortexError) as caught:
        identity.load(tmp_path)
    assert caught.value.code is Code.STORE_ERROR
    assert "chmod 600" in caught.value.hint
