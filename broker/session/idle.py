"""When a session that nobody asks for is paused, and when it is stopped. Pure: the caller brings the clock.

    ready ──pause_after──► paused ──keep──► stopped

Both times count from its last use. A session that is at work stays as it is; one with clients that say
nothing is paused at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf

from broker.config import IdleConfig


class Action(Enum):
    """What to do with it now."""

    STAY = "stay"
    PAUSE = "pause"
    STOP = "stop"


@dataclass(frozen=True)
class Facts:
    """What is known of a session that is up. Times are seconds of one clock that never jumps."""

    paused: bool
    at_work: bool
    """A turn, a request, a bind or a package install is under way."""
    clients: int
    used_at: float
    """When it was last asked for anything, or done with it; -inf: never."""
    keep_s: float
    """How long after that it is kept; see ``keep``."""
    kept_until: float = -inf
    """Somebody is expected until then."""
    roused_at: float = -inf
    """When it was last made ready for somebody who is expected."""


@dataclass(frozen=True)
class Look:
    """What to do now, and when to look again: None, when nothing changes by itself."""

    action: Action
    at: float | None = None


def keep(requests: Sequence[float], used_at: float, pattern_s: float | None, settings: IdleConfig) -> float:
    """Seconds to keep a session after its last use, at ``used_at``. ``requests``: when its turns began.

    ``pattern_s``: what its user's own pattern asks for, None where they have none.
    """
    recent = sum(used_at - settings.busy_window_s < at <= used_at for at in requests)
    if recent > settings.busy_requests:
        return settings.keep_s
    if pattern_s is None:
        return settings.fallback_keep_s
    return min(max(pattern_s, 0.0), settings.longest_keep_s)


def look(facts: Facts, settings: IdleConfig, now: float) -> Look:
    """Decides. One that is at work is looked at again when it no longer is."""
    if facts.at_work:
        return Look(Action.STAY)
    if facts.clients:
        return _attached(facts, settings, now)
    pause_at = max(facts.used_at, facts.roused_at) + settings.pause_after_s
    stop_at = max(facts.used_at + facts.keep_s, facts.kept_until)
    if now >= stop_at:
        return Look(Action.STOP)
    if facts.paused:
        return Look(Action.STAY, stop_at)
    if now >= pause_at:
        return Look(Action.PAUSE, stop_at)
    return Look(Action.STAY, min(pause_at, stop_at))


def _attached(facts: Facts, settings: IdleConfig, now: float) -> Look:
    """Its clients would lose their connection by a stop; of a pause they see nothing."""
    if facts.paused:
        return Look(Action.STAY)
    pause_at = facts.used_at + settings.attached_pause_after_s
    return Look(Action.PAUSE) if now >= pause_at else Look(Action.STAY, pause_at)
