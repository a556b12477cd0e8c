"""WebSocket frame headers (RFC 6455 section 5), read in place and never rewritten. Pure: no I/O.

``FrameScanner`` follows one direction of a connection. ``scan`` walks a chunk from header to header
and says how far it may be forwarded as it is; it stops before what needs a closer look (a control
frame, a header cut by the end of the chunk, a violation), and ``step`` takes that. The mask key
counts as payload: nothing in it has to be checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from broker.errors import Code, CortexError

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

MAX_CONTROL = 125
"""Largest payload of a control frame, in bytes."""
_MASK = 4
_NEVER = 0x100
# By a frame's second byte: the whole frame's length in bytes, 0 where it takes a longer look.
_JUMP_PLAIN = [size + 2 for size in range(126)] + [0] * 130
_JUMP_MASKED = [0] * 128 + [size + 2 + _MASK for size in range(126)] + [0] * 2
_SENDABLE = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})


@dataclass(frozen=True)
class Control:
    """A control frame cut out of the stream, its payload unmasked."""

    opcode: int
    payload: bytes


class FrameScanner:
    """One direction. ``masked``: frames must be masked (from a client) or must not be (from a server).

    ``limit``: largest message in bytes, over all its fragments. ``frames`` counts data frames begun.
    ``remaining`` is how much of the current data frame is still to come; 0 means that what was
    passed on so far ends at a frame boundary.
    """

    __slots__ = (
        "_extra", "_fragmented", "_head", "_jump", "_limit", "_long", "_masked", "_message", "_skip",
        "_usual", "_whole", "frames", "remaining",
    )  # fmt: skip

    def __init__(self, *, masked: bool, limit: int) -> None:
        self._masked = masked
        self._limit = limit
        self._extra = _MASK if masked else 0
        self._jump = _JUMP_MASKED if masked else _JUMP_PLAIN
        self._long = 126 + (0x80 if masked else 0)
        self._skip = 4 + self._extra
        self._head = bytearray()
        self._fragmented = False
        self._message = 0
        self._whole = self._usual = 0x80 | TEXT if limit > 0xFFFF else _NEVER
        self.frames = 0
        self.remaining = 0

    @property
    def in_message(self) -> bool:
        """Whether what was passed on so far ends inside a message, be it between two of its frames."""
        return self._fragmented or self.remaining > 0

    def scan(self, data: bytes | memoryview, start: int = 0) -> int:
        """The end of what of ``data`` from ``start`` may be forwarded as it is; ``step`` takes what follows."""
        size = len(data)
        if size > 3 and data[0] == self._whole and not self.remaining and not start:
            # By far the most frequent chunk: one whole message.
            second = data[1]
            if self._jump[second] == size or (
                second == self._long and (data[2] << 8 | data[3]) + self._skip == size and data[2]
            ):
                self.frames += 1
                return size
        pos = start + self.remaining
        if pos >= size:
            self.remaining = pos - size
            return size
        self.remaining = 0
        if self._head:
            return start
        # Whole text messages of up to 64 KiB are read here, everything else by _data.
        jump, long, skip, whole = self._jump, self._long, self._skip, self._whole
        frames, last = 0, size - 1
        while pos < last:
            if data[pos] == whole:
                if short := jump[data[pos + 1]]:
                    pos += short
                    frames += 1
                    continue
                if data[pos + 1] == long and pos + 3 < size and data[pos + 2]:
                    pos += (data[pos + 2] << 8 | data[pos + 3]) + skip
                    frames += 1
                    continue
            end = self._data(data, pos, size)
            if end == pos:
                self.frames += frames
                return pos
            pos = end
            whole = self._whole
        self.frames += frames
        if pos > size:
            self.remaining = pos - size
            return size
        return pos

    def scan_frame(self, data: bytes | memoryview, start: int) -> int:
        """As ``scan``, but of one frame at most: the end of the current one, else of the next."""
        size = len(data)
        if self.remaining:
            pos = start + self.remaining
        elif self._head:
            return start
        else:
            pos = self._data(data, start, size)
        self.remaining = max(0, pos - size)
        return min(pos, size)

    def step(self, data: bytes | memoryview, start: int) -> tuple[int, bytes | Control | None]:
        """Takes what ``scan`` stopped before: a control frame or a header that a chunk's end cut.

        Returns where it ended and what it was: bytes to forward (the whole header of a data frame), a
        control frame, or None when more is needed. Raises ``FRAME_INVALID`` or ``FRAME_TOO_BIG``.
        """
        head, size, pos = self._head, len(data), start
        while (need := self._need()) > len(head):
            if pos == size:
                self._whole = _NEVER
                return pos, None
            end = min(size, pos + need - len(head))
            head += data[pos:end]
            pos = end
        opcode = head[0] & 0x0F
        self._head = bytearray()
        self._whole = _NEVER if self._fragmented else self._usual
        if opcode & 0x08:
            return pos, Control(opcode, self._payload(head))
        self.remaining = self._enter(head[0], self._length(head)) + self._extra
        return pos, bytes(head)

    def _data(self, data: bytes | memoryview, pos: int, size: int) -> int:
        """The end of the data frame at ``pos`` (maybe behind ``size``); ``pos`` itself if ``step`` has to look."""
        if pos + 2 > size:
            return pos
        first, short = data[pos], data[pos + 1] & 0x7F
        header = 2 if short < 126 else 4 if short == 126 else 10
        if pos + header > size:
            return pos
        head = data[pos : pos + header]
        length = self._length(head)
        if first & 0x08 or self._fault(first, data[pos + 1]) or self._length_fault(short, length):
            return pos
        if self._message_size(first, length) > self._limit:
            return pos
        return pos + header + self._enter(first, length) + self._extra

    def _need(self) -> int:
        """Bytes wanted in ``_head`` until it can be acted on. Raises for the first violation in it."""
        head = self._head
        if len(head) < 2:
            return 2
        if fault := self._fault(head[0], head[1]):
            raise _invalid(fault)
        short = head[1] & 0x7F
        if head[0] & 0x08:
            return 2 + self._extra + short
        header = 2 if short < 126 else 4 if short == 126 else 10
        if len(head) >= header:
            length = self._length(head)
            if fault := self._length_fault(short, length):
                raise _invalid(fault)
            if self._message_size(head[0], length) > self._limit:
                raise CortexError(
                    Code.FRAME_TOO_BIG,
                    "message is too big",
                    hint=f"send messages of at most {self._limit} bytes",
                    details={"limit": self._limit},
                )
        return header

    def _fault(self, first: int, second: int) -> str:
        """What is wrong with the first two bytes of a frame, or nothing."""
        opcode = first & 0x0F
        if first & 0x70:
            return "reserved bits are set and no extension was negotiated"
        if (second & 0x80 != 0) != self._masked:
            return "frames from a client must be masked" if self._masked else "frames from a server must not be masked"
        if opcode & 0x08:
            if opcode > PONG:
                return f"unknown control frame {opcode}"
            if not first & 0x80:
                return "control frames must not be fragmented"
            if second & 0x7F > MAX_CONTROL:
                return "control frames carry at most 125 bytes"
            return ""
        if opcode > BINARY:
            return f"unknown data frame {opcode}"
        if (opcode == CONTINUATION) != self._fragmented:
            return "expected a continuation frame" if self._fragmented else "continuation frame without a beginning"
        return ""

    @staticmethod
    def _length(head: bytes | bytearray | memoryview) -> int:
        short = head[1] & 0x7F
        if short < 126:
            return short
        return int.from_bytes(head[2:4] if short == 126 else head[2:10], "big")

    @staticmethod
    def _length_fault(short: int, length: int) -> str:
        if (short == 126 and length < 126) or (short == 127 and length <= 0xFFFF):
            return "payload length is not encoded in the fewest bytes"
        return "payload length has its highest bit set" if length >> 63 else ""

    def _message_size(self, first: int, length: int) -> int:
        return length + (self._message if first & 0x0F == CONTINUATION else 0)

    def _enter(self, first: int, length: int) -> int:
        """Books a data frame that was found good; returns its payload's length."""
        final = first & 0x80 != 0
        self._message = 0 if final else self._message_size(first, length)
        self._fragmented = not final
        self._whole = self._usual if final else _NEVER
        self.frames += 1
        return length

    def _payload(self, frame: bytearray) -> bytes:
        if not self._masked:
            return bytes(frame[2:])
        return bytes(byte ^ frame[2 + index % 4] for index, byte in enumerate(frame[2 + _MASK :]))


def _invalid(fault: str) -> CortexError:
    return CortexError(Code.FRAME_INVALID, "WebSocket protocol error", cause=fault, hint=fault)


def frame(opcode: int, payload: bytes) -> bytes:
    """One whole unmasked frame, as a server sends it."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size <= 0xFFFF:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def close_payload(code: int, reason: str) -> bytes:
    """A close frame's payload: code and at most 123 bytes of UTF-8."""
    return struct.pack("!H", code) + reason.encode()[: MAX_CONTROL - 2].decode(errors="ignore").encode()


def parse_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a close frame; 1005 when it has none. Raises ``FRAME_INVALID``."""
    if not payload:
        return 1005, ""
    if len(payload) == 1:
        raise _invalid("a close frame carries no payload or a code of two bytes")
    code = int.from_bytes(payload[:2], "big")
    if code not in _SENDABLE and not 3000 <= code <= 4999:
        raise _invalid(f"close code {code} may not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError as error:
        raise _invalid("the reason of a close frame must be UTF-8") from error
