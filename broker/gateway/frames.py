"""Text messages in what a WebSocket server sends (RFC 6455, section 5), heard in passing. Pure."""

from __future__ import annotations

MAX_MESSAGE = 2**20
"""Of larger messages only the beginning and the end are heard, in one."""
ENDS = 64 * 2**10
"""Bytes of each of these: an answer's last event repeats what was asked and says at its end what was used."""
_FIN = 0x80
_RESERVED = 0x70
_MASKED = 0x80
_CONTINUATION = 0
_TEXT = 1
_CONTROL = 8
_LONGEST_HEAD = 10


class TextListener:
    """Fed with the stream in any pieces. After a frame that no server may send without an extension it is
    ``deaf``: it hears nothing more. It never raises and keeps ``max_message`` bytes at most, and a read's."""

    __slots__ = ("_begin", "_control", "_ends", "_final", "_head", "_kept", "_left", "_limit", "_text", "deaf")

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self.deaf = False
        self._ends = min(ENDS, max_message // 2)
        self._begin = b""
        self._limit = max_message
        self._head = b""
        self._left = 0
        self._final = False
        self._control = False
        self._kept = False
        """The message under way is text."""
        self._text = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The text messages that end in ``data``, UTF-8 unchecked."""
        found: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.deaf:
            at = self._take_payload(data, at) if self._left else self._take_head(data, at)
            if not self._left and not self._head and not self._control and self._final:
                if self._kept:
                    found.append(self._begin + (self._text[-self._ends :] if self._begin else self._text))
                self._forget()
        return found

    def _take_payload(self, data: bytes, at: int) -> int:
        stop = min(len(data), at + self._left)
        if self._kept and not self._control:
            self._text += data[at:stop]
            if len(self._text) > self._limit:
                self._begin = self._begin or bytes(self._text[: self._ends])
                del self._text[: -self._ends]
        self._left -= stop - at
        return stop

    def _take_head(self, data: bytes, at: int) -> int:
        """Reads on in a frame's head; gives back where its payload begins. ``_head`` is empty once it is whole."""
        before = len(self._head)
        raw = self._head + data[at : at + _LONGEST_HEAD - before]
        length = raw[1] & ~_MASKED if len(raw) > 1 else 0
        need = 2 if len(raw) < 2 else 2 + {126: 2, 127: 8}.get(length, 0)
        if len(raw) < need:
            self._head = raw
            return len(data)
        self._head = b""
        self._begin_frame(raw[0], raw[1], int.from_bytes(raw[2:need]) if need > 2 else length)
        return at + need - before

    def _begin_frame(self, first: int, second: int, length: int) -> None:
        opcode = first & 0x0F
        if first & _RESERVED or second & _MASKED or length >> 63:
            self._forget()
            self.deaf = True
            return
        self._left = length
        self._control = opcode >= _CONTROL
        if self._control:
            return
        self._final = bool(first & _FIN)
        if opcode != _CONTINUATION:
            self._forget()
            self._kept = opcode == _TEXT

    def _forget(self) -> None:
        self._kept = False
        self._text = bytearray()
        self._begin = b""
