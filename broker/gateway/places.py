"""So many places and no more; who finds none waits in a queue, for a place or for what leaves one to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_WAITING = 1024


class Places(Generic[T]):
    """``most``: how many places there are, 0 for no bound; ``taken``: how many are. ``unwanted`` gets a thing that
    was handed to somebody who went away."""

    def __init__(self, unwanted: Callable[[T], None]) -> None:
        self.most = 0
        self._unwanted = unwanted
        self.taken = 0
        self._waiting: deque[asyncio.Future[T | None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def take(self) -> bool:
        """Takes a place if one is free; where somebody waits, none is."""
        if self.most and self.taken >= self.most:
            return False
        self.taken += 1
        return True

    async def wait(self, timeout_s: float) -> T | None:
        """Waits its turn: None is a place, taken; a thing was handed over together with the place it has.
        Raises ``TimeoutError``, at once where too many wait."""
        if len(self._waiting) >= MAX_WAITING:
            raise TimeoutError
        turn: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        got = False
        try:
            async with asyncio.timeout(timeout_s):
                thing = await turn
                got = True
            return thing
        finally:
            if not got:
                self._give_up(turn)

    def _give_up(self, turn: asyncio.Future[T | None]) -> None:
        """Cancelled, but its turn may have come in the same moment: the next one gets what it got."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        if turn.done() and not turn.cancelled():
            thing = turn.result()
            if thing is None:
                self.leave()
            elif not self.hand(thing):
                self._unwanted(thing)

    def leave(self) -> None:
        """A place is given up."""
        self.taken -= 1
        self.admit()

    def admit(self) -> None:
        """Lets in who waits, as far as there are places."""
        while self._waiting and (not self.most or self.taken < self.most):
            if self._answer(None):
                self.taken += 1

    def hand(self, thing: T) -> bool:
        """Gives a thing that has a place to the first who waits; False where nobody does."""
        while self._waiting:
            if self._answer(thing):
                return True
        return False

    def _answer(self, thing: T | None) -> bool:
        turn = self._waiting.popleft()
        if turn.done():
            return False
        turn.set_result(thing)
        return True
