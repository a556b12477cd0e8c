"""When to ping a client and when to give a peer up. Pure: the caller brings clock and counters.

Time is looked at once a tick, never per message, so every limit is kept to within one tick.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_TICKS = 4
_LONGEST_TICK_S = 5.0


class Verdict(Enum):
    """What to do after a tick."""

    NOTHING = 0
    PING = 1
    CLIENT_SILENT = 2
    CLIENT_STALLED = 3
    AGENT_STALLED = 4


@dataclass
class _Stall:
    """One peer's write buffer: stalled when it is congested and not a byte of it is taken for ``timeout_s``."""

    timeout_s: float
    size: int = -1
    since: float = 0.0

    def stalled(self, now: float, buffered: int | None) -> bool:
        """``buffered``: bytes waiting when the peer is congested, else None."""
        if buffered is None:
            self.size = -1
            return False
        if self.size < 0 or buffered < self.size:
            self.size, self.since = buffered, now
            return False
        return now - self.since >= self.timeout_s


class Liveness:
    """One relay's timers. Durations in seconds; ``now`` is monotonic."""

    __slots__ = ("_agent", "_client", "_heard", "_interval", "_pinged", "_quiet_since", "_timeout", "tick_s")

    def __init__(self, *, ping_interval_s: float, ping_timeout_s: float, stall_timeout_s: float, now: float) -> None:
        self._interval = ping_interval_s
        self._timeout = ping_timeout_s
        self._client = _Stall(stall_timeout_s)
        self._agent = _Stall(stall_timeout_s)
        self._heard = -1
        self._quiet_since = now
        self._pinged = False
        self.tick_s = min(min(ping_interval_s, ping_timeout_s, stall_timeout_s) / _TICKS, _LONGEST_TICK_S)

    def tick(self, now: float, *, heard: int, client: int | None, agent: int | None) -> Verdict:
        """``heard``: bytes ever received from the client, -1 while it is not read; ``client``, ``agent``:
        bytes that wait for a congested peer, None when it is not congested."""
        if self._client.stalled(now, client):
            return Verdict.CLIENT_STALLED
        if self._agent.stalled(now, agent):
            return Verdict.AGENT_STALLED
        # A client that is not read, or that has data before a ping to take, cannot answer one.
        if heard != self._heard or heard < 0 or client is not None:
            self._heard, self._quiet_since, self._pinged = heard, now, False
            return Verdict.NOTHING
        quiet = now - self._quiet_since
        if self._pinged:
            return Verdict.CLIENT_SILENT if quiet >= self._timeout else Verdict.NOTHING
        if quiet < self._interval:
            return Verdict.NOTHING
        self._pinged, self._quiet_since = True, now
        return Verdict.PING
