"""Length-prefixed msgpack: ``u32 big endian length, msgpack map``.

Both ends treat the other as hostile: a length over ``MAX_MESSAGE`` is an error before a byte of
the body is buffered, and a body must be one map with string keys.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

MAX_MESSAGE = 8 * 2**20
"""Largest control message, in bytes."""
MAX_PREAMBLE = 4096
"""Largest preamble or attach header, in bytes."""
VERSION = 1
"""Version of everything in this package; both ends must agree."""

_LENGTH = struct.Struct("!I")
HEADER = _LENGTH.size


class WireError(Exception):
    """The peer broke the protocol."""


def pack(message: dict[str, Any], *, limit: int = MAX_MESSAGE) -> bytes:
    """One message with its length prefix. Raises ``WireError`` when over ``limit``, or for a value that
    msgpack does not know (an integer over 64 bits, half a surrogate pair)."""
    try:
        body: bytes = msgpack.packb(message, use_bin_type=True)
    except (ValueError, OverflowError, TypeError) as error:
        raise WireError(f"cannot be sent: {error}") from error
    if len(body) > limit:
        raise WireError(f"message of {len(body)} bytes is over the limit of {limit}")
    return _LENGTH.pack(len(body)) + body


def length(prefix: bytes, *, limit: int = MAX_MESSAGE) -> int:
    """The body length in a prefix of ``HEADER`` bytes. Raises ``WireError`` over ``limit``."""
    size: int = _LENGTH.unpack(prefix)[0]
    if size > limit:
        raise WireError(f"message of {size} bytes is over the limit of {limit}")
    return size


def unpack(body: bytes) -> dict[str, Any]:
    """The map in ``body``. Raises ``WireError`` for anything else."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise WireError("not a map")
    return message


class Decoder:
    """Cuts a byte stream into messages; bytes behind a message stay until asked for."""

    def __init__(self, *, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages completed by ``data``. Raises ``WireError``."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= HEADER:
            size = length(bytes(self._buffer[start : start + HEADER]), limit=self._limit)
            end = start + HEADER + size
            if len(self._buffer) < end:
                break
            messages.append(unpack(bytes(self._buffer[start + HEADER : end])))
            start = end
        del self._buffer[:start]
        return messages
