"""Erasing costs the same memory for any tree."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from broker.sandbox import trash


@pytest.mark.parametrize("shape", ["wide", "deep"])
def test_nothing_is_remembered_of_a_tree(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setattr(trash, "_BATCH", 20)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        grow(Path(directory) / "tree", shape)
        trash.erase(Path(directory), "missing")
        tracemalloc.start()
        try:
            trash.erase(Path(directory), "tree")
            assert tracemalloc.get_traced_memory()[1] < 40_000
        finally:
            tracemalloc.stop()
        assert os.listdir(directory) == []


def grow(here: Path, shape: str) -> None:
    """Directories with something in them: 1500 side by side, or a few in each of 100 levels."""
    here.mkdir()
    for number in range(100 if shape == "deep" else 1500):
        full = here / f"{number % 10 if shape == 'deep' else number}"
        full.mkdir()
        for name in ("x", "y", "z") if shape == "deep" else ("x",):
            (full / name / "f").mkdir(parents=True)
        here = full if shape == "deep" else here


def test_what_is_no_directory_goes_too(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "trash").mkdir()
    (tmp_path / "trash" / "link").symlink_to(kept)
    trash.erase(tmp_path / "trash", "link")
    assert list((tmp_path / "trash").iterdir()) == []
    assert kept.is_dir()
