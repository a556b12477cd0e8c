"""Which contents of one credential file the broker knows. Pure."""

from __future__ import annotations

from collections import deque

MAX_SENT = 64


class Lineage:
    """Contents are told apart by their digests; "" is none, what is no digest is like nothing that is known.

    A bind is the broker's answer to what it was sent: what has not come back may not have arrived.
    """

    def __init__(self) -> None:
        self._bound = ""
        self._sent: deque[str] = deque(maxlen=MAX_SENT)
        self._last = ""

    def bound(self, offered: str, current: str) -> None:
        """The broker has given ``offered``; the file holds ``current`` after that."""
        if offered == current:
            self._sent.clear()
            self._last = offered
        self._bound = offered

    def outdates(self, offered: str, current: str) -> bool:
        """Whether ``current`` was made after the broker, as far as it knew then, could offer ``offered``."""
        return current != "" and current != self._bound and (offered == self._bound or offered in self._sent)

    def news(self, current: str) -> bool:
        """Whether ``current`` is to be sent."""
        return current not in ("", self._last)

    def sent(self, current: str) -> None:
        """The broker was sent ``current``."""
        self._sent.append(current)
        self._last = current

    @property
    def known(self) -> list[str]:
        """What the broker may have: what it gave last, and what it was sent since."""
        return [self._bound, *self._sent]

    def forget_sent(self) -> None:
        """What was sent and not answered may be lost."""
        self._last = self._bound
