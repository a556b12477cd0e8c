from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from broker.sandbox import ram_dirs


@pytest.fixture
def ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory that passes for one in memory."""
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    monkeypatch.setattr(ram_dirs, "_on_tmpfs", lambda name: name == str(path))
    return path


def test_each_is_new_and_private_and_goes_with_its_content(ram: Path, tmp_path: Path) -> None:
    one, two = (Path(ram_dirs.make("a.1", tmp_path / "disk")) for _ in range(2))
    assert one != two
    for path in (one, two):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert ram in path.parents
    (tmp_path / "kept").write_text("x")
    (one / "link").symlink_to(tmp_path)
    ram_dirs.remove(str(one))
    ram_dirs.remove(str(one))
    ram_dirs.remove("")
    assert not one.exists()
    assert (tmp_path / "kept").exists()


def test_what_others_made_first_is_not_used(ram: Path, tmp_path: Path) -> None:
    (ram / f"cortex-credentials-{os.getuid()}").mkdir(mode=0o755)
    os.chmod(ram / f"cortex-credentials-{os.getuid()}", 0o755)
    assert ram_dirs.make("a.1", tmp_path / "disk").startswith(str(tmp_path / "disk"))
    (ram / f"cortex-credentials-{os.getuid()}").rmdir()
    (ram / f"cortex-credentials-{os.getuid()}").symlink_to(tmp_path)
    assert ram_dirs.make("a.1", tmp_path / "disk").startswith(str(tmp_path / "disk"))


def test_without_memory_it_is_the_disk_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(ram_dirs, "_on_tmpfs", lambda _: False)
    made = Path(ram_dirs.make("a.1", tmp_path / "disk"))
    assert stat.S_IMODE(made.parent.stat().st_mode) == stat.S_IMODE(made.stat().st_mode) == 0o700


def test_the_mount_that_counts_is_the_deepest_and_the_last(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    text = f"root / ext4 rw 0 0\nram {tmp_path} tmpfs rw 0 0\n"
    mounts.write_text(text)
    (tmp_path / "a b").mkdir()
    assert ram_dirs._on_tmpfs(str(tmp_path / "a b"), mounts)
    assert not ram_dirs._on_tmpfs(str(tmp_path / "missing"), mounts)
    mounts.write_text(text + f"disk {tmp_path}/a\\040b ext4 rw 0 0\n")
    assert not ram_dirs._on_tmpfs(str(tmp_path / "a b"), mounts)
    mounts.write_text(text + f"disk {tmp_path} ext4 rw 0 0\n")
    assert not ram_dirs._on_tmpfs(str(tmp_path / "a b"), mounts)
