"""The timeline of a bring-up: every stage, when it began and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.metrics import BRINGUP, BRINGUP_STAGE

ADOPTED = "adopted"
"""The path of a sandbox that outlived the last broker; nobody wished for it, so it is no bring-up to measure."""

USER_WARM = "user_warm"
"""The path of a session that was up when somebody asked for it."""

Intent = Literal["", "announced", "forecast"]
"""Why it was begun though nobody waits: somebody is said to come, or will by their pattern. Empty: somebody waits."""


@dataclass
class Timeline:
    """One bring-up. ``path``: cold, generic_warm, ``USER_WARM`` or ``ADOPTED``. Times are monotonic seconds."""

    driver: str
    path: str = "cold"
    intent: Intent = ""
    clock: Callable[[], float] = time.monotonic
    wall: float = field(default_factory=time.time)
    begin: float = field(init=False)
    stages: list[tuple[str, float, float]] = field(default_factory=list)
    total: float = 0.0
    outcome: str = "running"

    def __post_init__(self) -> None:
        self.begin = self.clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what runs inside, also when it fails."""
        start = self.clock()
        try:
            yield
        finally:
            self.add(name, start, self.clock())

    def add(self, name: str, start: float, end: float) -> None:
        """A stage that was timed elsewhere."""
        self.stages.append((name, start - self.begin, end - start))
        BRINGUP_STAGE.labels(name).observe(end - start)

    def finish(self, outcome: str) -> None:
        """``ready`` or the code of the error that ended it."""
        self.total = self.clock() - self.begin
        self.outcome = outcome
        if outcome == "ready" and self.path != ADOPTED:
            BRINGUP.labels(self.path, self.driver).observe(self.total)

    def view(self) -> dict[str, Any]:
        """JSON-safe; milliseconds from the beginning."""
        return {
            "path": self.path,
            "intent": self.intent,
            "driver": self.driver,
            "started_at": self.wall,
            "total_ms": round(self.total * 1000, 3),
            "outcome": self.outcome,
            "stages": [
                {"stage": name, "start_ms": round(start * 1000, 3), "ms": round(length * 1000, 3)}
                for name, start, length in sorted(self.stages, key=lambda item: item[1])
            ],
        }
