"""What a call keeps while it is made: the body that may have to be sent again, and the servers that were asked."""

from __future__ import annotations

from broker.gateway.breaker import Outcome
from broker.gateway.estimate import tokens_in
from broker.gateway.framing import LAST_CHUNK, chunk
from broker.gateway.heads import RequestHead
from broker.gateway.meter import Meter
from broker.gateway.plan import Plan
from broker.gateway.routes import Spot

MAX_REPLAY = 2**20
"""Body bytes kept so that a call can be made again, or looked up; a larger body is sent once."""
UNKNOWN_TOKENS = 1000
"""Reserved for a body whose length is not said."""


def tokens(head: RequestHead) -> int:
    """About as many as a call will use."""
    return UNKNOWN_TOKENS if head.length is None and head.chunked else tokens_in(head.length or 0)


class RequestBody:
    """The body of a request as it comes. ``replayable``: all that came so far is still here."""

    __slots__ = ("_chunked", "_pieces", "_unread", "done", "replayable", "size")

    def __init__(self, *, chunked: bool, done: bool) -> None:
        self.size = 0
        self.done = done
        self.replayable = True
        self._chunked = chunked
        self._pieces: list[bytes] = []
        self._unread: list[bytes] = []

    def take(self, pieces: list[bytes], done: bool) -> None:
        """More of it; ``done``: this was the last."""
        self.done = done
        self.size += sum(map(len, pieces))
        self._unread += pieces
        if self.replayable:
            self._pieces += pieces

    def read_by(self, meter: Meter | None) -> None:
        """Shows it what it has not seen: once it is on its way, for that takes longer than sending it."""
        unread, self._unread = self._unread, []
        if meter is not None:
            meter.request(unread)

    def whole(self) -> bytes:
        """All of it, while ``replayable``."""
        return b"".join(self._pieces)

    def so_far(self) -> list[bytes]:
        """What came, framed for a server that begins to get it; a large body is let go of thereby."""
        framed = self.framed(self._pieces)
        self.written()
        return framed

    def framed(self, pieces: list[bytes]) -> list[bytes]:
        """``pieces``, the last that came, as they go on."""
        if not self._chunked:
            return pieces
        parts = chunk(pieces)
        return [*parts, LAST_CHUNK] if self.done else parts

    def written(self) -> None:
        """What came is on its way to a server."""
        if self.size > MAX_REPLAY:
            self.drop()

    def drop(self) -> None:
        """It will not be sent again."""
        self.replayable = False
        self._pieces = []


class Visit:
    """A server that a call is at, and those where it was. ``last``: which it was at last, -1 for none; ``total``:
    attempts with those at other providers before."""

    __slots__ = ("_at", "_sent_at", "_turn", "attempts", "head_s", "last", "total", "tried")

    def __init__(self, total: int = 0) -> None:
        self.attempts = 0
        self.total = total
        self.last = -1
        self.tried: set[int] = set()
        self.head_s: float | None = None
        self._at = -1
        self._turn = 0
        self._sent_at = 0.0

    def begin(self, plan: Plan, now: float) -> Spot | None:
        """The server to ask; None where none is left that may be asked."""
        index = plan.balance.pick(now, self.tried)
        if index is None:
            return None
        self._turn = plan.balance.begun(index, now)
        self._at = self.last = index
        self._sent_at = now
        self.head_s = None
        self.attempts += 1
        self.total += 1
        return plan.spots[index]

    def uncounted(self) -> None:
        """The last attempt said nothing of the server."""
        self.attempts -= 1
        self.total -= 1

    def others(self, plan: Plan, now: float) -> bool:
        """Whether a server may be asked that was not yet."""
        return plan.balance.pick(now, self.tried) is not None

    def answered(self, plan: Plan, now: float, *, well: bool) -> None:
        """The response's head has come."""
        self.head_s = now - self._sent_at
        if well:
            plan.balance.answered(self._at, now, self._turn)

    def ended(self, plan: Plan, now: float, outcome: Outcome) -> None:
        """The call is no longer at the server; does nothing where it is at none."""
        index, self._at = self._at, -1
        if index < 0:
            return
        if outcome == "failed":
            self.tried.add(index)
        plan.balance.ended(index, now, outcome, self.head_s, self._turn)
