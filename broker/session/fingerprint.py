"""Keyed hashes of what a sandbox is given, so that equal means nothing is sent.

Canonical JSON (sorted keys, no white space; bytes as base64) under HMAC-SHA256, keyed because
parts can hold secrets and the sandbox is told the hash.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"cannot hash a {type(value).__name__}")


def fingerprint(key: bytes, name: str, value: Any) -> str:
    """The hash of part ``name``: 32 hexadecimal digits. Key order and white space never matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=_plain)
    return hmac.new(key, f"{name}\0{text}".encode(), hashlib.sha256).hexdigest()[:32]


def fingerprints(key: bytes, parts: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each part."""
    return {name: fingerprint(key, name, value) for name, value in parts.items()}


def changed(applied: Mapping[str, str], wanted: Mapping[str, str]) -> set[str]:
    """The parts whose hash differs from what the sandbox says it has."""
    return {name for name, digest in wanted.items() if applied.get(name) != digest}
