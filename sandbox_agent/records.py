"""The journal's records: their layout, and how a file of them is read back. Pure.

A record is a header of 28 bytes, big endian, and a body of JSON text (UTF-8)::

    magic "CJ" · u32 CRC-32 of all that follows · u8 kind · u8 flags · u32 body length ·
    u64 seq · u32 conversation · u32 target · body

``conversation`` is the number of an ACP session, 0 for none. ``target`` is the number of a client:
who gets a ``RESULT``, or, with ``EXCEPT``, who does not get an ``UPDATE`` or ``NOTICE``. No body
holds a NUL byte and every header does, so that a body is never taken for a header.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

HEAD = 1
"""First in a file: ``{"format", "epoch", "state"}``; state is all that was known when the file began."""
OPENED = 2
"""An agent server has opened the journal."""
UPDATE = 3
"""A notification as it was emitted; part of the conversation's history."""
REQUEST = 4
"""An agent's request as it was emitted; its id is its seq."""
NOTICE = 5
"""A notification as it was emitted that is no history."""
RESULT = 6
"""The answer to a client's request as it was emitted; never emitted before it is on disk."""
PROMPT = 7
"""A prompt was accepted: ``{"message_id", "client", "id"}``."""
STARTED = 8
"""It was given to the agent: ``{"of": seq of the PROMPT}``."""
END = 9
"""It is over: ``{"of", "message_id", "result" or "error"}``."""
CONVERSATION = 10
"""An ACP session is new or has changed: all that is kept of it."""
CLIENT = 11
"""A client's number: ``{"number", "key"}``."""
MARK = 12
"""Moves seq on."""

EXCEPT = 1
"""Flag: for every subscriber but ``target``."""

Data = bytes | mmap

FORMAT = 1
MAGIC = b"CJ"
MAX_BODY = 2**30

_REST = struct.Struct("!BBIQII")
_FRONT = struct.Struct("!2sI")
HEADER = _FRONT.size + _REST.size


class Record(NamedTuple):
    """One record. ``at``: its offset; ``end``: the offset behind it."""

    kind: int
    flags: int
    seq: int
    conversation: int
    target: int
    body: bytes
    at: int
    end: int

    def moved(self, by: int) -> Record:
        """The same record with its offsets moved."""
        kind, flags, seq, conversation, target, body, at, end = self
        return Record(kind, flags, seq, conversation, target, body, at + by, end + by)


def header(kind: int, flags: int, seq: int, conversation: int, target: int, body: bytes) -> bytes:
    """The header for ``body``."""
    rest = _REST.pack(kind, flags, len(body), seq, conversation, target)
    return _FRONT.pack(MAGIC, zlib.crc32(body, zlib.crc32(rest))) + rest


def needed(data: Data, at: int) -> int:
    """How many bytes the record that begins at ``at`` has, 0 if that is not a header."""
    if len(data) - at < HEADER or data[at : at + 2] != MAGIC:
        return 0
    length: int = _REST.unpack_from(data, at + _FRONT.size)[2]
    return HEADER + length if length <= MAX_BODY else 0


def read_one(data: Data, at: int) -> Record | None:
    """The record at ``at``; None when it is cut short or wrong."""
    body_at = at + HEADER
    if len(data) < body_at:
        return None
    magic, crc = _FRONT.unpack_from(data, at)
    kind, flags, length, seq, conversation, target = _REST.unpack_from(data, at + _FRONT.size)
    end = body_at + length
    if magic != MAGIC or end > len(data):
        return None
    body = data[body_at:end]
    if zlib.crc32(body, zlib.crc32(data[at + _FRONT.size : body_at])) != crc:
        return None
    return Record(kind, flags, seq, conversation, target, body, at, end)


def read_all(data: Data, at: int = 0) -> Iterator[Record]:
    """Every whole record from ``at`` on; what is damaged between two of them is stepped over.

    What follows the last one (its ``end``) is a torn tail.
    """
    while at < len(data):
        record = read_one(data, at)
        if record is None:
            found = data.find(MAGIC, at + 1)
            if found < 0:
                return
            at = found
            continue
        yield record
        at = record.end
