"""Segments are in their directory for good before anything is written to them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from broker.sandbox.journal_files import JournalFiles


def test_a_segment_is_granted_only_when_its_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    broken = [True]

    def fsync(fd: int) -> None:
        if broken:
            broken.clear()
            raise OSError(28, "no space")
        synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))

    monkeypatch.setattr(os, "fsync", fsync)
    files = JournalFiles(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no space"):
        files.open(-1)
    assert len(os.listdir("/proc/self/fd")) == before
    # The file is there now, its name perhaps not: the next grant has to make sure.
    segment = files.open(-1)
    assert synced == [True]
    os.close(segment.fd)


def test_a_link_in_the_place_of_a_segment_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("keep")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "0000000000.seg").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        JournalFiles(tmp_path / "journal").open(0)
    (tmp_path / "way").symlink_to(tmp_path / "journal")
    with pytest.raises(OSError, match="directory"):
        JournalFiles(tmp_path / "way").open(-1)
