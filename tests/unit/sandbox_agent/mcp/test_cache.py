from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import mcp_cache
from sandbox_agent.mcp_cache import ListCache
from sandbox_agent.mcp_protocol import KINDS, Listing
from sandbox_agent.mcp_spec import ServerSpec

KNOWN = Listing({"tools": {"listChanged": True}}, "Be kind.", {"tools": [{"name": "t", "x": "\udcff"}]})


@pytest.fixture
def cache(tmp_path: Path) -> ListCache:
    return ListCache(lambda: str(tmp_path), lambda: str(tmp_path / ".cache/cortex/mcp"))


def test_what_is_kept_is_what_comes_back(cache: ListCache) -> None:
    assert cache.load("k") is None
    cache.save("k", KNOWN)
    assert cache.load("k") == KNOWN
    assert cache.load("other") is None


@given(
    st.dictionaries(
        st.sampled_from(sorted(KINDS)), st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    ),
    st.text(max_size=20),
)
def test_every_listing_survives(lists: Any, instructions: str) -> None:
    sound = {kind: [{KINDS[kind].key: "k", **item} for item in items] for kind, items in lists.items()}
    listing = Listing({}, instructions, sound)
    assert mcp_cache._decode(mcp_cache._encode(listing)) == listing


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text(max_size=3), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_a_file_that_is_no_listing_is_nothing(data: bytes) -> None:
    try:
        assert mcp_cache._decode(data) is None
    except ValueError:
        return


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"format":2,"capabilities":{},"instructions":"","lists":{}}',
        b'{"format":1,"capabilities":[],"instructions":"","lists":{}}',
        b'{"format":1,"capabilities":{},"instructions":7,"lists":{}}',
        b'{"format":1,"capabilities":{},"instructions":"","lists":[]}',
    ],
)
def test_a_file_of_another_shape_is_nothing(cache: ListCache, tmp_path: Path, body: bytes) -> None:
    cache.save("k", KNOWN)
    (tmp_path / ".cache/cortex/mcp/k.json").write_bytes(body)
    assert cache.load("k") is None


def test_what_is_planted_is_not_read(cache: ListCache, tmp_path: Path) -> None:
    cache.save("k", KNOWN)
    place = tmp_path / ".cache/cortex/mcp"
    (place / "link.json").symlink_to(place / "k.json")
    os.mkfifo(place / "pipe.json")
    (place / "dir.json").mkdir()
    for name in ("link", "pipe", "dir"):
        assert cache.load(name) is None


def test_a_file_that_is_too_big_is_neither_read_nor_written(
    cache: ListCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.save("k", KNOWN)
    monkeypatch.setattr(mcp_cache, "MAX_BYTES", 20)
    assert cache.load("k") is None
    cache.save("new", KNOWN)
    assert not (tmp_path / ".cache/cortex/mcp/new.json").exists()


def test_only_the_latest_are_kept(cache: ListCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_cache, "MAX_FILES", 3)
    place = tmp_path / ".cache/cortex/mcp"
    for number in range(5):
        cache.save(f"k{number}", KNOWN)
        os.utime(place / f"k{number}.json", (number, number))
    (place / "note.txt").touch()
    cache.save("last", KNOWN)
    assert {path.name for path in place.iterdir()} == {"k3.json", "k4.json", "last.json", "note.txt"}


def test_no_place_is_no_error(tmp_path: Path) -> None:
    for directory in (None, "/elsewhere", str(tmp_path / "file/below")):
        (tmp_path / "file").touch()
        cache = ListCache(lambda: str(tmp_path), lambda directory=directory: directory)  # type: ignore[misc]
        cache.save("k", KNOWN)
        assert cache.load("k") is None


def test_the_key_is_of_the_program_and_not_of_secrets() -> None:
    base = ServerSpec("a", "/bin/x", ("1", "2"), (("TOKEN", "one"),))
    assert base.key == ServerSpec("b", "/bin/x", ("1", "2"), (("TOKEN", "two"),)).key
    others = [
        ServerSpec("a", "/bin/y", ("1", "2"), (("TOKEN", "one"),)),
        ServerSpec("a", "/bin/x", ("12",), (("TOKEN", "one"),)),
        ServerSpec("a", "/bin/x", ("1", "2"), ()),
    ]
    assert len({base.key, *(other.key for other in others)}) == 4
