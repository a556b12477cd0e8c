"""Erasing trees that hostile programs made: never follows a link, never recurses, bounded memory.

A directory that is not empty moves up to the top of its tree before it is emptied, so neither depth,
nor the length of paths, nor the number of directories matters: nothing is remembered.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from itertools import islice
from pathlib import Path

_BATCH = 1000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        here = _opened(name, top)
        if here is None:
            return
        try:
            os.fchmod(here, 0o700)
            # What is not empty moves up into this one directory, which is therefore emptied until nothing comes.
            while batch := _entries(here):
                for entry in batch:
                    _erase_one(entry.name, here)
        finally:
            os.close(here)
        os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _erase_one(name: str, top: int) -> None:
    here = _opened(name, top)
    if here is None:
        return
    try:
        os.fchmod(here, 0o700)
        while batch := _entries(here):
            for entry in batch:
                _clear(entry, here, top)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=top)


def _opened(name: str, parent: int) -> int | None:
    """A directory's descriptor; anything else is unlinked, and None."""
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            return None
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        return os.open(name, _DIRECTORY, dir_fd=parent)


def _entries(directory: int) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as found:
        return list(islice(found, _BATCH))


def _clear(entry: os.DirEntry[str], here: int, top: int) -> None:
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
        os.rename(entry.name, secrets.token_hex(8), src_dir_fd=here, dst_dir_fd=top)
