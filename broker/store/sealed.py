"""The sealed form of a secret: AES-256-GCM under a key that is used once. Pure.

    "CXV" | format 1 | key id 4 | salt 32 | nonce 12 | ciphertext and tag

Each blob has a key of its own, HKDF-Expand(SHA-256) of a master key and 32 random bytes (as
Kubernetes does), so that no number of writes brings two under the same key and nonce. What stands
in the clear, and the place where the blob belongs, are associated data: it opens nowhere else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

MAGIC = b"CXV\x01"
KEY_BYTES = 32
ID_BYTES = 4
_SALT_BYTES = 32
_NONCE_BYTES = 12
_HEAD = len(MAGIC) + ID_BYTES + _SALT_BYTES + _NONCE_BYTES
_TAG_BYTES = 16


class Broken(Exception):
    """A blob that is damaged, forged, of another place, or of a key that is not there. Says nothing secret."""


@dataclass(frozen=True)
class Key:
    """A master key. ``id`` follows from it, so a wrong key is told from a damaged blob."""

    secret: bytes = field(repr=False)

    @cached_property
    def id(self) -> bytes:
        """Four bytes that may be shown."""
        return hmac.digest(self.secret, b"cortex vault key id", hashlib.sha256)[:ID_BYTES]


@dataclass(frozen=True)
class Keyring:
    """Keys by which blobs are opened; the first seals."""

    keys: tuple[Key, ...]

    @property
    def first(self) -> Key:
        """The one that seals."""
        return self.keys[0]

    @property
    def ids(self) -> frozenset[bytes]:
        """Of all keys."""
        return frozenset(key.id for key in self.keys)


def place(table: str, user: str, provider: str, version: int) -> bytes:
    """The one place where a blob may be found, canonical: no two places are written alike."""
    texts = [text.encode() for text in (table, user, provider)]
    return b"".join(struct.pack(">I", len(text)) + text for text in texts) + struct.pack(">Q", version)


def seal(key: Key, where: bytes, secret: bytes) -> bytes:
    """A blob that opens at ``where`` only."""
    head = MAGIC + key.id + os.urandom(_SALT_BYTES + _NONCE_BYTES)
    return head + _cipher(key, head).encrypt(head[-_NONCE_BYTES:], secret, head + where)


def unseal(ring: Keyring, where: bytes, blob: bytes) -> bytes:
    """The secret in a blob that was found at ``where``. Raises ``Broken``."""
    head = blob[:_HEAD]
    if len(blob) < _HEAD + _TAG_BYTES or not head.startswith(MAGIC):
        raise Broken("it is not a sealed secret")
    key = next((key for key in ring.keys if key.id == key_id(blob)), None)
    if key is None:
        raise Broken(f"its key {key_id(blob).hex()} is not there")
    try:
        return _cipher(key, head).decrypt(head[-_NONCE_BYTES:], blob[_HEAD:], head + where)
    except InvalidTag:
        raise Broken("it was changed, or belongs elsewhere") from None


def key_id(blob: bytes) -> bytes:
    """Which key a blob names; proves nothing."""
    return blob[len(MAGIC) : len(MAGIC) + ID_BYTES]


def _cipher(key: Key, head: bytes) -> AESGCM:
    salt = head[-_NONCE_BYTES - _SALT_BYTES : -_NONCE_BYTES]
    return AESGCM(HKDFExpand(SHA256(), KEY_BYTES, b"cortex vault 1" + salt).derive(key.secret))
