"""One call to a model, as it is told to the broker and kept there. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Outcome = Literal["ok", "error", "cut", "gone"]
"""error: answered with one, by the provider or by the gateway; cut: the answer broke off; gone: the client did."""
Cached = Literal["", "hit", "coalesced", "batched"]
"""Where the answer came from, if not from a provider's call of its own."""


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``id`` is given by the log; tokens as ``broker.gateway.meter`` counts them, None: not said; ``estimated``: by
    the gateway, since the provider said nothing.

    ``at``: seconds since 1970 when the call ended; ``status`` is what the client saw, 0 when nothing; ``duration_s``
    from the request to the end, ``queue_s`` of it waiting for a limit, ``ttft_s`` until the first byte of the
    answer's body; ``attempts`` upstream calls made, ``upstream``: which server, -1 for none.
    """

    id: str = ""
    at: float
    provider: str
    model: str = ""
    user: str
    team: str = ""
    workspace: str = ""
    agent: str = ""
    endpoint: str
    status: int
    outcome: Outcome
    cached: Cached = ""
    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None
    estimated: bool = False
    duration_s: float
    queue_s: float = 0.0
    ttft_s: float | None = None
    attempts: int = 1
    upstream: int = -1


def to_wire(record: Record) -> dict[str, Any]:
    """JSON-safe."""
    found: dict[str, Any] = msgspec.to_builtins(record)
    return found


def from_wire(found: Mapping[str, Any]) -> Record:
    """Fields that are not known are passed over. Raises ``ValueError``."""
    return msgspec.convert(dict(found), Record)
