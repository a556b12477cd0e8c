"""Putting a finished build on the shelf of packages."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from broker.errors import Code, CortexError
from broker.sandbox.package_calls import PackageCall
from broker.sandbox.slots import Slot, Slots
from sandbox_agent.wire.messages import Built

_LIBC = ctypes.CDLL(None, use_errno=True)
_BIN = re.compile(r"[^/\x00-\x1f]{1,128}")
_MAX_BINS = 256


@dataclass(frozen=True)
class Package:
    """One installed package. ``key``: its directory on the shelf; ``bins``: command name → path below it."""

    key: str
    bins: dict[str, str]
    version: str


def publish(slot: Slot, slots: Slots, call: PackageCall, built: Built) -> Package:
    """Moves ``home/build`` to the shelf by rename; what the sandbox says and made is checked before.

    Only when nothing that ran in the slot still lives; blocks, for it is durable when it returns.
    Raises ``CortexError`` (``PACKAGE_FAILED``).
    """
    source = slot.home_dir / "build"
    # The spec is part of the key, so a package's scripts cannot take another package's place.
    key = hashlib.sha256(f"{call.spec}\n{built.integrity}".encode()).hexdigest()[:32]
    target = slots.packages_dir / key
    try:
        bins = checked_bins(source, built.bins)
        if bins and not target.is_dir():
            os.chmod(source, 0o755)
            _sync_file_system(source)
            os.rename(source, target)
            _sync_file_system(slots.packages_dir)
    except OSError as error:
        raise CortexError(
            Code.PACKAGE_FAILED,
            f"{call.spec} could not be put on the shelf",
            hint="look at owner, mode and free space of broker.state_dir",
            cause=error,
        ) from error
    if not bins:
        raise CortexError(
            Code.PACKAGE_FAILED,
            f"{call.spec} has no command to run",
            hint="name the package that holds the server, not one of its libraries",
        )
    return Package(key, bins, built.version[:128])


def _sync_file_system(path: Path) -> None:
    """syncfs(2): one call for the thousands of files of a package, and none of them opened."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def checked_bins(root: Path, bins: dict[str, str]) -> dict[str, str]:
    """Those of ``bins`` that are plain relative paths to something beneath ``root``, no link on the way.

    Raises ``OSError`` when ``root`` is no directory.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        good = {name: path for name, path in list(bins.items())[:_MAX_BINS] if _BIN.fullmatch(name)}
        return {name: path for name, path in good.items() if _beneath(top, path)}
    finally:
        os.close(top)


def _beneath(top: int, path: str) -> bool:
    *parents, last = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in (*parents, last)):
        return False
    here = os.dup(top)
    try:
        for part in parents:
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = inner
        mode = os.stat(last, dir_fd=here, follow_symlinks=False).st_mode
        return stat.S_ISREG(mode) or stat.S_ISLNK(mode)
    except OSError:
        return False
    finally:
        os.close(here)
