"""Erasing costs the same memory for any tree."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from broker.sandbox import trash


@pytest.mark.parametrize("shape", ["wide", "deep"])
def test_nothing_is_remembered_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setattr(trash, "_BATCH", 10)
    here = tmp_path / "tree"
    here.mkdir()
    for number in range(100 if shape == "deep" else 1500):
        full = here / f"{number % 10 if shape == 'deep' else number}"
        full.mkdir()
        for name in ("x", "y", "z") if shape == "deep" else ("x",):
            (full / name / "f").mkdir(parents=True)
        here = full if shape == "deep" else here
    trash.erase(tmp_path, "missing")
    tracemalloc.start()
    try:
        trash.erase(tmp_path, "tree")
        assert tracemalloc.get_traced_memory()[1] < 40_000
    finally:
        tracemalloc.stop()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_directory_goes_too(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "trash").mkdir()
    (tmp_path / "trash" / "link").symlink_to(kept)
    trash.erase(tmp_path / "trash", "link")
    assert list((tmp_path / "trash").iterdir()) == []
    assert kept.is_dir()
