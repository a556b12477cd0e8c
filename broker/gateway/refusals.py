"""What a caller reads when a limit keeps a call from its provider: which limit, how long, what to do. Pure."""

from __future__ import annotations

import math

from broker.errors import Code, CortexError
from broker.gateway.turns import Block

_WHOSE = {
    "provider": "calls to it",
    "credential": "calls with one credential",
    "user": "calls of one user",
    "sandbox": "calls of one sandbox",
}
_MEASURES = {
    "concurrency": "{} at once",
    "interval_s": "one every {:g} s",
    "rpm": "{} a minute",
    "tpm": "{} tokens a minute",
}
MAX_SAID_S = 31 * 86_400


def seconds(wait_s: float) -> int:
    """For ``retry-after``: whole, at least 1."""
    return max(1, math.ceil(min(wait_s, MAX_SAID_S)))


def limited(name: str, block: Block, tokens: int, now: float, retry_s: float, waited_s: float = 0.0) -> CortexError:
    """A call that would wait too long, or has."""
    retry = seconds(retry_s)
    cause = f"waited {waited_s:g} s" if waited_s else None
    gauge = block.gauge
    if gauge is None:
        whole = block.scope == "provider"
        return CortexError(
            Code.GATEWAY_LIMITED,
            f"{name} has asked for a pause" if whole else f"{name} has refused its credential for now",
            hint=f"retry in {retry} s" if whole else f"retry in {retry} s, or give {name} one more credential",
            cause=cause,
            details={"retry_after_s": retry, "limit": f"{block.scope}.pause"},
        )
    field = gauge.in_the_way(now, tokens) or "concurrency"
    measure = _MEASURES[field].format(getattr(gauge.limit, field))
    return CortexError(
        Code.GATEWAY_LIMITED,
        f"{name}: {_WHOSE[block.scope]} are limited to {measure}",
        hint=f"retry in {retry} s; gateway.providers.{name}.limits.{block.scope}.{field} sets the limit",
        cause=cause,
        details={"retry_after_s": retry, "limit": f"{block.scope}.{field}"},
    )


def is_pause(error: CortexError) -> bool:
    """The provider asked for it; no limit of ours is in the way."""
    return str(error.details.get("limit", "")).endswith(".pause")


def crowded(name: str, waiting: int, retry_s: float) -> CortexError:
    """No more calls may wait."""
    retry = seconds(retry_s)
    return CortexError(
        Code.GATEWAY_LIMITED,
        f"{name}: {waiting} calls are waiting already",
        hint=f"retry in {retry} s; gateway.providers.{name}.limits.waiting sets how many may wait",
        details={"retry_after_s": retry, "limit": "waiting"},
    )


def spent(whose: str, left_s: float) -> CortexError:
    """``whose``: "user" or "team"."""
    retry = seconds(left_s)
    return CortexError(
        Code.BUDGET_SPENT,
        f"The model budget of this {whose} is used up",
        hint=f"it begins anew in {_span(retry)}; an operator can raise it",
        details={"retry_after_s": retry, "limit": f"budget.{whose}"},
    )


def _span(whole_s: int) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if whole_s >= 2 * size:
            return f"{math.ceil(whole_s / size)} {unit}"
    return f"{whole_s} s"
