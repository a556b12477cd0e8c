"""What is told of a slot's way out, and how much of it was used. Pure; ``now`` is monotonic seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

Result = Literal["allowed", "denied", "refused_address", "limited"]
"""``denied``: no list has the host; ``refused_address``: it leads where sandboxes may not go; ``limited``: too much."""
MAX_HOSTS = 64
"""Told at a time; what comes on top is added up as the host ""."""
MINUTE_S = 60.0
MINUTES = 60


@dataclass(slots=True)
class Tally:
    """Of one host since the last report. ``sent`` and ``received``: bytes, as the sandbox sees it."""

    allowed: int = 0
    denied: int = 0
    refused_address: int = 0
    limited: int = 0
    sent: int = 0
    received: int = 0
    tool: str = ""
    last: str = ""
    """The last decision; "": none."""


class Ledger:
    """Adds up what happened until it is told."""

    def __init__(self) -> None:
        self._hosts: dict[tuple[str, int], Tally] = {}

    def __len__(self) -> int:
        return len(self._hosts)

    def decided(self, host: str, port: int, result: Result, tool: str = "") -> bool:
        """Counts a decision; True for the first of its kind since the last report."""
        tally = self._tally(host, port)
        count = getattr(tally, result) + 1
        setattr(tally, result, count)
        tally.tool = tool or tally.tool
        tally.last = result
        return bool(count == 1)

    def moved(self, host: str, port: int, sent: int, received: int) -> None:
        """Counts bytes."""
        if sent or received:
            tally = self._tally(host, port)
            tally.sent += sent
            tally.received += received

    def rows(self) -> list[dict[str, Any]]:
        """What is to be told, JSON-safe."""
        return [{"host": host, "port": port, **asdict(tally)} for (host, port), tally in self._hosts.items()]

    def clear(self) -> None:
        """It was told."""
        self._hosts.clear()

    def _tally(self, host: str, port: int) -> Tally:
        tally = self._hosts.get((host, port))
        if tally is None:
            key = (host, port) if len(self._hosts) < MAX_HOSTS else ("", 0)
            tally = self._hosts.setdefault(key, Tally())
        return tally


class Hourly:
    """Bytes of the last hour, true to a minute."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, int]] = deque()
        self._before = 0
        self._minute = 0
        self._count = 0

    def add(self, count: int, now: float) -> int:
        """Counts ``count`` bytes; returns those of the last hour."""
        minute = int(now // MINUTE_S)
        if minute != self._minute:
            if self._count:
                self._minutes.append((self._minute, self._count))
                self._before += self._count
            self._minute, self._count = minute, 0
            while self._minutes and self._minutes[0][0] <= minute - MINUTES:
                self._before -= self._minutes.popleft()[1]
        self._count += count
        return self._before + self._count

    def wait(self, limit: int, now: float) -> float:
        """Seconds until less than ``limit`` bytes are of the last hour; 0: so it is now."""
        left = self.add(0, now)
        if left < limit:
            return 0.0
        for minute, count in (*self._minutes, (self._minute, self._count)):
            left -= count
            if left < limit:
                return (minute + MINUTES) * MINUTE_S - now
        return MINUTES * MINUTE_S
