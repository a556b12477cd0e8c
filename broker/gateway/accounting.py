"""Makes the record of a call, whichever way it went. Pure but for the wall clock."""

from __future__ import annotations

import time

from broker.gateway.caller import Caller, Endpoint
from broker.gateway.meter import Usage
from broker.gateway.records import Cached, Outcome, Record


def record(
    caller: Caller, provider: str, endpoint: Endpoint, usage: Usage, *, status: int, outcome: Outcome,
    cached: Cached = "", duration_s: float, queue_s: float = 0.0, ttft_s: float | None = None, attempts: int = 1,
    upstream: int = -1,
) -> Record:  # fmt: skip
    """A record that ends now; the log gives it its id."""
    return Record(
        at=time.time(), provider=provider, model=usage.model, user=caller.user, team=caller.team,
        workspace=caller.workspace, agent=caller.agent, endpoint=endpoint.value, status=status, outcome=outcome,
        cached=cached, input=usage.input, output=usage.output, cache_read=usage.cache_read,
        cache_write=usage.cache_write, reasoning=usage.reasoning, duration_s=duration_s, queue_s=queue_s,
        ttft_s=ttft_s, attempts=attempts, upstream=upstream, estimated=usage.estimated,
    )  # fmt: skip
