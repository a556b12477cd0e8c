"""Writes files below HOME without ever following a link that something inside may have planted.

Light: boot imports it. Each directory on the way is opened relative to the one above with
O_NOFOLLOW; a file or a link appears by rename, whole, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


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


@contextlib.contextmanager
def place(home: str, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """The directory that ``path`` lies in, open, and the name there. ``make``: directories that are missing.

    Raises ``UnsafePath`` or ``OSError``.
    """
    *above, name = parts_below(home, path)
    directory = _open_dir(home, above, make=make)
    try:
        yield directory, name
    finally:
        os.close(directory)


def write(home: str, path: str, content: bytes, mode: int = 0o600) -> None:
    """Puts ``content`` at ``path``, in place of what is there. Raises ``UnsafePath`` or ``OSError``."""
    with place(home, path, make=True) as (directory, name):
        write_in(directory, name, content, mode)


def write_missing(home: str, files: dict[str, str]) -> None:
    """Writes each text that has no file yet. Raises ``UnsafePath`` or ``OSError``."""
    for path, text in files.items():
        with place(home, path, make=True) as (directory, name):
            if not _exists(directory, name):
                write_in(directory, name, text.encode())


def remove(home: str, path: str) -> None:
    """Removes a file; one that is not there is no error. Raises ``UnsafePath`` or ``OSError``."""
    with contextlib.suppress(FileNotFoundError), place(home, path, make=False) as (directory, name):
        os.unlink(name, dir_fd=directory)


def link_in(directory: int, name: str, target: str) -> None:
    """Puts a symbolic link to ``target`` at ``name``, in place of what is there. Raises ``OSError``."""
    scratch = _scratch()
    os.symlink(target, scratch, dir_fd=directory)
    try:
        os.rename(scratch, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(scratch, dir_fd=directory)
        raise


def target_of(directory: int, name: str) -> str | None:
    """Where a symbolic link leads; None for anything else and for nothing."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError:
        return None


@contextlib.contextmanager
def regular(directory: int, name: str) -> Iterator[int | None]:
    """The file at ``name``, open for reading; None for a link, a directory, a pipe, and for nothing."""
    try:
        file = os.open(name, _READ, dir_fd=directory)
    except OSError:
        yield None
        return
    try:
        yield file if stat.S_ISREG(os.fstat(file).st_mode) else None
    finally:
        os.close(file)


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


def write_in(directory: int, name: str, content: bytes, mode: int = 0o600) -> None:
    """Puts ``content`` at ``name``, in place of what is there. Raises ``OSError``."""
    scratch = _scratch()
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


def _scratch() -> str:
    return f".cortex-{os.urandom(8).hex()}"
