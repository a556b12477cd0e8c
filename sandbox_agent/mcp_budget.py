"""How much a peer may say in a second before it has to wait. Pure: the clock is passed in."""

from __future__ import annotations

WINDOW_S = 1.0
MESSAGES = 5000
BYTES = 64 * 2**20


class Budget:
    """Counts in windows of a second."""

    def __init__(self) -> None:
        self._begun = float("-inf")
        self._messages = self._bytes = 0

    def spend(self, now: float, messages: int, size: int) -> float:
        """Seconds to wait before the peer is heard again; 0: go on."""
        if now - self._begun >= WINDOW_S:
            self._begun, self._messages, self._bytes = now, 0, 0
        self._messages += messages
        self._bytes += size
        if self._messages <= MESSAGES and self._bytes <= BYTES:
            return 0.0
        return self._begun + WINDOW_S - now
