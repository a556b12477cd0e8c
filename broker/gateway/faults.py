"""What can go wrong between the gateway and a provider, as it is told to the sandbox. Pure."""

from __future__ import annotations

from math import ceil

from broker.errors import Code, CortexError
from broker.gateway.heads import Headers

MAX_RETRY_AFTER_S = 3600.0
OVERLOAD = frozenset((503, 529))
"""Answers that say "not now" for everybody."""


def unreachable(name: str, error: CortexError) -> CortexError:
    """Where a provider lives is no business of the sandbox."""
    if error.code is Code.UPSTREAM_BUSY:
        return CortexError(error.code, f"All connections to {name} are in use", hint=error.hint)
    return CortexError(error.code, f"{name} cannot be reached", cause=error.cause, hint=error.hint)


def silent(name: str) -> CortexError:
    """Nothing has moved for too long."""
    return CortexError(
        Code.UPSTREAM_TIMEOUT,
        f"{name} has been silent for too long",
        hint="retry; gateway.idle_timeout_s sets how long is too long",
    )


def broken(name: str, why: str) -> CortexError:
    """The connection ended before the whole answer had come."""
    return CortexError(
        Code.UPSTREAM_FAILED,
        f"{name} broke the connection",
        cause=why,
        hint="retry; if it stays, check the provider's status",
    )


def no_server(name: str, retry_at: float | None, now: float) -> CortexError:
    """Every server has failed so often lately that it is not asked."""
    wait = max(1, ceil(retry_at - now)) if retry_at is not None else 1
    return CortexError(
        Code.UPSTREAM_BUSY,
        f"No server of {name} answers at present",
        hint=f"retry in {wait} s; an operator sees why in the gateway's log",
        details={"retry_after_s": wait},
    )


def retry_after(headers: Headers) -> float | None:
    """Seconds that an answer asks to wait: ``retry-after-ms``, or ``retry-after`` where it is a number
    (RFC 9110 section 10.2.3; a date is left to the client). None: not said."""
    found: float | None = None
    for name, value in headers:
        low = name.lower()
        if low not in (b"retry-after", b"retry-after-ms"):
            continue
        try:
            seconds = float(value)
        except ValueError:
            continue
        seconds = seconds / 1000 if low.endswith(b"-ms") else seconds
        if 0 <= seconds < float("inf"):
            found = min(seconds, MAX_RETRY_AFTER_S)
            if low.endswith(b"-ms"):
                return found
    return found
