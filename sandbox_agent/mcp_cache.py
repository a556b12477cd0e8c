"""Lists of MCP servers, kept in the user's home: what a server has is known before it runs. No secrets in it.

A file a server, named by ``ServerSpec.key``. What is wrong with a file, or with the place, only means that nothing
is known: the server will say it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from sandbox_agent import homefiles, jsonrpc, mcp_protocol
from sandbox_agent.mcp_protocol import KINDS, Listing

FORMAT = 1
MAX_BYTES = 4 * 2**20
"""Of one file."""
MAX_FILES = 64
SUFFIX = ".json"


class ListCache:
    """``home``, and the directory below it; None: there is no home yet. No method raises."""

    def __init__(self, home: Callable[[], str], directory: Callable[[], str | None]) -> None:
        self._home = home
        self._directory = directory

    def load(self, key: str) -> Listing | None:
        """What the server had when it last ran; None: not known."""
        try:
            with self._place(key, make=False) as (directory, name), homefiles.regular(directory, name) as file:
                return _decode(_read(file)) if file is not None else None
        except (homefiles.UnsafePath, OSError, ValueError):
            return None

    def save(self, key: str, listing: Listing) -> None:
        """Keeps it; of the servers of earlier days only the latest are kept."""
        data = _encode(listing)
        if len(data) > MAX_BYTES:
            return
        with (
            contextlib.suppress(homefiles.UnsafePath, OSError, FileNotFoundError),
            self._place(key, make=True) as (directory, name),
        ):
            homefiles.write_in(directory, name, data)
            _prune(directory)

    def _place(self, key: str, *, make: bool) -> contextlib.AbstractContextManager[tuple[int, str]]:
        """Raises ``OSError`` where there is none."""
        directory = self._directory()
        if directory is None:
            raise FileNotFoundError("there is no home yet")
        return homefiles.place(self._home(), os.path.join(directory, key + SUFFIX), make=make)


def _read(file: int) -> bytes:
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := os.read(file, MAX_BYTES)):
        data += piece
    return bytes(data) if len(data) <= MAX_BYTES else b""


def _encode(listing: Listing) -> bytes:
    body = {"capabilities": listing.capabilities, "instructions": listing.instructions, "lists": listing.lists}
    return jsonrpc.dumps({"format": FORMAT, **body})


def _decode(data: bytes) -> Listing | None:
    """Raises ``ValueError``."""
    value: Any = jsonrpc.parse(data)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    capabilities, instructions, lists = value.get("capabilities"), value.get("instructions"), value.get("lists")
    if not isinstance(capabilities, dict) or not isinstance(instructions, str) or not isinstance(lists, dict):
        return None
    known = {name: mcp_protocol.items(lists[name], kind.key) for name, kind in KINDS.items() if name in lists}
    return Listing(capabilities, instructions, known)


def _prune(directory: int) -> None:
    names = [name for name in os.listdir(directory) if name.endswith(SUFFIX)]
    if len(names) <= MAX_FILES:
        return
    ages = sorted((os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns, name) for name in names)
    for _, name in ages[: len(names) - MAX_FILES]:
        os.unlink(name, dir_fd=directory)
