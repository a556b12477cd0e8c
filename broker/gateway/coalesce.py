"""Equal requests that are under way at once share one answer: one leads, the others get what it gets.

Nothing is kept when the leader is done, and no failure is shared: followers of a leader that failed are told so
and ask for themselves. What followers have yet to read is kept within bounds; who is behind when those are
reached is lost, the leader never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from broker.gateway.cache import Recorded, recorded
from broker.gateway.heads import ResponseHead

MAX_BYTES = 2**20
MAX_TOTAL_BYTES = 32 * 2**20
TOO_MUCH = "the shared answer grew too large"


class Audience(Protocol):
    """Gets a recorded or shared answer instead of an upstream's: a head, bodies, and an end or a loss."""

    def shared_head(self, recorded: Recorded) -> None: ...
    def shared_body(self, pieces: list[bytes]) -> None: ...
    def shared_end(self) -> None: ...
    def shared_lost(self, why: str) -> None:
        """Nothing comes any more. Before the head: ask for yourself."""


class Flights:
    """Requests under way, by key. ``max_bytes``: kept of one answer for who comes late; ``max_total``: of all."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_total: int = MAX_TOTAL_BYTES) -> None:
        self.max_bytes = max_bytes
        self.max_total = max_total
        self.size = 0
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def followers(self) -> int:
        """How many get what others asked for, now."""
        return sum(flight.followers for flight in self._flights.values())

    def lead(self, key: bytes) -> Flight | None:
        """The flight to report to, with exactly one ``end`` or ``lost``; None: somebody leads, so ``join``."""
        if key in self._flights:
            return None
        flight = self._flights[key] = Flight(self, key)
        return flight

    def join(self, key: bytes, audience: Audience) -> Joined:
        """Follows; ``audience`` hears all from the beginning on, once this has returned. ``KeyError``: nobody leads."""
        return self._flights[key].join(audience)

    def closed(self, flight: Flight) -> None:
        """Nobody joins it any more."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


class Flight:
    """The leader's side. ``deserted``: called when the last follower has left, or was lost."""

    def __init__(self, flights: Flights, key: bytes) -> None:
        self.key = key
        self.deserted: Callable[[], None] | None = None
        self.answer: Recorded | None = None
        self.done = False
        self.pieces: list[bytes] = []
        self._flights = flights
        self._size = 0
        self._live = False
        self._joined: list[Joined] = []

    @property
    def followers(self) -> int:
        """How many there are."""
        return len(self._joined)

    # -- told by the leader

    def head(self, head: ResponseHead) -> None:
        """The final head. An answer other than 200 is for the leader alone."""
        if head.status != 200:
            self.lost(f"the shared call was answered {head.status}")
        elif not self.done:
            self.answer = recorded(head).marked(b"coalesced")
            self._pump()

    def body(self, pieces: list[bytes]) -> None:
        if self.done:
            return
        size = sum(map(len, pieces))
        flights = self._flights
        if not self._live and (self._size + size > flights.max_bytes or flights.size + size > flights.max_total):
            self._go_live()
        if self._live:
            for joined in list(self._joined):
                joined.pass_on(pieces)
            return
        self.pieces += pieces
        self._size += size
        flights.size += size
        self._pump()

    def end(self) -> None:
        """The answer is whole."""
        if not self.done:
            self._close()
            self._pump()

    def lost(self, why: str) -> None:
        """It is not, or there is none."""
        if not self.done:
            self._close()
            for joined in list(self._joined):
                joined.lose(why)
            if self.deserted is not None:
                self.deserted()

    def _pump(self) -> None:
        for joined in list(self._joined):
            joined.pump()

    def _close(self) -> None:
        self.done = True
        self._flights.closed(self)
        self._flights.size -= self._size
        self._size = 0

    def _go_live(self) -> None:
        """Too much to keep: nobody joins any more, and who has read all so far gets the rest as it comes."""
        self._live = True
        self._flights.closed(self)
        for joined in list(self._joined):
            joined.pump()
            joined.go_live()
        self.pieces = []
        self._flights.size -= self._size
        self._size = 0

    # -- told by followers

    def join(self, audience: Audience) -> Joined:
        joined = Joined(self, audience)
        self._joined.append(joined)
        asyncio.get_running_loop().call_soon(joined.pump)
        return joined

    def leave(self, joined: Joined) -> None:
        if joined in self._joined:
            self._joined.remove(joined)
            if not self._joined and not self.done and self.deserted is not None:
                self.deserted()


class Joined:
    """The follower's side."""

    def __init__(self, flight: Flight, audience: Audience) -> None:
        self._flight = flight
        self._audience: Audience | None = audience
        self._began = False
        self._held = False
        self._next = 0

    def cancel(self) -> None:
        """Nothing more is heard."""
        if self._audience is not None:
            self._audience = None
            self._flight.leave(self)

    def hold(self, held: bool) -> None:
        """The follower is slow, or no longer."""
        self._held = held
        self.pump()

    # -- told by the flight

    def pump(self) -> None:
        """Hands over what is there, and the end when that is all."""
        audience, flight = self._audience, self._flight
        if audience is None or flight.answer is None:
            return
        if not self._began:
            self._began = True
            audience.shared_head(flight.answer)
        if self._audience is None or self._held:
            return
        fresh = flight.pieces[self._next :]
        if fresh:
            self._next += len(fresh)
            audience.shared_body(fresh)
        # Hearing of the body may have made the follower leave, or held it back.
        if flight.done and self._audience is not None and self._next == len(flight.pieces):
            self._audience = None
            flight.leave(self)
            audience.shared_end()

    def pass_on(self, pieces: list[bytes]) -> None:
        """What is kept no longer."""
        if self._held:
            self.lose(TOO_MUCH)
        elif self._audience is not None:
            self._audience.shared_body(pieces)

    def go_live(self) -> None:
        if self._held and self._next < len(self._flight.pieces):
            self.lose(TOO_MUCH)
        self._next = 0

    def lose(self, why: str) -> None:
        audience, self._audience = self._audience, None
        if audience is not None:
            self._flight.leave(self)
            audience.shared_lost(why)
