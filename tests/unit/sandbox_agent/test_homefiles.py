from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import homefiles
from sandbox_agent.homefiles import UnsafePath


def test_a_file_is_private_and_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    homefiles.write(str(tmp_path), "a", b"new")
    homefiles.write(str(tmp_path), ".config/x/auth.json", b"{}")
    assert (tmp_path / "a").read_bytes() == b"new"
    made = tmp_path / ".config/x/auth.json"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert sorted(os.listdir(tmp_path)) == [".config", "a"]


def test_a_planted_link_is_replaced_never_followed(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "victim").write_text("mine")
    (home / "file").symlink_to(outside / "victim")
    (home / "dir").symlink_to(outside)
    homefiles.write(str(home), "file", b"secret")
    assert (outside / "victim").read_text() == "mine"
    assert not (home / "file").is_symlink()
    for path in ("dir/victim", "dir/new/deep"):
        with pytest.raises(UnsafePath):
            homefiles.write(str(home), path, b"secret")
    with pytest.raises(UnsafePath):
        homefiles.remove(str(home), "dir/victim")
    assert sorted(os.listdir(outside)) == ["victim"]


def test_missing_files_only(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("user's")
    (tmp_path / "dangling").symlink_to("/nowhere")
    home = str(tmp_path)
    homefiles.write_missing(home, {"kept": "ours", "~/new": "ours", f"{home}/also": "ours", "dangling": "ours"})
    assert (tmp_path / "kept").read_text() == "user's"
    assert (tmp_path / "new").read_text() == (tmp_path / "also").read_text() == "ours"
    assert (tmp_path / "dangling").is_symlink()


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError):
        homefiles.write(str(tmp_path), "dir", b"x")
    assert os.listdir(tmp_path) == ["dir"]


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    homefiles.remove(str(tmp_path), "a")
    homefiles.remove(str(tmp_path), "a")
    homefiles.remove(str(tmp_path), "no/such")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "path", ["", "/", ".", "../x", "a/../../x", "/etc/passwd", "/homer/x", "~/..", "a\0b", "/home"]
)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(UnsafePath):
        homefiles.parts_below("/home", path)


@given(st.text(alphabet="ab./~", max_size=12))
def test_what_is_accepted_lies_below(path: str) -> None:
    try:
        parts = homefiles.parts_below("/home", path)
    except UnsafePath:
        return
    assert os.path.normpath(os.path.join("/home", *parts)).startswith("/home/")


def test_a_link_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dir").mkdir()
    with homefiles.place(str(tmp_path), "any", make=False) as (directory, _):
        for name in ("file", "link", "new"):
            homefiles.link_in(directory, name, "/ram/target")
            assert homefiles.target_of(directory, name) == "/ram/target"
        with pytest.raises(OSError):
            homefiles.link_in(directory, "dir", "/ram/target")
        assert homefiles.target_of(directory, "dir") is None
        assert homefiles.target_of(directory, "none") is None
    assert sorted(os.listdir(tmp_path)) == ["dir", "file", "link", "new"]


KINDS = ("nothing", "directory", "file", "pipe", "link out", "link to itself", "dangling")


def plant(path: Path, kind: str, outside: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("theirs")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link out": outside, "link to itself": path}.get(kind, "/nowhere/at/all"))


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.sampled_from(["write", "link", "read", "remove"]))
def test_whatever_was_planted_nothing_outside_is_touched_nor_read(kinds: list[str], action: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        home, outside = Path(root, "home"), Path(root, "outside")
        home.mkdir()
        outside.mkdir()
        names = [f"d{number}" for number in range(len(kinds))]
        for depth in range(len(kinds)):  # a link out must lead to something that would do
            Path(outside, *names[depth + 1 : -1]).mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                Path(outside, *names[depth + 1 :]).write_text("secret")
        before = {path: path.stat().st_mtime_ns for path in (outside, *outside.rglob("*"))}
        place = home
        for name, kind in zip(names, kinds, strict=True):
            place = place / name
            plant(place, kind, outside)
            if kind != "directory":
                break
        with suppress(UnsafePath, OSError):
            if action == "write":
                homefiles.write(str(home), "/".join(names), b"ours")
            elif action == "remove":
                homefiles.remove(str(home), "/".join(names))
            else:
                with homefiles.place(str(home), "/".join(names), make=action == "link") as (directory, name):
                    if action == "link":
                        homefiles.link_in(directory, name, "/ram/target")
                    with homefiles.regular(directory, name) as own:
                        assert own is None or os.read(own, 100) == b"theirs"
        assert {path: path.stat().st_mtime_ns for path in (outside, *outside.rglob("*"))} == before
        assert not [path for path in outside.rglob("*") if path.is_file() and path.read_text() != "secret"]
        assert not list(home.rglob(".cortex-*"))
