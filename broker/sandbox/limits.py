"""What one sandbox may do on its agent socket, and the bucket that holds it to a rate."""

from __future__ import annotations

from dataclasses import dataclass

_ROUNDING = 1e-9
"""So much of a token may be missing: after exactly ``wait`` seconds there is one."""


@dataclass(frozen=True)
class LinkLimits:
    """Durations in seconds, sizes in bytes."""

    preamble_timeout_s: float = 5.0
    """From accept to a whole preamble, on a first control connection to its Hello."""
    welcome_timeout_s: float = 30.0
    """Longest that ``on_hello`` may take."""
    redial_timeout_s: float = 5.0
    """How long a lost control connection may stay away before the link counts as lost."""
    max_unauthenticated: int = 16
    max_idle_streams: int = 32
    max_waiting_clients: int = 256
    max_violations: int = 64
    accept_burst: int = 256
    accept_per_s: float = 100.0
    message_burst: int = 1000
    messages_per_s: float = 200.0
    max_message_bytes: int = 256 * 2**10
    refreshed_burst: int = 32
    """Credential files that an agent has changed; its agent server tells of each at most once a second."""
    refreshed_per_s: float = 8.0


class TokenBucket:
    """``burst`` tokens, refilled at ``rate`` a second. Pure: the time comes in, in seconds."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = burst
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Takes a token if there is one."""
        self._refill(now)
        if self._tokens + _ROUNDING < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def whole(self, now: float) -> int:
        """How many tokens there are."""
        self._refill(now)
        return int(self._tokens + _ROUNDING)

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 when there is one."""
        self._refill(now)
        return 0.0 if self._tokens + _ROUNDING >= 1.0 else (1.0 - self._tokens) / self._rate

    def configure(self, burst: float, rate: float, now: float) -> None:
        """Other limits from now on; what there is stays, as far as it fits."""
        self._refill(now)
        self._burst, self._rate = burst, rate
        self._tokens = min(self._tokens, burst)

    def reserve(self, now: float) -> float:
        """Takes a token, of the future if need be; returns the seconds to wait before using it."""
        self._refill(now)
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self._rate)

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
