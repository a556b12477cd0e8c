"""What the host has for us: file descriptors and disk space."""

from __future__ import annotations

import os
import resource
from pathlib import Path

MIN_FREE_BYTES = 32 * 2**20


def raise_file_limit() -> None:
    """As many descriptors as the host allows: each client takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def short_of_space(directory: Path) -> str:
    """What is wrong with the file system of ``directory``; "" when there is room to write."""
    try:
        facts = os.statvfs(directory)
    except OSError as error:
        return f"{directory}: {error.strerror}"
    free = facts.f_bavail * facts.f_frsize
    return "" if free >= MIN_FREE_BYTES else f"{free // 2**20} MiB free, {MIN_FREE_BYTES // 2**20} MiB are needed"
