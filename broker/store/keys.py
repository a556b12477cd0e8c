"""The vault's master keys on disk: one in base64 a line; the first seals, all open.

The file is replaced whole and synced before anything relies on it, and never written over: where
it cannot be used, that is an error, since what it may hold opens what is stored.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.errors import Code, CortexError
from broker.store.sealed import KEY_BYTES, Key, Keyring

MAX_KEYS = 16
_MAX_FILE = 16 * 2**10
_HEAD = "# Keys of the Cortex vault, base64 of 32 bytes each. The first seals, all open. Keep a copy elsewhere.\n"


@dataclass(frozen=True)
class KeyFile:
    """``passed``: below systemd's $CREDENTIALS_DIRECTORY, so that it is not ours to write."""

    path: Path
    passed: bool = False

    @classmethod
    def at(cls, path: Path, env: Mapping[str, str]) -> KeyFile:
        """The file at ``path``, as far as the environment says where it is from."""
        passed = env.get("CREDENTIALS_DIRECTORY")
        return cls(path, bool(passed) and path.is_relative_to(str(passed)))

    def read(self) -> Keyring | None:
        """The keys; None when there is no such file. Raises ``VAULT_KEY`` when it cannot be trusted or used."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error.strerror or "it cannot be opened") from error
        try:
            self._check(os.fstat(fd))
            return self._parse(os.read(fd, _MAX_FILE + 1))
        except OSError as error:
            raise self._unusable(error.strerror or "it cannot be read") from error
        finally:
            os.close(fd)

    def create(self) -> Keyring:
        """Makes the file with a new key, durable when it returns. Raises ``VAULT_KEY``, also when it exists."""
        ring = Keyring((new_key(),))
        self._write(ring, exclusive=True)
        return ring

    def replace(self, ring: Keyring) -> None:
        """Puts ``ring`` in the place of what is there, durable when it returns; whole or not at all."""
        self._write(ring, exclusive=False)

    def _check(self, facts: os.stat_result) -> None:
        # Where systemd grants access by an ACL, the group's bits show its mask.
        others = 0o007 if self.passed else 0o077
        if not stat.S_ISREG(facts.st_mode):
            raise self._unusable("it is not a plain file")
        if facts.st_mode & others or facts.st_uid not in (0, os.geteuid()):
            raise self._unusable(
                f"others could read or replace it (mode {stat.S_IMODE(facts.st_mode):04o}, uid {facts.st_uid})"
            )

    def _parse(self, text: bytes) -> Keyring:
        keys = []
        for number, line in enumerate(text.splitlines(), 1):
            word = line.strip()
            if not word or word.startswith(b"#"):
                continue
            try:
                keys.append(Key(base64.b64decode(word, validate=True)))
            except (ValueError, binascii.Error):
                raise self._unusable(f"line {number} is not base64") from None
            if len(keys[-1].secret) != KEY_BYTES:
                raise self._unusable(f"line {number} does not hold {KEY_BYTES} bytes")
        if not keys or len(keys) > MAX_KEYS or len(text) > _MAX_FILE:
            raise self._unusable(f"it holds no key, or more than {MAX_KEYS}")
        if len({key.id for key in keys}) != len(keys):
            raise self._unusable("it holds a key twice")
        return Keyring(tuple(keys))

    def _write(self, ring: Keyring, *, exclusive: bool) -> None:
        draft = self.path.with_name(f".{self.path.name}.new")
        try:
            # One broker owns the state directory, so a draft is what a killed one has left.
            draft.unlink(missing_ok=True)
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fd, "w") as file:
                    file.write(_HEAD + "".join(f"{base64.b64encode(key.secret).decode()}\n" for key in ring.keys))
                    file.flush()
                    os.fsync(fd)
                if exclusive:
                    os.link(draft, self.path)
                else:
                    os.rename(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)
            _sync(self.path.parent)
        except OSError as error:
            raise CortexError(
                Code.VAULT_KEY,
                f"the vault's key file {self.path} cannot be written",
                cause=error.strerror,
                hint="the broker's user has to own the file and its directory, and the disk must have room",
            ) from error

    def _unusable(self, cause: str) -> CortexError:
        return CortexError(
            Code.VAULT_KEY,
            f"the vault's key file {self.path} cannot be used",
            cause=cause,
            hint=f"put it right from your copy of it, one key a line, then: chmod 600 {self.path}",
        )


def new_key() -> Key:
    """A random one."""
    return Key(secrets.token_bytes(KEY_BYTES))


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
