"""The broker's own frames between an agent's: pongs, pings, notices, the close frame. Pure.

A control frame may stand between any two frames, a notice (a text message) only between two
messages (RFC 6455 section 5.4). Everything here is bounded: of pongs the newest counts (section
5.5.3), of notices the last ``MAX_NOTES``.
"""

from __future__ import annotations

from collections import deque

from broker.front.frames import CLOSE, PING, PONG, TEXT, close_payload, frame

MAX_NOTES = 64
"""Notices that wait for a place; the oldest give way."""


class Inserts:
    """What waits for the next boundary of the direction to the client."""

    __slots__ = ("_close", "_notes", "_ping", "_pong")

    def __init__(self) -> None:
        self._pong: bytes | None = None
        self._ping = False
        self._notes: deque[bytes] = deque(maxlen=MAX_NOTES)
        self._close: tuple[int, str] | None = None

    def __bool__(self) -> bool:
        return self._close is not None or self._ping or self._pong is not None or bool(self._notes)

    def pong(self, payload: bytes) -> None:
        self._pong = payload

    def ping(self) -> None:
        self._ping = True

    def note(self, message: bytes) -> None:
        self._notes.append(message)

    def close(self, code: int, reason: str) -> None:
        """``code`` 1005: a close frame without a code. Nothing goes out after it."""
        self._close = (code, reason)

    @property
    def closing(self) -> bool:
        return self._close is not None

    def take(self, *, in_message: bool, congested: bool) -> bytes:
        """What may go out at a frame boundary. ``in_message``: between two fragments of one message;
        ``congested``: the client has enough to take already, so only a close frame is added."""
        out = []
        if not in_message and (self._close is not None or not congested):
            out += [frame(TEXT, note) for note in self._notes]
            self._notes.clear()
        if self._close is not None:
            code, reason = self._close
            out.append(frame(CLOSE, b"" if code == 1005 else close_payload(code, reason)))
            self.__init__()  # type: ignore[misc]
        elif not congested:
            if self._pong is not None:
                out.append(frame(PONG, self._pong))
            if self._ping:
                out.append(frame(PING, b""))
            self._pong, self._ping = None, False
        return b"".join(out)
