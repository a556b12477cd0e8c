"""Which of a provider's servers gets the next call. Pure; the clock comes in, in seconds."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from broker.gateway.breaker import Breaker, Outcome

WEIGHT = 0.2
"""Of the newest time to head in the average."""
HALF_LIFE_S = 30.0
"""An average counts half after so long: a server that was slow once, as while it loads a model, is asked again."""
TRIAL_S = 1.0
"""How soon to look again while a trial is under way."""


class _Server:
    __slots__ = ("breaker", "head_s", "heard", "running")

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.running = 0
        self.head_s: float | None = None
        self.heard = 0.0

    def pace(self, now: float) -> float:
        """The average time to head, fading; 0 where none is known, so that such a server is tried."""
        if not self.head_s:
            return 0.0
        return self.head_s * math.exp2(min(0.0, self.heard - now) / HALF_LIFE_S)

    def took(self, now: float, head_s: float) -> None:
        self.head_s = head_s if self.head_s is None else self.head_s + WEIGHT * (head_s - self.head_s)
        self.heard = now


class Balance:
    """Fewest calls under way, then the shortest time to head. Servers are known by their index.

    ``pick``, ``begun`` at once, then ``ended`` exactly once; ``begun``'s ticket goes to ``ended``.
    """

    def __init__(self, count: int, max_fails: int, fail_timeout_s: float) -> None:
        self._servers = [_Server(Breaker(max_fails, fail_timeout_s)) for _ in range(count)]

    def pick(self, now: float, avoid: Collection[int] = ()) -> int | None:
        """The server to ask, None where none may be asked. One that is due for its trial comes first: nothing
        else closes its breaker."""
        best: int | None = None
        least = 0
        for index, server in enumerate(self._servers):
            if index in avoid or not server.breaker.admits(now):
                continue
            if not server.breaker.closed:
                return index
            if best is None or server.running < least:
                best, least = index, server.running
            elif server.running == least and server.pace(now) < self._servers[best].pace(now):
                best = index
        return best

    def begun(self, index: int, now: float) -> int:
        """A call is on its way to the server, dialling included. Returns the ticket for ``ended``."""
        server = self._servers[index]
        server.running += 1
        return server.breaker.begun(now)

    def answered(self, index: int, now: float, ticket: int) -> None:
        """A good response head has come. Optional, before ``ended``: a trial that streams for minutes has
        succeeded by then."""
        self._servers[index].breaker.ended(now, "ok", ticket)

    def ended(
        self, index: int, now: float, outcome: Outcome, head_s: float | None = None, ticket: int | None = None
    ) -> None:
        """The call is over. ``head_s``: from its beginning to its response head; ``ticket`` None: of a call
        begun in the breaker's present state."""
        server = self._servers[index]
        server.running = max(0, server.running - 1)
        if head_s is not None and outcome != "failed":
            server.took(now, head_s)
        server.breaker.ended(now, outcome, server.breaker.term if ticket is None else ticket)

    def told(self, index: int, now: float, alive: bool) -> None:
        """By a health probe."""
        self._servers[index].breaker.told(now, alive)

    def retry_at(self, now: float) -> float | None:
        """When the next server may be tried; None where one may be now."""
        if any(server.breaker.admits(now) for server in self._servers):
            return None
        times = (server.breaker.until for server in self._servers)
        return min((at if at > now else now + TRIAL_S for at in times), default=None)

    def view(self, now: float) -> list[dict[str, Any]]:
        """For people and metrics, by index."""
        return [
            {
                "state": server.breaker.state(now),
                "running": server.running,
                "fails": server.breaker.fails,
                "head_s": server.head_s,
            }
            for server in self._servers
        ]
