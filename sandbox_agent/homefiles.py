"""Writes files below HOME without ever following a link that something inside may have planted.

Light: boot imports it. Each directory on the way is opened relative to the one above with
O_NOFOLLOW; a file appears by rename, whole, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafePath(Exception):
    """A path that leaves HOME or leads through a link."""


def parts_below(home: str, path: str) -> list[str]:
    """The components of ``path`` below ``home``; ``path`` is relative, ``~/…`` or absolute below ``home``.

    Raises ``UnsafePath``.
    """
    if path.startswith("~/"):
        path = path[2:]
    elif path.startswith("/"):
        prefix = home.rstrip("/") + "/"
        if not path.startswith(prefix):
            raise UnsafePath(f"{path!r} is not below the home")
        path = path[len(prefix) :]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise UnsafePath(f"{path!r} is not a file below the home")
    return parts


def write(home: str, path: str, content: bytes, mode: int = 0o600) -> None:
    """Puts ``content`` at ``path``, in place of what is there. Raises ``UnsafePath`` or ``OSError``."""
    *above, name = parts_below(home, path)
    directory = _open_dir(home, above, make=True)
    try:
        _write_in(directory, name, content, mode)
    finally:
        os.close(directory)


def write_missing(home: str, files: dict[str, str]) -> None:
    """Writes each text that has no file yet. Raises ``UnsafePath`` or ``OSError``."""
    for path, text in files.items():
        *above, name = parts_below(home, path)
        directory = _open_dir(home, above, make=True)
        try:
            if not _exists(directory, name):
                _write_in(directory, name, text.encode(), 0o600)
        finally:
            os.close(directory)


def remove(home: str, path: str) -> None:
    """Removes a file; one that is not there is no error. Raises ``UnsafePath`` or ``OSError``."""
    *above, name = parts_below(home, path)
    try:
        directory = _open_dir(home, above, make=False)
    except FileNotFoundError:
        return
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    finally:
        os.close(directory)


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_dir(home: str, parts: list[str], *, make: bool) -> int:
    directory = os.open(home, _DIR)
    for part in parts:
        try:
            below = _open_below(directory, part, make=make)
        finally:
            os.close(directory)
        directory = below
    return directory


def _open_below(directory: int, name: str, *, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=directory)
    try:
        return os.open(name, _DIR, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise UnsafePath(f"{name!r} on the way is a link or a file, not a directory") from error


def _write_in(directory: int, name: str, content: bytes, mode: int) -> None:
    scratch = f".cortex-{os.urandom(8).hex()}"
    file = os.open(scratch, _NEW, 0o600, dir_fd=directory)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(file, view) :]
        os.fchmod(file, mode)
        os.rename(scratch, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(scratch, dir_fd=directory)
        raise
    finally:
        os.close(file)
