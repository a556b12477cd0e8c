"""A clock and timers that stand still until told."""

from __future__ import annotations

from collections.abc import Callable


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.over = False

    def cancel(self) -> None:
        self.over = True


class VirtualClock:
    """``call_at`` and ``now`` as a loop has them. ``most``: timers there ever were at once."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.timers: list[Timer] = []
        self.most = 0
        self.set = 0

    def now(self) -> float:
        return self.at

    def call_at(self, at: float, call: Callable[[], None]) -> Timer:
        timer = Timer(at, call)
        self.timers.append(timer)
        self.set += 1
        self.most = max(self.most, len(self.pending))
        return timer

    @property
    def pending(self) -> list[Timer]:
        self.timers = [timer for timer in self.timers if not timer.over]
        return self.timers

    def run(self, seconds: float) -> None:
        """Time goes by; what is due is called at its time."""
        self._run_to(self.at + seconds)

    def run_out(self, most: int = 10_000) -> None:
        """Until no timer is left."""
        while self.pending and most:
            most -= 1
            self._run_to(max(self.at, min(timer.at for timer in self.pending)))
        assert not self.pending

    def _run_to(self, end: float) -> None:
        while (due := min(self.pending, key=lambda timer: timer.at, default=None)) and due.at <= end:
            due.over = True
            self.at = max(self.at, due.at)
            due.call()
        self.at = end
