"""An event loop whose clock jumps to the next timer when there is nothing else to do: hours pass in no time.

For tests without threads and without other processes; whoever waits for one of these waits for ever, and is told so.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """Nothing is to be done and no timer is set."""


class _Selector(selectors.DefaultSelector):
    """Never waits; tells how long it would have waited."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise Stuck("every task waits for something that no timer and no socket brings")
            self.skipped += max(0.0, timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time`` begins at 1000 seconds."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return 1000.0 + self._virtual.skipped


def run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
