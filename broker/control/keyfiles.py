"""The operator's secrets on disk: the admin token and the hook secrets, made 0600 at first start."""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from broker.errors import Code, CortexError

HOOK_PREFIX = "whsec_"


def admin_token(path: Path, *, make: bool = False) -> str:
    """The operators' bearer token. ``make``: writes a new one where there is none. Raises ``BAD_CONFIG``."""
    text = _read(path, (lambda: secrets.token_urlsafe(32) + "\n") if make else None).strip()
    if len(text) < 32 or not text.isascii() or any(c.isspace() for c in text):
        raise CortexError(
            Code.BAD_CONFIG,
            f"{path} does not hold an admin token",
            hint=f"one line of at least 32 characters; or remove it and restart: rm {path}",
        )
    return text


def hook_keys(path: Path, *, make: bool = False) -> list[bytes]:
    """Keys of the web app's hooks: ``whsec_`` and base64 of 24 to 64 bytes, one a line. Raises ``BAD_CONFIG``."""
    text = _read(path, _new_hook_secret if make else None)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        try:
            key = base64.b64decode(word.removeprefix(HOOK_PREFIX), validate=True)
        except (ValueError, binascii.Error):
            key = b""
        if not word.startswith(HOOK_PREFIX) or not 24 <= len(key) <= 64:
            raise CortexError(
                Code.BAD_CONFIG,
                f"{path}:{number} is not a hook secret",
                hint="each line is whsec_ and the base64 of 24 to 64 random bytes",
            )
        keys.append(key)
    return keys


def _new_hook_secret() -> str:
    return HOOK_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode() + "\n"


def _read(path: Path, new: Callable[[], str] | None) -> str:
    """The text of a file that only its owner can read, made with ``new()`` where it is missing."""
    try:
        if new is not None and not path.exists():
            _create(path, new())
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, encoding="utf-8") as file:
            _check(path, os.fstat(fd))
            return file.read(65_536)
    except (OSError, UnicodeDecodeError) as error:
        raise CortexError(
            Code.BAD_CONFIG,
            f"cannot read {path}",
            cause=error,
            hint="it is made when the broker first starts; run this as the broker's user",
        ) from error


def _create(path: Path, text: str) -> None:
    """Whole or not at all, also when two start at once: the first link wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o600)
            file.write(text)
            file.flush()
            os.fsync(fd)
        try:
            os.link(new, path)
        except FileExistsError:
            return
    finally:
        os.unlink(new)


def _check(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077 or facts.st_uid not in (os.geteuid(), 0):
        raise CortexError(
            Code.BAD_CONFIG,
            f"{path} can be read by others (mode {stat.S_IMODE(facts.st_mode):04o}, uid {facts.st_uid})",
            hint=f"chmod 600 {path}; and make a new secret if others may have read it",
        )
