"""Few places for the work of many: each has a line, lines take turns, and nobody holds more than a share of the places.

Work that cannot be broken off holds its place however long it takes, so turns alone would let whoever comes first
hold them all.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque


class Job:
    """Work that waits for ``place``. Who else wants it may stand in for it too: the first line that comes counts."""

    __slots__ = ("over", "place", "whose")

    def __init__(self) -> None:
        self.place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.whose: str | None = None
        """In whose line it was when its turn came."""
        self.over = False

    @property
    def waits(self) -> bool:
        """Its turn is yet to come."""
        return self.whose is None and not self.over and not self.place.done()


class Lines:
    """``share``: places that one may hold; "" (nobody in particular) may hold all."""

    def __init__(self, places: int, share: int) -> None:
        self._free = self._places = places
        self._share = share
        self._held: Counter[str] = Counter()
        self._lines: dict[str, deque[Job]] = {}
        """The next one's turn first."""

    def enter(self, job: Job, whose: str) -> None:
        """Puts it at the end of that line."""
        line = self._lines.get(whose)
        if job.waits and not (line and job in line):
            if line is None:
                line = self._lines[whose] = deque()
            line.append(job)
            self._serve()

    def leave(self, job: Job) -> None:
        """Its work is over, or not wanted any more; once."""
        job.over = True
        if job.whose is not None:
            self._free += 1
            self._held[job.whose] -= 1
            self._held += Counter()
        self._serve()

    def _serve(self) -> None:
        while self._free and self._next():
            pass

    def _next(self) -> bool:
        """Gives a place to the first line that may have one, which goes behind the others."""
        for whose, line in list(self._lines.items()):
            while line and not line[0].waits:
                line.popleft()
            if not line:
                del self._lines[whose]
            elif self._held[whose] < (self._share if whose else self._places):
                job = line.popleft()
                del self._lines[whose]
                if line:
                    self._lines[whose] = line
                self._free -= 1
                self._held[whose] += 1
                job.whose = whose
                job.place.set_result(None)
                return True
        return False
