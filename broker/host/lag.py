"""Measures how late the event loop runs its timers: what blocks the loop shows here."""

from __future__ import annotations

import asyncio

from broker.metrics import LOOP_LAG

INTERVAL_S = 0.1


class LagMeter:
    """Observes ``cortex_loop_lag_seconds`` every 100 ms between ``start`` and ``stop``."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self._worst = 0.0

    def start(self) -> None:
        """In a running loop."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._plan(loop, loop.time())

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take_worst(self) -> float:
        """The largest lag since the last call, seconds."""
        worst, self._worst = self._worst, 0.0
        return worst

    def _plan(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        due = now + self._interval
        self._timer = loop.call_at(due, self._fired, loop, due)

    def _fired(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        lag = max(0.0, now - due)
        LOOP_LAG.observe(lag)
        self._worst = max(self._worst, lag)
        self._plan(loop, now)
