"""Directories of the host's memory, for the credential files of sandboxes without isolation.

They lie on a tmpfs where the host has one that others cannot look into, and are 0700. Beside what an
isolated sandbox has they lack a size limit, the host sees them by name, and a host that loses power while
they lie on disk (no tmpfs found) keeps what is in them.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_NAME = "cortex-credentials"


def make(name: str, otherwise: Path) -> str:
    """A new private directory on a tmpfs, else below ``otherwise``. Raises ``OSError``."""
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):
        if base and _on_tmpfs(base):
            above = Path(base) / f"{_NAME}-{os.getuid()}"
            if _private(above):
                return tempfile.mkdtemp(prefix=f"{name}.", dir=above)
    log.warning("credentials_on_disk", directory=str(otherwise), hint="mount a tmpfs at /dev/shm")
    above = otherwise / _NAME
    above.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=f"{name}.", dir=above)


def remove(path: str) -> None:
    """Removes it with all that is in it, links unfollowed. Idempotent."""
    if path:
        shutil.rmtree(path, ignore_errors=True)


def _private(path: Path) -> bool:
    """Makes ``path``; whether it is ours alone. Others may have made it first where all may write."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:
        return False
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700


def _on_tmpfs(path: str, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether ``path`` lies on a tmpfs or ramfs."""
    real = os.path.realpath(path)
    best, kind = -1, ""
    for line in mounts.read_text().splitlines():
        _, place, found, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= best and os.path.isdir(real):
            best, kind = len(place), found
    return kind in ("tmpfs", "ramfs")
