from __future__ import annotations

import base64
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.store.keys import MAX_KEYS, KeyFile, new_key
from broker.store.sealed import Keyring


def line() -> bytes:
    return base64.b64encode(os.urandom(32)) + b"\n"


def test_made_private_and_read_again(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "vault.key")
    assert file.read() is None
    ring = file.create()
    assert file.read() == ring
    assert len(ring.keys) == 1
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["vault.key"]


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "vault.key")
    ring = file.create()
    with pytest.raises(CortexError, match="cannot be written"):
        file.create()
    assert file.read() == ring


def test_replaced_whole_and_in_order(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "vault.key")
    old = file.create()
    # What a broker that was killed while it wrote has left.
    (tmp_path / ".vault.key.new").write_text("half")
    new = Keyring((new_key(), *old.keys))
    file.replace(new)
    assert file.read() == new
    assert [item.name for item in tmp_path.iterdir()] == ["vault.key"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_comments_and_blank_lines_are_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(b"# old\n\n" + line() + b"\n" + line())
    path.chmod(0o400)
    ring = KeyFile(path).read()
    assert ring is not None
    assert len(ring.keys) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "no key"),
        (b"# nothing\n", "no key"),
        (line()[:-3] + b"\n", "line 1"),
        (line() + line()[:20], "line 2"),
        (b"\xff\xfe\n", "base64"),
        (base64.b64encode(b"short") + b"\n", "32 bytes"),
        (b"".join(line() for _ in range(MAX_KEYS + 1)), "more than"),
        (b"#" * 20_000, "no key"),
    ],
    ids=["empty", "comment", "cut", "second cut", "binary", "short", "too many", "long comment"],
)
def test_a_file_that_is_damaged_or_cut_is_refused_and_stays_as_it_is(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "k"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(CortexError, match=why) as caught:
        KeyFile(path).read()
    assert caught.value.code is Code.VAULT_KEY
    assert "chmod 600" in caught.value.hint
    assert path.read_bytes() == text
    for word in text.split():
        assert len(word) < 20 or word.decode(errors="replace") not in str(caught.value)


@given(st.lists(st.binary(max_size=60) | st.binary(min_size=32, max_size=32).map(base64.b64encode), max_size=20))
def test_any_file_is_keys_or_refused(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "k")
        path.write_bytes(b"\n".join(lines))
        path.chmod(0o600)
        found = outcome(KeyFile(path))
        if isinstance(found, Keyring):
            assert 1 <= len(found.keys) <= MAX_KEYS
            assert all(base64.b64encode(key.secret) in path.read_bytes() for key in found.keys)
        else:
            assert found is Code.VAULT_KEY


def outcome(file: KeyFile) -> Keyring | Code | None:
    try:
        return file.read()
    except CortexError as error:
        return error.code


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(line() * 2)
    path.chmod(0o600)
    with pytest.raises(CortexError, match="twice"):
        KeyFile(path).read()


def _readable(path: Path) -> None:
    path.chmod(0o640)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12_345, 12_345)


@pytest.mark.parametrize("spoil", [_readable, _link, _directory, _pipe, _foreign])
def test_a_file_that_others_may_have_read_or_put_there_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    file = KeyFile(tmp_path / "vault.key")
    file.create()
    spoil(file.path)
    with pytest.raises(CortexError) as caught:
        file.read()
    assert caught.value.code is Code.VAULT_KEY


def test_of_a_file_that_systemd_passes_the_groups_bits_are_an_acls(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(line())
    path.chmod(0o440)
    assert KeyFile(path, passed=True).read() is not None
    path.chmod(0o444)
    with pytest.raises(CortexError):
        KeyFile(path, passed=True).read()


def test_a_directory_that_takes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(CortexError) as caught:
        KeyFile(tmp_path / "gone" / "k").create()
    assert caught.value.code is Code.VAULT_KEY
