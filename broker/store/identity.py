"""The installation's key and the short id that is made from it.

The key signs sandbox secrets and derived tokens; the id labels containers, so that two
installations on one host never take each other's. The key never leaves ``state_dir``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from broker.errors import Code, CortexError

KEY_BYTES = 32
FILE_NAME = "installation.key"


@dataclass(frozen=True)
class Identity:
    """``id``: 12 hex digits, safe to show; ``key``: 32 secret bytes."""

    id: str
    key: bytes = field(repr=False)


def load(state_dir: Path) -> Identity:
    """Reads ``state_dir/installation.key`` or makes it, 0600. Raises ``CortexError`` (``STORE_ERROR``)."""
    path = state_dir / FILE_NAME
    try:
        key = _read(path)
        if key is None:
            _create(path)
            key = _read(path)
    except OSError as error:
        raise _failed(path, f"{error.strerror}") from error
    if key is None:
        raise _failed(path, "it vanished while it was made")
    digest = hmac.new(key, b"cortex installation id", hashlib.sha256).hexdigest()
    return Identity(id=digest[:12], key=key)


def _failed(path: Path, cause: str) -> CortexError:
    return CortexError(
        Code.STORE_ERROR,
        f"the installation key {path} cannot be used",
        cause=cause,
        hint=f"it has to be a file of {KEY_BYTES} bytes, owned by the broker's user: chmod 600 {path}",
    )


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o077 or info.st_uid != os.geteuid():
            raise _failed(path, "others could read or replace it")
        key = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(key) != KEY_BYTES:
        raise _failed(path, "it has the wrong length")
    return key


def _create(path: Path) -> None:
    """Never leaves a half-written key: written beside, synced, then linked into place."""
    draft = path.with_name(f".{FILE_NAME}.{secrets.token_hex(6)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(KEY_BYTES))
        os.fsync(fd)
        os.link(draft, path)
    finally:
        os.close(fd)
        os.unlink(draft)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
