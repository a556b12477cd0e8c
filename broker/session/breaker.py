"""When to try again what failed: pauses that double, then a breaker. Pure; the clock comes in, in seconds.

closed ── failures in a row ──► open ── its time is over ──► half open ── one success ──► closed
                                 ▲                               └────── a failure ──┐
                                 └───────────────────────────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
NEVER = float("-inf")


@dataclass(frozen=True)
class Patience:
    """``backoff_s``: first pause, it doubles; ``failures``: so many in a row open it; ``open_s``: for so long."""

    backoff_s: float
    failures: int
    open_s: float


class Breaker:
    """Counts failures in a row. ``until``: no try before then; ``error``: of the last failure."""

    def __init__(self) -> None:
        self.failures = 0
        self.until = NEVER
        self.error = ""
        self._tripped = False

    def state(self, now: float) -> State:
        """``half_open``: one try decides."""
        if not self._tripped:
            return "closed"
        return "open" if now < self.until else "half_open"

    def limit(self, now: float) -> int | None:
        """How many tries may be under way; None: as many as one likes. After a failure it is one at a time."""
        if now < self.until:
            return 0
        return 1 if self.failures else None

    def failed(self, now: float, error: str, patience: Patience, *, chance: float, lasting: bool) -> None:
        """``chance``: from 0 to 1, so that pauses differ; ``lasting``: trying again soon cannot help."""
        self.failures += 1
        self.error = error
        if self._tripped and now < self.until:
            return  # one that was under way when it opened
        self._tripped = self._tripped or lasting or self.failures >= patience.failures
        if self._tripped:
            self.until = now + patience.open_s
        else:
            pause = min(patience.backoff_s * 2.0 ** min(self.failures - 1, 32), patience.open_s)
            self.until = max(self.until, now + pause * (0.5 + chance / 2))

    def reset(self) -> None:
        """It worked, or what it failed on is another now."""
        self.__init__()  # type: ignore[misc]
