"""What the gateway process counts; the broker asks for it and shows it as metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Stats:
    """``connections`` and ``idle_upstreams`` are how many there are now, the rest only grows. ``unread``: answers that
    usage could not be read out of."""

    connections: int = 0
    idle_upstreams: int = 0
    requests: int = 0
    refused: int = 0
    upstream_new: int = 0
    upstream_reused: int = 0
    upstream_prewarmed: int = 0
    upstream_waited: int = 0
    upstream_failed: int = 0
    upstream_cut: int = 0
    client_gone: int = 0
    retries: int = 0
    fallbacks: int = 0
    unread: int = 0
    tunnels: int = 0
    tunnels_denied: int = 0
    plain_denied: int = 0

    def view(self) -> dict[str, int]:
        """All of it, by name."""
        return asdict(self)


GAUGES = frozenset(("connections", "idle_upstreams"))
"""The fields of ``Stats`` that may fall."""
