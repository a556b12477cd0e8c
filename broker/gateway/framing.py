"""Message bodies, RFC 9112 sections 6 and 7: where one ends, and chunks taken apart and made. Pure.

A body is fed with what came in and gives back the pieces that belong to it. Chunk extensions and
trailers are dropped; what goes on is framed anew, so nothing odd in the framing is passed on.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from broker.gateway.heads import bad

LAST_CHUNK = b"0\r\n\r\n"
MAX_CHUNK_LINE = 4096
MAX_SIZE_DIGITS = 15
MAX_TRAILER = 16 * 2**10
_HEX = frozenset(b"0123456789abcdefABCDEF")


class Body(Protocol):
    """A body that is coming in. ``done``: its last byte was fed; ``ends_at_close``: only EOF ends it."""

    done: bool
    ends_at_close: bool

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        """The pieces of the body in ``data`` and how many bytes of ``data`` were used.
        All are used unless it is done then. Raises ``CortexError`` (400) on bad framing."""


class LengthBody:
    """A body of ``length`` bytes."""

    __slots__ = ("_left", "done", "ends_at_close")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.ends_at_close = False

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        size = len(data)
        if size < self._left:
            self._left -= size
            return [data], size
        left, self._left, self.done = self._left, 0, True
        piece = data if size == left else data[:left]
        return ([piece] if piece else []), left


class CloseBody:
    """A response body that lasts until the connection closes."""

    __slots__ = ("done", "ends_at_close")

    def __init__(self) -> None:
        self.done = False
        self.ends_at_close = True

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        return [data], len(data)


class _Expect(Enum):
    SIZE = 1
    DATA = 2
    DATA_END = 3
    TRAILER = 4


class ChunkedBody:
    """A chunked body. Strict: CRLF only, no white space in a size, sizes below 2**60."""

    __slots__ = ("_expect", "_left", "_line", "_trailer", "done", "ends_at_close")

    def __init__(self) -> None:
        self.done = False
        self.ends_at_close = False
        self._expect = _Expect.SIZE
        self._left = 0
        self._line = b""
        self._trailer = 0

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._expect is _Expect.DATA:
                at = self._take(data, at, pieces)
                continue
            if self._expect is _Expect.SIZE and not self._line:
                stop = self._whole_chunk(data, at, pieces)
                if stop:
                    at = stop
                    continue
            end = data.find(b"\n", at)
            stop = size if end < 0 else end + 1
            self._line += data[at:stop]
            at = stop
            if len(self._line) > MAX_CHUNK_LINE:
                raise bad("a line in a chunked body is too long")
            if end >= 0:
                line, self._line = self._line, b""
                self._end_line(line)
        return pieces, at

    def _whole_chunk(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Most streams come a chunk a read: where one that is whole and plain begins, takes it. Where it ends, or 0."""
        line = data.find(b"\r\n", at, at + MAX_SIZE_DIGITS)
        digits = data[at:line]
        if line < 0 or not digits or not _HEX.issuperset(digits):
            return 0
        start, size = line + 2, int(digits, 16)
        end = start + size
        if not size or data[end : end + 2] != b"\r\n":
            return 0
        pieces.append(data[start:end])
        return end + 2

    def _take(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        stop = min(len(data), at + self._left)
        pieces.append(data[at:stop])
        self._left -= stop - at
        if self._left == 0:
            self._expect = _Expect.DATA_END
        return stop

    def _end_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise bad("a line in a chunked body does not end in CRLF")
        text = line[:-2]
        if self._expect is _Expect.SIZE:
            self._left = _chunk_size(text)
            self._expect = _Expect.DATA if self._left else _Expect.TRAILER
        elif self._expect is _Expect.DATA_END:
            if text:
                raise bad("a chunk is longer than its size")
            self._expect = _Expect.SIZE
        elif text:
            self._trailer += len(line)
            if self._trailer > MAX_TRAILER:
                raise bad("the trailers of a chunked body are too long")
        else:
            self.done = True


def _chunk_size(text: bytes) -> int:
    digits = text.partition(b";")[0]
    if not 0 < len(digits) <= MAX_SIZE_DIGITS or not _HEX.issuperset(digits):
        raise bad("a chunk's size is malformed")
    return int(digits, 16)


def chunk(pieces: list[bytes]) -> list[bytes]:
    """``pieces`` as one chunk, ready for ``writelines``; no piece gives nothing (never the last chunk)."""
    size = sum(map(len, pieces))
    if not size:
        return []
    return [b"%x\r\n" % size, *pieces, b"\r\n"]


def request_body(length: int | None, chunked: bool) -> Body | None:
    """The body that follows a request head, None for none."""
    if chunked:
        return ChunkedBody()
    return LengthBody(length) if length else None


def response_body(status: int, method: bytes, length: int | None, chunked: bool) -> Body:
    """The body that follows a final response head (RFC 9112 section 6.3)."""
    if method == b"HEAD" or status in (204, 304):
        return LengthBody(0)
    if chunked:
        return ChunkedBody()
    return CloseBody() if length is None else LengthBody(length)
