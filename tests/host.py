"""What a test needs of the host, and may not get: mounts, namespaces, a look into other processes.

A test that cannot run here is skipped; where CI requires all of them, it fails.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def missing(why: str) -> None:
    """Skips the running test, or fails it where CI requires all tests."""
    if os.environ.get("CORTEX_TEST_DOCKER") == "required":
        pytest.fail(why)
    pytest.skip(why)


def need_namespace(kind: str) -> None:
    """``kind``: an option of unshare(1), such as ``--mount``."""
    try:
        done = subprocess.run(["unshare", kind, "--fork", "true"], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        missing("unshare is not installed")
    else:
        if done.returncode:
            missing(f"no namespace by unshare {kind} here: {done.stderr.strip()}")


def need_sight_of(pid: int) -> None:
    """The descriptors of another process; of one that is undumpable they need CAP_SYS_PTRACE."""
    try:
        os.readlink(f"/proc/{pid}/fd/0")
    except PermissionError:
        missing("the descriptors of another process cannot be read here")


@contextmanager
def small_disk(path: Path, size: str, *options: str) -> Iterator[Path]:
    """Mounts a tmpfs of ``size`` on ``path``, where that is allowed."""
    path.mkdir(mode=0o700, exist_ok=True)
    chosen = ",".join((f"size={size}", *options))
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(path)], capture_output=True, text=True)
    if made.returncode:
        missing(f"no small disk can be mounted here: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def grow(path: Path, size: str) -> None:
    """Gives the disk at ``path`` more space."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)
