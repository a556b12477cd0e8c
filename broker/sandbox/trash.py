"""Erasing trees that hostile programs made: never follows a link, never recurses, bounded memory.

A directory that is not empty moves up into the trash directory before it is emptied, so neither a
tree's depth nor the length of its paths matters.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from itertools import islice
from pathlib import Path

_BATCH = 1000


def discard(path: Path, trash: Path) -> str | None:
    """Moves ``path`` into ``trash`` (same file system) in one step; returns its name there or None."""
    name = secrets.token_hex(8)
    try:
        os.rename(path, trash / name)
    except FileNotFoundError:
        return None
    return name


def erase(trash: Path, name: str) -> None:
    """Erases ``trash/name``, whatever it is. Blocks; run it in a thread. Raises ``OSError``."""
    top = os.open(trash, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        queue = [name]
        while queue:
            _erase_one(top, queue.pop(), queue)
    finally:
        os.close(top)


def _erase_one(top: int, name: str, queue: list[str]) -> None:
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=top)
            return
        here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    except FileNotFoundError:
        return
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=top)
        here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        os.fchmod(here, 0o700)
        while batch := _entries(here):
            for entry in batch:
                _clear(entry, here, top, queue)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=top)


def _entries(directory: int) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as found:
        return list(islice(found, _BATCH))


def _clear(entry: os.DirEntry[str], here: int, top: int, queue: list[str]) -> None:
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=here)
        return
    try:
        os.rmdir(entry.name, dir_fd=here)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Moving a directory writes its "..", so its owner needs write permission on it.
        os.chmod(entry.name, 0o700, dir_fd=here)
        name = secrets.token_hex(8)
        os.rename(entry.name, name, src_dir_fd=here, dst_dir_fd=top)
        queue.append(name)
